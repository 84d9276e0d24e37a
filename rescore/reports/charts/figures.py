"""The pieces that all charts are made of: Plotly figures as JSON, without colours of text and ground.

Those follow the reader's light or dark mode and are set by the page. Each figure is small: one task, no title, no
legend (the page has one legend for all).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import plotly.graph_objects as go

from rescore.reports.charts.style import ORACLE, Pen
from rescore.studies.analysis import Efficiency
from rescore.table import COUNT, Column, Format, Table

WORDS_FILE = Path(__file__).parents[1] / "templates" / "sections.toml"
HEIGHT = 270
MARGIN = {"l": 52, "r": 14, "t": 10, "b": 44}
DIGITS = 5  # of numbers in figures; finer than a pixel
TASK = Column("task")
DECODE = (TASK, Column("rescorer"), Column("p", COUNT))


def columns(format: Format, *headings: str) -> tuple[Column, ...]:
    """Columns of one format."""
    return tuple(Column(heading, format) for heading in headings)


def legend_of(pens: Iterable[Pen]) -> dict[str, str]:
    """The colour by the name of each pen."""
    return {pen.name: pen.colour for pen in pens}


@dataclass(frozen=True)
class Chart:
    """One figure (`data` and `layout` of Plotly) of a section; title: mostly the task."""

    title: str
    figure: dict[str, Any]
    caption: str = ""


@dataclass(frozen=True)
class Words:
    """What stands above the charts of a section: its title, how to read the charts, and why there are none."""

    title: str
    reading: str
    lacking: str = "This is read from traces, and none is there; the top of this page says how to record them again."


WORDS = msgspec.toml.decode(WORDS_FILE.read_bytes(), type=dict[str, Words])  # by section, in the order of the page


@dataclass
class Section:
    """Charts of one kind.

    key: of its words, and its name in addresses; numbers: those that the words name.
    columns, rows: the numbers, for readers without charts; a shorter row has nothing in the last columns.
    legend: colours by name, where they are not those of rescorers.
    """

    key: str
    columns: Sequence[Column]
    legend: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, int] = field(default_factory=dict)
    charts: list[Chart] = field(default_factory=list)
    rows: list[Sequence[Any]] = field(default_factory=list)

    @property
    def words(self) -> Words:
        """What stands above the charts."""
        words = WORDS[self.key]
        return Words(words.title, words.reading.format(**self.numbers), words.lacking)

    def draw(self, title: str, marks: Sequence[go.Scatter | go.Bar], *, caption: str = "", **layout: Any) -> None:
        """Adds a chart of these marks, if there are any; `layout` as Plotly has it."""
        if not marks:
            return
        figure = go.Figure(
            data=list(marks),
            layout={
                "template": "none", "height": HEIGHT, "showlegend": False, "hovermode": "closest", "margin": MARGIN,
                **layout,
            },
        ).to_plotly_json()  # fmt: skip
        figure["layout"].pop("template", None)
        self.charts.append(Chart(title, _rounded(figure), caption))

    @property
    def table(self) -> Table:
        """The numbers."""
        return Table(self.columns, [[*row, *[None] * (len(self.columns) - len(row))] for row in self.rows])


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def axis(title: str, **options: Any) -> dict[str, Any]:
    """An axis with a title."""
    return {"title": {"text": title, "standoff": 6}, "automargin": True, "zeroline": False, **options}


def log_axis(title: str, ticks: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis with ticks at these places only."""
    return axis(title, type="log", tickvals=list(ticks), ticktext=[f"{tick:g}" for tick in ticks])


def one_below_the_other(names: Sequence[str], *, each: int = 25) -> dict[str, Any]:
    """Layout of a figure with a row of `each` pixels for each name, the first one on top."""
    return {
        "height": 86 + each * len(names),
        "margin": {**MARGIN, "l": 20},
        "yaxis": {
            "automargin": True, "range": [len(names) - 0.5, -0.5], "ticksuffix": " ", "type": "category",
            "categoryorder": "array", "categoryarray": list(names),
        },
    }  # fmt: skip


def rule(*, x: float | None = None, y: float | None = None, colour: str = ORACLE) -> dict[str, Any]:
    """A dashed line through a figure, upright at `x` or level at `y`."""
    (x0, x1), (y0, y1) = (0, 1) if x is None else (x, x), (0, 1) if y is None else (y, y)
    return {
        "type": "line", "line": {"color": colour, "width": 1.5, "dash": "dash"}, "layer": "below", "x0": x0, "x1": x1,
        "y0": y0, "y1": y1, "xref": "paper" if x is None else "x", "yref": "paper" if y is None else "y",
    }  # fmt: skip


def line(
    x: Sequence[Any],
    y: Sequence[Any],
    pen: Pen,
    *,
    hover: str = "%{x}: %{y}",
    width: float = 2,
    size: float | Sequence[float] = 7,
    mode: str = "lines+markers",
    **options: Any,
) -> go.Scatter:
    """A line with a marker at each point; `hover`: what is said of a point below the name; `options` of Plotly."""
    return go.Scatter(
        x=list(x), y=list(y), name=pen.name, meta=pen.meta, mode="lines" if pen.marker is None else mode,
        line={"color": pen.colour, "dash": pen.dash, "width": width},
        marker={"symbol": pen.marker or "circle", "size": size, "color": pen.colour},
        hovertemplate=f"<b>%{{fullData.name}}</b><br>{hover}<extra></extra>", **options,
    )  # fmt: skip


def curve(x: Sequence[Any], points: Sequence[Efficiency], pen: Pen, *, hover: str) -> go.Scatter:
    """The line of block efficiencies with their intervals."""
    values, intervals = [of.block_efficiency for of in points], [of.block_efficiency_ci95 for of in points]
    return line(x, values, pen, error_y=whiskers(values, intervals, pen), hover=hover)


def bar(x: Sequence[float], names: Sequence[str], pen: Pen, *, hover: str, **options: Any) -> go.Bar:
    """Level bars in the rows of these names; `hover`: what is said of one below its row's name."""
    return go.Bar(
        x=list(x), y=list(names), orientation="h", name=pen.name, meta=pen.meta, marker={"color": pen.colour},
        hovertemplate=f"<b>%{{y}}</b><br>{hover}<extra></extra>", **options,
    )  # fmt: skip


def whiskers(
    values: Sequence[float | None], intervals: Sequence[tuple[float, float] | None], pen: Pen
) -> dict[str, Any] | None:
    """The error bars from each value to the ends of its interval; None where there is no interval at all."""
    if not any(intervals):
        return None
    ends = [
        (0.0, 0.0) if value is None or ci95 is None else (max(0.0, value - ci95[0]), max(0.0, ci95[1] - value))
        for value, ci95 in zip(values, intervals, strict=True)
    ]
    return {
        "type": "data", "symmetric": False, "array": [up for _, up in ends], "arrayminus": [down for down, _ in ends],
        "color": pen.colour, "thickness": 1.2, "width": 3,
    }  # fmt: skip
