"""What a report is made of: finished runs with their traces and analyses, and notices of what is missing.

Bad results are refused with one line; a trace that is gone or broken only costs what is read from it.
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lattices.errors import RescoreError
from lm.files import cache_directory, read_json_lines, read_json_object
from lm.records import convert_record, object_of
from rescore.bootstrap import LEAST_GROUPS
from rescore.options import written
from rescore.runs.evaluated import Evaluation
from rescore.runs.inputs import Progress
from rescore.runs.log import CONFIG_FILE, RESULTS_FILE
from rescore.runs.records import Result, Tuned, is_unrescored
from rescore.studies.analysis import HmaxCorrelation, RescorerAnalysis, RunAnalysis, analyse_run, correlate_h_max
from rescore.suites.files import PLAN_FILE, RUNS_FOLDER, TUNED_FILE, load_runs
from rescore.tracing import trace_folder


@dataclass(frozen=True)
class TaskView:
    """One task of one run: a column of the report.

    label: the task's name, with the folder's where two runs have the task.
    results: of the task, in the order of the run; sweeps: of the weights that the run used.
    """

    label: str
    task: str
    run: Evaluation
    results: tuple[Result, ...]
    analysis: RunAnalysis
    sweeps: tuple[Tuned, ...]

    @property
    def is_sample(self) -> bool:
        """Whether the examples are those embedded for the task, not its data set's."""
        return self.run.config.data.get(self.task, {}).get("kind") == "sample"

    @property
    def unrescored(self) -> Result | None:
        """The result of `none` with one draft a step, where that was run."""
        return next((r for r in self.results if r.is_unrescored), None)

    @property
    def oracles(self) -> list[float]:
        """Block efficiency of a perfect choice among what drafters propose, of each set of drafters that was run."""
        of_each = (result.oracle_block_efficiency for result in self.results)
        return list(dict.fromkeys(oracle for oracle in of_each if oracle is not None))

    @property
    def rescored(self) -> list[RescorerAnalysis]:
        """The analyses of the other decodes."""
        return [a for a in self.analysis.rescorers if not is_unrescored(a.rescorer, a.p)]

    @property
    def mark(self) -> str:
        """The acceptance rule of all its results (`Result.mark`)."""
        return self.results[0].mark

    @property
    def base(self) -> dict[str, Any]:
        """What the trace says of its base LM (`RunConfig.base`)."""
        return self.run.config.base(self.task)


@dataclass(frozen=True)
class Sources:
    """All of a report.

    views: in the order of the folders; h_max: its correlation with block efficiency over them.
    missing: what to know: examples that are not the data set's, and what the report can't show, with how to get it.
    """

    views: tuple[TaskView, ...]
    h_max: HmaxCorrelation
    missing: tuple[str, ...]


def load_sources(results: Sequence[Evaluation | Path], *, progress: Progress | None = None) -> Sources:
    """Analyses evaluations, or results folders of `rescore eval` or `rescore suite` (or folders of them).

    Raises `RescoreError` for a folder without finished results, `InvalidDataError` for one of another schema or with
    anything else in it.
    """
    found = [run for given in results for run in _runs_in(given)]
    runs = {(run.folder.resolve() if run.folder else id(run), run.results[0].k): run for run in found}
    pairs = [(run, task) for run in runs.values() for task in run.tasks]
    lacking = [line for run, task in pairs if (line := _lacks_trace(run, task))]
    views = []
    for place, ((run, task), label) in enumerate(zip(pairs, _labels(pairs), strict=True)):
        if progress:
            progress("analyse", place, len(pairs))
        of_task = tuple(result for result in run.results if result.task == task)
        views.append(TaskView(label, task, run, of_task, analyse_run(run, task), sweeps_of(run, task)))
    traces = [view.analysis.trace for view in views if view.analysis.trace is not None]
    samples = [
        f"{view.label}: the examples are those embedded for the task, whose numbers do not compare with the real data "
        "set's (rescore eval --data PATH)"
        for view in views if view.is_sample
    ]  # fmt: skip
    missing = (*samples, *lacking, *_gaps(views))
    return Sources(tuple(views), correlate_h_max(traces), missing)


def _runs_in(given: Evaluation | Path) -> list[Evaluation]:
    if isinstance(given, Evaluation):
        return given.at_each_k()
    return [run for folder in _results_in(given) for run in load_runs(folder)]


def _results_in(folder: Path) -> list[Path]:
    """The folder itself, or the folders of runs and suites in it where it is none."""
    if any((folder / name).is_file() for name in (RESULTS_FILE, CONFIG_FILE, PLAN_FILE)):
        return [folder]
    return sorted({path.parent for name in (CONFIG_FILE, PLAN_FILE) for path in folder.glob(f"*/{name}")}) or [folder]


