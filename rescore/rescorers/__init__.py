"""Rescorers by name. Others register an entry point in the group `rescore.rescorers`: a callable that takes the text
after the colon of `name:text` (empty without one) and returns a `Rescorer`."""

from __future__ import annotations

from importlib.metadata import entry_points

from lattices.errors import RescoreError, UnknownNameError
from rescore.rescorers.base import Context, Rescorer
from rescore.rescorers.oracle import Oracle
from rescore.rescorers.unrescored import Unrescored

__all__ = ["Context", "Rescorer", "load_rescorer", "rescorer_names"]

ENTRY_POINTS = "rescore.rescorers"
BUILT_IN: dict[str, type[Unrescored] | type[Oracle]] = {"none": Unrescored, "oracle": Oracle}


def rescorer_names() -> list[str]:
    """Names that `load_rescorer` takes."""
    return sorted([*BUILT_IN, *(e.name for e in entry_points(group=ENTRY_POINTS))])


def load_rescorer(specification: str) -> Rescorer:
    """The rescorer that `name` or `name:argument` stands for; `UnknownNameError` names the nearest."""
    name, _, argument = specification.partition(":")
    if name in BUILT_IN:
        if argument:
            raise RescoreError(f"the rescorer {name} takes no argument; write --rescorer {name}")
        return BUILT_IN[name]()
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name == name:
            rescorer: Rescorer = entry.load()(argument)
            return rescorer
    raise UnknownNameError("rescorer", name, rescorer_names())
