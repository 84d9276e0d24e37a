"""Analyses of folders, as the command makes them: traces or finished runs, several at a time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from lattices.errors import RescoreError
from rescore.runs.finished import load_runs
from rescore.studies.analysis.heads import DEFAULT_BINS
from rescore.studies.analysis.runs import (
    Contrast,
    EfficiencyTable,
    RunAnalysis,
    analyse_run,
    contrast,
    efficiency_table,
)
from rescore.studies.analysis.traces import ANALYSES, HmaxCorrelation, TraceAnalysis, analyse_trace, correlate_h_max
from rescore.studies.records import Record
from rescore.tracing import load_trace


@dataclass(frozen=True)
class Findings(Record):
    """What the folders hold.

    traces, runs: a record for each task of each folder; h_max: over their tasks.
    table: all results of runs; contrasts: those that were asked for.
    """

    traces: tuple[TraceAnalysis, ...]
    runs: tuple[RunAnalysis, ...]
    h_max: HmaxCorrelation
    table: EfficiencyTable | None
    contrasts: tuple[Contrast, ...]


def analyse_folders(
    *,
    traces: Sequence[Path] = (),
    results: Sequence[Path] = (),
    only: Collection[str] = ANALYSES,
    against: Sequence[tuple[str, str]] = (),
    h: int | None = None,
    k: int | None = None,
    limit: int | None = None,
    bins: int | None = None,
    seed: int = 0,
) -> Findings:
    """Analyses of trace folders (with the first h heads, `limit` examples) and of results folders.

    `against`: pairs of rescorers of the results, as typed, which are compared wherever both were run; h, `k`, `limit`
    and `bins` are for traces alone. Raises `RescoreError` for options that the folders have no use for, and as
    `load_trace`, `load_run`, `analyse_trace` and `efficiency_table` do.
    """
    own = {"--h": h, "--k": k, "--limit": limit, "--bins": bins}
    if results and (given := [option for option, value in own.items() if value is not None]):
        raise RescoreError(f"{given[0]} is for traces; a run is analysed as it was decoded, so drop {given[0]}")
    if h is not None and h < 2:
        raise RescoreError(f"--h {h}; a block has at least 2 heads, the base LM's own and one more (--h 2)")
    if against and not results:
        raise RescoreError("--against compares rescorers of a run; give its folder: --results")
    bins = DEFAULT_BINS if bins is None else bins
    of_traces = []
    for folder in traces:
        trace = load_trace(folder).first_heads(h)
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
        for p in sorted({p for of, name, p in run.records if of == task and name == pair[0]} or {1})
    ]
    return Findings(
        traces=tuple(of_traces),
        runs=tuple(of_runs),
        h_max=correlate_h_max([*of_traces, *(run.trace for run in of_runs if run.trace)]),
        table=efficiency_table(runs) if runs else None,
        contrasts=tuple(contrasts),
    )
