"""Analyses of finished runs: every rescorer of a task with its outcomes and times, rescorers x tasks over several runs,
and one rescorer against another (docs/analyses.md)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from lattices.errors import RescoreError, UnknownNameError
from rescore.runs.evaluated import Evaluation
from rescore.runs.records import Result, RunConfig, SourceShare
from rescore.studies.analysis.curves import PCurve
from rescore.studies.analysis.drafts import BeforeAfter, Outcomes, before_after, outcomes_of
from rescore.studies.analysis.positions import Efficiency
from rescore.studies.analysis.traces import ANALYSES, TraceAnalysis, analyse_trace
from rescore.studies.comparison import Comparison, compared_row
from rescore.studies.records import Record, record_of
from rescore.tracing import TracedExample


@dataclass(frozen=True)
class Wallclock(Record):
    """Times of a live run; fields as in `rescore.runs.records.Latency`."""

    autoregressive_ms: float
    verify_ms: float
    draft_ms: float
    rescore_ms: float
    rescore_p50_ms: float
    rescore_p95_ms: float
    glue_share: float
    speedup: float


@dataclass(frozen=True)
class RescorerAnalysis(Record):
    """One rescorer at one p on one task of a run; fields that are not listed as in `rescore.runs.records.Result`.

    alpha_source: where alpha came from (`option`, `tuned`, `default`; None: the rescorer has no weight).
    repetition: needs the trace and the drafts; outcomes: an output that is the trace's; wallclock: live mode.
    """

    rescorer: str
    p: int
    k: int
    alpha: float | None
    alpha_source: str | None
    efficiency: Efficiency
    oracle_block_efficiency: float | None
    gain: float | None
    gain_ci95: tuple[float, float] | None
    predicted_speedup: float | None
    repetition: BeforeAfter | None
    outcomes: Outcomes | None
    wallclock: Wallclock | None
    quality: dict[str, float]
    autoregressive_quality: dict[str, float] | None
    cut_at_limit: float | None
    sources: tuple[SourceShare, ...]


@dataclass(frozen=True)
class RunAnalysis(Record):
    """All analyses of one task of a finished run.

    rescorers: every rescorer and p in the order of the results; by_p: block efficiency of those run with several p.
    trace: the analyses of the trace (None: it is gone).
    """

    task: str
    h: int
    k: int
    examples: int
    groups: int
    mode: str
    rescorers: tuple[RescorerAnalysis, ...]
    by_p: tuple[PCurve, ...]
    trace: TraceAnalysis | None


@dataclass(frozen=True)
class TableCell(Record):
    """One rescorer on one task; fields as in `RescorerAnalysis`, `n` examples of so many `groups`."""

    task: str
    block_efficiency: float
    block_efficiency_ci95: tuple[float, float] | None
    gain: float | None
    gain_ci95: tuple[float, float] | None
    alpha: float | None
    alpha_source: str | None
    n: int
    groups: int


@dataclass(frozen=True)
class TableRow(Record):
    """A rescorer at one p, h and k; `cells[i]` for `EfficiencyTable.tasks[i]`, None where it was not run. `mean_gain`:
    mean of the gains that there are."""

    rescorer: str
    p: int
    h: int
    k: int
    cells: tuple[TableCell | None, ...]
    mean_gain: float | None


@dataclass(frozen=True)
class EfficiencyTable(Record):
    """Rescorers x tasks over one or several runs (of other h, other tasks)."""

    tasks: tuple[str, ...]
    rows: tuple[TableRow, ...]


@dataclass(frozen=True)
class Contrast(Record):
    """Two rescorers of one run on one task, paired by example (`n` of so many `groups`): `gain` of `rescorer` over
    `against` (0.01 = 1 % more tokens a step) with its paired 95 % interval."""

    task: str
    p: int
    rescorer: str
    against: str
    n: int
    groups: int
    block_efficiency: float
    against_block_efficiency: float
    gain: float
    gain_ci95: tuple[float, float] | None


def analyse_run(run: Evaluation, task: str, *, only: Collection[str] = ANALYSES, seed: int = 0) -> RunAnalysis:
    """The analyses of one task of a run; `only` chooses among those of its trace (none of them: ()).

    Raises `UnknownNameError` for a task that the run has not.
    """
    if task not in run.tasks:
        raise UnknownNameError("task of these results", task, run.tasks)
    results = [result for result in run.results if result.task == task]
    trace = run.trace(task)
    k = results[0].k
    return RunAnalysis(
        task=task,
        h=results[0].h,
        k=k,
        examples=max(result.n for result in results),
        groups=max(result.groups for result in results),
        mode=run.config.mode,
        rescorers=tuple(_rescorer(run, result, trace.examples if trace else ()) for result in results),
        by_p=curves_of_results(results),
        trace=analyse_trace(trace, name=task, only=only, k=k, seed=seed) if trace else None,
    )


def _rescorer(run: Evaluation, result: Result, examples: Sequence[TracedExample]) -> RescorerAnalysis:
    records = run.records(result.task, result.rescorer, result.p)
    return record_of(
        RescorerAnalysis,
        result,
        alpha_source=alpha_source(run.config, result),
        efficiency=record_of(Efficiency, result),
        repetition=None if result.oracle_block_efficiency is None else before_after(records, examples),
        outcomes=outcomes_of(records, result.h, examples),
        wallclock=record_of(Wallclock, result.latency) if result.latency else None,
        sources=tuple(result.sources),
    )


def alpha_source(config: RunConfig, result: Result) -> str | None:
    """Where the weight of a rescorer came from (`option`, `tuned`, `default`); None if it has none."""
    alpha = config.alpha(result.task, result.rescorer, result.p, result.k)
    return alpha.source if alpha else None


def curves_of_results(results: Sequence[Result]) -> tuple[PCurve, ...]:
    """Block efficiency by p of every rescorer that the results (of one task) have with several p."""
    by_rescorer: dict[str, list[Result]] = {}
    for result in results:
        by_rescorer.setdefault(result.rescorer, []).append(result)
    curves = []
    for rescorer, of_it in by_rescorer.items():
        if len(of_it) > 1:
            of_it.sort(key=lambda r: r.p)
            ps, alphas = tuple(r.p for r in of_it), tuple(r.alpha for r in of_it)
            curves.append(PCurve(rescorer, of_it[0].k, ps, alphas, tuple(record_of(Efficiency, r) for r in of_it)))
    return tuple(curves)


def efficiency_table(runs: Sequence[Evaluation]) -> EfficiencyTable:
    """Rescorers x tasks of all results of the runs, in their order.

    Runs of the same tasks with other h or k make rows of their own. Raises `RescoreError` where two runs have a result
    for the same place.
    """
    tasks = tuple(dict.fromkeys(task for run in runs for task in run.tasks))
    rows: dict[tuple[str, int, int, int], dict[str, TableCell]] = {}
    for run in runs:
        for r in run.results:
            cells = rows.setdefault((r.rescorer, r.p, r.h, r.k), {})
            if r.task in cells:
                raise RescoreError(
                    f"{r.rescorer} on {r.task} with p = {r.p}, h = {r.h}, k = {r.k} is in two of the folders (the "
                    f"second is {run.folder}); give one of them"
                )
            cells[r.task] = record_of(TableCell, r, alpha_source=alpha_source(run.config, r))
    made = []
    for key, cells in rows.items():
        gains = [cell.gain for cell in cells.values() if cell.gain is not None]
        made.append(TableRow(*key, tuple(map(cells.get, tasks)), float(np.mean(gains)) if gains else None))
    return EfficiencyTable(tasks, tuple(made))


def contrast(run: Evaluation, task: str, rescorer: str, against: str, *, p: int = 1, seed: int = 0) -> Contrast:
    """One rescorer against another (in-domain against general) on the examples that both finished, by label.

    Raises `UnknownNameError` for one that the run has not on this task at this p.
    """
    results = {r.rescorer: r for r in run.results if (r.task, r.p) == (task, p)}
    for name in (rescorer, against):
        if name not in results:
            raise UnknownNameError(f"rescorer of these results on {task} at p = {p}", name, results)
    row = compared_row((run, results[against]), (run, results[rescorer]), Comparison("", ""), seed)
    if row is None:
        raise RescoreError(f"{rescorer} and {against} have no example of {task} in common; evaluate both on the same")
    return record_of(
        Contrast, row, p=p, rescorer=rescorer, against=against, block_efficiency=row.b.block_efficiency,
        against_block_efficiency=row.a.block_efficiency, gain=row.difference.gain, gain_ci95=row.difference.gain_ci95,
    )  # fmt: skip
