"""A user's own task: one YAML file, no code (docs/formats.md has an example and all keys).

source:      {file: JSON lines} or {hub: id, split, config, revision, files}
prompt:      text with fields of a record in braces
reference:   a field with the right answer or a list of them, dots into objects (answers.text)
metric:      a name or a list of names
limits:      {examples, new_tokens, prompt_tokens}
name, description, chat, passage, group
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lattices.errors import InvalidDataError, RescoreError
from lattices.paths import user_path
from lm.yaml_input import Value, read_yaml
from rescore.tasks.base import HubSource, Limits, Metric, Record, Task, checked_text, json_kind, text_list
from rescore.tasks.metrics import find_metric

SUFFIXES = (".yaml", ".yml")
KEYS = ("name", "description", "source", "prompt", "reference", "metric", "limits", "chat", "passage", "group")
SOURCE_KEYS = ("file", "hub", "config", "split", "revision", "files")
LIMIT_KEYS = ("examples", "new_tokens", "prompt_tokens")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def is_task_file(name: str) -> bool:
    """Whether what is given for a task is a YAML file's path, not a name."""
    return name.lower().endswith(SUFFIXES)


def load_task_file(path: Path) -> Task:
    """The task of a YAML file.

    A relative `source.file` is looked for beside the YAML file; the name is the file's unless it gives one. Raises
    `RescoreError` if the file can't be read, `InvalidDataError` with the line of what is wrong in it.
    """
    top = read_yaml(path)
    fields = top.fields(KEYS, required=("source", "prompt"))
    file, hub = _source(fields["source"], path)
    template, used = _template(fields["prompt"])
    reference = _field_path(fields["reference"]) if "reference" in fields else ""
    limits = fields["limits"].fields(LIMIT_KEYS) if "limits" in fields else {}
    passage = _text(fields["passage"]) if "passage" in fields else None
    group = _field_path(fields["group"]) if "group" in fields else ""
    return Task(
        name=_name(fields.get("name"), path),
        description=" ".join(_text(fields["description"]).split()) if "description" in fields else f"of {path.name}",
        # Of a path into objects, the field that it begins with.
        fields=tuple(dict.fromkeys([*used, *(path.split(".")[0] for path in (reference, passage, group) if path)])),
        template=template,
        references=_references(reference),
        metrics=_metrics(fields["metric"], bool(reference)) if "metric" in fields else (),
        chat=fields["chat"].flag() if "chat" in fields else True,
        passage=passage,
        group=_group(group) if group else None,
        limits=Limits(**{key: limit.whole(least=1) for key, limit in limits.items()}),
        file=file,
        hub=hub,
        definition=_definition(top),
    )


def _text(value: Value) -> str:
    text = value.text()
    try:
        text.encode()
    except UnicodeEncodeError:  # YAML can spell half a surrogate pair, which no tokenizer takes
        raise value.wrong("half a surrogate pair is no valid text; write the character itself") from None
    return text


def _name(value: Value | None, path: Path) -> str:
    name = path.stem if value is None else _text(value)
    if _NAME.fullmatch(name):
        return name
    if value is None:
        raise InvalidDataError(
            f"{path} gives no name, and its own is none of letters, digits, dots, _ and -; add name: my-task"
        )
    raise value.wrong(f"{name[:80]!r} is no name; give up to 64 letters, digits, dots, _ and -")


def _template(value: Value) -> tuple[str, list[str]]:
    """The template of a prompt and the fields that it names."""
    template = _text(value)
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise value.wrong(f"{error}; a field stands in braces, {{{{ and }}}} are braces themselves") from None
    used = []
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if not name or form or conversion or re.search(r"[][.\s]", name) or name.isdecimal():
            raise value.wrong(f"{{{name}}} names no field; give its bare name in braces, like {{text}}")
        used.append(name)
    if not used:
        raise value.wrong("no field in braces, so every prompt would be the same; add one, like {text}")
    return template, used


def _field_path(value: Value) -> str:
    path = _text(value)
    if not all(path.split(".")):
        raise value.wrong(f"{path!r} is no field; give its name, with dots into objects (answers.text)")
    return path


def _references(path: str) -> Callable[[Record], tuple[str, ...]]:
    """What gives the references of a record: text or a list of text at the path; none without a path."""

    def references(record: Record) -> tuple[str, ...]:
        value = _at(record, path)
        if isinstance(value, str):
            return (checked_text(value, path),)
        if not isinstance(value, list):
            raise InvalidDataError(f"the field {path!r} holds {json_kind(value)} where text or a list of it is needed")
        return text_list(value, path)

    return references if path else lambda record: ()


def _group(path: str) -> Callable[[Record], str]:
    """What gives the source of a record: the text or whole number at the path."""

    def group(record: Record) -> str:
        value = _at(record, path)
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else checked_text(value, path)

    return group


def _at(record: Record, path: str) -> object:
    value: object = record
    for step in path.split("."):
        if not isinstance(value, Mapping) or step not in value:
            raise InvalidDataError(f"no field {path!r}")
        value = value[step]
    return value


def _metrics(value: Value, has_reference: bool) -> tuple[Metric, ...]:
    if not has_reference:
        raise value.wrong("a metric needs answers to compare with; add reference: FIELD")
    metrics: list[Metric] = []
    for entry in value.items():
        name = _text(entry)
        try:
            metric = find_metric(name)
        except RescoreError as error:
            raise entry.wrong(str(error)) from None
        if metric in metrics:
            raise entry.wrong(f"the metric {metric.name!r} is there twice; keep one")
        metrics.append(metric)
    return tuple(metrics)


def _source(value: Value, path: Path) -> tuple[Path | None, HubSource | None]:
    """Where the data lie: a file or a place on the hub, the other one None."""
    fields = value.fields(SOURCE_KEYS)
    if "file" in fields:
        if others := [key for key in SOURCE_KEYS if key != "file" and key in fields]:
            raise value.wrong(f"file and {others[0]} can't stand together; keep one of file and hub")
        name = _text(fields["file"])
        try:
            return path.parent / user_path(name, "file"), None
        except RescoreError as error:
            raise fields["file"].wrong(str(error)) from None
    for key in ("hub", "split"):
        if key not in fields:
            raise value.wrong(f"the key {key!r} is missing; give file: PATH, or hub: ID and split: NAME")
    text = {key: _text(entry) for key, entry in fields.items()}
    return None, HubSource(
        text["hub"], text.get("config"), text["split"], text.get("revision"), data_files=text.get("files")
    )


def _definition(value: Value) -> Any:
    """All that the file says, as plain values: what makes two versions of a task two tasks."""
    if value.is_mapping:
        return {key: _definition(entry) for key, entry in value.fields(None).items()}
    entries = value.items()
    return str(value.node.value) if entries == [value] else [_definition(entry) for entry in entries]
