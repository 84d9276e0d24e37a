"""Analyses of folders, as the command makes them: traces or finished runs, several at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lattices.errors import RescoreError
from rescore.runs.evaluated import load_runs
from rescore.studies.analysis import ANALYSES, analyse_run, analyse_trace, contrast, correlate_h_max, efficiency_table
from rescore.studies.analysis.calibration import DEFAULT_BINS
from rescore.studies.analysis.records import (
    Contrast,
    EfficiencyTable,
    HmaxCorrelation,
    Record,
    RunAnalysis,
    TraceAnalysis,
)
from rescore.tracing import read_trace


@dataclass(frozen=True)
class Findings(Record):
    """What was found in the folders: `traces` or `runs` (a record for each task of each folder), h_max over their
    tasks, and of runs the `table` of all results and the `contrasts` that were asked for."""

    traces: tuple[TraceAnalysis, ...]
    runs: tuple[RunAnalysis, ...]
    h_max: HmaxCorrelation
    table: EfficiencyTable | None
    contrasts: tuple[Contrast, ...]


def analyse_folders(
    *,
    traces: Annotated[Sequence[Path], "Trace folder; several for h_max over tasks.", "--trace"] = (),
    results: Annotated[Sequence[Path], "Folder of rescore eval --out; several for one table of all."] = (),
    only: Annotated[
        Sequence[str],
        "Analyses of the trace: repetition, entropy, oracle, p_curve, ranks, acceptance, calibration. Default: all.",
    ] = (),
    against: Annotated[
        Sequence[tuple[str, str]],
        "With --results: two rescorers, like ngram:own=ngram; the gain of the first over the second, paired by "
        "example; several.",
        "<RESCORER=RESCORER>",
    ] = (),
    h: Annotated[int | None, "Use only the first h heads (block of h tokens)."] = None,
    k: Annotated[int | None, "With --trace: entries per head of p-best drafts. Default: 16."] = None,
    limit: Annotated[int | None, "With --trace: only the first N examples."] = None,
    bins: Annotated[int | None, "With --trace: bins of the calibration. Default: 15."] = None,
    seed: Annotated[int, "Seed of the bootstrap intervals."] = 0,
) -> Findings:
    """Analyses of trace folders (with the first h heads, `limit` examples) and of results folders.

    `against`: pairs of rescorers of the results, as typed, which are compared wherever both were run; h, `k`, `limit`
    and `bins` are for traces alone. Raises `RescoreError` for options that the folders have no use for, and as
    `read_trace`, `load_run`, `analyse_trace` and `efficiency_table` do.
    """
    if bool(traces) == bool(results):
        raise RescoreError("give trace folders (--trace) or folders of rescore eval (--results)")
    only = only or ANALYSES
    own = {"--h": h, "--k": k, "--limit": limit, "--bins": bins}
    if results and (given := [option for option, value in own.items() if value is not None]):
        raise RescoreError(f"{given[0]} is for traces; a run is analysed as it was decoded, so drop {given[0]}")
    for option, value, analysis in (("--k", k, "p_curve"), ("--bins", bins, "calibration")):
        if value is not None and analysis not in only:
            raise RescoreError(f"{option} is for the analysis {analysis}; add it to --only, or drop {option}")
    if h is not None and h < 2:
        raise RescoreError(f"--h {h}; a block has at least 2 heads, the base LM's own and one more (--h 2)")
    if against and not results:
        raise RescoreError("--against compares rescorers of a run; give its folder: --results")
    bins = DEFAULT_BINS if bins is None else bins
    of_traces = []
    for folder in traces:
        trace = read_trace(folder).first_heads(h)
        if limit is not None:
            trace = trace.first_examples(limit)
        name = str(trace.header.settings.get("task") or folder.resolve().name)
        of_traces.append(analyse_trace(trace, name=name, only=only, k=k, bins=bins, seed=seed))
    runs = [run for folder in results for run in load_runs(folder)]
    of_runs = [analyse_run(run, task, only=only, seed=seed) for run in runs for task in run.tasks]
    contrasts = [
        contrast(run, task, *pair, p=p, seed=seed)
        for run in runs
        for pair in against
        for task in run.tasks
        for p in sorted({r.p for r in run.results if r.task == task and r.rescorer == pair[0]} or {1})
    ]
    return Findings(
        traces=tuple(of_traces),
        runs=tuple(of_runs),
        h_max=correlate_h_max([*of_traces, *(run.trace for run in of_runs if run.trace)]),
        table=efficiency_table(runs) if runs else None,
        contrasts=tuple(contrasts),
    )
