"""Finished runs: what `rescore eval --out` left, read back for reports, comparisons and analyses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lm.files import read_json_lines, read_json_object
from rescore.results import CONFIG_FILE, EXAMPLES_FILE, RECORD, RESULTS_FILE, SCHEMA
from rescore.tracing import HEADER_FILE, Trace, load_trace, trace_folder

Record = dict[str, Any]  # a line of examples.jsonl (docs/formats.md)
NEEDED = {"task", "rescorer", "k", "p", "alpha", "n", "marginal"}  # of a result, by what reads finished runs


@dataclass(frozen=True)
class FinishedRun:
    """One results folder: `config` and `results` of its `results.json` (fields of `rescore.results.Result`), and
    `records`, the lines of `examples.jsonl`, by (task, rescorer as typed, p), in the order of finishing."""

    folder: Path
    config: dict[str, Any]
    results: list[dict[str, Any]]
    records: dict[tuple[str, str, int], list[Record]]

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
        made_of = dict(self.config["traces"][task])
        given = self.config["options"].get("trace")
        k = made_of.pop("k")
        folder = Path(given).expanduser() if given else trace_folder(task, made_of, k)
        if not (folder / HEADER_FILE).is_file():
            return None
        trace = load_trace(folder)
        ids = list(dict.fromkeys(r["id"] for (of, _, _), found in self.records.items() if of == task for r in found))
        by_id = {example.id: example for example in trace.examples}
        if missing := [name for name in ids if name not in by_id]:
            raise IncompatibleError(f"{folder} lacks the example {missing[0]!r} of {self.folder}; it is another trace")
        cut = Trace(trace.header, tuple(by_id[name] for name in ids))
        return cut.first_heads(self.config["options"]["h"])


def load_run(folder: Path) -> FinishedRun:
    """Reads a results folder.

    Raises `RescoreError` if there is none or its run has not finished, `InvalidDataError` for a broken or older one.
    """
    if not folder.is_dir():
        raise RescoreError(f"no results in {folder}; rescore eval --out {folder} writes them")
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
    if not all(isinstance(result, dict) and result.keys() >= NEEDED for result in results):
        raise InvalidDataError(f"{folder / RESULTS_FILE} holds no whole results; run the evaluation again")
    records: dict[tuple[str, str, int], list[Record]] = {}
    for number, record in read_json_lines(folder / EXAMPLES_FILE, torn_tail=True):
        if not all(isinstance(record.get(name), kind) for name, kind in RECORD.items()):
            where = f"{folder / EXAMPLES_FILE} line {number}"
            raise InvalidDataError(f"{where} is not a finished example; run the evaluation again")
        records.setdefault((record["task"], record["rescorer"], record["p"]), []).append(record)
    for result in results:
        n = len(records.get((result["task"], result["rescorer"], result["p"]), ()))
        if n < result["n"]:
            raise InvalidDataError(
                f"{folder / EXAMPLES_FILE} has {n} of the {result['n']} examples of {result['rescorer']} on "
                f"{result['task']}; run the evaluation again"
            )
    return FinishedRun(folder, config, results, records)
