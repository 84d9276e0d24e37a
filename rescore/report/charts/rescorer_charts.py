"""Charts of rescorers: block efficiency, acceptance by position, wins and losses, repetition; then those of cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go

from rescore.accounting import marginal_intervals
from rescore.report.charts.cost_charts import Looks, alpha_section, drafts_section, name_of, rule, time_section
from rescore.report.charts.cost_model_charts import cost_model_section
from rescore.report.charts.figures import (
    Chart,
    Section,
    axis,
    bars,
    figure,
    interval,
    line,
    meta_of,
    number,
    one_below_the_other,
    percent,
    safe,
)
from rescore.report.charts.style import dashes, decode_name
from rescore.report.sources import TaskView
from rescore.studies.analysis import Outcomes


def rescorer_sections(views: Sequence[TaskView], looks: Looks) -> list[Section]:
    """All sections of this module, in the order of the page."""
    dash = dashes(r.p for view in views for r in view.results)
    return [
        _efficiency(views, looks),
        _acceptance(views, looks, dash),
        _outcomes(views, looks),
        time_section(views, looks),
        alpha_section(views, looks, dash),
        drafts_section(views, looks),
        _repetition(views, looks),
        cost_model_section(views),
    ]


def _efficiency(views: Sequence[TaskView], looks: Looks) -> Section:
    charts, rows = [], []
    for view in views:
        names = [safe(name_of(r)) for r in view.results]
        traces: list[Any] = []
        for result, name in zip(view.results, names, strict=True):
            look, value, ci95 = looks[result.rescorer], result.block_efficiency, result.block_efficiency_ci95
            traces.append(
                go.Scatter(
                    x=[value],
                    y=[name],
                    mode="markers",
                    name=name,
                    marker={
                        "symbol": look.marker,
                        "size": 10,
                        "color": look.colour,
                        "line": {"width": 1.5, "color": look.colour},
                    },
                    error_x=None if ci95 is None else bars([ci95[1] - value], [value - ci95[0]], look.colour),
                    hovertemplate="<b>%{y}</b><br>%{x:.3f} tokens a step<extra></extra>",
                    meta=meta_of((result.rescorer, result.p)),
                )
            )
            rows.append(
                (
                    view.label,
                    result.rescorer,
                    str(result.p),
                    number(value),
                    interval(ci95),
                    percent(result.gain, sign=True),
                    interval(result.gain_ci95, gain=True),
                    number(result.block_efficiency_macro),
                    str(result.steps),
                    str(result.tokens),
                )
            )
        ceiling = view.results[0].oracle_block_efficiency
        charts.append(
            Chart(
                view.label,
                figure(
                    traces,
                    **one_below_the_other(names),
                    xaxis=axis("tokens a step"),
                    shapes=[rule(x=ceiling)],
                ),
            )
        )
    return Section(
        "efficiency",
        "Block efficiency",
        "Farther right is better: the mark is the mean number of tokens that a step accepts, the bar its 95 % "
        "interval by group, the dashed line the oracle. 1 would be no gain over autoregressive decoding.",
        tuple(charts),
        ("task", "rescorer", "p", "block eff.", "95 %", "gain", "95 %", "macro", "steps", "tokens"),
        tuple(rows),
        by_rescorer=True,
    )


def _acceptance(views: Sequence[TaskView], looks: Looks, dash: dict[int, str]) -> Section:
    charts, rows = [], []
    for view in views:
        h = max(r.h for r in view.results)
        places = list(range(1, h + 1))
        traces = []
        for result in view.results:
            rescorer, p, marginal = result.rescorer, result.p, result.marginal
            accepted = [r.accepted for r in view.run.records(view.task, rescorer, p)]
            groups = [r.group for r in view.run.records(view.task, rescorer, p)]
            found = marginal_intervals(accepted, len(marginal), groups=groups, seed=view.run.config.seed)
            error = None
            if found is not None:
                error = (
                    [max(0.0, high - m) for (_, high), m in zip(found, marginal, strict=True)],
                    [max(0.0, m - low) for (low, _), m in zip(found, marginal, strict=True)],
                )
            traces.append(
                line(
                    places,
                    marginal,
                    name=safe(name_of(result)),
                    colour=looks[rescorer].colour,
                    dash=dash[p],
                    marker=looks[rescorer].marker,
                    error=error,
                    hover="at least %{x} tokens: %{y:.1%} of steps",
                    rescorer=(rescorer, p),
                )
            )
            for kind, values in (("at least i", marginal), ("i, given i - 1", result.conditional)):
                shown = [number(value) for value in values]
                if kind == "at least i" and found is not None:
                    shown = [f"{v} ({interval(ci95)})" for v, ci95 in zip(shown, found, strict=True)]
                rows.append((view.label, rescorer, str(p), kind, *shown))
        charts.append(
            Chart(
                view.label,
                figure(
                    traces,
                    xaxis=axis("accepted tokens i, at least", dtick=1),
                    yaxis=axis("share of steps", tickformat=".0%", rangemode="tozero"),
                ),
            )
        )
    widest = max((len(row) - 4 for row in rows), default=0)
    padded = tuple((*row, *([""] * (widest - len(row) + 4))) for row in rows)
    return Section(
        "acceptance",
        "Acceptance by position",
        "Each point is the share of steps that accepted at least i tokens (marginal; their sum is the block "
        "efficiency), with its 95 % interval by group; the first token is always accepted, and a slower fall "
        "is better.",
        tuple(charts),
        ("task", "rescorer", "p", "share of steps", *(str(i) for i in range(1, widest + 1))),
        padded,
        by_rescorer=True,
    )


def _outcomes(views: Sequence[TaskView], looks: Looks) -> Section:
    charts, rows = [], []
    for view in views:
        known = [(a, a.outcomes) for a in view.analysis.rescorers if a.outcomes and (a.rescorer, a.p) != ("none", 1)]
        known = [(a, outcomes) for a, outcomes in known if outcomes.steps]
        if not known:
            continue
        names = [safe(decode_name(a.rescorer, a.p)) for a, _ in known]
        traces = []
        for (a, o), name in zip(known, names, strict=True):
            colour = looks[a.rescorer].colour
            for value, opacity, what in ((o.won / o.steps, 1.0, "won"), (-o.lost / o.steps, 0.45, "lost")):
                traces.append(
                    go.Bar(
                        x=[value],
                        y=[name],
                        orientation="h",
                        name=name,
                        marker={"color": colour, "opacity": opacity},
                        customdata=[abs(value)],
                        hovertemplate=f"<b>%{{y}}</b><br>%{{customdata:.1%}} of steps {what}<extra></extra>",
                        meta=meta_of((a.rescorer, a.p)),
                    )
                )
            rows.append((view.label, a.rescorer, str(a.p), *_outcome_cells(o)))
        charts.append(
            Chart(
                view.label,
                figure(
                    traces,
                    **one_below_the_other(names),
                    barmode="relative",
                    bargap=0.35,
                    xaxis=axis("lost | won, share of steps", tickformat=".0%", zeroline=True),
                ),
            )
        )
    return Section(
        "outcomes",
        "Steps won and lost",
        "To the right the share of steps that accepted more tokens than the unrescored draft would have at the "
        "same place, to the left (paler) of those that accepted fewer; the rest tied. Long bars to the right and "
        "short ones to the left are good.",
        tuple(charts),
        (
            "task",
            "rescorer",
            "p",
            "steps",
            "won",
            "tied",
            "lost",
            "tokens won",
            "tokens lost",
            "wins that repair a repeat",
            "losses that bring one",
        ),
        tuple(rows),
        lacking="No rescored decode was replayed beside its unrescored drafts; add a rescorer to rescore eval.",
        by_rescorer=True,
    )


def _outcome_cells(o: Outcomes) -> Iterable[str]:
    shares = [percent(count / o.steps) for count in (o.won, o.tied, o.lost)]
    return (
        str(o.steps),
        *shares,
        str(o.tokens_won),
        str(o.tokens_lost),
        percent(o.repair_share),
        percent(o.regress_share),
    )


def _repetition(views: Sequence[TaskView], looks: Looks) -> Section:
    charts, rows = [], []
    for view in views:
        known = [
            (a, a.repetition) for a in view.analysis.rescorers if a.repetition and (a.rescorer, a.p) != ("none", 1)
        ]
        known = [(a, r) for a, r in known if r.before.share is not None and r.after.share is not None]
        if not known:
            continue
        names = [safe(decode_name(a.rescorer, a.p)) for a, _ in known]
        traces = []
        for (a, r), name in zip(known, names, strict=True):
            look = looks[a.rescorer]
            traces.append(
                go.Scatter(
                    x=[r.before.share, r.after.share],
                    y=[name, name],
                    mode="lines+markers",
                    name=name,
                    line={"color": look.colour, "width": 2},
                    marker={"symbol": ["circle-open", "circle"], "size": [9, 10], "color": look.colour, "opacity": 1},
                    hovertemplate="<b>%{y}</b><br>%{x:.1%} of neighbours equal<extra></extra>",
                    meta=meta_of((a.rescorer, a.p)),
                )
            )
            rows.append(
                (
                    view.label,
                    a.rescorer,
                    str(a.p),
                    percent(r.before.share),
                    percent(r.after.share),
                    number(r.before.mean_longest_run, 2),
                    number(r.after.mean_longest_run, 2),
                )
            )
        trace = view.analysis.trace
        own = trace.repetition.output.share if trace is not None and trace.repetition is not None else None
        caption = "" if own is None else f"the base model's own output: {own:.1%} (dashed)"
        charts.append(
            Chart(
                view.label,
                figure(
                    traces,
                    **one_below_the_other(names),
                    xaxis=axis("equal neighbours in drafts", tickformat=".0%", rangemode="tozero"),
                    shapes=[] if own is None else [rule(x=own, colour="#7d8590")],
                ),
                caption,
            )
        )
    return Section(
        "repetition",
        "Repetition in drafts",
        "Share of neighbouring tokens of a draft that are equal, at the steps of each decode: the open mark is the "
        "unrescored draft, the filled one the draft that won. Farther left is better, down to what the base model "
        "itself writes (dashed).",
        tuple(charts),
        ("task", "rescorer", "p", "equal neighbours before", "after", "mean longest run before", "after"),
        tuple(rows),
        lacking="No rescored decode has both its drafts and its trace.",
        by_rescorer=True,
    )
