"""What an evaluation leaves: in memory, and as a folder of `rescore eval --out`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError, UnknownNameError
from lattices.paths import user_path
from lm.records import plain, read_record
from rescore.runs.log import (
    CONFIG_FILE,
    EXAMPLES_FILE,
    RESULTS_FILE,
    ExampleLog,
    key_of_record,
    read_examples,
    save_results,
)
from rescore.runs.records import SCHEMA, ExampleRecord, Result, ResultsDocument, RunConfig
from rescore.tracing import HEADER_FILE, Trace, check_settings, content_sha256, read_trace, trace_folder

if TYPE_CHECKING:
    import pandas

    from rescore.table import Table


@dataclass(frozen=True)
class Evaluation:
    """Results of runs on tasks, with the examples that they sum up.

    document: configuration and results; examples: in the order of finishing.
    folder: where they lie; None: in memory only. interrupted: Ctrl-C cut it short.
    traces: by task, as far as they were asked for; a task that is set to None counts as having none.
    """

    document: ResultsDocument
    examples: list[ExampleRecord] = field(default_factory=list)
    folder: Path | None = None
    interrupted: bool = False
    traces: dict[str, Trace | None] = field(repr=False, compare=False, default_factory=dict)

    @property
    def config(self) -> RunConfig:
        """All that the numbers follow from."""
        return self.document.config

    @property
    def results(self) -> list[Result]:
        """A result for each task and run, in the order of the request."""
        return self.document.results

    @property
    def notices(self) -> list[str]:
        """What the user should know of how the numbers came about; part of the document."""
        return self.config.notices

    @property
    def tasks(self) -> list[str]:
        """Tasks in the order of the results."""
        return list(dict.fromkeys(result.task for result in self.results))

    @property
    def rescorers(self) -> list[tuple[str, int]]:
        """(rescorer, p) in the order of the results."""
        return list(dict.fromkeys((result.rescorer, result.p) for result in self.results))

    def __getitem__(self, rescorer: str) -> Result:
        """The only result of a rescorer. Raises `UnknownNameError`, `RescoreError` if there are several."""
        return self.result(rescorer)

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def result(self, rescorer: str, *, p: int | None = None, k: int | None = None, task: str | None = None) -> Result:
        """The result of a rescorer, with this p, k and task where there are several.

        Raises `UnknownNameError` for a rescorer that was not run, `RescoreError` for none or several results.
        """
        of_it = [r for r in self.results if r.rescorer == rescorer]
        if not of_it:
            raise UnknownNameError("rescorer of these results", rescorer, {r.rescorer for r in self.results})
        asked = {"p": p, "k": k, "task": task}
        fitting = [r for r in of_it if all(v is None or getattr(r, name) == v for name, v in asked.items())]
        if len(fitting) != 1:
            there = ", ".join(f"{r.task} p = {r.p} k = {r.k}" for r in of_it)
            raise RescoreError(f"{len(fitting)} results of {rescorer} fit; choose by task, p and k: {there}")
        return fitting[0]

    def records(self, task: str, rescorer: str, p: int, k: int | None = None) -> list[ExampleRecord]:
        """The examples of one run on a task (k: None where there is only one), in the order of finishing."""
        return [e for e in self.examples if (e.task, e.rescorer, e.p) == (task, rescorer, p) and k in (None, e.k)]

    def tables(self, *, details: bool = False) -> list[Table]:
        """All results in one table; with `details` quality, acceptance by position and times too."""
        from rescore.runs.tables import results_tables

        return results_tables(self.document, details=details)

    def __str__(self) -> str:
        from rescore.table import joined

        return joined(self.tables())

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each result: fields of `Result`, those of records inside as `latency.verify_ms`."""
        import pandas

        return pandas.json_normalize([plain(result) for result in self.results], max_level=1)

    def save(self, folder: str | Path) -> None:
        """Writes what `rescore eval --out` leaves; `load_run` reads it back.

        Raises `IncompatibleError` if the folder holds another evaluation, `OutputError` if it can't be written.
        """
        path = user_path(folder, "the folder")
        with ExampleLog(path, self.config.decides()) as log:
            for record in self.examples:
                if not log.has(key_of_record(record), record.id):
                    log.add(record)
                elif log.records(key_of_record(record), [record.id]) != [record]:
                    raise IncompatibleError(f"{path} holds another evaluation of the same runs; give another folder")
            if not self.interrupted:
                save_results(self.document, path)

    def at_each_k(self) -> list[Evaluation]:
        """The same, each k apart."""
        ks = list(dict.fromkeys(result.k for result in self.results))
        return [self] if len(ks) == 1 else [self._at(k) for k in ks]

    def _at(self, k: int) -> Evaluation:
        document = dataclasses.replace(self.document, results=[r for r in self.results if r.k == k])
        return dataclasses.replace(self, document=document, examples=[e for e in self.examples if e.k == k])

    def trace(self, task: str) -> Trace | None:
        """The trace that a task was replayed from, with the examples and heads that were evaluated.

        None if it is no longer there. Raises `InvalidDataError` if it is there and broken.
        """
        if task not in self.traces:
            self.traces[task] = self._read_trace(task)
        return self.traces[task]

    def _read_trace(self, task: str) -> Trace | None:
        settings: dict[str, Any] = dict(self.config.traces[task])
        inputs = self.config.inputs[task]
        k = settings.pop("k")
        folder = user_path(inputs.trace) if inputs.trace else trace_folder(task, settings, k)
        if not (folder / HEADER_FILE).is_file():
            return None
        try:
            trace = read_trace(folder)
            if not inputs.trace:
                check_settings(folder, trace.header, k=k, settings=settings)
            elif content_sha256(folder, trace.header.parts) != self.config.data.get(task, {}).get("sha256"):
                raise IncompatibleError(
                    f"{folder} is not the trace that {self.folder} was replayed from; give that one back, or evaluate "
                    "again"
                )
        except RescoreError as error:
            if inputs.trace:
                raise
            raise InvalidDataError(
                f"the cached trace of {task} is broken ({error}); rescore eval with the options of {self.folder} makes "
                "it again"
            ) from error
        groups = {e.id: e.group for e in self.examples if e.task == task}
        by_id = {example.id: example for example in trace.examples}
        if missing := [name for name in groups if name not in by_id]:
            raise IncompatibleError(f"{folder} lacks the example {missing[0]!r} of {self.folder}; it is another trace")
        examples = (dataclasses.replace(by_id[name], group=group) for name, group in groups.items())
        return Trace(trace.header, tuple(examples)).first_heads(inputs.h)


