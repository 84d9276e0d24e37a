"""The examples of a task: from the user's file, else the task's own file or its hub data set, else the sample that it
embeds.

Which of these it was is part of the result (`TaskData.source`), and the sample is never used without a notice.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError, unreadable
from lm.files import sha256_of_file
from lm.text_files import check_whole, identify, rows, rows_file
from rescore.tasks.base import Example, HubSource, Record, Task, checked_text, json_kind
from rescore.tasks.groups import digest, one_of_each_first

HUB_TIMEOUT = 3.0  # seconds for the hub to answer; `datasets` alone retries an unreachable hub for some 23 s
REFUSALS = {403, 407, 429}  # statuses by which a proxy or the hub turns everybody away; the request carries no token


@dataclass(frozen=True)
class TaskData:
    """Examples and their origin.

    source: a JSON object for results: `kind` (`file`, `hub` or `sample`), where it was, `sha256` of all of it, whatever
        the limit, and where examples were left out their ids, `left_out`.
    notice: a line for the user if the data are not the task's own.
    """

    examples: tuple[Example, ...]
    source: dict[str, Any]
    notice: str | None = None


def load_examples(
    task: Task, *, data: Path | None = None, limit: int | None = None, leave_out: Collection[str] = ()
) -> TaskData:
    """`limit` examples (default: the task's limit, else all) of `task`, from `data` (rows of any kind that
    `lm.text_files` reads), the task's file, the hub or the sample.

    Their order is that of the data, but one of each group stands before a second one of any, which before the third
    ones (`rescore.tasks.groups.one_of_each_first`): with a limit as many sources as there are, and the first so many of
    a smaller limit are those of a larger one. `leave_out`: digests of prompts that are left out, before the limit
    counts.

    Rows that are not the task's (`Task.row`) are passed over and do not count. An example's id is the record's `id`,
    else its line number; one that came before gets `#line` appended. With no network the hub's data set is taken from
    the cache of `datasets` if it is there. Raises `RescoreError` if there are no data to be had or the limit is below
    1, `InvalidDataError` that names line and field of a bad record.
    """
    if limit is not None and limit < 1:
        raise RescoreError(f"the limit of examples must be at least 1, not {limit}; leave it out to take all")
    selection = _Selection(task, limit or task.limits.examples, leave_out)
    if (path := data or task.file) is not None:
        return _from_file(selection, path, kind="file")
    missing = task.without_hub
    if task.hub is not None:
        try:
            return _from_hub(selection, task.hub)
        except _UnreachableError as error:
            missing = str(error)
    if task.sample is None:
        raise RescoreError(
            f"no data for task {task.name}: {missing}; give --data PATH, JSON lines with {wanted_rows(task)}"
        )
    sample = _from_file(selection, task.sample, kind="sample")
    notice = (
        f"{missing}; using {len(sample.examples)} examples of the sample embedded for task {task.name}, "
        "whose numbers do not compare with the real data set's (--data PATH gives other data)"
    )
    return replace(sample, notice=notice)


def file_in(folder: Path, task: Task) -> Path:
    """The file of a task's rows in a data folder: called like the task, else one that it shares with others; the first,
    which need not be there, where there is neither. Raises as `rows_file`."""
    own = rows_file(folder, task.name)
    shared = rows_file(folder, task.shared) if task.shared and not own.exists() else own
    return shared if shared.exists() else own


def wanted_rows(task: Task) -> str:
    """The rows of a task's data, in words."""
    return task.rows or f"the {'field' if len(task.fields) == 1 else 'fields'} {', '.join(task.fields)}"


@dataclass(frozen=True)
class _Selection:
    """Which examples of a task are taken: see `load_examples`."""

    task: Task
    limit: int | None
    leave_out: Collection[str]

    def read(self, records: Iterable[tuple[int, Record]], *, where: str) -> list[Example]:
        """The examples of the records, as far as they are needed: until there are `limit` of different groups."""
        task, groups, examples = self.task, set[str](), dict[str, Example]()
        for number, row in records:
            try:
                record = task.row(row) if task.row else row
                if record is None:
                    continue
                identity = _identity(record, number)
                while identity in examples:
                    identity = f"{identity}#{number}"
                example = examples[identity] = task.example(record, id=identity)
            except InvalidDataError as error:
                raise InvalidDataError(f"{where} {number}: {error}") from error
            if self._takes(example):
                groups.add(example.group)
                if len(groups) == self.limit:
                    break
        return list(examples.values())

    def data(self, examples: list[Example], source: dict[str, Any]) -> TaskData:
        """The first `limit` of the examples that are not left out, one of each group first."""
        taken = [example for example in examples if self._takes(example)]
        if not taken:
            raise RescoreError(f"all {len(examples)} examples of {self.task.name} are to be left out; drop --leave-out")
        if self.leave_out:
            source = {**source, "left_out": [example.id for example in examples if not self._takes(example)]}
        order = one_of_each_first([example.group for example in taken])
        return TaskData(tuple(taken[place] for place in order[: self.limit]), source)

    def _takes(self, example: Example) -> bool:
        return not self.leave_out or digest(example.prompt) not in self.leave_out