def _lacks_trace(run: Evaluation, task: str) -> str | None:
    """Reads a trace once for all that need it; a sentence if there is none, or none that can be used."""
    try:
        if run.trace(task) is not None:
            return None
    except RescoreError as error:
        run.traces[task] = None
        return f"The trace of {task} can't be used ({error}), so what is read from it is not shown."
    return (
        f"The trace of {task} is no longer there, so its lattices, entropies and oracle curves are not shown. "
        f"To record it again: {trace_command(run, task)}"
    )


def trace_command(run: Evaluation, task: str) -> str:
    """The command that records the trace of a task of the run where the run looks for it."""
    inputs, settings = run.config.inputs[task], dict(run.config.traces[task])
    k = settings.pop("k")
    base = object_of(settings, "base")
    return written("trace", {
        "task": task,
        "base": base.get("name"),
        "heads": inputs.heads,
        "k": k,
        "limit": len({r.id for r in run.examples if r.task == task}),
        "max_new_tokens": settings.get("max_new_tokens"),
        "max_prompt_tokens": settings.get("max_prompt_tokens"),
        "data": inputs.data,
        "leave_out": inputs.leave_out,
        "dtype": None if base.get("dtype") == "float32" else base.get("dtype"),
        "device": object_of(settings, "recorded_by").get("device"),
        "out": inputs.trace or trace_folder(task, settings, k),
    })  # fmt: skip


def _labels(pairs: Sequence[tuple[Evaluation, str]]) -> list[str]:
    often = Counter(task for _, task in pairs)
    ks = {run.results[0].k for run, _ in pairs}
    names = [task if often[task] == 1 else f"{task} ({_place(run, ks)})" for run, task in pairs]
    before = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name} [{count + 1}]" if count else name for name, count in zip(names, before, strict=True)]


def _place(run: Evaluation, ks: Collection[int]) -> str:
    """Folder (whose name tells the acceptance rule, in a suite) and, where there are several, k."""
    name = run.folder.resolve().name if run.folder else "in memory"
    return f"{name}, k = {run.results[0].k}" if len(ks) > 1 else name


def _gaps(views: Sequence[TaskView]) -> list[str]:
    lines = []
    if few := [view.label for view in views if view.analysis.groups < LEAST_GROUPS]:
        lines.append(
            f"{', '.join(few)}: too few groups (sources that examples share) for an interval, which needs "
            f"{LEAST_GROUPS} or more (rescore eval --limit)."
        )
    if plain := [view.label for view in views if view.unrescored is None]:
        lines.append(
            f"{', '.join(plain)}: the unrescored drafts were not run, so there are no gains; "
            "add --rescorer none to rescore eval, and 1 to its --p."
        )
    for view in views:
        decodes = {(r.rescorer, r.p) for other in views if other.mark == view.mark for r in other.results}
        if lacking := decodes - {(r.rescorer, r.p) for r in view.results}:
            names = ", ".join(f"{rescorer} (p = {p})" for rescorer, p in sorted(lacking))
            lines.append(f"{view.label}: not run there, so its cells of the tables are empty: {names}.")
    return lines


def sweeps_of(run: Evaluation, task: str) -> tuple[Tuned, ...]:
    """The sweeps from which the tuned weights of a task of a run came, in the run's order.

    A sweep belongs to a weight if task, rescorer, k, h (where it says), p, the data, the held-out examples and the best
    weight are the same. Files that can't be read are passed over: a sweep is shown where there is one.
    """
    k, h = run.results[0].k, run.config.inputs[task].h
    weights = {
        (r.rescorer, r.p): r.alpha
        for r in run.config.runs.get(task, ())
        if r.k == k and r.alpha and r.alpha.source == "tuned"
    }
    sweeps: dict[tuple[str, int], Tuned] = {}
    for fields in _candidates(run, task) if weights else ():
        with suppress(RescoreError):
            tuned = convert_record(fields, Tuned, where="", advice="")
            weight = weights.get((tuned.rescorer, tuned.p))
            if (
                weight is not None
                and (tuned.task, tuned.k, fields.get("h", h)) == (task, k, h)
                and (tuned.alpha, tuned.held_out) == (weight.alpha, weight.held_out)
                and tuned.data_sha256 == weight.data_sha256
                and len(tuned.alphas) == len(tuned.block_efficiency)
            ):
                sweeps.setdefault((tuned.rescorer, tuned.p), tuned)
    return tuple(sweeps[key] for key in weights if key in sweeps)


def _candidates(run: Evaluation, task: str) -> Iterator[dict[str, Any]]:
    """Lines of the suite's file, then documents of the cache; what can't be read is passed over."""
    folder = (run.folder or Path()).resolve().parent
    if folder.name == RUNS_FOLDER:
        with suppress(RescoreError):
            lines = [fields for _, fields in read_json_lines(folder.parent / TUNED_FILE, torn_tail=True)]
            yield from reversed(lines)  # of two sweeps of one run the later is the one that was used
    for path in sorted((cache_directory() / "tuned").glob(f"{glob.escape(task)}-*.json")):
        with suppress(RescoreError):
            yield read_json_object(path, missing=f"can't read {path}")
