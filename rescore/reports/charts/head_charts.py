"""Charts of the block heads and their lattices, whatever the rescorer: oracle, entropy, ranks, calibration."""

from __future__ import annotations

from collections.abc import Sequence

from rescore.reports.charts.figures import TASK, Section, axis, columns, curve, legend_of, line, log_axis
from rescore.reports.charts.style import ORACLE, UNRESCORED, Pen, of_sequence, safe
from rescore.reports.sources import TaskView
from rescore.studies.analysis import HmaxCorrelation, TraceAnalysis
from rescore.table import COUNT, GAIN, NUMBER, NUMBER_INTERVAL, SHARE, fixed

LEAST_IN_BIN = 20  # positions; the share in a bin of fewer is mostly chance
HEAD = (TASK, *columns(COUNT, "head"))
Traces = dict[str, TraceAnalysis]  # by the label of the task


def head_sections(views: Sequence[TaskView], h_max: HmaxCorrelation) -> list[Section]:
    """All sections of this module, in the order of the page."""
    traces = {view.label: view.analysis.trace for view in views if view.analysis.trace is not None}
    return [
        _oracle(traces), _refined(traces), _entropy(traces), _h_max(h_max, list(traces)), _recall(traces),
        _calibration(traces),
    ]  # fmt: skip


def _pens(traces: Traces) -> list[Pen]:
    most = max((trace.h for trace in traces.values()), default=0)
    return [Pen(f"head {head + 1}", of_sequence(head, most)) for head in range(most)]


def _oracle(traces: Traces) -> Section:
    oracle, unrescored = Pen("oracle", ORACLE, "star"), Pen("unrescored", UNRESCORED, None, "dash")
    section = Section(
        "oracle",
        (TASK, *columns(COUNT, "k"), *columns(NUMBER, "oracle block eff."), *columns(NUMBER_INTERVAL, "95 %")),
        legend=legend_of([oracle, unrescored]),
    )
    for label, trace in traces.items():
        if (curves := trace.oracle) is None:
            continue
        section.rows += [
            [label, k, of_k.block_efficiency, of_k.block_efficiency_ci95]
            for k, of_k in zip(curves.ks, curves.by_k, strict=True)
        ]
        lines = [curve(curves.ks, curves.by_k, oracle, hover="k = %{x}: %{y:.3f} tokens a step")]
        if (plain := curves.unrescored.block_efficiency) is not None:
            lines.append(line(curves.ks, [plain] * len(curves.ks), unrescored, hover="%{y:.3f} tokens a step"))
        section.draw(label, lines, xaxis=log_axis("entries of each slot, k", curves.ks), yaxis=axis("tokens a step"))
    return section


def _refined(traces: Traces) -> Section:
    heads = range(max((trace.h for trace in traces.values()), default=0))
    legend: dict[str, str] = {}
    section = Section(
        "refined",
        (TASK, *columns(COUNT, "k"), *columns(GAIN, *("1 head" if m == 1 else f"{m} heads" for m in heads))),
        legend=legend,
    )
    for label, trace in traces.items():
        if (curves := trace.oracle) is None:
            continue
        lines = []
        for place, (k, gains) in enumerate(zip(curves.ks, curves.gain_by_refined, strict=True)):
            if k == 1:  # nothing to choose
                continue
            pen = Pen(f"k = {k}", of_sequence(place, len(curves.ks)))
            legend |= legend_of([pen])
            lines.append(line(range(len(gains)), gains, pen, hover="%{x} heads chosen well: %{y:+.1%}"))
            section.rows.append([label, k, *gains])
        section.draw(
            label, lines, xaxis=axis("heads after the first that are chosen well", dtick=1),
            yaxis=axis("gain over unrescored", tickformat="+.0%"),
        )  # fmt: skip
    return section


def _entropy(traces: Traces) -> Section:
    pens = [Pen(pen.name, pen.colour, None) for pen in _pens(traces)]
    levels = next((trace.entropy.levels for trace in traces.values() if trace.entropy), ())
    section = Section(
        "entropy",
        (*HEAD, *columns(fixed(2), "mean, nats", "std", *(f"{level:.0%} quantile" for level in levels))),
        legend=legend_of(pens),
    )
    for label, trace in traces.items():
        if (entropies := trace.entropy) is None:
            continue
        bins = list(zip(entropies.edges, entropies.edges[1:], strict=False))
        lines = []
        reach = entropies.edges[1]  # the end of the last bin that anything is in
        for head in entropies.heads:
            if not (total := sum(head.histogram)):
                continue
            density = [n / total / (high - low) for n, (low, high) in zip(head.histogram, bins, strict=True)]
            reach = max(reach, *(high for n, (_, high) in zip(head.histogram, bins, strict=True) if n))
            lines.append(line(
                [(low + high) / 2 for low, high in bins], density, pens[head.head - 1], width=1.8, line_shape="spline",
                hover="%{x:.2f} nats: density %{y:.3f}",
            ))  # fmt: skip
            section.rows.append([label, head.head, head.mean, head.std, *head.quantiles])
        h_max = entropies.h_max
        section.draw(
            label, lines, xaxis=axis("entropy, nats", range=[0, reach]), yaxis=axis("density", rangemode="tozero"),
            caption="" if h_max is None else f"h_max = {h_max}: mean entropy does not fall up to that head.",
        )  # fmt: skip
    return section


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


