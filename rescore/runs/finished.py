"""Finished runs: what `rescore eval --out` left, read back for reports, comparisons and analyses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lattices.paths import user_path
from lm.files import read_json_object
from lm.records import convert_record
from rescore.runs.inputs import content_sha256
from rescore.runs.records import SCHEMA, ExampleRecord, Result, ResultsDocument, RunConfig
from rescore.runs.results import CONFIG_FILE, EXAMPLES_FILE, RESULTS_FILE, read_examples
from rescore.runs.suite_files import MANIFEST_FILE, PLAN_FILE, read_manifest
from rescore.tracing import HEADER_FILE, Trace, check_settings, load_trace, trace_folder


@dataclass(frozen=True)
class FinishedRun:
    """One results folder.

    config, results: of its `results.json`.
    records: the lines of `examples.jsonl` by (task, rescorer, p), in the order of finishing.
    traces: by task, as far as they were asked for; a task that is set to None here counts as having none.
    """

    folder: Path
    config: RunConfig
    results: list[Result]
    records: dict[tuple[str, str, int], list[ExampleRecord]]
    traces: dict[str, Trace | None] = field(init=False, repr=False, compare=False, default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        """Tasks in the order of the results."""
        return list(dict.fromkeys(result.task for result in self.results))

    @property
    def rescorers(self) -> list[tuple[str, int]]:
        """(rescorer as typed, p) in the order of the results."""
        return list(dict.fromkeys((result.rescorer, result.p) for result in self.results))

    def trace(self, task: str) -> Trace | None:
        """The trace that a task was replayed from, with the examples and heads that the run evaluated.

        None if it is no longer there.

        Raises `InvalidDataError` if it is there and broken.
        """
        if task not in self.traces:
            self.traces[task] = self._read_trace(task)
        return self.traces[task]

    def _read_trace(self, task: str) -> Trace | None:
        made_of = dict(self.config.traces[task])
        given = self.config.options.trace
        k = made_of.pop("k")
        folder = user_path(given) if given else trace_folder(task, made_of, k)
        if not (folder / HEADER_FILE).is_file():
            return None
        try:
            trace = load_trace(folder)
            if not given:
                check_settings(folder, trace.header, k=k, settings=made_of)
            elif content_sha256(folder, trace.header.parts) != self.config.data.get(task, {}).get("sha256"):
                raise IncompatibleError(
                    f"{folder} is not the trace that {self.folder} was replayed from; give that one back, or evaluate "
                    "again"
                )
        except RescoreError as error:
            if given:
                raise
            raise InvalidDataError(
                f"the cached trace of {task} is broken ({error}); rescore eval with the options of {self.folder} makes "
                "it again"
            ) from error
        of_task = [r for (of, _, _), found in self.records.items() if of == task for r in found]
        groups = {r.id: r.group for r in of_task}
        by_id = {example.id: example for example in trace.examples}
        if missing := [name for name in groups if name not in by_id]:
            raise IncompatibleError(f"{folder} lacks the example {missing[0]!r} of {self.folder}; it is another trace")
        examples = (dataclasses.replace(by_id[name], group=group) for name, group in groups.items())
        cut = Trace(trace.header, tuple(examples))
        return cut.first_heads(self.config.options.h)


def load_runs(folder: Path) -> list[FinishedRun]:
    """The runs in a folder of `rescore eval --out` (one) or `rescore suite --out` (one for each task, k and h).

    Raises as `load_run`, and `RescoreError` for a suite that has not finished.
    """
    if (folder / MANIFEST_FILE).is_file():
        return [load_run(folder / run.folder) for run in read_manifest(folder).runs]
    if (folder / PLAN_FILE).is_file():
        raise RescoreError(f"the suite in {folder} has not finished; the command that began it goes on")
    return [load_run(folder)]


def run_of_task(folder: Path, task: str | None, *, h: int | None = None) -> FinishedRun:
    """The only run in a folder as `load_runs` has it, or that of a task (and of blocks of h tokens).

    Raises as `load_runs`, and `RescoreError` where several are left.
    """
    runs = load_runs(folder)
    if len(runs) == 1:
        return runs[0]
    fitting = [run for run in runs if task is None or task in run.tasks]
    if h is not None:
        fitting = [run for run in fitting if run.results[0].h == h] or fitting
    if len(fitting) == 1:
        return fitting[0]
    tasks = ", ".join(dict.fromkeys(name for run in runs for name in run.tasks))
    if not fitting:
        raise RescoreError(f"{folder} has no task {task}; give one of {tasks}")
    if task is None and "," in tasks:
        raise RescoreError(f"{folder} has several runs; give one task with --task: {tasks}")
    folders = ", ".join(str(run.folder) for run in fitting)
    raise RescoreError(f"{folder} has several runs of {task or tasks}; give the folder of one: {folders}")


def load_run(folder: Path) -> FinishedRun:
    """Reads a results folder of `rescore eval --out`.

    Raises `RescoreError` if there is none or its run has not finished, `InvalidDataError` for a broken or older one.
    """
    if not folder.is_dir():
        raise RescoreError(f"no such folder: {folder}; rescore eval --out {folder} writes them")
    if not (folder / RESULTS_FILE).is_file():
        if (folder / CONFIG_FILE).is_file():
            raise RescoreError(f"the run in {folder} has not finished; the command that began it goes on")
        raise RescoreError(f"no results in {folder}; rescore eval --out {folder} writes them")
    path, advice = folder / RESULTS_FILE, "run the evaluation again"
    fields = read_json_object(path, missing=f"no results in {folder}", advice=advice)
    if (schema := fields.get("schema")) != SCHEMA:
        raise InvalidDataError(f"{path} has schema {schema!r}; this version reads {SCHEMA!r}; {advice}")
    document = convert_record(fields, ResultsDocument, where=f"{path} holds no whole results", advice=advice)
    config, results = document.config, document.results
    if not results:
        raise InvalidDataError(f"{path} holds no results; {advice}")
    if missing := [r.task for r in results if not isinstance(config.traces.get(r.task, {}).get("k"), int)]:
        raise InvalidDataError(f"{path} holds no whole configuration: traces.{missing[0]}.k; {advice}")
    by_id: dict[tuple[str, str, int], dict[str, ExampleRecord]] = {}
    for record in read_examples(folder / EXAMPLES_FILE, advice=advice):
        # An example that is there twice (two processes once wrote to one folder) counts once, as `ExampleLog` has it.
        by_id.setdefault((record.task, record.rescorer, record.p), {})[record.id] = record
    records = {key: list(examples.values()) for key, examples in by_id.items()}
    for result in results:
        n = len(records.get((result.task, result.rescorer, result.p), ()))
        if n < result.n:
            raise InvalidDataError(
                f"{folder / EXAMPLES_FILE} has {n} of the {result.n} examples of {result.rescorer} on {result.task}; "
                f"{advice}"
            )
    return FinishedRun(folder, config, results, records)
