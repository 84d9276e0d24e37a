"""YAML files that users write: every value knows its line, unknown keys are refused with the nearest one.

`read_yaml` gives the top `Value`; its methods check types and give plain Python values. Only what data needs is read:
no tags, no anchors, no key twice.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lattices.errors import InvalidDataError, RescoreError

LARGEST = 1 << 20  # bytes; a file that a person writes is far smaller
TAG = "tag:yaml.org,2002:"
DECIMAL = re.compile(
    r"[-+]?(0|[1-9][0-9]*|[1-9][0-9]{0,2}(_[0-9]{3})+)?(\.[0-9]*)?([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)", re.I
)
NAME = re.compile(r"\w+")
PLACE = re.compile(r"\$\{(\w*)\}")  # where the value of a name goes
KINDS = {"str": "text", "int": "a number", "float": "a number", "bool": "true or false", "null": "nothing"}


@dataclass(frozen=True)
class Value:
    """One value of a YAML file: the file, its dotted name (empty at the top) and its node.

    The methods give it as what it should be, and raise `InvalidDataError` with the line if it is not.
    """

    path: Path
    name: str
    node: yaml.Node

    @property
    def is_null(self) -> bool:
        """Whether nothing (or null, or ~) stands there."""
        return bool(self.node.tag == TAG + "null")

    @property
    def is_mapping(self) -> bool:
        """Whether `fields` can take it."""
        return isinstance(self.node, yaml.MappingNode)

    def wrong(self, what: str) -> InvalidDataError:
        """The error that says so of this value, with its line and name."""
        return self._wrong(self.node, f"{self.name}: {what}" if self.name else what)

    def _wrong(self, node: yaml.Node, what: str) -> InvalidDataError:
        return InvalidDataError(f"{self.path} line {node.start_mark.line + 1}: {what}")

    def fields(self, known: Collection[str] | None, *, required: Collection[str] = ()) -> dict[str, Value]:
        """The values of a mapping by key; one whose value is null counts as left out.

        `known`: keys that may be there (None: any); another is refused with the nearest of them.
        """
        if not isinstance(self.node, yaml.MappingNode):
            raise self.wrong(f"{self._kind()} stands where keys with values (key: value) are needed")
        values: dict[str, Value] = {}
        for key_node, node in self.node.value:
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.value:
                raise self._wrong(key_node, "a key must be a plain word")
            key = str(key_node.value)
            if key in values:
                raise self._wrong(key_node, f"the key {key!r} is there twice; keep one")
            if known is not None and key not in known:
                of = f" in {self.name!r}" if self.name else ""
                raise self._wrong(key_node, f"unknown key {key!r}{of}; {_nearest(key, known)}")
            values[key] = Value(self.path, f"{self.name}.{key}" if self.name else key, node)
        values = {key: value for key, value in values.items() if not value.is_null}
        if missing := [key for key in required if key not in values]:
            raise self.wrong(f"the key {missing[0]!r} is missing or empty; add it")
        return values

    def items(self) -> list[Value]:
        """The entries of a list, one at least; a single value counts as a list of one."""
        if not isinstance(self.node, yaml.SequenceNode):
            return [self]
        if not self.node.value:
            raise self.wrong("the list is empty; give one entry at least, or leave the key out")
        return [Value(self.path, f"{self.name}[{place}]", node) for place, node in enumerate(self.node.value, start=1)]

    def text(self) -> str:
        """Text with something in it; what YAML takes for a number or a truth value needs quotes."""
        if self._tag() != "str":
            quotes = "; put it in quotes" if isinstance(self.node, yaml.ScalarNode) and not self.is_null else ""
            raise self.wrong(f"{self._kind()} stands where text is needed{quotes}")
        text = str(self.node.value)
        if not text.strip():
            raise self.wrong("the text is empty; fill it in, or leave the key out")
        return text

    def whole(self, *, least: int | None = None) -> int:
        """A whole number, `least` or more."""
        if self._tag() != "int":
            raise self.wrong(f"{self._kind()} stands where a whole number is needed")
        value: int = self._plain()
        if least is not None and value < least:
            raise self.wrong(f"{value} is too small; give {least} or more")
        return value

    def number(self) -> float:
        """A finite number, whole or not."""
        value = math.nan
        if self._tag() in ("int", "float"):
            value = float(self._plain())
        elif self._tag() == "str" and self.node.style is None:  # YAML 1.1 takes 1e-3, without a dot, for text
            with suppress(ValueError):
                value = float(self.node.value)
        if not math.isfinite(value):
            raise self.wrong(f"{self._kind()} stands where a finite number is needed")
        return value

    def flag(self) -> bool:
        """true or false."""
        if self._tag() != "bool":
            raise self.wrong(f"{self._kind()} stands where true or false is needed")
        return bool(self._plain())

    def choice(self, known: Collection[str]) -> str:
        """Text that is one of `known`; another is refused with the nearest."""
        text = self.text()
        if text not in known:
            raise self.wrong(f"{text!r} is not known; {_nearest(text, known)}")
        return text

    def _tag(self) -> str:
        return str(self.node.tag).removeprefix(TAG) if isinstance(self.node, yaml.ScalarNode) else ""

    def _plain(self) -> Any:
        # YAML 1.1 reads 010 as 8, 0x10 as 16 and 1:30 as 90: nobody means that here.
        if self._tag() in ("int", "float") and not DECIMAL.fullmatch(self.node.value):
            raise self.wrong(f"{self.node.value!r} can be read in two ways; write it in plain digits, like 10 or 0.5")
        try:
            return yaml.SafeLoader("").construct_object(self.node)
        except (ValueError, yaml.YAMLError):
            raise self.wrong(f"{self.node.value!r} can't be read") from None

    def _kind(self) -> str:
        if isinstance(self.node, yaml.MappingNode):
            return "a mapping (key: value)"
        if isinstance(self.node, yaml.SequenceNode):
            return "a list"
        kind = KINDS.get(self._tag(), f"a {self._tag()}")
        text = str(self.node.value)
        return kind if self.is_null else f"{kind} ({text[:40]!r}{'...' if len(text) > 40 else ''})"


def _nearest(text: str, known: Collection[str]) -> str:
    """What to do about a word that is none of those known."""
    near = difflib.get_close_matches(text, sorted(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"


def named_values(top: Value, key: str, given: Mapping[str, str]) -> Value:
    """The document with what stands for names in it: `${name}` in a value is what the mapping under `key`, which goes,
    or else (first) `given` says of the name.

    Raises `InvalidDataError` with the line for a name that the mapping lacks or that is no word, and `RescoreError` for
    a given one that it lacks.
    """
    if not isinstance(top.node, yaml.MappingNode):
        return top
    entries = [(name, node) for name, node in top.node.value if name.value == key]
    texts: dict[str, str] = {}
    for name, value in Value(top.path, key, entries[0][1]).fields(None).items() if entries else ():
        if not isinstance(value.node, yaml.ScalarNode) or not NAME.fullmatch(name):
            raise value.wrong("give a name of letters, digits and _ with one value")
        texts[name] = str(value.node.value)
    if unknown := [name for name in given if name not in texts]:
        known = f"{_nearest(unknown[0], texts)}" if texts else f"it has no {key}"
        raise RescoreError(f"{top.path} has no name {unknown[0]!r} to be given a value; {known}")
    texts |= given

    def replaced(node: yaml.Node) -> yaml.Node:
        if isinstance(node, yaml.CollectionNode):
            node.value = [
                tuple(map(replaced, each)) if isinstance(each, tuple) else replaced(each) for each in node.value
            ]
        elif "${" in node.value:
            for name in PLACE.findall(node.value):
                if name not in texts:
                    raise top._wrong(node, f"${{{name}}} stands for nothing; give it a value under {key}")
            text = PLACE.sub(lambda match: texts[match[1]], node.value)
            resolve = yaml.SafeLoader("").resolve
            tag = resolve(yaml.ScalarNode, text, (node.style is None, node.style is not None))
            return yaml.ScalarNode(tag, text, node.start_mark, node.end_mark, node.style)
        return node

    rest = [pair for pair in top.node.value if pair not in entries]
    return Value(top.path, top.name, replaced(yaml.MappingNode(top.node.tag, rest, top.node.start_mark)))


def read_yaml(path: Path) -> Value:
    """The one document of a YAML file.

    Raises `RescoreError` if there is no such file, `InvalidDataError` with the line if it is no YAML, is empty, or has
    tags or anchors.
    """
    try:
        content = path.read_bytes() if path.stat().st_size <= LARGEST else None
    except OSError as error:
        raise RescoreError(f"can't read {path}: {error.strerror}; give a YAML file") from error
    if content is None:
        raise InvalidDataError(f"{path} is larger than {LARGEST >> 20} MB; give a YAML file written by hand")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InvalidDataError(f"{path} line {line}: no valid UTF-8; save the file as UTF-8") from None
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            where = f"{path} line {event.start_mark.line + 1}"
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise InvalidDataError(f"{where}: anchors and aliases (& and *) are not taken; write the value out")
            if isinstance(event, yaml.NodeEvent) and getattr(event, "tag", None):  # what it makes is Python's affair
                raise InvalidDataError(f"{where}: the tag {event.tag!r} is not taken; write the value without it")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InvalidDataError(f"{path} line {line}: a control character ({error.character!r}); remove it") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}" if mark else ""
        problem = " ".join((error.problem or error.context or "this is no YAML").split())
        raise InvalidDataError(f"{path}{where}: {problem}; mend the YAML there") from None
    except RecursionError:
        raise InvalidDataError(f"{path} is nested too deep; give lists and keys with values") from None
    if node is None:
        raise InvalidDataError(f"{path} is empty; give keys with values (key: value)")
    return Value(path, "", node)
