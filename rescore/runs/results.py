"""Results on disk and as one JSON document: per-example lines while a run goes on, the summary last."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lattices.errors import IncompatibleError, InvalidDataError
from lm.files import (
    append_json_line,
    changed_settings,
    open_appending,
    read_json_lines,
    read_json_object,
    write_json,
    writing,
)
from lm.locks import writing_to

SCHEMA = "rescore.results/4"
EXAMPLES_FILE, CONFIG_FILE, RESULTS_FILE = "examples.jsonl", "config.json", "results.json"
RECORD = {
    "task": str,
    "rescorer": str,
    "p": int,
    "id": str,
    "group": str,
    "h": int,
    "accepted": list,
    "drafts": list,
    "oracle_accepted": list,
    "quality": dict,
}
LIBRARIES = ("torch", "transformers", "numpy", "numba", "datasets")


@dataclass(frozen=True)
class Result:
    """One rescorer on one task at one p: its name as typed, `n` examples of so many `groups`, accounting as in
    `rescore.accounting.Accounting`.

    `oracle_block_efficiency` at this k; `gain` of block efficiency over `none` at p = 1 in the same run and its paired
    interval (`rescore.accounting.Gain`; None where that was not run, and for it itself); `against_unrescored`: shares
    of steps that `won`, `tied` and `lost` tokens against the unrescored draft of their position (None where a live
    output is not the trace's); `quality`: by name of each of the task's metrics, the mean of the outputs' scores over
    the examples that have references (empty where the text is not known), `cut_at_limit`: the share of all outputs that
    did not come to their end (None where the end-of-text token is not known); and in live mode, else None: `identical`
    `{"n", "identical"}` outputs equal to greedy decoding, `divergence` of the others (`{"id", "position", "margin"}`:
    the first token that differs, from 0, and the greedy logit margin there), `latency`
    (`rescore.runs.summary.latency`).
    """

    task: str
    rescorer: str
    k: int
    p: int
    alpha: float | None
    n: int
    groups: int
    block_efficiency: float
    block_efficiency_ci95: tuple[float, float] | None
    block_efficiency_macro: float
    oracle_block_efficiency: float
    gain: float | None
    gain_ci95: tuple[float, float] | None
    against_unrescored: dict[str, float] | None
    steps: int
    tokens: int
    accepted_histogram: list[int]
    marginal: list[float]
    conditional: list[float | None]
    quality: dict[str, float]
    cut_at_limit: float | None
    identical: dict[str, int] | None
    divergence: list[dict[str, Any]] | None
    latency: dict[str, Any] | None


@dataclass
class ResultsDocument:
    """`{schema, config, results}`: all of the configuration with versions and hashes, a `Result` for each result."""

    config: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    schema: str = SCHEMA

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        results = [dataclasses.asdict(result) for result in self.results]
        return {"schema": self.schema, "config": self.config, "results": results}

    def save(self, folder: Path) -> None:
        """Writes `results.json` atomically."""
        write_json(folder / RESULTS_FILE, self.as_dict())


class ExampleLog:
    """Finished examples of a run, in memory and (with a folder) appended to `examples.jsonl`; resumes what is there.

    `config` is what makes two runs the same, kept in `config.json`. Raises `IncompatibleError` with the difference if
    the folder belongs to another one, `InvalidDataError` if it holds something else, `OutputError` if another process
    is writing to it. A context manager.
    """

    def __init__(self, folder: Path | None, config: Mapping[str, Any]) -> None:
        self._records: dict[tuple[str, str, int, str], dict[str, Any]] = {}
        self._stream: IO[str] | None = None
        self._lock = ExitStack()
        if folder is None:
            return
        self._lock.enter_context(writing_to(folder))
        with ExitStack() as undone:
            undone.push(self._lock)
            _claim(folder, json.loads(json.dumps(config)))
            path = folder / EXAMPLES_FILE
            with writing(path):
                self._stream = open_appending(path)  # cuts off a torn last line
            for number, record in read_json_lines(path):
                if not all(isinstance(record.get(name), kind) for name, kind in RECORD.items()):
                    raise InvalidDataError(f"{path} line {number} is not a finished example; use another --out")
                self._records[_key(record)] = record
            undone.pop_all()

    def __enter__(self) -> ExampleLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            with suppress(OSError):  # what could not be written was reported when it was added
                self._stream.close()
        self._lock.close()

    def has(self, task: str, rescorer: str, p: int, example: str) -> bool:
        """Whether this example is finished."""
        return (task, rescorer, p, example) in self._records

    def add(self, record: dict[str, Any]) -> None:
        """Takes a finished example: `task`, `rescorer`, `p`, `id` and what was measured. Raises `OutputError`."""
        self._records[_key(record)] = record
        if self._stream is not None:
            with writing(Path(self._stream.name)):
                append_json_line(self._stream, record)

    def records(self, task: str, rescorer: str, p: int, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Finished examples of one rescorer on one task at one p, in the order of `ids` (not in that of finishing)."""
        found = (self._records.get((task, rescorer, p, example)) for example in ids)
        return [record for record in found if record is not None]


def _key(record: dict[str, Any]) -> tuple[str, str, int, str]:
    return record["task"], record["rescorer"], record["p"], record["id"]


def _claim(folder: Path, config: dict[str, Any]) -> None:
    """Writes `config.json`, or compares with the one that is there."""
    path = folder / CONFIG_FILE
    if not path.exists():
        if (folder / EXAMPLES_FILE).exists():
            raise IncompatibleError(f"{folder} holds examples of a run without its {CONFIG_FILE}; use another --out")
        write_json(path, config)
        return
    found = read_json_object(path, missing=f"can't tell whose results {folder} holds", advice="use another --out")
    if changed := changed_settings(found, config):
        raise IncompatibleError(
            f"{folder} holds results of another configuration ({'; '.join(changed)}); use another --out"
        )


def environment() -> dict[str, Any]:
    """Versions of this project and its key libraries, and the git revision where there is one."""
    return {"versions": versions(), "git_revision": _git_revision()}


def versions() -> dict[str, str]:
    """Installed versions by distribution name."""
    found = {}
    for name in ("rescore", *LIBRARIES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _git_revision() -> str | None:
    """The commit, with `-dirty` where tracked files are changed; None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
