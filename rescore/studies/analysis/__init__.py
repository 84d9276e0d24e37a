"""Analyses of traces and finished runs: records of numbers, which docs/analyses.md defines.

`traces` and `runs` collect all of one; `heads`, `drafts` and `curves` hold the single analyses, over the `positions` of
a trace; `collect` is what the command does with folders, and `text` makes tables. What reads a trace position by
position ("every position") and what walks it as a decoder would ("decode") are never mixed: the records say which.

A new analysis of a trace is a function of `positions` with an entry in `traces.ANALYSES`, a field of `TraceAnalysis`
and a table in `text`.
"""

from rescore.studies.analysis.collect import analyse
from rescore.studies.analysis.positions import Efficiency
from rescore.studies.analysis.runs import RescorerAnalysis, RunAnalysis, analyse_run
from rescore.studies.analysis.traces import HmaxCorrelation, TraceAnalysis, correlate_h_max

__all__ = [
    "Efficiency", "HmaxCorrelation", "RescorerAnalysis", "RunAnalysis", "TraceAnalysis", "analyse", "analyse_run",
    "correlate_h_max",
]  # fmt: skip
