"""What a decode looks like in a report: its name, and one colour and marker for its rescorer throughout.

The colours are of middle lightness, so that they can be told apart on light and dark ground; neighbours in the list
differ for colour-blind readers too, and markers and dashes say the same again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rescore.reports.token_text import harmless
from rescore.runs.records import SOURCES, is_oracle

UNRESCORED, ORACLE = "#7d8590", "#b8860b"
COLOURS = (
    "#2f7fd1", "#e0731d", "#0f9d7a", "#a45cc8", "#d64550", "#4aa5d8", "#8a9a1f", "#a0673a", "#d468a6", "#6f74d8",
    "#2aa198", "#c28a00",
)  # fmt: skip
MARKERS = (  # Plotly's name, and a character like it for legends
    ("circle", "●"), ("square", "■"), ("diamond", "◆"), ("triangle-up", "▲"), ("cross", "✚"), ("triangle-down", "▼"),
    ("pentagon", "⬟"), ("hexagon2", "⬢"), ("star-triangle-up", "●"), ("hourglass", "●"), ("bowtie", "●"),
    ("star-square", "●"),
)  # fmt: skip
STARS = (("star", "★"), ("star-open", "☆"), ("star-diamond", "✦"), ("star-diamond-open", "✧"))  # of oracles
# None of the colours that the first rescorers have.
SOURCE_COLOURS = dict(zip(SOURCES.values(), ("#6f74d8", "#d468a6", "#2aa198", "#8a9a1f", "#a0673a"), strict=True))
SEVERAL = "#9aa3b0"  # sources at once
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SEQUENCE = (
    "#5a6fe0", "#4a86d8", "#3d9cc4", "#3fa79b", "#5fa86a", "#8aa83c", "#b3a02f", "#cf8f2a", "#dd7534", "#db5748",
    "#c94468", "#b0488f",
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """Colour and marker of a rescorer; swatch: the marker as a character."""

    colour: str
    marker: str
    swatch: str = "●"


@dataclass(frozen=True)
class Pen:
    """What one line or bar is drawn with.

    name: as it is called when the pointer is over it.
    marker: at each point (None: none); dash: of the line.
    meta: the rescorer and p whose switches in the legend hide it (None: nothing does).
    """

    name: str
    colour: str
    marker: str | None = "circle"
    dash: str = "solid"
    meta: dict[str, Any] | None = None


@dataclass(frozen=True)
class Palette:
    """The looks of all rescorers of a report, and the dash of the lines of each p: solid for the smallest."""

    looks: dict[str, Look]
    dashes: dict[int, str]

    def pen(self, rescorer: str, p: int | None = None) -> Pen:
        """The pen of one decode; p None: of a rescorer, whatever p."""
        look, meta = self.looks[rescorer], {"rescorer": harmless(rescorer), "p": p or 0}
        name = decode_name(rescorer, p) if p else rescorer
        return Pen(safe(name), look.colour, look.marker, self.dashes.get(p or 0, "solid"), meta)


def palette_of(decodes: Iterable[tuple[str, int]]) -> Palette:
    """The looks of these rescorers (its spec) and p, by the order in which they come.

    `none` and `oracle` always look the same, oracles of other drafters have other stars; colours come again after
    twelve others, with other markers.
    """
    decodes = list(decodes)
    names = dict.fromkeys(rescorer for rescorer, _ in decodes)
    looks = {"none": Look(UNRESCORED, "circle-open", "○")}
    oracles = dict.fromkeys(["oracle", *filter(is_oracle, names)])
    looks |= {name: Look(ORACLE, *STARS[place % len(STARS)]) for place, name in enumerate(oracles)}
    for place, name in enumerate(name for name in names if name not in looks):
        turn, colour = divmod(place, len(COLOURS))
        looks[name] = Look(COLOURS[colour], *MARKERS[(colour + turn) % len(MARKERS)])
    ps = sorted({p for _, p in decodes})
    return Palette({name: looks[name] for name in names}, {p: DASHES[i % len(DASHES)] for i, p in enumerate(ps)})


def decode_name(rescorer: str, p: int) -> str:
    """Name of a decode: the rescorer's spec, with p where several drafts are verified."""
    return rescorer if p == 1 else f"{rescorer}, p = {p}"


def of_sequence(place: int, places: int) -> str:
    """The colour of one of several ordered things (heads, k), from cold to warm."""
    last = len(SEQUENCE) - 1
    return SEQUENCE[last // 2 if places < 2 else round(place * last / (places - 1))]


def safe(text: str) -> str:
    """Harmless text for Plotly, which reads some HTML tags and entities in it."""
    return harmless(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
