"""Finished runs: what `rescore eval --out` left, read back for reports, comparisons and analyses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lattices.paths import user_path
from lm.files import read_json_lines, read_json_object
from rescore.runs.results import CONFIG_FILE, EXAMPLES_FILE, RECORD, RESULTS_FILE, SCHEMA
from rescore.runs.suite_files import MANIFEST_FILE, PLAN_FILE, read_manifest
from rescore.tracing import HEADER_FILE, Trace, check_settings, load_trace, trace_folder

Record = dict[str, Any]  # a line of examples.jsonl (docs/formats.md)
Check = Callable[[Any], bool]


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check, length: int | None = None) -> Check:
    return lambda value: (
        isinstance(value, list) and length in (None, len(value)) and all(check(entry) for entry in value)
    )


def _by_name(check: Check, *needed: str) -> Check:
    """An object with text keys, `needed` among them, whose values pass."""
    return lambda value: (
        isinstance(value, dict) and value.keys() >= set(needed) and all(check(entry) for entry in value.values())
    )


def _object(**fields: Check) -> Check:
    """An object that has these fields, and others."""
    return lambda value: (
        isinstance(value, dict) and all(name in value and check(value[name]) for name, check in fields.items())
    )


_INTERVAL = _or_null(_list_of(_number, 2))
_TIMES = (
    "prefill_ms", "autoregressive_ms", "verify_ms", "heads_ms", "rescore_ms", "rescore_p50_ms", "rescore_p95_ms",
    "glue_share", "tokens_per_second", "autoregressive_tokens_per_second", "speedup",
)  # fmt: skip
# Every field of `rescore.runs.results.Result`.
RESULT: dict[str, Check] = {
    "task": _text,
    "rescorer": _text,
    "k": _whole,
    "p": _whole,
    "alpha": _or_null(_number),
    "n": _whole,
    "groups": _whole,
    "block_efficiency": _number,
    "block_efficiency_ci95": _INTERVAL,
    "block_efficiency_macro": _number,
    "oracle_block_efficiency": _number,
    "gain": _or_null(_number),
    "gain_ci95": _INTERVAL,
    "against_unrescored": _or_null(_by_name(_number, "won", "tied", "lost")),
    "steps": _whole,
    "tokens": _whole,
    "accepted_histogram": _list_of(_whole),
    "marginal": lambda value: _list_of(_number)(value) and bool(value),
    "conditional": _list_of(_or_null(_number)),
    "quality": _by_name(_number),
    "cut_at_limit": _or_null(_number),
    "identical": _or_null(_by_name(_whole, "n", "identical")),
    "divergence": _or_null(_list_of(_object(id=_text, position=_whole, margin=_number))),
    "latency": _or_null(
        _object(verify=_text, predicted_speedup=_or_null(_number), **dict.fromkeys(_TIMES, _number)),
    ),
}
_OPTIONS = _object(
    mode=_text, base=_text, dtype=_text, heads=_or_null(_text), trace=_or_null(_text), data=_or_null(_text),
    h=_or_null(_whole), k=_whole, seed=_whole,
)  # fmt: skip
# What is read of the configuration.
CONFIG: dict[str, Check] = {
    "options": _OPTIONS,
    "traces": _by_name(_object(k=_whole)),
    "data": _by_name(_object()),
    "versions": _by_name(_text),
    "notices": _list_of(_text),
    "alphas": _by_name(_by_name(_by_name(lambda chosen: _object(alpha=_number)(chosen) and _text(chosen.get("from"))))),
}
_TOKENS = _list_of(_whole)
_MEASURED = {"accepted": _TOKENS, "drafts": _list_of(_TOKENS), "oracle_accepted": _TOKENS, "output_ids": _TOKENS}


@dataclass(frozen=True)
class FinishedRun:
    """One results folder: `config` and `results` of its `results.json` (fields of `rescore.runs.results.Result`), and
    `records`, the lines of `examples.jsonl`, by (task, rescorer as typed, p), in the order of finishing. `traces`: by
    task those that were asked for, which are read once; a task that is set to None here counts as having none."""

    folder: Path
    config: dict[str, Any]
    results: list[dict[str, Any]]
    records: dict[tuple[str, str, int], list[Record]]
    traces: dict[str, Trace | None] = field(init=False, repr=False, compare=False, default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        """Tasks in the order of the results."""
        return list(dict.fromkeys(result["task"] for result in self.results))

    @property
    def rescorers(self) -> list[tuple[str, int]]:
        """(rescorer as typed, p) in the order of the results."""
        return list(dict.fromkeys((result["rescorer"], result["p"]) for result in self.results))

    def trace(self, task: str) -> Trace | None:
        """The trace that a task was replayed from, with the examples and heads that the run evaluated.

        None if it is no longer there.

        Raises `InvalidDataError` if it is there and broken.
        """
        if task not in self.traces:
            self.traces[task] = self._read_trace(task)
        return self.traces[task]

    def _read_trace(self, task: str) -> Trace | None:
        made_of = dict(self.config["traces"][task])
        given = self.config["options"].get("trace")
        k = made_of.pop("k")
        folder = user_path(given) if given else trace_folder(task, made_of, k)
        if not (folder / HEADER_FILE).is_file():
            return None
        try:
            trace = load_trace(folder)
            if not given:
                check_settings(folder, trace.header, k=k, settings=made_of)
        except RescoreError as error:
            if given:
                raise
            raise InvalidDataError(
                f"the cached trace of {task} is broken ({error}); rescore eval with the options of {self.folder} makes "
                "it again"
            ) from error
        of_task = [r for (of, _, _), found in self.records.items() if of == task for r in found]
        groups = {r["id"]: r["group"] for r in of_task}
        by_id = {example.id: example for example in trace.examples}
        if missing := [name for name in groups if name not in by_id]:
            raise IncompatibleError(f"{folder} lacks the example {missing[0]!r} of {self.folder}; it is another trace")
        examples = (dataclasses.replace(by_id[name], group=group) for name, group in groups.items())
        cut = Trace(trace.header, tuple(examples))
        return cut.first_heads(self.config["options"]["h"])


def load_runs(folder: Path) -> list[FinishedRun]:
    """The runs in a folder of `rescore eval --out` (one) or `rescore suite --out` (one for each task, k and h).

    Raises as `load_run`, and `RescoreError` for a suite that has not finished.
    """
    if (folder / MANIFEST_FILE).is_file():
        return [load_run(folder / entry["folder"]) for entry in read_manifest(folder)["runs"]]
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
        fitting = [run for run in fitting if len(run.results[0]["marginal"]) == h] or fitting
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
    document = read_json_object(folder / RESULTS_FILE, missing=f"no results in {folder}")
    if (found := document.get("schema")) != SCHEMA:
        raise InvalidDataError(f"{folder / RESULTS_FILE} has schema {found!r}; this version reads {SCHEMA!r}")
    config, results = document.get("config"), document.get("results")
    if not isinstance(config, dict) or not isinstance(results, list) or not results:
        raise InvalidDataError(f"{folder / RESULTS_FILE} holds no results; run the evaluation again")
    _check(folder / RESULTS_FILE, config, results)
    by_id: dict[tuple[str, str, int], dict[str, Record]] = {}
    for number, record in read_json_lines(folder / EXAMPLES_FILE, torn_tail=True):
        typed = all(isinstance(record.get(name), kind) for name, kind in RECORD.items())
        if not typed or not all(check(record.get(name)) for name, check in _MEASURED.items()):
            where = f"{folder / EXAMPLES_FILE} line {number}"
            raise InvalidDataError(f"{where} is not a finished example; run the evaluation again")
        # An example that is there twice (two processes once wrote to one folder) counts once, as `ExampleLog` has it.
        by_id.setdefault((record["task"], record["rescorer"], record["p"]), {})[record["id"]] = record
    records = {key: list(found.values()) for key, found in by_id.items()}
    for result in results:
        n = len(records.get((result["task"], result["rescorer"], result["p"]), ()))
        if n < result["n"]:
            raise InvalidDataError(
                f"{folder / EXAMPLES_FILE} has {n} of the {result['n']} examples of {result['rescorer']} on "
                f"{result['task']}; run the evaluation again"
            )
    return FinishedRun(folder, config, results, records)


def _check(path: Path, config: dict[str, Any], results: list[Any]) -> None:
    """Raises `InvalidDataError` with the first thing that readers of a finished run would stumble over."""
    for number, result in enumerate(results, start=1):
        if not isinstance(result, dict):
            raise InvalidDataError(f"{path} holds no whole results: result {number}; run the evaluation again")
        if wrong := next((name for name, check in RESULT.items() if name not in result or not check(result[name])), ""):
            raise InvalidDataError(
                f"{path} holds no whole results: {wrong} of result {number}; run the evaluation again"
            )
    wrong = next((name for name, check in CONFIG.items() if name not in config or not check(config[name])), "")
    if not wrong and (gone := [r["task"] for r in results if r["task"] not in config["traces"]]):
        wrong = f"traces.{gone[0]}"
    if wrong:
        raise InvalidDataError(f"{path} holds no whole configuration: {wrong}; run the evaluation again")
