"""Rescorers x tasks over one or several finished runs, and one rescorer against another (docs/analyses.md)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lattices.errors import RescoreError, UnknownNameError
from rescore.accounting import account, paired_difference
from rescore.runs.evaluated import Evaluation
from rescore.studies.analysis.records import Contrast, EfficiencyTable, TableCell, TableRow
from rescore.studies.analysis.run_records import alpha_source


def efficiency_table(runs: Sequence[Evaluation]) -> EfficiencyTable:
    """Rescorers x tasks of all results of the runs, in their order.

    Runs of the same tasks with other h or k make rows of their own. Raises `RescoreError` where two runs have a result
    for the same place.
    """
    tasks = tuple(dict.fromkeys(task for run in runs for task in run.tasks))
    rows: dict[tuple[str, int, int, int], dict[str, TableCell]] = {}
    for run in runs:
        for result in run.results:
            key = (result.rescorer, result.p, result.h, result.k)
            cells = rows.setdefault(key, {})
            if result.task in cells:
                raise RescoreError(
                    f"{result.rescorer} on {result.task} with p = {key[1]}, h = {key[2]}, k = {key[3]} is in two "
                    f"of the folders (the second is {run.folder}); give one of them"
                )
            cells[result.task] = TableCell(
                task=result.task,
                block_efficiency=result.block_efficiency,
                block_efficiency_ci95=_pair(result.block_efficiency_ci95),
                gain=result.gain,
                gain_ci95=_pair(result.gain_ci95),
                alpha=result.alpha,
                alpha_source=alpha_source(run.config, result),
                n=result.n,
                groups=result.groups,
            )
    return EfficiencyTable(
        tasks,
        tuple(TableRow(*key, tuple(cells.get(t) for t in tasks), _mean_gain(cells)) for key, cells in rows.items()),
    )


def contrast(run: Evaluation, task: str, rescorer: str, against: str, *, p: int = 1, seed: int = 0) -> Contrast:
    """One rescorer against another (in-domain against general) on the examples that both finished, names as typed.

    Raises `UnknownNameError` for one that the run has not on this task at this p.
    """
    there = [r.rescorer for r in run.results if (r.task, r.p) == (task, p)]
    for name in (rescorer, against):
        if name not in there:
            raise UnknownNameError(f"rescorer of these results on {task} at p = {p}", name, there)
    sides = [{r.id: r.accepted for r in run.records(task, name, p)} for name in (rescorer, against)]
    both = [name for name in sides[0] if name in sides[1]]
    if not both:
        raise RescoreError(f"{rescorer} and {against} have no example of {task} in common; evaluate both on the same")
    ours, theirs = ([side[name] for name in both] for side in sides)
    h = run.records(task, rescorer, p)[0].h
    of_id = {r.id: r.group for r in run.records(task, rescorer, p)}
    gain = paired_difference(theirs, ours, groups=[of_id[name] for name in both], seed=seed)
    return Contrast(
        task=task,
        p=p,
        rescorer=rescorer,
        against=against,
        n=len(both),
        groups=gain.groups,
        block_efficiency=account(ours, h).block_efficiency,
        against_block_efficiency=account(theirs, h).block_efficiency,
        gain=gain.gain,
        gain_ci95=gain.gain_ci95,
    )


def _pair(interval: Sequence[float] | None) -> tuple[float, float] | None:
    return (interval[0], interval[1]) if interval else None


def _mean_gain(cells: dict[str, TableCell]) -> float | None:
    gains = [cell.gain for cell in cells.values() if cell.gain is not None]
    return float(np.mean(gains)) if gains else None
