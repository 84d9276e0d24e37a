"""Steps that a rescorer won, tied and lost against the unrescored draft, and why ([A] 6.3).

What decides a step is one token. In a win it is the first one that the unrescored draft got wrong: all before it are
the output's, and the chosen draft has the right one there. If the wrong one only repeated the token before it, the win
is a `repair` of a repetition. In a loss it is the first one that the chosen draft got wrong, where the unrescored one
was right; if it repeats the token before it, the loss is a `regress`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lattices.statistics import equal_neighbours
from rescore.runs.records import ExampleRecord
from rescore.studies.analysis.positions import share
from rescore.studies.analysis.records import Outcomes
from rescore.studies.analysis.repetition import step_drafts, traced
from rescore.tracing import TracedExample


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
    joint = np.zeros((h, h), dtype=np.int64)
    np.add.at(joint, (plain - 1, chosen - 1), 1)
    won, lost = chosen > plain, chosen < plain
    pairs = [step_drafts(record, example) for record, example in traced(known, examples)]
    causes: tuple[int | None, ...] = (None,) * 4
    if len(pairs) == len(known):
        before, after = (np.concatenate(side) for side in zip(*pairs, strict=True))  # [steps, h]
        again_before, again_after = equal_neighbours(before), equal_neighbours(after)  # [steps, h-1]
        repeats_before, repeats_after = again_before.sum(axis=1), again_after.sum(axis=1)
        causes = (
            _deciding(again_before[won], plain[won]),
            _deciding(again_after[lost], chosen[lost]),
            int((repeats_after < repeats_before)[won].sum()),
            int((repeats_after > repeats_before)[lost].sum()),
        )
    wins, losses = int(won.sum()), int(lost.sum())
    shares = [None if n is None else share(n, of) for n, of in zip(causes, (wins, losses) * 2, strict=True)]
    return Outcomes(
        steps=len(chosen),
        won=wins,
        tied=len(chosen) - wins - losses,
        lost=losses,
        tokens_won=int((chosen - plain)[won].sum()),
        tokens_lost=int((plain - chosen)[lost].sum()),
        joint=tuple(tuple(row) for row in joint.tolist()),
        repairs=causes[0],
        regressions=causes[1],
        fewer_repeats=causes[2],
        more_repeats=causes[3],
        repair_share=shares[0],
        regress_share=shares[1],
        fewer_repeats_share=shares[2],
        more_repeats_share=shares[3],
    )


def _deciding(again: np.ndarray, accepted: np.ndarray) -> int:
    """How many drafts repeat, in the token behind their first `accepted` `[n]` ones, the token before it.

    `again` bool `[n, h-1]`: whether token i + 1 equals token i, i from 1, so entry accepted - 1 is the one.
    """
    return int(again[np.arange(len(again)), accepted - 1].sum())
