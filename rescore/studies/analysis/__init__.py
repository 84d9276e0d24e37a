"""Analyses of traces and finished runs: records of numbers, which docs/analyses.md defines.

`traces` and `runs` collect all of one; `heads`, `drafts` and `curves` hold the single analyses, over the `positions` of
a trace; `collect` is what the command does with folders, and `text` makes tables. What reads a trace position by
position ("every position") and what walks it as a decoder would ("decode") are never mixed: the records say which.
"""

from rescore.studies.analysis.collect import Findings, analyse
from rescore.studies.analysis.curves import PCurve
from rescore.studies.analysis.drafts import Outcomes
from rescore.studies.analysis.positions import Efficiency
from rescore.studies.analysis.runs import RescorerAnalysis, RunAnalysis, analyse_run, contrast, efficiency_table
from rescore.studies.analysis.traces import ANALYSES, HmaxCorrelation, TraceAnalysis, analyse_trace, correlate_h_max

__all__ = [
    "ANALYSES", "Efficiency", "Findings", "HmaxCorrelation", "Outcomes", "PCurve", "RescorerAnalysis", "RunAnalysis",
    "TraceAnalysis", "analyse", "analyse_run", "analyse_trace", "contrast", "correlate_h_max", "efficiency_table",
]  # fmt: skip
