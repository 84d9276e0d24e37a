"""Charts of the block heads and their lattices, whatever the rescorer: oracle, entropy, ranks, calibration."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from rescore.report.charts.figures import Chart, Section, axis, figure, interval, line, number, percent, safe
from rescore.report.charts.style import ORACLE, UNRESCORED, of_sequence
from rescore.report.sources import TaskView
from rescore.studies.analysis import HmaxCorrelation, TraceAnalysis

LEAST_IN_BIN = 20  # positions; the share in a bin of fewer is mostly chance
NO_TRACE = "This is read from traces, and none is there; the top of this page says how to record them again."


def head_sections(views: Sequence[TaskView], h_max: HmaxCorrelation | None) -> list[Section]:
    """All sections of this module, in the order of the page."""
    traces = [(view.label, view.analysis.trace) for view in views if view.analysis.trace is not None]
    return [
        _oracle(traces),
        _refined(traces),
        _entropy(traces),
        _h_max(h_max, [label for label, _ in traces]),
        _recall(traces),
        _calibration(traces),
    ]


Traces = Sequence[tuple[str, TraceAnalysis]]


def _oracle(traces: Traces) -> Section:
    charts, rows = [], []
    for label, trace in traces:
        if (found := trace.oracle) is None:
            continue
        values = [point.block_efficiency for point in found.by_k]
        up, down = [], []
        for point in found.by_k:
            value, ci95 = point.block_efficiency, point.block_efficiency_ci95
            up.append(0.0 if value is None or ci95 is None else ci95[1] - value)
            down.append(0.0 if value is None or ci95 is None else value - ci95[0])
            rows.append((label, str(found.ks[len(up) - 1]), number(value), interval(ci95)))
        plain = found.unrescored.block_efficiency
        ks = list(found.ks)
        drawn = [
            line(
                ks,
                values,
                name="oracle",
                colour=ORACLE,
                marker="star",
                error=(up, down),
                hover="k = %{x}: %{y:.3f} tokens a step",
            )
        ]
        if plain is not None:
            drawn.append(
                line(
                    ks,
                    [plain] * len(ks),
                    name="unrescored",
                    colour=UNRESCORED,
                    marker=None,
                    dash="dash",
                    hover="%{y:.3f} tokens a step",
                )
            )
        charts.append(
            Chart(
                label,
                figure(
                    drawn,
                    xaxis=axis("entries of each slot, k", type="log", tickvals=ks, ticktext=[str(k) for k in ks]),
                    yaxis=axis("tokens a step"),
                ),
            )
        )
    return Section(
        "oracle",
        "Oracle by width of the lattice (k)",
        "What a perfect choice among the k best tokens of every head would reach, with its 95 % interval; at k = 1 "
        "there is nothing to choose. The distance to the grey line is what a rescorer can win at that k.",
        tuple(charts),
        ("task", "k", "oracle block eff.", "95 %"),
        tuple(rows),
        lacking=NO_TRACE,
        legend=(("oracle", ORACLE), ("unrescored", UNRESCORED)),
    )


def _refined(traces: Traces) -> Section:
    charts, rows = [], []
    legend: dict[str, str] = {}
    for label, trace in traces:
        if (found := trace.oracle) is None:
            continue
        drawn = []
        for i, k in enumerate(found.ks):
            if k == 1:
                continue
            colour = of_sequence(i, len(found.ks))
            legend[f"k = {k}"] = colour
            gains = found.gain_by_refined[i]
            drawn.append(
                line(
                    list(range(len(gains))),
                    gains,
                    name=f"k = {k}",
                    colour=colour,
                    hover="%{x} heads chosen well: %{y:+.1%}",
                )
            )
            rows.append((label, str(k), *(percent(gain, sign=True) for gain in gains)))
        charts.append(
            Chart(
                label,
                figure(
                    drawn,
                    xaxis=axis("heads behind the first that are chosen well", dtick=1),
                    yaxis=axis("gain over unrescored", tickformat="+.0%"),
                ),
            )
        )
    widest = max((len(row) - 2 for row in rows), default=0)
    padded = tuple((*row, *([""] * (widest - len(row) + 2))) for row in rows)
    return Section(
        "refined",
        "Oracle by number of heads",
        "Gain over the unrescored drafts if the choice is perfect in the first so many slots and the arg-max in "
        "the rest. Where a curve goes flat, later heads have nothing more to give.",
        tuple(charts),
        ("task", "k", *("1 head" if m == 1 else f"{m} heads" for m in range(widest))),
        padded,
        lacking=NO_TRACE,
        legend=tuple(legend.items()),
    )


def _entropy(traces: Traces) -> Section:
    charts, rows = [], []
    most = max((trace.h for _, trace in traces), default=1)
    for label, trace in traces:
        if (found := trace.entropy) is None:
            continue
        middles = [(a + b) / 2 for a, b in zip(found.edges, found.edges[1:], strict=False)]
        widths = [b - a for a, b in zip(found.edges, found.edges[1:], strict=False)]
        drawn = []
        for head in found.heads:
            total = sum(head.histogram)
            if not total:
                continue
            density = [count / total / width for count, width in zip(head.histogram, widths, strict=True)]
            drawn.append(
                line(
                    middles,
                    density,
                    name=f"head {head.head}",
                    colour=of_sequence(head.head - 1, most),
                    marker=None,
                    width=1.8,
                    hover="%{x:.2f} nats: density %{y:.3f}",
                    line_shape="spline",
                )
            )
            rows.append(
                (
                    label,
                    str(head.head),
                    number(head.mean, 2),
                    number(head.std, 2),
                    *(number(q, 2) for q in head.quantiles),
                )
            )
        reach = _last_filled(found.edges, [head.histogram for head in found.heads])
        caption = "" if found.h_max is None else f"h_max = {found.h_max}: mean entropy does not fall up to that head."
        charts.append(
            Chart(
                label,
                figure(
                    drawn,
                    xaxis=axis("entropy, nats", range=[0, reach]),
                    yaxis=axis("density", rangemode="tozero"),
                ),
                caption,
            )
        )
    levels = next((trace.entropy.levels for _, trace in traces if trace.entropy), ())
    return Section(
        "entropy",
        "Confidence of the heads (entropy)",
        "How sure each head is, over all positions: mass on the left means sure. Heads farther ahead (warmer "
        "colours) are less sure; where two of them lie on each other the later one has learnt little of its own.",
        tuple(charts),
        ("task", "head", "mean, nats", "std", *(f"{level:.0%} quantile" for level in levels)),
        tuple(rows),
        lacking=NO_TRACE,
        legend=tuple((f"head {i + 1}", of_sequence(i, most)) for i in range(most)) if traces else (),
    )


def _last_filled(edges: Sequence[float], histograms: Sequence[Sequence[int]]) -> float:
    """The end of the last bin that anything is in."""
    filled = [i for counts in histograms for i, count in enumerate(counts) if count]
    return float(edges[max(filled, default=0) + 1])


def _label_places(points: Sequence[tuple[int, float]]) -> list[str]:
    """Where the label of each (x, y) stands so that labels of one column do not cover each other."""
    places = ["top center"] * len(points)
    for x in {x for x, _ in points}:
        column = sorted((i for i, point in enumerate(points) if point[0] == x), key=lambda i: -points[i][1])
        for rank, i in enumerate(column[1:-1]):
            places[i] = ("middle left", "middle right")[rank % 2]
        if len(column) > 1:
            places[column[-1]] = "bottom center"
    return places


def _h_max(found: HmaxCorrelation | None, labels: Sequence[str]) -> Section:
    points = found.points if found is not None else ()
    names = list(labels) if len(labels) == len(points) else [point.name for point in points]
    charts = []
    caption = ""
    if found is not None and len(points) > 1:
        caption = (
            "Fewer than three tasks, or one h_max for all: no correlation."
            if found.pearson is None
            else f"Pearson's R = {found.pearson:.2f} over {len(points)} tasks (0.77 in Kim et al. 2024)."
        )
        made = figure(
            [
                go.Scatter(
                    x=[p.h_max for p in points],
                    y=[p.block_efficiency for p in points],
                    mode="markers+text",
                    text=[safe(name) for name in names],
                    textposition=_label_places([(p.h_max, p.block_efficiency) for p in points]),
                    cliponaxis=False,
                    marker={"size": 10, "color": UNRESCORED},
                    hovertemplate="<b>%{text}</b><br>h_max %{x}: %{y:.3f} tokens a step<extra></extra>",
                )
            ],
            xaxis=axis("h_max", dtick=1, range=[0.5, max(p.h_max for p in points) + 0.9]),
            yaxis=axis("tokens a step, unrescored"),
            height=300,
            margin={"l": 52, "r": 24, "t": 24, "b": 44},
        )
        charts.append(Chart("tasks", made, caption))
    return Section(
        "h-max",
        "Confidence and block efficiency",
        "Each mark is a task: how many heads grow less sure one after the other (h_max), against what the "
        "unrescored drafts get out of a step. A rising pattern means that well-ordered confidence goes with longer "
        "blocks.",
        tuple(charts),
        ("task", "h_max", "unrescored block eff."),
        tuple((name, str(p.h_max), number(p.block_efficiency)) for name, p in zip(names, points, strict=True)),
        lacking="This needs the traces of two tasks or more." if points else NO_TRACE,
    )


def _recall(traces: Traces) -> Section:
    charts, rows = [], []
    most = max((trace.h for _, trace in traces), default=1)
    ks: tuple[int, ...] = ()
    for label, trace in traces:
        if (found := trace.ranks) is None:
            continue
        ks = found.ks if len(found.ks) > len(ks) else ks
        drawn = []
        for head in found.heads:
            drawn.append(
                line(
                    found.ks,
                    head.recall,
                    name=f"head {head.head}",
                    colour=of_sequence(head.head - 1, most),
                    hover="among the first %{x}: %{y:.1%}",
                )
            )
            rows.append((label, str(head.head), number(head.mean_reciprocal_rank), *(percent(r) for r in head.recall)))
        charts.append(
            Chart(
                label,
                figure(
                    drawn,
                    xaxis=axis(
                        "entries of the slot, k",
                        type="log",
                        tickvals=list(found.ks),
                        ticktext=[str(k) for k in found.ks],
                    ),
                    yaxis=axis("has the base's token", tickformat=".0%", range=[0, 1.03]),
                ),
            )
        )
    widest = max((len(row) - 3 for row in rows), default=0)
    padded = tuple((*row, *([""] * (widest - len(row) + 3))) for row in rows)
    return Section(
        "recall",
        "Is the right token in the lattice? (recall at k)",
        "Share of all positions at which the k best entries of a head hold the token that the base model goes on "
        "to choose. What is not in the lattice no rescorer can find; the first head is the base model itself.",
        tuple(charts),
        ("task", "head", "mean reciprocal rank", *(f"recall@{k}" for k in ks)),
        padded,
        lacking=NO_TRACE,
        legend=tuple((f"head {i + 1}", of_sequence(i, most)) for i in range(most)) if traces else (),
    )


def _calibration(traces: Traces) -> Section:
    charts, rows = [], []
    most = max((trace.h for _, trace in traces), default=1)
    for label, trace in traces:
        if (found := trace.calibration) is None:
            continue
        drawn = [line([0, 1], [0, 1], name="calibrated", colour=UNRESCORED, marker=None, dash="dash", width=1.2)]
        for head in found:
            rows.append(
                (
                    label,
                    str(head.head),
                    number(head.ece),
                    percent(head.confidence),
                    percent(head.accuracy),
                    number(head.brier),
                )
            )
            bins = [b for b in head.bins if b.count >= LEAST_IN_BIN and b.confidence is not None]
            if head.head == 1 or not bins:
                continue  # right by definition
            drawn.append(
                line(
                    [b.confidence for b in bins],
                    [b.accuracy for b in bins],
                    name=f"head {head.head}",
                    colour=of_sequence(head.head - 1, most),
                    width=1.5,
                    customdata=[b.count for b in bins],
                    hover="says %{x:.0%}, is right %{y:.0%} (%{customdata} positions)",
                )
            )
        charts.append(
            Chart(
                label,
                figure(
                    drawn,
                    xaxis=axis("probability of the arg-max", tickformat=".0%", range=[0, 1.02]),
                    yaxis=axis("is right", tickformat=".0%", range=[0, 1.02]),
                ),
            )
        )
    return Section(
        "calibration",
        "Are the heads' probabilities to be believed?",
        "Positions in bins by the probability that a head gives its first choice, against the share where that "
        "choice is what the base model takes. On the dashed diagonal a head says what it knows; below it is too "
        f"sure. Bins of fewer than {LEAST_IN_BIN} positions are left out; head 1 is right by definition.",
        tuple(charts),
        ("task", "head", "ECE", "mean probability", "right", "Brier score"),
        tuple(rows),
        lacking=NO_TRACE,
        legend=tuple((f"head {i + 1}", of_sequence(i, most)) for i in range(1, most)) if traces else (),
    )
