"""What a decode looks like in a report: its name, and one colour and marker for its rescorer throughout.

The colours are of middle lightness, so that they can be told apart on light and dark ground; neighbours in the list
differ for colour-blind readers too, and markers and dashes say the same again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

UNRESCORED, ORACLE = "#7d8590", "#b8860b"
COLOURS = (
    "#2f7fd1", "#e0731d", "#0f9d7a", "#a45cc8", "#d64550", "#4aa5d8", "#8a9a1f", "#a0673a", "#d468a6", "#6f74d8",
    "#2aa198", "#c28a00",
)  # fmt: skip
MARKERS = (
    "circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "pentagon", "hexagon2", "star-triangle-up",
    "hourglass", "bowtie", "star-square",
)  # fmt: skip
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SEQUENCE = (
    "#5a6fe0", "#4a86d8", "#3d9cc4", "#3fa79b", "#5fa86a", "#8aa83c", "#b3a02f", "#cf8f2a", "#dd7534", "#db5748",
    "#c94468", "#b0488f",
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """Colour and marker of a rescorer."""

    colour: str
    marker: str


def looks(rescorers: Iterable[str]) -> dict[str, Look]:
    """The look of each rescorer (names as typed), by the order in which they come; the fixed ones are `none` and
    `oracle`. Colours come again after twelve, with other markers."""
    found: dict[str, Look] = {}
    others = 0
    for name in rescorers:
        if name in found:
            continue
        if name == "none":
            found[name] = Look(UNRESCORED, "circle-open")
        elif name == "oracle":
            found[name] = Look(ORACLE, "star")
        else:
            turn, place = divmod(others, len(COLOURS))
            found[name] = Look(COLOURS[place], MARKERS[(place + turn) % len(MARKERS)])
            others += 1
    return found


def decode_name(rescorer: str, p: int) -> str:
    """Name of a decode: the rescorer as typed, with p where several drafts are verified."""
    return rescorer if p == 1 else f"{rescorer}, p = {p}"


def dashes(ps: Iterable[int]) -> dict[int, str]:
    """The dash of the lines of each p: solid for the smallest."""
    return {p: DASHES[place % len(DASHES)] for place, p in enumerate(sorted(set(ps)))}


def of_sequence(place: int, places: int) -> str:
    """The colour of one of several ordered things (heads, k), from cold to warm."""
    last = len(SEQUENCE) - 1
    return SEQUENCE[last // 2 if places < 2 else round(place * last / (places - 1))]