def _from_file(selection: _Selection, path: Path, *, kind: str) -> TaskData:
    task = selection.task
    if not os.path.isfile(path):  # unlike `Path.is_file`, no error for a name too long or a folder closed to us
        try:
            path.stat()
        except PermissionError as error:
            raise unreadable(path, error) from error
        except OSError:
            pass  # not there
        raise RescoreError(
            f"{'not a file' if os.path.exists(path) else 'no such file'}: {path}; "
            f"the data of task {task.name} are JSON lines with {wanted_rows(task)}"
        )
    file, sha256 = identify(path, wants_rows=True), sha256_of_file(path)
    examples = selection.read(rows(file), where=f"{path} {file.unit}")
    check_whole(file)
    if sha256_of_file(path) != sha256:
        raise IncompatibleError(f"{path} was replaced while it was read; run the command again")
    if not examples:
        nothing = "is empty" if next(rows(file), None) is None else f"has no rows of task {task.name}"
        raise InvalidDataError(f"{path} {nothing}; task {task.name} needs {wanted_rows(task)}")
    # The embedded sample goes by its name alone: where the package is installed says nothing about the data.
    shown = str(path) if kind == "file" else path.name
    return selection.data(examples, {"kind": kind, "path": shown, "sha256": sha256})


def _identity(record: Record, number: int) -> str:
    value = record.get("id")
    if value is None:
        return str(number)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise InvalidDataError(f"the field 'id' holds {json_kind(value)} where text or a whole number is needed")
    return checked_text(value, "id")


class _UnreachableError(Exception):
    """The hub can't be reached and its data set is not in the local cache."""


def _from_hub(selection: _Selection, hub: HubSource) -> TaskData:
    from datasets import config, load_dataset
    from datasets.utils import logging as datasets_logging

    verbosity = datasets_logging.get_verbosity()
    offline_by_choice = bool(config.HF_HUB_OFFLINE)
    trouble = "HF_HUB_OFFLINE is set" if offline_by_choice else _hub_trouble(hub)
    arguments: dict[str, Any] = {"name": hub.name, "split": hub.split, "revision": hub.revision}
    if hub.data_files is not None:
        arguments["data_files"] = hub.data_files
    try:
        # In its offline mode `datasets` goes straight to its cache, instead of there after all its retries.
        config.HF_HUB_OFFLINE = trouble is not None
        datasets_logging.set_verbosity_error()  # that it takes what is in its cache is no news
        dataset = load_dataset(hub.path, **arguments)
    except Exception as error:  # `datasets` raises its own errors, the hub's, httpx's, pyarrow's and Python's
        if isinstance(error, ConnectionError):
            trouble = trouble or "the connection to the hub broke"
        if trouble:
            raise _UnreachableError(f"{trouble} and {hub.path} is not in the local cache") from error
        summary = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RescoreError(
            f"can't load {hub.path} from the hub ({summary}); try again later, or give --data PATH"
        ) from error
    finally:
        config.HF_HUB_OFFLINE = offline_by_choice
        datasets_logging.set_verbosity(verbosity)
    sha256 = hashlib.sha256()
    for record in dataset:
        sha256.update(json.dumps(record, sort_keys=True, default=str).encode() + b"\n")
    examples = selection.read(enumerate(dataset, start=1), where=f"{hub.path} record")
    if not examples:
        nothing = f"no records of task {selection.task.name} in its split {hub.split}"
        raise InvalidDataError(f"{hub.path} holds {nothing}; give --data PATH")
    source = {"kind": "hub", "path": hub.path, **arguments, "sha256": sha256.hexdigest()}
    return selection.data(examples, source)


def _hub_trouble(hub: HubSource, timeout: float = HUB_TIMEOUT) -> str | None:
    """What keeps the hub (`HF_ENDPOINT`, proxies honoured) from serving a data set, found out in `timeout` seconds.

    Asks for the file that `datasets` asks for first. An answer such as "not found" is no trouble here: `datasets`
    tells it better. The request runs in a thread of its own because looking up a host name takes no timeout.
    """
    from huggingface_hub import get_session, hf_hub_url

    url = hf_hub_url(hub.path, "README.md", repo_type="dataset", revision=hub.revision)
    statuses: list[int] = []

    def ask() -> None:
        try:
            statuses.append(get_session().head(url, timeout=timeout).status_code)
        except Exception:  # whatever keeps it from answering, it is not there for us
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    if not statuses:
        return "the hub can't be reached"
    if statuses[0] >= 500 or statuses[0] in REFUSALS:
        return f"the hub refuses to serve (HTTP {statuses[0]})"
    return None
