"""Plug-ins by their spec, `name:key=value,key=value`: rescorers, drafters, acceptance rules and peers.

Others register an entry point in the group of their kind: a callable that takes the values as keyword arguments and
returns the object.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import EntryPoints, entry_points
from typing import Any, Generic, TypeVar

import msgspec

from lattices.errors import RescoreError, UnknownNameError
from rescore.checks import check_alpha

MAIN = ""  # the key of a value that is given without one
_KEY = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VALUES = {float: "a number", int: "a whole number", int | None: "a whole number", bool: "true or false"}
Made = TypeVar("Made")


def plug_ins(group: str) -> EntryPoints:
    """What other packages register in a group of entry points."""
    return _registered(group, tuple(map(_changed, sys.path)))


@lru_cache
def _registered(group: str, _: tuple[tuple[str, int], ...]) -> EntryPoints:
    return entry_points(group=group)  # reads the files of every package


def _changed(place: str) -> tuple[str, int]:
    """A place where packages are installed, and when that was last done."""
    with suppress(OSError):
        return place, os.stat(place or os.curdir).st_mtime_ns
    return place, 0


def named(made: Made, name: str) -> Made:
    """The same under a name: a copy, for another package may give one object for all of its specs."""
    changed = copy.copy(made)
    changed.name = name  # type: ignore[attr-defined]
    return changed


def parse_spec(text: str, option: str = "--rescorer") -> tuple[str, dict[str, str]]:
    """The name and the arguments of `name:key=value,key=value`; a first value without key is under `MAIN`.

    What follows a comma and does not begin with `key=` belongs to the value before: a path may have commas in it.
    Raises `RescoreError` for a colon or a key with nothing after it, and for a key that comes twice.
    """
    name, colon, values = text.partition(":")
    if colon and not values:
        raise RescoreError(f"{option} {text}: nothing stands after the colon; write {name} or {name}:KEY=VALUE")
    arguments: dict[str, str] = {}
    key = MAIN
    for part in values.split(",") if values else ():
        if match := _KEY.fullmatch(part):
            key = match[1]
            if key in arguments:
                raise RescoreError(f"{option} {text}: {key} is there twice; give it once")
            arguments[key] = match[2]
        else:
            arguments[key] = f"{arguments[key]},{part}" if key in arguments else part
    if empty := [key for key, value in arguments.items() if not value]:
        raise RescoreError(f"{option} {text}: {empty[0] or 'a comma'} has no value; give one, or leave it out")
    return name, arguments


def format_spec(name: str, arguments: Mapping[str, str]) -> str:
    """The spec that `parse_spec` gives these of."""
    values = ",".join(value if key == MAIN else f"{key}={value}" for key, value in arguments.items())
    return f"{name}:{values}" if values else name


@dataclass(frozen=True)
class Registry(Generic[Made]):
    """All plug-ins of one kind.

    word: what one is called; option: where its spec is given.
    kind: what each is an object of, at this place for users.
    group: of entry points.
    package: where `built_in` ones lie, `module:name` by name; they are imported when first needed.
    weight: the key of the weight, which objects with `alpha` take beside their own keys (none: "").
    """

    word: str
    option: str
    kind: Any
    group: str
    package: str
    built_in: dict[str, str | Callable[..., Made]]
    weight: str = ""

    def names(self) -> list[str]:
        """Names that `load` takes, sorted."""
        return sorted({*self.built_in, *plug_ins(self.group).names})

    def has(self, spec: str) -> bool:
        """Whether a spec is of this kind, by its name."""
        name, _, _ = spec.partition(":")
        return name in self.built_in or name in plug_ins(self.group).names

    def load(self, spec: str) -> Made:
        """The object of a spec; a built-in one goes before another package's of that name.

        Raises `UnknownNameError` with the nearest names or keys, `RescoreError` for a value that is none or if another
        package's can't be loaded.
        """
        name, arguments = parse_spec(spec, self.option)
        if name in self.built_in:
            return self._build(name, self._built_in(name), arguments)
        for point in plug_ins(self.group).select(name=name):
            origin = f"the {self.word} {name!r} of the package {point.dist.name if point.dist else point.value}"
            try:
                other = self._build(name, point.load(), arguments)
            except RescoreError:
                raise
            except Exception as error:  # another package's code may raise anything
                raise RescoreError(f"can't load {origin} ({error}); mend or uninstall that package") from error
            if not isinstance(other, self.kind):
                raise RescoreError(
                    f"{origin} is no {self.package}.{self.kind.__name__} ({point.value}); mend or uninstall that "
                    "package"
                )
            return other
        raise UnknownNameError(self.word, name, self.names())

    def load_named(self, spec: str) -> Made:
        """The object of a spec, `named` by it. Raises as `load`."""
        return named(self.load(spec), spec)

    def _built_in(self, name: str) -> Callable[..., Made]:
        place = self.built_in[name]
        if not isinstance(place, str):
            return place
        module, _, kind = place.partition(":")
        factory: Callable[..., Made] = getattr(importlib.import_module(f"{self.package}.{module}"), kind)
        return partial(factory, name) if name.startswith("neural-") else factory

    def _build(self, name: str, factory: Callable[..., Any], arguments: Mapping[str, str]) -> Made:
        """What a factory makes of its arguments, each turned into the type that its parameter has."""
        kinds = {key: p.annotation for key, p in inspect.signature(factory, eval_str=True).parameters.items()}
        keys = list(kinds)
        values: dict[str, Any] = {}
        for key, text in arguments.items():
            key = keys[0] if key == MAIN and keys else key
            if key in values:
                raise RescoreError(f"{self.option} {name}: {key} is there twice, once without its name; give it once")
            if key not in keys and (key != self.weight or not key):
                raise self._unknown_key(name, key, factory, keys)
            values[key] = self._value(name, key, text, kinds.get(key, float))
        weight = None if self.weight in keys else values.pop(self.weight, None)
        made: Made = factory(**values)
        if weight is None or not isinstance(made, self.kind):
            return made
        if getattr(made, self.weight) is None:
            raise self._unknown_key(name, self.weight, factory, keys)
        check_alpha(weight)
        return made.weighted(weight)  # type: ignore[attr-defined, no-any-return]

    def _value(self, name: str, key: str, text: str, kind: Any) -> Any:
        if kind in (inspect.Parameter.empty, str):
            return text
        try:
            return msgspec.convert(text, kind, strict=False)
        except msgspec.ValidationError:
            what = _VALUES.get(kind, kind)
            raise RescoreError(f"{self.option} {name}: {key} is {what}, and {text!r} is none") from None

    def _unknown_key(self, name: str, key: str, factory: Callable[..., Any], keys: list[str]) -> RescoreError:
        weighted = getattr(getattr(factory, "func", factory), self.weight or "alpha", None) is not None
        known = [*keys, *([self.weight] if weighted else [])]
        if not known:
            return RescoreError(f"the {self.word} {name} takes no text after a colon; write {self.option} {name}")
        what = f"takes no {key}" if key != MAIN else "takes no value without its key"
        return RescoreError(f"the {self.word} {name} {what}; it takes {', '.join(known)}")
