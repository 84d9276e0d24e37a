"""Results on disk and as one JSON document: per-example lines while a run goes on, the summary last."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lattices.errors import IncompatibleError
from lm.files import append_json_line, open_appending, read_json_lines, write_json, writing

SCHEMA = "rescore.results/1"
EXAMPLES_FILE, CONFIG_FILE, RESULTS_FILE = "examples.jsonl", "config.json", "results.json"
LIBRARIES = ("torch", "transformers", "numpy", "numba", "datasets")


@dataclass(frozen=True)
class Result:
    """One rescorer on one task. Accounting fields as in `rescore.accounting.Accounting`; `oracle_block_efficiency` at
    this k; `quality`: the task's metric of the output; `identical`: outputs equal to greedy decoding, in live mode;
    `latency`: times in ms per step, in live mode (`rescore.evaluation`)."""

    task: str
    rescorer: str
    k: int
    p: int
    alpha: float | None
    n: int
    block_efficiency: float
    block_efficiency_ci95: tuple[float, float] | None
    block_efficiency_macro: float
    oracle_block_efficiency: float
    steps: int
    tokens: int
    accepted_histogram: list[int]
    marginal: list[float]
    conditional: list[float]
    quality: dict[str, Any] | None
    identical: dict[str, int] | None
    latency: dict[str, float] | None


@dataclass
class ResultsDocument:
    """`{schema, config, results}`: the whole configuration with versions and hashes, and one `Result` each."""

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

    Raises `IncompatibleError` with the difference if the folder belongs to a run with another configuration.
    """

    def __init__(self, folder: Path | None, options: Any) -> None:
        self._records: dict[tuple[str, str, str], dict[str, Any]] = {}
        self._stream: IO[str] | None = None
        if folder is None:
            return
        path = folder / EXAMPLES_FILE
        wanted = json.loads(json.dumps(dataclasses.asdict(options)))
        if (folder / CONFIG_FILE).is_file():
            found = json.loads((folder / CONFIG_FILE).read_text())
            changed = [f"{key}: {found.get(key)} -> {wanted[key]}" for key in wanted if found.get(key) != wanted[key]]
            if changed:
                raise IncompatibleError(
                    f"{folder} holds results of another configuration ({'; '.join(changed)}); use another --out"
                )
        else:
            write_json(folder / CONFIG_FILE, wanted)
        if path.is_file():
            for _, record in read_json_lines(path, torn_tail=True):
                self._records[record["task"], record["rescorer"], record["id"]] = record
        with writing(path):
            self._stream = open_appending(path)

    def has(self, task: str, rescorer: str, example: str) -> bool:
        """Whether this example is finished."""
        return (task, rescorer, example) in self._records

    def add(self, record: dict[str, Any]) -> None:
        """Takes a finished example (`task`, `rescorer`, `id` and what was measured); one already there stays."""
        key = (record["task"], record["rescorer"], record["id"])
        if key in self._records:
            return
        self._records[key] = record
        if self._stream is not None:
            with writing(Path(self._stream.name)):
                append_json_line(self._stream, record)

    def records(self, task: str, rescorer: str) -> list[dict[str, Any]]:
        """Finished examples of one rescorer on one task."""
        return [r for (t, name, _), r in self._records.items() if t == task and name == rescorer]


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
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