def _h_max(tasks: HmaxCorrelation, labels: Sequence[str]) -> Section:
    points = tasks.points
    names = labels if len(labels) == len(points) else [point.name for point in points]
    section = Section("h-max", (TASK, *columns(COUNT, "h_max"), *columns(NUMBER, "unrescored block eff.")))
    section.rows += [[name, p.h_max, p.block_efficiency] for name, p in zip(names, points, strict=True)]
    if len(points) < 2:
        return section
    marks = line(
        [p.h_max for p in points], [p.block_efficiency for p in points], Pen("", UNRESCORED), mode="markers+text",
        size=10, text=[safe(name) for name in names], cliponaxis=False,
        textposition=_label_places([(p.h_max, p.block_efficiency) for p in points]),
    )  # fmt: skip
    marks.hovertemplate = "<b>%{text}</b><br>h_max %{x}: %{y:.3f} tokens a step<extra></extra>"
    section.draw(
        "tasks", [marks], height=300, margin={"l": 52, "r": 24, "t": 24, "b": 44},
        xaxis=axis("h_max", dtick=1, range=[0.5, max(p.h_max for p in points) + 0.9]),
        yaxis=axis("tokens a step, unrescored"),
        caption=(
            "Fewer than three tasks, or one h_max for all: no correlation."
            if tasks.pearson is None
            else f"Pearson's R = {tasks.pearson:.2f} over {len(points)} tasks (0.77 in Kim et al. 2024)."
        ),
    )  # fmt: skip
    return section


def _recall(traces: Traces) -> Section:
    pens = _pens(traces)
    ks = max((trace.ranks.ks for trace in traces.values() if trace.ranks), key=len, default=())
    section = Section(
        "recall",
        (*HEAD, *columns(NUMBER, "mean reciprocal rank"), *columns(SHARE, *(f"recall@{k}" for k in ks))),
        legend=legend_of(pens),
    )
    for label, trace in traces.items():
        if (ranks := trace.ranks) is None:
            continue
        section.rows += [[label, of.head, of.mean_reciprocal_rank, *of.recall] for of in ranks.heads]
        section.draw(
            label,
            [line(ranks.ks, of.recall, pens[of.head - 1], hover="among the first %{x}: %{y:.1%}")
             for of in ranks.heads],
            xaxis=log_axis("entries of the slot, k", ranks.ks),
            yaxis=axis("has the base's token", tickformat=".0%", range=[0, 1.03]),
        )  # fmt: skip
    return section


def _calibration(traces: Traces) -> Section:
    pens = _pens(traces)
    section = Section(
        "calibration",
        (*HEAD, *columns(NUMBER, "ECE"), *columns(SHARE, "mean probability", "right"), *columns(NUMBER, "Brier score")),
        legend=legend_of(pens[1:]),
        numbers={"least": LEAST_IN_BIN},
    )
    for label, trace in traces.items():
        if trace.calibration is None:
            continue
        lines = [line([0, 1], [0, 1], Pen("calibrated", UNRESCORED, None, "dash"), width=1.2)]
        for head in trace.calibration:
            section.rows.append([label, head.head, head.ece, head.confidence, head.accuracy, head.brier])
            bins = [b for b in head.bins if b.count >= LEAST_IN_BIN and b.confidence is not None]
            if head.head > 1 and bins:
                lines.append(line(
                    [b.confidence for b in bins], [b.accuracy for b in bins], pens[head.head - 1], width=1.5,
                    customdata=[b.count for b in bins],
                    hover="says %{x:.0%}, is right %{y:.0%} (%{customdata} positions)",
                ))  # fmt: skip
        section.draw(
            label, lines, xaxis=axis("probability of the arg-max", tickformat=".0%", range=[0, 1.02]),
            yaxis=axis("is right", tickformat=".0%", range=[0, 1.02]),
        )  # fmt: skip
    return section
