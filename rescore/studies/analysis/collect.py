"""Analyses of traces and evaluations, several at a time, as objects or in folders."""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lattices.errors import RescoreError
from rescore.runs.evaluated import Evaluation
from rescore.runs.recording import Recording
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
from rescore.suites.files import load_runs
from rescore.table import Table, joined
from rescore.tracing import Trace, read_trace


@dataclass(frozen=True)
class Findings(Record):
    """What the traces and the evaluations say.

    traces, runs: a record for each trace, and for each task of each run; h_max: over their tasks.
    table: all results of runs; contrasts: those that were asked for.
    """

    traces: tuple[TraceAnalysis, ...]
    runs: tuple[RunAnalysis, ...]
    h_max: HmaxCorrelation
    table: EfficiencyTable | None
    contrasts: tuple[Contrast, ...]

    def tables(self) -> list[Table]:
        """A table for each analysis, with a line that says how to read it."""
        from rescore.studies.analysis.text import findings_tables

        return findings_tables(self)

    def __str__(self) -> str:
        return joined(self.tables())


def analyse(
    *subjects: Trace | Recording | Evaluation,
    only: Collection[str] = ANALYSES,
    against: Sequence[tuple[str, str]] = (),
    k: int | None = None,
    bins: int = DEFAULT_BINS,
    seed: int = 0,
) -> Findings:
    """The analyses of traces, recordings and evaluations; options as in `analyse_trace` and `analyse_folders`."""
    traces, runs = [], []
    for subject in subjects:
        if isinstance(subject, Evaluation):
            runs += subject.at_each_k()
            continue
        name = subject.name if isinstance(subject, Recording) else None
        trace = subject.trace() if isinstance(subject, Recording) else subject
        traces.append(analyse_trace(trace, name=name, only=only, k=k, bins=bins, seed=seed))
    return _findings(traces, runs, only, against, seed)


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
    """Analyses of trace folders or of results folders.

    Raises `RescoreError` for options that the folders have no use for, and as `read_trace`, `load_run`, `analyse_trace`
    and `efficiency_table` do.
    """
    if traces and results:
        raise RescoreError("traces and results are analysed apart; drop --trace or --results")
    if not traces and not results:
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
        name = trace.header.task or folder.resolve().name
        of_traces.append(analyse_trace(trace, name=name, only=only, k=k, bins=bins, seed=seed))
    return _findings(of_traces, [run for folder in results for run in load_runs(folder)], only, against, seed)


def _findings(
    traces: Sequence[TraceAnalysis],
    runs: Sequence[Evaluation],
    only: Collection[str],
    against: Sequence[tuple[str, str]],
    seed: int,
) -> Findings:
    pairs = _pairs_of(against, {result.rescorer for run in runs for result in run.results})
    of_runs = [analyse_run(run, task, only=only, seed=seed) for run in runs for task in run.tasks]
    contrasts = [
        contrast(run, task, *pair, p=p, seed=seed)
        for run in runs
        for pair in pairs
        for task in run.tasks
        for p in sorted({r.p for r in run.results if r.task == task and r.rescorer == pair[0]} or {1})
    ]
    return Findings(
        traces=tuple(traces),
        runs=tuple(of_runs),
        h_max=correlate_h_max([*traces, *(run.trace for run in of_runs if run.trace)]),
        table=efficiency_table(runs) if runs else None,
        contrasts=tuple(contrasts),
    )


def _pairs_of(given: Sequence[tuple[str, str]], known: Set[str]) -> Sequence[tuple[str, str]]:
    """Pairs of the known rescorers. Their specs hold commas and = themselves, at which they may have been cut."""
    pairs, text = [], ""
    for pair in given:
        text += ("," if text else "") + "=".join(pair)
        parts = text.split("=")
        cuts = [("=".join(parts[:end]), "=".join(parts[end:])) for end in range(len(parts) - 1, 0, -1)]
        if fitting := [cut for cut in cuts if known >= {*cut}]:
            pairs.append(fitting[0])
            text = ""
    return given if text else pairs
