"""What a report is made of: finished runs with their traces and analyses, and notices of what is missing.

Bad results are refused with one line; a trace that is gone or broken only costs what is read from it.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lattices.errors import RescoreError
from rescore.bootstrap import LEAST_GROUPS
from rescore.report.sweeps import kept_sweeps
from rescore.runs.evaluated import Evaluation, load_runs
from rescore.runs.inputs import Progress
from rescore.runs.log import CONFIG_FILE, RESULTS_FILE
from rescore.runs.records import Result, Tuned
from rescore.studies.analysis import HmaxCorrelation, RunAnalysis, analyse_run, correlate_h_max
from rescore.suites.files import PLAN_FILE
from rescore.tracing import trace_folder


@dataclass(frozen=True)
class TaskView:
    """One task of one run: a column of the report. `label` is the task's name, with the folder's where two runs have
    the task; `results` (fields of `rescore.runs.records.Result`) in the order of the run; `sweeps`: of the weights
    that the run used."""

    label: str
    task: str
    run: Evaluation
    results: tuple[Result, ...]
    analysis: RunAnalysis
    sweeps: tuple[Tuned, ...]

    @property
    def live(self) -> bool:
        """Whether time was measured."""
        return any(result.latency for result in self.results)

    @property
    def is_sample(self) -> bool:
        """Whether the examples are those embedded for the task, not its data set's."""
        return self.run.config.data.get(self.task, {}).get("kind") == "sample"

    @property
    def unrescored(self) -> Result | None:
        """The result of `none` with one draft a step, where that was run."""
        return next((r for r in self.results if r.rescorer == "none" and r.p == 1), None)


@dataclass(frozen=True)
class Sources:
    """All views in the order of the folders, the correlation of h_max with block efficiency over them, and `missing`: a
    sentence for each thing that the report can't show, with how to get it."""

    views: tuple[TaskView, ...]
    h_max: HmaxCorrelation | None
    missing: tuple[str, ...]


def load_sources(folders: Sequence[Path], *, progress: Progress | None = None) -> Sources:
    """Reads results folders of `rescore eval` or `rescore suite` (or folders of them) and analyses them.

    Raises `RescoreError` for a folder without finished results, `InvalidDataError` for one of another schema or with
    anything else in it.
    """
    found = [run for given in folders for folder in _results_in(given) for run in load_runs(folder)]
    runs = list({(run.folder and run.folder.resolve(), run.results[0].k): run for run in found}.values())
    missing: list[str] = []
    for run in runs:
        for task in run.tasks:
            _read_trace(run, task, missing)
    pairs = [(run, task) for run in runs for task in run.tasks]
    labels = _labels(pairs)
    views = []
    for place, ((run, task), label) in enumerate(zip(pairs, labels, strict=True)):
        if progress:
            progress("analyse", place, len(pairs))
        results = tuple(result for result in run.results if result.task == task)
        analysis = analyse_run(run, task)
        views.append(TaskView(label, task, run, results, analysis, kept_sweeps(run, task)))
    traces = [view.analysis.trace for view in views if view.analysis.trace is not None]
    missing += _gaps(views)
    return Sources(tuple(views), correlate_h_max(traces) if traces else None, tuple(missing))


def _results_in(folder: Path) -> list[Path]:
    """The folder itself, or the folders of runs and suites in it where it is none."""
    begun = (RESULTS_FILE, CONFIG_FILE, PLAN_FILE)
    if folder.is_dir() and not any((folder / name).is_file() for name in begun):
        inside = sorted({path.parent for name in (CONFIG_FILE, PLAN_FILE) for path in folder.glob(f"*/{name}")})
        return inside or [folder]
    return [folder]


def _read_trace(run: Evaluation, task: str, missing: list[str]) -> None:
    """Reads a trace once for all that need it; says if there is none, or none that can be used."""
    try:
        trace = run.trace(task)
    except RescoreError as error:
        missing.append(f"The trace of {task} can't be used ({error}), so what is read from it is not shown.")
        run.traces[task] = None
        return
    if trace is None:
        missing.append(
            f"The trace of {task} is no longer there, so its lattices, entropies and oracle curves are not shown. "
            f"To record it again: {trace_command(run, task)}"
        )


def trace_command(run: Evaluation, task: str) -> str:
    """The command that records the trace of a task of the run where the run looks for it."""
    inputs, made_of = run.config.inputs[task], dict(run.config.traces[task])
    k = made_of.pop("k")
    folder = inputs.trace or str(trace_folder(task, made_of, k))
    base = made_of.get("base")
    arguments: dict[str, Any] = {
        "task": task,
        "base": base["name"] if isinstance(base, dict) and "name" in base else inputs.base,
        "heads": inputs.heads,
        "k": k,
        "limit": len({r.id for r in run.examples if r.task == task}),
        "max-new-tokens": made_of.get("max_new_tokens"),
        "max-prompt-tokens": made_of.get("max_prompt_tokens"),
        "data": inputs.data,
        "leave-out": inputs.leave_out,
        "dtype": base.get("dtype") if isinstance(base, dict) and base.get("dtype") != "float32" else None,
        "device": (made_of.get("recorded_by") or {}).get("device"),
        "out": folder,
    }
    words = [f"--{name} {shlex.quote(str(value))}" for name, value in arguments.items() if value is not None]
    return " ".join(["rescore trace", *words])


def _labels(pairs: Sequence[tuple[Evaluation, str]]) -> list[str]:
    """Names of the views, every one different."""
    often = Counter(task for _, task in pairs)
    ks = {run.results[0].k for run, _ in pairs}
    names = [task if often[task] == 1 else f"{task} ({_place(run, ks)})" for run, task in pairs]
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(name if seen[name] == 1 else f"{name} [{seen[name]}]")
    return labels


def _place(run: Evaluation, ks: Collection[int]) -> str:
    """Folder and, where there are several, k."""
    name = run.folder.resolve().name if run.folder else "in memory"
    return f"{name}, k = {run.results[0].k}" if len(ks) > 1 else name


def _gaps(views: Sequence[TaskView]) -> list[str]:
    """What the results themselves leave open."""
    lines = []
    if few := [view.label for view in views if max(r.groups for r in view.results) < LEAST_GROUPS]:
        lines.append(
            f"{', '.join(few)}: too few groups (sources that examples share) for an interval, which needs "
            f"{LEAST_GROUPS} or more (rescore eval --limit)."
        )
    if plain := [view.label for view in views if view.unrescored is None]:
        lines.append(
            f"{', '.join(plain)}: the unrescored drafts were not run, so there are no gains; "
            "add --rescorer none to rescore eval, and 1 to its --p."
        )
    everything = {(r.rescorer, r.p) for view in views for r in view.results}
    for view in views:
        lacking = everything - {(r.rescorer, r.p) for r in view.results}
        if lacking:
            names = ", ".join(f"{rescorer} (p = {p})" for rescorer, p in sorted(lacking))
            lines.append(f"{view.label}: not run there, so its cells of the tables are empty: {names}.")
    return lines


def json_text(value: Any) -> str:
    """JSON for a script element: no `</`, no `<!--`, and nothing that JavaScript takes for the end of a line."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    escaped = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return escaped.encode("utf-8", "backslashreplace").decode("utf-8")  # a lone surrogate has no UTF-8
