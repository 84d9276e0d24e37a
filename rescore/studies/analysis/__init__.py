"""Analyses of traces and finished runs: functions that return the records of `rescore.studies.analysis.records`.

`analyse_trace` and `analyse_run` collect all of them; the single ones are in the modules here. docs/analyses.md defines
every number. What reads a trace position by position ("every position") and what walks it as a decoder would ("decode")
are never mixed: the records say which is which.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lattices.errors import UnknownNameError
from rescore.checks import check_held_k
from rescore.groups import count_groups
from rescore.runs.evaluated import Evaluation
from rescore.runs.records import Result
from rescore.studies.analysis.calibration import DEFAULT_BINS, calibration_of
from rescore.studies.analysis.confidence import correlation, entropies_of
from rescore.studies.analysis.oracle_curves import oracle_curves
from rescore.studies.analysis.outcomes import outcomes_of
from rescore.studies.analysis.p_curve import curves_of_results, unrescored_by_p
from rescore.studies.analysis.positions import Positions
from rescore.studies.analysis.ranks import acceptance_of, ranks_of
from rescore.studies.analysis.records import (
    BeforeAfter,
    Contrast,
    Efficiency,
    EfficiencyTable,
    Entropies,
    HeadAcceptance,
    HeadCalibration,
    HmaxCorrelation,
    HmaxPoint,
    OracleCurves,
    Outcomes,
    PCurve,
    Ranks,
    RescorerAnalysis,
    RunAnalysis,
    TraceAnalysis,
    TraceRepetition,
    Wallclock,
)
from rescore.studies.analysis.repetition import before_after, trace_repetition
from rescore.studies.analysis.run_records import alpha_source, efficiency_in, wallclock_in
from rescore.studies.analysis.tables import contrast, efficiency_table
from rescore.tracing import Trace, TracedExample

__all__ = [
    "ANALYSES", "BeforeAfter", "Contrast", "Efficiency", "EfficiencyTable", "Entropies", "HeadAcceptance",
    "HeadCalibration", "HmaxCorrelation", "OracleCurves", "Outcomes", "PCurve", "Ranks", "RescorerAnalysis",
    "RunAnalysis", "TraceAnalysis", "TraceRepetition", "Wallclock", "analyse_run", "analyse_trace", "contrast",
    "correlate_h_max", "efficiency_table",
]  # fmt: skip

ANALYSES = ("repetition", "entropy", "oracle", "p_curve", "ranks", "acceptance", "calibration")
DEFAULT_K = 16  # entries per slot of p-best drafts ([A])


def analyse_trace(
    trace: Trace,
    *,
    name: str | None = None,
    only: Collection[str] = ANALYSES,
    k: int | None = None,
    bins: int = DEFAULT_BINS,
    seed: int = 0,
) -> TraceAnalysis:
    """The analyses `only` of a trace.

    `name`: what it is called in records (default: its task). `k`: entries per slot of the decodes with several drafts
    (default: 16, or all where there are fewer); `bins`: of the calibration; `seed`: of the bootstrap. Raises
    `UnknownNameError` for an analysis that there is not, `RescoreError` for a k beyond the trace's or no bins.
    """
    for asked in only:
        if asked not in ANALYSES:
            raise UnknownNameError("analysis", asked, ANALYSES)
    header = trace.header
    k = min(DEFAULT_K, header.k) if k is None else k
    check_held_k(header.k, k)
    positions = Positions.of(trace)
    return TraceAnalysis(
        name=name or str(header.settings.get("task", "trace")),
        examples=len(trace.examples),
        groups=count_groups([example.group for example in trace.examples]),
        positions=len(positions),
        h=header.h,
        k=k,
        entries=header.k,
        repetition=trace_repetition(positions) if "repetition" in only else None,
        entropy=entropies_of(positions, header.vocab_size) if "entropy" in only else None,
        oracle=oracle_curves(positions, seed=seed) if "oracle" in only else None,
        p_curve=unrescored_by_p(positions, k, seed=seed) if "p_curve" in only else None,
        ranks=ranks_of(positions) if "ranks" in only else None,
        acceptance=acceptance_of(positions) if "acceptance" in only else None,
        calibration=calibration_of(positions, bins) if "calibration" in only else None,
    )


def analyse_run(run: Evaluation, task: str, *, only: Collection[str] = ANALYSES, seed: int = 0) -> RunAnalysis:
    """The analyses of one task of a run; `only` chooses among those of its trace (none of them: ()).

    Raises `UnknownNameError` for a task that the run has not.
    """
    if task not in run.tasks:
        raise UnknownNameError("task of these results", task, run.tasks)
    results = [result for result in run.results if result.task == task]
    trace = run.trace(task)
    k = int(results[0].k)
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
    task, rescorer, p, h = result.task, result.rescorer, result.p, result.h
    records = run.records(task, rescorer, p)
    gain_ci95 = result.gain_ci95
    return RescorerAnalysis(
        rescorer=rescorer,
        p=p,
        k=result.k,
        alpha=result.alpha,
        alpha_source=alpha_source(run.config, result),
        efficiency=efficiency_in(result),
        oracle_block_efficiency=result.oracle_block_efficiency,
        gain=result.gain,
        gain_ci95=(gain_ci95[0], gain_ci95[1]) if gain_ci95 else None,
        repetition=before_after(records, examples),
        outcomes=outcomes_of(records, h, examples),
        wallclock=wallclock_in(result),
    )


def correlate_h_max(traces: Sequence[TraceAnalysis]) -> HmaxCorrelation:
    """h_max against the unrescored block efficiency over traces of several tasks (those with both).

    A task is one point, whatever number of traces it has, and all points have one h: of the h that the most tasks have,
    the largest. Of several traces of a task with this h, that of most positions counts (of equals the first).
    """
    by_h: dict[int, dict[str, tuple[int, HmaxPoint]]] = {}  # h -> task -> positions and point
    for trace in traces:
        if trace.entropy is None or trace.entropy.h_max is None or trace.oracle is None:
            continue
        if (efficiency := trace.oracle.unrescored.block_efficiency) is not None:
            tasks = by_h.setdefault(trace.h, {})
            if trace.name not in tasks or trace.positions > tasks[trace.name][0]:
                tasks[trace.name] = trace.positions, HmaxPoint(trace.name, trace.entropy.h_max, efficiency)
    if not by_h:
        return correlation(())
    h = max(by_h, key=lambda h: (len(by_h[h]), h))
    return correlation([point for _, point in by_h[h].values()], h)
