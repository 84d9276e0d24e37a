"""What a task is: how a record of its data becomes a prompt and references, and how outputs are scored.

Knows nothing about files, the hub or models; `rescore.tasks.data` reads the records, the pipeline does the rest.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lattices.errors import InvalidDataError
from rescore.tasks.groups import digest

Record = Mapping[str, Any]
"""One line of a JSON lines file, or one row of a hub data set."""


@dataclass(frozen=True)
class Example:
    """One prompt to decode, with the answers that count as right; `id` is unique within its data.

    `passage` is the whole text that the base LM's perplexity is of, where the task has one. `group` is the key of the
    source that the example shares with others (`rescore.tasks.groups`); by default that of the prompt: no other has it.
    """

    id: str
    prompt: str
    references: tuple[str, ...]
    passage: str | None = None
    group: str = ""

    def __post_init__(self) -> None:
        if not self.group:
            object.__setattr__(self, "group", digest(self.prompt))


@dataclass(frozen=True)
class Metric:
    """A score in 0..1 of one output against its references (one at least); reports give the mean over examples."""

    name: str
    score: Callable[[str, tuple[str, ...]], float]


@dataclass(frozen=True)
class HubSource:
    """Where the hub keeps a task's data: the arguments of `datasets.load_dataset`."""

    path: str
    name: str | None
    split: str
    revision: str | None = None
    data_files: str | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What holds where the command line says nothing: the first so many examples, tokens of an output and a prompt."""

    examples: int | None = None
    new_tokens: int | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task: prompt, references, metrics, and where its data come from.

    fields: those that a record must have.
    template: the prompt, with names in braces that stand for text fields of the record, or for what `variables` makes
        of it. It is the whole record of how a prompt is made, so it belongs in cache keys and results.
    chat: whether the prompt is put into the base LM's chat template.
    row: gives the record of a row that may have another shape, None for a row that is not this task's.
    rows: says in words which rows are.
    passage: the text field that perplexity is of.
    group: gives the text of the source that examples share (a passage, a document, a conversation); without it only
        examples that ask the same are of one group.
    file: the task's own data (JSON lines).
    shared: what a file of a data folder is called that holds rows of several tasks, this one among them.
    hub: where the hub keeps its data; `without_hub` tells a user why it does not, and what to do.
    sample: a JSON lines file in the package that stands in where neither `--data` nor the hub gives data.
    definition: all that a user's own file says of the task (None: built in), part of what a trace is made of.
    """

    name: str
    description: str
    fields: tuple[str, ...]
    template: str
    references: Callable[[Record], tuple[str, ...]]
    metrics: tuple[Metric, ...] = ()
    chat: bool = True
    variables: Callable[[Record], Mapping[str, str]] | None = None
    row: Callable[[Record], Record | None] | None = None
    rows: str = ""
    passage: str | None = None
    group: Callable[[Record], str] | None = None
    limits: Limits = field(default_factory=Limits)
    file: Path | None = None
    shared: str = ""
    hub: HubSource | None = None
    without_hub: str = "it has no data set on the hub"
    sample: Path | None = None
    definition: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.variables is None and (unknown := [name for name in self._names() if name not in self.fields]):
            raise ValueError(f"the template of task {self.name!r} names {{{unknown[0]}}}, which is not in its fields")
        if len({metric.name for metric in self.metrics}) < len(self.metrics):
            raise ValueError(f"task {self.name!r} has two metrics of one name")

    def prompt(self, record: Record) -> str:
        """The prompt of a record. Raises `InvalidDataError` that names the field that is missing or no text."""
        if self.variables is not None:
            return self.template.format(**self.variables(record))
        return self.template.format(**{name: text_field(record, name) for name in self._names()})

    def example(self, record: Record, *, id: str) -> Example:
        """The example of a record. Raises `InvalidDataError` that names the field that is missing or wrong."""
        for name in self.fields:
            if name not in record:
                raise InvalidDataError(f"no field {name!r} (task {self.name} needs: {', '.join(self.fields)})")
        passage = None if self.passage is None else text_field(record, self.passage)
        source = "" if self.group is None else self.group(record).strip()
        return Example(id, self.prompt(record), self.references(record), passage, digest(source) if source else "")

    def _names(self) -> list[str]:
        return [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]


def text_field(record: Record, name: str) -> str:
    """The text in a field. Raises `InvalidDataError` that names the field if it is missing or no valid text."""
    if name not in record:
        raise InvalidDataError(f"no field {name!r}")
    return checked_text(record[name], name)


def only_reference(name: str) -> Callable[[Record], tuple[str, ...]]:
    """References for a task whose one reference is the text of the field `name`."""
    return lambda record: (text_field(record, name),)


def checked_text(value: object, name: str) -> str:
    """`value` of the field `name`, if it is text. Raises `InvalidDataError` that says what it is instead."""
    if not isinstance(value, str):
        raise InvalidDataError(f"the field {name!r} holds {json_kind(value)} where text is needed")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise InvalidDataError(f"the field {name!r} holds half a surrogate pair, which is no valid text") from error
    return value


def text_list(value: object, name: str) -> tuple[str, ...]:
    """A list of text, one at least, repeats left out. Raises `InvalidDataError` that names the field if it is none."""
    if not isinstance(value, list):
        raise InvalidDataError(f"the field {name!r} holds {json_kind(value)} where a list of text is needed")
    if not value:
        raise InvalidDataError(f"the field {name!r} holds an empty list where text is needed")
    return tuple(dict.fromkeys(checked_text(entry, name) for entry in value))


def json_kind(value: object) -> str:
    """What JSON calls a value, for messages."""
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return kinds.get(type(value), "an object" if isinstance(value, Mapping) else "a list")
