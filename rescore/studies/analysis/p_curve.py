"""Block efficiency by number of drafts, p (Kim et al. 2024: p-best drafts from one top-k lattice)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lattices.search import p_best
from rescore.runs.records import Result
from rescore.studies.analysis.positions import Positions, leading
from rescore.studies.analysis.records import PCurve
from rescore.studies.analysis.run_records import efficiency_in

PS = (1, 2, 4, 8, 16)


def unrescored_by_p(positions: Positions, k: int, ps: Sequence[int] = PS, *, seed: int = 0) -> PCurve:
    """The p best drafts of the heads alone ("0-gram") for each of `ps`, by replay.

    Raises `RescoreError` for a k outside 1 to the trace's K and for p < 1.
    """
    lattice = positions.lattice.top(k)
    drafts = p_best(lattice, max(ps)).drafts  # [n, p', h]; the first q of the p best are the q best
    lengths = np.stack([leading(drafts[:, i] == positions.targets) for i in range(drafts.shape[1])], axis=1)  # [n, p']
    points = [positions.efficiency(lengths[:, :p].max(axis=1, initial=1), seed=seed) for p in ps]
    return PCurve("none", k, tuple(ps), (None,) * len(ps), tuple(points))


def curves_of_results(results: Sequence[Result]) -> tuple[PCurve, ...]:
    """Block efficiency by p of every rescorer that the results (of one task) have with several p."""
    by_rescorer: dict[str, list[Result]] = {}
    for result in results:
        by_rescorer.setdefault(result.rescorer, []).append(result)
    curves = []
    for rescorer, found in by_rescorer.items():
        if len(found) < 2:
            continue
        found = sorted(found, key=lambda r: int(r.p))
        curves.append(
            PCurve(
                rescorer, found[0].k, tuple(r.p for r in found), tuple(r.alpha for r in found),
                tuple(efficiency_in(r) for r in found),
            )
        )  # fmt: skip
    return tuple(curves)