def load_run(folder: str | Path) -> Evaluation:
    """Reads a results folder of `rescore eval --out` or `Evaluation.save`.

    Raises `RescoreError` if there is none or its run has not finished, `InvalidDataError` for a broken or older one.
    """
    folder = user_path(folder, "the folder")
    if not folder.is_dir():
        raise RescoreError(f"no such folder: {folder}; rescore eval --out {folder} writes them")
    if not (folder / RESULTS_FILE).is_file():
        if (folder / CONFIG_FILE).is_file():
            raise RescoreError(f"the run in {folder} has not finished; the command that began it goes on")
        raise RescoreError(f"no results in {folder}; rescore eval --out {folder} writes them")
    path, advice = folder / RESULTS_FILE, "run the evaluation again"
    document = read_record(path, ResultsDocument, missing=f"no results in {folder}", advice=advice, schema=SCHEMA)
    config, results = document.config, document.results
    if not results:
        raise InvalidDataError(f"{path} holds no results; {advice}")
    for name, by_task in (("traces", config.traces), ("inputs", config.inputs)):
        if missing := [r.task for r in results if r.task not in by_task]:
            raise InvalidDataError(f"{path} holds no whole configuration: {name}.{missing[0]}; {advice}")
    if missing := [r.task for r in results if not isinstance(config.traces[r.task].get("k"), int)]:
        raise InvalidDataError(f"{path} holds no whole configuration: traces.{missing[0]}.k; {advice}")
    # An example that is there twice (two processes once wrote to one folder) counts once, as `ExampleLog` has it.
    examples = {(key_of_record(r), r.id): r for r in read_examples(folder / EXAMPLES_FILE, advice=advice)}
    evaluation = Evaluation(document, list(examples.values()), folder)
    for result in results:
        records = evaluation.records(result.task, result.rescorer, result.p, result.k)
        if len(records) < result.n:
            raise InvalidDataError(
                f"{folder / EXAMPLES_FILE} has {len(records)} of the {result.n} examples of {result.rescorer} on "
                f"{result.task}; {advice}"
            )
        if not all(record.accepted and min(record.accepted) for record in records):
            continue  # steps that make no sense: each reader tells what they cost it
        lengths = [length for record in records for length in record.accepted]
        if (len(records), len(lengths), sum(lengths)) != (result.n, result.steps, result.tokens):
            raise InvalidDataError(
                f"{path} and the {EXAMPLES_FILE} beside it are not of one run: {result.rescorer} on {result.task} has "
                f"{result.tokens} tokens in {result.steps} steps there, {sum(lengths)} in {len(lengths)} here; {advice}"
            )
    return evaluation
