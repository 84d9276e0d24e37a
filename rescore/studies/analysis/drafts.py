"""Drafts step by step: how they repeat themselves ([A] 5.1), which steps a rescorer wins or loses, and why ([A] 6.3).

What decides a step is one token. In a win it is the first one that the unrescored draft got wrong: all before it are
the output's, and the chosen draft has the right one there. If the wrong one only repeated the token before it, the win
is a `repair` of a repetition. In a loss it is the first one that the chosen draft got wrong, where the unrescored one
was right; if it repeats the token before it, the loss is a `regress`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lattices.statistics import decode_starts, equal_neighbours, longest_runs
from rescore.runs.records import ExampleRecord
from rescore.studies.analysis.positions import Positions, share
from rescore.studies.records import Record
from rescore.tracing import TracedExample


@dataclass(frozen=True)
class Repetition(Record):
    """Consecutive repetition in `drafts` drafts of h tokens: longer ones are read so far, cut and shorter ones do not
    count.

    share: of neighbouring pairs of tokens that are equal; by_pair[i-1]: of tokens i and i + 1, i = 1..h-1.
    repeating: share of drafts with at least one such pair.
    """

    drafts: int
    share: float | None
    repeating: float | None
    mean_longest_run: float | None
    by_pair: tuple[float | None, ...]


@dataclass(frozen=True)
class TraceRepetition(Record):
    """Repetition of the unrescored drafts at the steps of the unrescored decode and at all positions, and of the output
    itself in windows of h tokens, below which no rescorer should fall."""

    decode: Repetition
    every_position: Repetition
    output: Repetition


@dataclass(frozen=True)
class BeforeAfter(Record):
    """Repetition at the steps of one rescored decode, in the `examples` that both are known of: `before` in the
    unrescored drafts there, `after` in the drafts that won."""

    examples: int
    before: Repetition
    after: Repetition


@dataclass(frozen=True)
class Outcomes(Record):
    """The steps of one rescored decode against the unrescored draft at each step's position.

    won, tied, lost: steps that accepted more, as many, fewer tokens; tokens_won, tokens_lost: by how many, summed.
    joint[i-1][j-1]: steps where the unrescored draft would have accepted i tokens and the chosen one j.
    repairs ... more_repeats: causes, and their shares of `won` and `lost`; None where drafts or trace are unknown.
    """

    steps: int
    won: int
    tied: int
    lost: int
    tokens_won: int
    tokens_lost: int
    joint: tuple[tuple[int, ...], ...]
    repairs: int | None
    regressions: int | None
    fewer_repeats: int | None
    more_repeats: int | None
    repair_share: float | None
    regress_share: float | None
    fewer_repeats_share: float | None
    more_repeats_share: float | None


def repetition_of(drafts: np.ndarray) -> Repetition:
    """Repetition in drafts int `[n, h]`. Those that end with -1 are cut, by the end of an output or the limit of
    tokens, and do not count: a short one has less room to repeat anything."""
    drafts = drafts[(drafts >= 0).all(axis=1)]
    same = equal_neighbours(drafts)  # [n, h-1]
    return Repetition(
        drafts=len(drafts),
        share=share(same.sum(), same.size),
        repeating=share(same.any(axis=1).sum(), len(drafts)),
        mean_longest_run=share(longest_runs(drafts).sum(), len(drafts)),
        by_pair=tuple(share(equal, len(drafts)) for equal in same.sum(axis=0)),
    )


def trace_repetition(positions: Positions) -> TraceRepetition:
    """Repetition in the unrescored drafts of a trace, and in the output itself."""
    starts = decode_starts(positions.unrescored, positions.lengths)
    return TraceRepetition(
        decode=repetition_of(positions.best[starts]),
        every_position=repetition_of(positions.best),
        output=repetition_of(positions.targets),
    )


def before_after(records: Sequence[ExampleRecord], examples: Sequence[TracedExample]) -> BeforeAfter | None:
    """Repetition before and after rescoring, at the steps of a rescored decode.

    `records` of one rescorer and p; `examples` of the trace. Records without drafts, and those whose output is not the
    trace's (live decoding in half precision), are left out; None if none is left.
    """
    pairs = _step_drafts(records, examples)
    if not pairs:
        return None
    before, after = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return BeforeAfter(len(pairs), repetition_of(before), repetition_of(after))


def outcomes_of(records: Sequence[ExampleRecord], h: int, examples: Sequence[TracedExample] = ()) -> Outcomes | None:
    """Outcomes of the steps of one rescorer at one p.

    Causes need the trace's `examples` and the drafts of every record that has outcomes; they are None otherwise.
    Records without `unrescored_accepted` (live outputs that are not the trace's) are left out; None if none is left.
    """
    known = [record for record in records if record.unrescored_accepted is not None]
    if not known:
        return None
    chosen = np.concatenate([np.asarray(r.accepted, dtype=np.int64) for r in known])  # [steps]
    plain = np.concatenate([np.asarray(r.unrescored_accepted, dtype=np.int64) for r in known])
    joint = np.zeros((h, max(h, int(chosen.max()))), dtype=np.int64)  # a draft may be longer than the heads' blocks
    np.add.at(joint, (plain - 1, chosen - 1), 1)
    won, lost = chosen > plain, chosen < plain
    wins, losses = int(won.sum()), int(lost.sum())
    causes: list[int | None] = [None] * 4
    pairs = _step_drafts(known, examples)
    if len(pairs) == len(known):
        before, after = (equal_neighbours(np.concatenate(side)) for side in zip(*pairs, strict=True))  # [steps, h-1]
        fewer = after.sum(axis=1) - before.sum(axis=1)
        causes = [
            _deciding(before[won], plain[won]),
            _deciding(after[lost], chosen[lost]),
            int((fewer < 0)[won].sum()),
            int((fewer > 0)[lost].sum()),
        ]
    shares = [None if n is None else share(n, of) for n, of in zip(causes, (wins, losses) * 2, strict=True)]
    return Outcomes(
        len(chosen),
        wins,
        len(chosen) - wins - losses,
        losses,
        int((chosen - plain)[won].sum()),
        int((plain - chosen)[lost].sum()),
        tuple(tuple(row) for row in joint.tolist()),
        *causes,
        *shares,
    )


def _deciding(again: np.ndarray, accepted: np.ndarray) -> int:
    """How many drafts repeat, in the token after their first `accepted` `[n]` ones, the token before it.

    `again` bool `[n, h-1]`: whether token i + 1 equals token i, i from 1, so entry accepted - 1 is the one.
    """
    inside = accepted <= again.shape[1]  # a whole block may be accepted, and what follows it decide
    return int(again[np.flatnonzero(inside), accepted[inside] - 1].sum())


def _step_drafts(
    records: Sequence[ExampleRecord], examples: Sequence[TracedExample]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The unrescored and the winning draft of every step, int32 `[steps, h]` each, of every record that has drafts and
    the output of its example in the trace.

    Live decoding cuts drafts at the limit of tokens; both then end with -1 from there on.
    """
    by_id = {example.id: example for example in examples}
    pairs = []
    for record in records:
        example = by_id.get(record.id)
        if example is None or not record.drafts or record.output_ids != example.output_ids.tolist():
            continue
        accepted = np.asarray(record.accepted, dtype=np.int64)
        starts = np.cumsum(accepted) - accepted
        before = example.lattice.token_ids[starts, :, 0].copy()
        after = np.full_like(before, -1)
        for row, draft in enumerate(record.drafts):
            after[row, : len(draft)] = draft[: after.shape[1]]  # what is beyond the heads has nothing before it
        before[after < 0] = -1
        pairs.append((before, after))
    return pairs
