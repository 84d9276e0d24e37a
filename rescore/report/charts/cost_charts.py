"""Charts of what rescoring costs and what it is set to: time against gain, weights, several drafts a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from rescore.report.charts.figures import (
    NONE,
    Chart,
    Section,
    axis,
    bars,
    figure,
    interval,
    line,
    meta_of,
    number,
    percent,
    safe,
)
from rescore.report.charts.style import ORACLE, Look, decode_name
from rescore.report.sources import TaskView
from rescore.runs.records import Latency, Result
from rescore.studies.analysis import PCurve

Looks = dict[str, Look]


def name_of(result: Result) -> str:
    """Name of the decode of a result."""
    return decode_name(result.rescorer, result.p)


def rule(*, x: float | None = None, y: float | None = None, colour: str = ORACLE) -> dict[str, Any]:
    """A dashed line through a figure, upright at `x` or level at `y`."""
    style = {"type": "line", "line": {"color": colour, "width": 1.5, "dash": "dash"}, "layer": "below"}
    if x is not None:
        return {**style, "x0": x, "x1": x, "xref": "x", "yref": "paper", "y0": 0, "y1": 1}
    return {**style, "y0": y, "y1": y, "yref": "y", "xref": "paper", "x0": 0, "x1": 1}


def time_section(views: Sequence[TaskView], looks: Looks) -> Section:
    charts, rows = [], []
    for view in views:
        timed = [(r, r.latency) for r in view.results if r.latency is not None]
        for r, t in timed:
            rows.append(
                (
                    view.label,
                    r.rescorer,
                    str(r.p),
                    percent(r.gain, sign=True),
                    number(t.autoregressive_ms, 1),
                    number(t.verify_ms, 1),
                    number(t.heads_ms, 1),
                    number(t.rescore_ms, 2),
                    number(t.rescore_p50_ms, 2),
                    number(t.rescore_p95_ms, 2),
                    f"{t.speedup:.2f}x",
                    NONE if t.predicted_speedup is None else f"{t.predicted_speedup:.2f}x",
                )
            )
        shown = [(r, t, r.gain) for r, t in timed if r.gain is not None]
        plain = next((t for r, t in timed if r.is_unrescored), None)
        if not shown or plain is None:
            continue
        charts.append(Chart(view.label, _time_figure(shown, plain, looks)))
    return Section(
        "time",
        "Latency against gain",
        "Each mark is a rescorer: the time that it adds to a step against its gain in tokens a step over the "
        "unrescored drafts, with the 95 % interval. Above the dashed break-even line it pays: there the gain is "
        "more than the share of a step that rescoring (and verifying more drafts) adds; below it the unrescored "
        "drafts are faster.",
        tuple(charts),
        (
            "task",
            "rescorer",
            "p",
            "gain",
            "greedy ms",
            "verify ms",
            "heads ms",
            "rescore ms",
            "median",
            "95th percentile",
            "speed-up",
            "predicted",
        ),
        tuple(rows),
        lacking="These results were replayed from traces, so no time was measured. rescore eval --mode live with "
        "the same task and rescorers (none among them) --out FOLDER measures it; give that folder to rescore "
        "report as well.",
        by_rescorer=True,
    )


def _step_ms(latency: Latency) -> float:
    return latency.verify_ms + latency.heads_ms + latency.rescore_ms


def _time_figure(shown: Sequence[tuple[Result, Latency, float]], plain: Latency, looks: Looks) -> dict[str, Any]:
    """Added time of a step, against gain. Break-even: gain = added time / time of an unrescored step."""
    step = _step_ms(plain)
    traces, added = [], []
    for r, t, gain in shown:
        look, ci95, more = looks[r.rescorer], r.gain_ci95, _step_ms(t) - step
        added.append(more)
        traces.append(
            go.Scatter(
                x=[more],
                y=[gain],
                mode="markers",
                name=safe(name_of(r)),
                meta=meta_of((r.rescorer, r.p)),
                marker={"symbol": look.marker, "size": 11, "color": look.colour},
                error_y=None if ci95 is None else bars([ci95[1] - gain], [gain - ci95[0]], look.colour),
                customdata=[[t.rescore_ms, t.speedup]],
                hovertemplate="<b>%{fullData.name}</b><br>%{x:.2f} ms more a step (rescoring %{customdata[0]:.2f})<br>"
                "%{y:+.1%} tokens a step; %{customdata[1]:.2f}x autoregressive speed<extra></extra>",
            )
        )
    low, high = min([0.0, *added]), max([0.0, *added])
    room = 0.08 * (high - low or 1.0)
    ends = [low - room, high + room]
    traces.append(
        go.Scatter(
            x=ends,
            y=[end / step for end in ends],
            mode="lines",
            name="break-even",
            hoverinfo="skip",
            line={"color": ORACLE, "dash": "dash", "width": 1.5},
        )
    )
    return figure(
        traces,
        height=320,
        xaxis=axis("ms a step more than unrescored"),
        yaxis=axis("gain", tickformat="+.0%"),
    )


def alpha_section(views: Sequence[TaskView], looks: Looks, dash: dict[int, str]) -> Section:
    charts, rows = [], []
    for view in views:
        traces = []
        for tuned in view.sweeps:
            look, best = looks[tuned.rescorer], tuned.alphas.index(tuned.alpha) if tuned.alpha in tuned.alphas else None
            sizes = [12 if place == best else 5 for place in range(len(tuned.alphas))]
            made = line(
                tuned.alphas,
                tuned.block_efficiency,
                name=safe(decode_name(tuned.rescorer, tuned.p)),
                colour=look.colour,
                dash=dash.get(tuned.p, "solid"),
                marker=look.marker,
                hover="alpha %{x}: %{y:.3f} tokens a step",
                rescorer=(tuned.rescorer, tuned.p),
            )
            made.marker.size = sizes
            traces.append(made)
            for alpha, value in zip(tuned.alphas, tuned.block_efficiency, strict=True):
                mark = "chosen" if alpha == tuned.alpha else ""
                rows.append((view.label, tuned.rescorer, str(tuned.p), f"{alpha:g}", number(value), mark))
        if traces:
            charts.append(
                Chart(
                    view.label,
                    figure(
                        traces,
                        xaxis=axis("alpha", rangemode="tozero"),
                        yaxis=axis("tokens a step (held out)"),
                    ),
                )
            )
    return Section(
        "alpha",
        "Weight of the rescorer (alpha)",
        "Block efficiency on the held-out examples by the weight that the rescorer's scores get beside the heads'; "
        "0 gives the unrescored drafts, and the large mark is the weight that was chosen. A flat top means that "
        "the weight matters little.",
        tuple(charts),
        ("task", "rescorer", "p", "alpha", "block eff., held out", ""),
        tuple(rows),
        lacking="The sweeps behind these weights are not in the cache here (weights given or by default have none). "
        "rescore tune with the same task and rescorer makes them; then run rescore eval again.",
        by_rescorer=True,
    )


def drafts_section(views: Sequence[TaskView], looks: Looks) -> Section:
    charts, rows = [], []
    for view in views:
        curves: list[PCurve] = list(view.analysis.by_p)
        trace = view.analysis.trace
        if trace is not None and trace.p_curve is not None:
            curves = [trace.p_curve, *(curve for curve in curves if curve.rescorer != trace.p_curve.rescorer)]
        traces = []
        for curve in curves:
            values = [point.block_efficiency for point in curve.points]
            error = _error(curve, values)
            look = looks.get(curve.rescorer)
            if look is None:  # the trace's own curve of `none`, where that was not run
                continue
            traces.append(
                line(
                    curve.ps,
                    values,
                    name=safe(curve.rescorer),
                    colour=look.colour,
                    marker=look.marker,
                    error=error,
                    hover="%{x} drafts a step: %{y:.3f} tokens",
                    rescorer=(curve.rescorer, 0),
                )
            )
            for p, point in zip(curve.ps, curve.points, strict=True):
                rows.append(
                    (
                        view.label,
                        curve.rescorer,
                        str(p),
                        number(point.block_efficiency),
                        interval(point.block_efficiency_ci95),
                    )
                )
        if traces:
            ticks = sorted({p for curve in curves for p in curve.ps})
            charts.append(
                Chart(
                    view.label,
                    figure(
                        traces,
                        shapes=[rule(y=view.results[0].oracle_block_efficiency)],
                        xaxis=axis("drafts a step, p", type="log", tickvals=ticks, ticktext=[str(p) for p in ticks]),
                        yaxis=axis("tokens a step"),
                    ),
                )
            )
    return Section(
        "drafts",
        "Several drafts a step (p)",
        "Block efficiency when the base model verifies the p best drafts at once and the longest acceptance wins; "
        "the dashed line is the oracle. What more drafts cost in a verify call depends on the machine: rescore "
        "bench verify-curve.",
        tuple(charts),
        ("task", "rescorer", "p", "block eff.", "95 %"),
        tuple(rows),
        lacking="Only one draft a step was run, and there is no trace to read more from; rescore eval --p 1,4,16 "
        "runs several.",
        by_rescorer=True,
    )


def _error(curve: PCurve, values: Sequence[float | None]) -> tuple[list[float], list[float]] | None:
    intervals = [point.block_efficiency_ci95 for point in curve.points]
    up, down = [], []
    for value, found in zip(values, intervals, strict=True):
        if value is None or found is None:
            return None
        up.append(found[1] - value)
        down.append(value - found[0])
    return up, down
