"""Rescorers by their spec, `name:key=value,key=value`.

Others register an entry point in the group `rescore.rescorers`: a callable that takes the values as keyword arguments
and returns a `Rescorer`. See `docs/rescorers.md`.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import entry_points
from typing import Any

import msgspec

from lattices.errors import RescoreError, UnknownNameError
from rescore.checks import check_alpha
from rescore.rescorers.base import Context, Rescorer, Target

__all__ = ["Context", "Rescorer", "Target", "format_spec", "load_rescorer", "parse_spec", "rescorer_names"]

ENTRY_POINTS = "rescore.rescorers"
JOINT = "joint"
BUILT_IN: dict[str, str | Callable[..., Rescorer]] = {  # by their places in this folder, imported when first needed
    "none": "unrescored:Unrescored",
    "oracle": "oracle:Oracle",
    "ngram": "ngram:Ngram",
    "context-ngram": "context_ngram:ContextNgram",
    JOINT: "joint:Joint",
    "learned-bigram": "learned_bigram:LearnedBigram",
    "lookup": "lookup:PromptLookup",
    "neural": "neural:Neural",
    "ngram-neural": "ngram_neural:NgramNeural",
    **dict.fromkeys(("neural-32m", "neural-61m", "neural-94m"), "neural:Neural"),
}
MAIN = ""  # the key of a value that is given without one
WEIGHT = "alpha"  # the key that every rescorer with a weight takes
_KEY = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VALUES = {float: "a number", int: "a whole number", bool: "true or false"}


def rescorer_names() -> list[str]:
    """Names that `load_rescorer` takes, sorted."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def parse_spec(text: str) -> tuple[str, dict[str, str]]:
    """The name and the arguments of `name:key=value,key=value`; a first value without key is under `MAIN`.

    What follows a comma and does not begin with `key=` belongs to the value before: a path may have commas in it.
    Raises `RescoreError` for a colon or a key with nothing after it, and for a key that comes twice.
    """
    name, colon, values = text.partition(":")
    if colon and not values:
        raise RescoreError(f"--rescorer {text}: nothing stands after the colon; write {name} or {name}:KEY=VALUE")
    arguments: dict[str, str] = {}
    key = MAIN
    for part in values.split(",") if values else ():
        if match := _KEY.fullmatch(part):
            key = match[1]
            if key in arguments:
                raise RescoreError(f"--rescorer {text}: {key} is there twice; give it once")
            arguments[key] = match[2]
        else:
            arguments[key] = f"{arguments[key]},{part}" if key in arguments else part
    if empty := [key for key, value in arguments.items() if not value]:
        raise RescoreError(f"--rescorer {text}: {empty[0] or 'a comma'} has no value; give one, or leave it out")
    return name, arguments


def format_spec(name: str, arguments: Mapping[str, str]) -> str:
    """The spec that `parse_spec` gives these of."""
    values = ",".join(value if key == MAIN else f"{key}={value}" for key, value in arguments.items())
    return f"{name}:{values}" if values else name


def load_rescorer(spec: str) -> Rescorer:
    """The rescorer of a spec; a built-in one goes before another package's of that name.

    Raises `UnknownNameError` with the nearest names or keys, `RescoreError` for a value that is none or if another
    package's rescorer can't be loaded.
    """
    name, arguments = parse_spec(spec)
    if name in BUILT_IN:
        built_in: Rescorer = _build(name, _built_in(name), arguments)
        return built_in
    for point in entry_points(group=ENTRY_POINTS, name=name):
        origin = f"the rescorer {name!r} of the package {point.dist.name if point.dist else point.value}"
        try:
            rescorer = _build(name, point.load(), arguments)
        except RescoreError:
            raise
        except Exception as error:  # another package's code may raise anything
            raise RescoreError(f"can't load {origin} ({error}); mend or uninstall that package") from error
        if not isinstance(rescorer, Rescorer):
            raise RescoreError(
                f"{origin} is no rescore.rescorers.Rescorer ({point.value}); mend or uninstall that package"
            )
        return rescorer
    raise UnknownNameError("rescorer", name, rescorer_names())


def _built_in(name: str) -> Callable[..., Rescorer]:
    place = BUILT_IN[name]
    if not isinstance(place, str):
        return place
    module, _, kind = place.partition(":")
    factory: Callable[..., Rescorer] = getattr(importlib.import_module(f"{__name__}.{module}"), kind)
    return partial(factory, name) if name.startswith("neural-") else factory


def _build(name: str, factory: Callable[..., Any], arguments: Mapping[str, str]) -> Any:
    """What a factory makes of its arguments, each turned into the type that its parameter has."""
    kinds = {key: p.annotation for key, p in inspect.signature(factory, eval_str=True).parameters.items()}
    keys = list(kinds)
    values: dict[str, Any] = {}
    for key, text in arguments.items():
        key = keys[0] if key == MAIN and keys else key
        if key in values:
            raise RescoreError(f"--rescorer {name}: {key} is there twice, once without its name; give it once")
        if key not in (*keys, WEIGHT):
            raise _unknown_key(name, key, factory, keys)
        values[key] = _value(name, key, text, kinds.get(key, float))
    weight = None if WEIGHT in keys else values.pop(WEIGHT, None)
    rescorer = factory(**values)
    if weight is None or not isinstance(rescorer, Rescorer):
        return rescorer
    if rescorer.alpha is None:
        raise _unknown_key(name, WEIGHT, factory, keys)
    check_alpha(weight)
    return rescorer.weighted(weight)


def _value(name: str, key: str, text: str, kind: Any) -> Any:
    if kind in (inspect.Parameter.empty, str):
        return text
    try:
        return msgspec.convert(text, kind, strict=False)
    except msgspec.ValidationError:
        raise RescoreError(f"--rescorer {name}: {key} is {_VALUES.get(kind, kind)}, and {text!r} is none") from None


def _unknown_key(name: str, key: str, factory: Callable[..., Any], keys: list[str]) -> RescoreError:
    weighted = getattr(getattr(factory, "func", factory), WEIGHT, None) is not None
    known = [*keys, *([WEIGHT] if weighted else [])]
    if not known:
        return RescoreError(f"the rescorer {name} takes no text after a colon; write --rescorer {name}")
    what = f"takes no {key}" if key != MAIN else "takes no value without its key"
    return RescoreError(f"the rescorer {name} {what}; it takes {', '.join(known)}")
