"""Results on disk and as one JSON document: per-example lines while a run goes on, the summary last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from lattices.errors import IncompatibleError
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
from lm.records import convert_record, plain
from rescore.runs.records import ExampleRecord, ResultsDocument

EXAMPLES_FILE, CONFIG_FILE, RESULTS_FILE = "examples.jsonl", "config.json", "results.json"
Key = tuple[str, str, int, int]  # task, rescorer, p, k


class ExampleLog:
    """Finished examples of a run, in memory and (with a folder) appended to `examples.jsonl`; resumes what is there.

    `config` is what makes two runs the same, kept in `config.json`. Raises `IncompatibleError` with the difference if
    the folder belongs to another one, `InvalidDataError` if it holds something else, `OutputError` if another process
    is writing to it. A context manager.
    """

    def __init__(self, folder: Path | None, config: Mapping[str, Any]) -> None:
        self._records: dict[tuple[Key, str], ExampleRecord] = {}
        self._stream: IO[str] | None = None
        self._lock = ExitStack()
        if folder is None:
            return
        with ExitStack() as lock:
            lock.enter_context(writing_to(folder))
            path = folder / EXAMPLES_FILE
            if path.exists() and not (folder / CONFIG_FILE).exists():
                raise IncompatibleError(
                    f"{folder} holds examples of a run without its {CONFIG_FILE}; use another --out"
                )
            claim(folder / CONFIG_FILE, plain(config), holds="results of another configuration")
            with writing(path):
                self._stream = open_appending(path)  # cuts off a torn last line
            self._records = {(key_of_record(r), r.id): r for r in read_examples(path, advice="use another --out")}
            self._lock = lock.pop_all()

    def __enter__(self) -> ExampleLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            with suppress(OSError):  # what could not be written was reported when it was added
                self._stream.close()
        self._lock.close()

    def has(self, key: Key, example: str) -> bool:
        """Whether this example is finished."""
        return (key, example) in self._records

    def add(self, record: ExampleRecord) -> None:
        """Takes a finished example. Raises `OutputError`."""
        self._records[key_of_record(record), record.id] = record
        if self._stream is not None:
            with writing(Path(self._stream.name)):
                append_json_line(self._stream, plain(record))

    @property
    def all(self) -> list[ExampleRecord]:
        """All finished examples, in the order of finishing; those of before first."""
        return list(self._records.values())

    def records(self, key: Key, ids: Sequence[str]) -> list[ExampleRecord]:
        """Finished examples of one run on one task, in the order of `ids` (not in that of finishing)."""
        return [self._records[key, example] for example in ids if (key, example) in self._records]


def key_of_record(record: ExampleRecord) -> Key:
    """The run and task that an example was decoded by."""
    return record.task, record.rescorer, record.p, record.k


def read_examples(path: Path, *, advice: str) -> Iterator[ExampleRecord]:
    """The lines of `examples.jsonl`, in the order of finishing; a torn last line is passed over.

    Raises `InvalidDataError` that names the line of what is no finished example and ends with `advice`.
    """
    for number, fields in read_json_lines(path, torn_tail=True):
        where = f"{path} line {number} is not a finished example"
        yield convert_record(fields, ExampleRecord, where=where, advice=advice)


def claim(path: Path, document: dict[str, Any], *, holds: str, whole: bool = False) -> None:
    """Writes what the results in a folder are of, or compares it with what is there.

    Raises `IncompatibleError` with the difference: the folder `holds` something else. whole: also of what is no more.
    """
    if not path.exists():
        write_json(path, document)
        return
    advice = "use another --out"
    recorded = read_json_object(path, missing=f"can't tell whose results {path.parent} holds", advice=advice)
    if changed := changed_settings(recorded, document, whole=whole):
        shown = "; ".join(changed[:6]) + (f"; and {len(changed) - 6} more" if len(changed) > 6 else "")
        raise IncompatibleError(f"{path.parent} holds {holds} ({shown}); {advice}")


def save_results(document: ResultsDocument, folder: Path) -> None:
    """Writes `results.json` atomically. Raises `OutputError`."""
    write_json(folder / RESULTS_FILE, plain(document))
