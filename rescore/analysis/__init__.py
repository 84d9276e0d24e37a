"""Analyses of traces and finished runs: functions that return the records of `rescore.analysis.records`.

`analyse_trace` and `analyse_run` collect all of them; the single ones are in the modules here. docs/analyses.md defines
every number. What reads a trace position by position ("every position") and what walks it as a decoder would ("decode")
are never mixed: the records say which is which.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rescore.analysis.records import (
    BeforeAfter,
    Contrast,
    Efficiency,
    EfficiencyTable,
    Entropies,
    HeadAcceptance,
    HeadCalibration,
    HmaxCorrelation,
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
from rescore.runs import FinishedRun
from rescore.tracing import Trace

__all__ = [
    "ANALYSES", "BeforeAfter", "Contrast", "Efficiency", "EfficiencyTable", "Entropies", "HeadAcceptance",
    "HeadCalibration", "HmaxCorrelation", "OracleCurves", "Outcomes", "PCurve", "Ranks", "RescorerAnalysis",
    "RunAnalysis", "TraceAnalysis", "TraceRepetition", "Wallclock", "analyse_run", "analyse_trace", "contrast",
    "correlate_h_max", "efficiency_table",
]  # fmt: skip

ANALYSES = ("repetition", "entropy", "oracle", "p_curve", "ranks", "acceptance", "calibration")


def analyse_trace(
    trace: Trace,
    *,
    name: str | None = None,
    only: Collection[str] = ANALYSES,
    k: int | None = None,
    bins: int = 15,
    seed: int = 0,
) -> TraceAnalysis:
    """The analyses `only` of a trace.

    `name`: what it is called in records (default: its task). `k`: entries per slot of the decodes with several drafts
    (default: 16, or all where there are fewer); `bins`: of the calibration; `seed`: of the bootstrap. Raises
    `UnknownNameError` for an analysis that there is not, `RescoreError` for a k beyond the trace's or no bins.
    """
    raise NotImplementedError


def analyse_run(run: FinishedRun, task: str, *, only: Collection[str] = ANALYSES, seed: int = 0) -> RunAnalysis:
    """The analyses of one task of a run; `only` chooses among those of its trace (none of them: ()).

    Raises `UnknownNameError` for a task that the run has not.
    """
    raise NotImplementedError


def correlate_h_max(traces: Sequence[TraceAnalysis]) -> HmaxCorrelation:
    """h_max against the unrescored block efficiency over traces of several tasks (those with both)."""
    raise NotImplementedError


def efficiency_table(runs: Sequence[FinishedRun]) -> EfficiencyTable:
    """Rescorers x tasks of all results of the runs."""
    raise NotImplementedError


def contrast(run: FinishedRun, task: str, rescorer: str, against: str, *, p: int = 1, seed: int = 0) -> Contrast:
    """One rescorer against another on the examples of one run, names as typed."""
    raise NotImplementedError
