"""Consecutive repetition in drafts ([A] 5.1): independent heads like to propose the same token twice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lattices.statistics import decode_starts, equal_neighbours, longest_runs
from rescore.runs.records import ExampleRecord
from rescore.studies.analysis.positions import Positions, share
from rescore.studies.analysis.records import BeforeAfter, Repetition, TraceRepetition
from rescore.tracing import TracedExample


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
    starts = decode_starts(positions.accepted(positions.best), positions.lengths)
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
    pairs = [step_drafts(record, example) for record, example in traced(records, examples)]
    if not pairs:
        return None
    before, after = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return BeforeAfter(len(pairs), repetition_of(before), repetition_of(after))


def traced(
    records: Sequence[ExampleRecord], examples: Sequence[TracedExample]
) -> list[tuple[ExampleRecord, TracedExample]]:
    """The records that have drafts, with their examples in the trace where the output is the same."""
    by_id = {example.id: example for example in examples}
    found = [(record, by_id[record.id]) for record in records if record.id in by_id and record.drafts]
    return [(record, example) for record, example in found if record.output_ids == example.output_ids.tolist()]


def step_drafts(record: ExampleRecord, example: TracedExample) -> tuple[np.ndarray, np.ndarray]:
    """The unrescored and the winning draft of every step, int32 `[steps, h]` each.

    Live decoding cuts drafts at the limit of tokens; both then end with -1 from there on.
    """
    accepted = np.asarray(record.accepted, dtype=np.int64)
    starts = np.cumsum(accepted) - accepted
    before = example.lattice.token_ids[starts, :, 0].copy()
    after = np.full_like(before, -1)
    for row, draft in enumerate(record.drafts):
        after[row, : len(draft)] = draft
    before[after < 0] = -1
    return before, after
