"""The pieces that all charts are made of: Plotly figures as JSON, without colours of text and ground.

Those follow the reader's light or dark mode and are set by the page. Each figure is small: one task, no title, no
legend (the page has one legend for all).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from rescore.report.token_text import harmless

HEIGHT = 270
NONE = "-"  # in a table, what is not known
DIGITS = 5  # of numbers in figures; finer than a pixel


@dataclass(frozen=True)
class Chart:
    """One figure (`data` and `layout` of Plotly) of a section; `title`: mostly the task."""

    title: str
    figure: dict[str, Any]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """Charts of one kind. `reading`: how to read them; `rows` under `header`: their numbers, for readers without
    charts; `lacking`: why there are none, and how to get them (where `charts` is empty); `legend`: colours that are not
    of rescorers, as (name, colour); `by_rescorer`: whether the legend of rescorers is of these charts."""

    key: str
    title: str
    reading: str
    charts: tuple[Chart, ...] = ()
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    lacking: str = ""
    legend: tuple[tuple[str, str], ...] = ()
    by_rescorer: bool = False


def figure(traces: Sequence[go.Scatter | go.Bar], *, height: int = HEIGHT, **layout: Any) -> dict[str, Any]:
    """A figure with these traces; `layout` as Plotly has it."""
    made = go.Figure(
        data=list(traces),
        layout={
            "template": "none", "height": height, "showlegend": False, "hovermode": "closest",
            "margin": {"l": 52, "r": 14, "t": 10, "b": 44}, **layout,
        },
    )  # fmt: skip
    plain: dict[str, Any] = made.to_plotly_json()
    plain["layout"].pop("template", None)
    rounded: dict[str, Any] = _rounded(plain)
    return rounded


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def axis(title: str, **options: Any) -> dict[str, Any]:
    """An axis with a title."""
    return {"title": {"text": title, "standoff": 6}, "automargin": True, "zeroline": False, **options}


def one_below_the_other(names: Sequence[str]) -> dict[str, Any]:
    """Layout of a figure with a row for each name, the first one on top."""
    return {
        "height": 86 + 25 * len(names),
        "margin": {"l": 20, "r": 14, "t": 10, "b": 44},
        "yaxis": {
            "automargin": True, "autorange": "reversed", "ticksuffix": " ", "type": "category",
            "categoryorder": "array", "categoryarray": names,
        },
    }  # fmt: skip


def line(
    x: Sequence[Any],
    y: Sequence[Any],
    *,
    name: str,
    colour: str,
    dash: str = "solid",
    marker: str | None = "circle",
    width: float = 2,
    error: tuple[Sequence[float], Sequence[float]] | None = None,
    hover: str = "%{x}: %{y}",
    rescorer: tuple[str, int] | None = None,
    **options: Any,
) -> go.Scatter:
    """A line; `error`: how far the interval goes up and down; `rescorer`: whose switch in the legend hides it."""
    return go.Scatter(
        x=list(x),
        y=list(y),
        name=name,
        mode="lines" if marker is None else "lines+markers",
        line={"color": colour, "dash": dash, "width": width},
        marker={"symbol": marker or "circle", "size": 7, "color": colour},
        error_y=None if error is None else bars(*error, colour),
        hovertemplate=f"<b>%{{fullData.name}}</b><br>{hover}<extra></extra>",
        meta=meta_of(rescorer),
        **options,
    )


def bars(up: Sequence[float], down: Sequence[float], colour: str) -> dict[str, Any]:
    """Error bars."""
    return {
        "type": "data", "symmetric": False, "array": list(up), "arrayminus": list(down), "color": colour,
        "thickness": 1.2, "width": 3,
    }  # fmt: skip


def meta_of(rescorer: tuple[str, int] | None) -> dict[str, Any] | None:
    """What the page's switches go by; a name as the page shows it."""
    return None if rescorer is None else {"rescorer": harmless(rescorer[0]), "p": rescorer[1]}


def safe(text: str) -> str:
    """Harmless text for Plotly, which reads some HTML tags and entities in it."""
    return harmless(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def number(value: float | None, digits: int = 3) -> str:
    """A number of a table."""
    return NONE if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """A share or gain of a table."""
    if value is None:
        return NONE
    return f"{value:+.{digits}%}" if sign else f"{value:z.{digits}%}"  # z: no -0 %


def interval(values: Sequence[float] | None, *, gain: bool = False) -> str:
    """A 95 % interval of a table."""
    if values is None:
        return NONE
    low, high = values
    return f"{low:+.1%} to {high:+.1%}" if gain else f"{low:.3f} to {high:.3f}"
