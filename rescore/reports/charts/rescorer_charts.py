"""Charts of rescorers: block efficiency, sources of tokens, acceptance by position, wins and losses, several drafts,
repetition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rescore.accounting import marginal_intervals
from rescore.reports.charts.figures import (
    DECODE,
    Section,
    axis,
    bar,
    columns,
    curve,
    legend_of,
    line,
    log_axis,
    one_below_the_other,
    rule,
    whiskers,
)
from rescore.reports.charts.style import SEVERAL, SOURCE_COLOURS, UNRESCORED, Palette, Pen
from rescore.reports.sources import TaskView
from rescore.runs.tables import PREDICTED, SOURCES
from rescore.table import COUNT, EFFICIENCY, GAINS, NUMBER, NUMBER_INTERVAL, SHARE, Column, Format, fixed


def rescorer_sections(views: Sequence[TaskView], palette: Palette) -> list[Section]:
    """All sections of this module."""
    return [make(views, palette) for make in (_efficiency, _sources, _acceptance, _outcomes, _drafts, _repetition)]


def _efficiency(views: Sequence[TaskView], palette: Palette) -> Section:
    numbers = (*EFFICIENCY, *GAINS, *columns(NUMBER, "macro"), *columns(COUNT, "steps", "tokens"), PREDICTED)
    section = Section("efficiency", (*DECODE, *numbers))
    for view in views:
        marks = []
        for r in view.results:
            pen, value, ci95 = palette.pen(r.rescorer, r.p), r.block_efficiency, r.block_efficiency_ci95
            marks.append(line(
                [value], [pen.name], pen, mode="markers", size=10, marker_line={"width": 1.5, "color": pen.colour},
                error_x=whiskers([value], [ci95], pen), hover="%{x:.3f} tokens a step",
            ))  # fmt: skip
            section.rows.append([
                view.label, r.rescorer, r.p, value, ci95, r.gain, r.gain_ci95, r.block_efficiency_macro, r.steps,
                r.tokens, r.predicted_speedup,
            ])  # fmt: skip
        section.draw(
            view.label, marks, **one_below_the_other([mark.name for mark in marks]), xaxis=axis("tokens a step"),
            shapes=[rule(x=oracle) for oracle in view.oracles],
        )  # fmt: skip
    return section


def _sources(views: Sequence[TaskView], palette: Palette) -> Section:
    found = {share.source for view in views for r in view.results for share in r.sources}
    pens = {name: Pen(f"only {name}", colour) for name, colour in SOURCE_COLOURS.items() if name in found}
    several = Pen("several of them", SEVERAL)
    legend = legend_of([*pens.values(), several])
    section = Section("sources", (*DECODE, *columns(NUMBER, "block eff."), *SOURCES), legend=legend)
    for view in views:
        joined = [(r, palette.pen(r.rescorer, r.p)) for r in view.results if r.sources]
        section.rows += [
            [view.label, r.rescorer, r.p, r.block_efficiency, *(column.value(share) for column in SOURCES)]
            for r, _ in joined
            for share in r.sources
        ]
        bars = []
        for r, decode in joined:
            rest = 1.0
            for share in r.sources:
                rest -= share.only or 0.0
                pen = replace(pens[share.source], meta=decode.meta)
                bars.append(bar(
                    [share.only or 0.0], [decode.name], pen, customdata=[[share.proposed or 0.0, share.alone]],
                    hover=f"%{{x:.1%}} of accepted drafted tokens: {pen.name}<br>it had proposed "
                    "%{customdata[0]:.1%}; alone %{customdata[1]:.2f} tokens a step",
                ))  # fmt: skip
            bars.append(bar(
                [max(rest, 0.0)], [decode.name], replace(several, meta=decode.meta),
                hover="%{x:.1%}: several drafters alike",
            ))  # fmt: skip
        section.draw(
            view.label, bars, **one_below_the_other([decode.name for _, decode in joined]), barmode="stack",
            bargap=0.35, xaxis=axis("share of accepted drafted tokens", tickformat=".0%", range=[0, 1]),
        )  # fmt: skip
    return section


def _acceptance(views: Sequence[TaskView], palette: Palette) -> Section:
    places = list(range(1, max(len(r.marginal) for view in views for r in view.results) + 1))
    number = Format(str)  # that is text already
    section = Section("acceptance", (*DECODE, Column("share of steps"), *columns(number, *map(str, places))))
    for view in views:
        lines = []
        for r in view.results:
            records = view.run.records(view.task, r.rescorer, r.p)
            known = marginal_intervals(
                [record.accepted for record in records], len(r.marginal), groups=[record.group for record in records],
                seed=view.run.config.seed,
            )  # fmt: skip
            intervals: Sequence[tuple[float, float] | None] = known or [None] * len(r.marginal)
            pen = palette.pen(r.rescorer, r.p)
            lines.append(line(
                places[: len(r.marginal)], r.marginal, pen, error_y=whiskers(r.marginal, intervals, pen),
                hover="at least %{x} tokens: %{y:.1%} of steps",
            ))  # fmt: skip
            at_least = [
                NUMBER.show(share) + (f" ({NUMBER_INTERVAL.show(ci95)})" if ci95 else "")
                for share, ci95 in zip(r.marginal, intervals, strict=True)
            ]
            given = [None if share is None else NUMBER.show(share) for share in r.conditional]
            section.rows += [
                [view.label, r.rescorer, r.p, "at least i", *at_least],
                [view.label, r.rescorer, r.p, "i, given i - 1", *given],
            ]
        section.draw(
            view.label, lines, xaxis=axis("accepted tokens i, at least", dtick=1),
            yaxis=axis("share of steps", tickformat=".0%", rangemode="tozero"),
        )  # fmt: skip
    return section


def _outcomes(views: Sequence[TaskView], palette: Palette) -> Section:
    section = Section("outcomes", (
        *DECODE, *columns(COUNT, "steps"), *columns(SHARE, "won", "tied", "lost"),
        *columns(COUNT, "tokens won", "tokens lost"),
        *columns(SHARE, "wins that repair a repeat", "losses that bring one"),
    ))  # fmt: skip
    for view in views:
        bars = []
        for decode in view.rescored:
            if (of := decode.outcomes) is None or not of.steps:
                continue
            pen = palette.pen(decode.rescorer, decode.p)
            won, tied, lost = (count / of.steps for count in (of.won, of.tied, of.lost))
            for share, opacity, what in ((won, 1.0, "won"), (-lost, 0.45, "lost")):
                bars.append(bar(
                    [share], [pen.name], pen, marker_opacity=opacity, customdata=[abs(share)],
                    hover=f"%{{customdata:.1%}} of steps {what}",
                ))  # fmt: skip
            section.rows.append([
                view.label, decode.rescorer, decode.p, of.steps, won, tied, lost, of.tokens_won, of.tokens_lost,
                of.repair_share, of.regress_share,
            ])  # fmt: skip
        section.draw(
            view.label, bars, **one_below_the_other([won.name for won in bars[::2]]), barmode="relative",
            bargap=0.35, xaxis=axis("lost | won, share of steps", tickformat=".0%", zeroline=True),
        )  # fmt: skip
    return section


def _drafts(views: Sequence[TaskView], palette: Palette) -> Section:
    section = Section("drafts", (*DECODE, *EFFICIENCY))
    for view in views:
        curves, trace = list(view.analysis.by_p), view.analysis.trace
        if trace is not None and (plain := trace.p_curve) is not None:  # of more p than were run
            curves = [plain, *(of for of in curves if of.rescorer != plain.rescorer)]
        curves = [of for of in curves if of.rescorer in palette.looks]
        for of in curves:
            section.rows += [
                [view.label, of.rescorer, p, point.block_efficiency, point.block_efficiency_ci95]
                for p, point in zip(of.ps, of.points, strict=True)
            ]
        section.draw(
            view.label,
            [curve(of.ps, of.points, palette.pen(of.rescorer), hover="%{x} drafts a step: %{y:.3f} tokens")
             for of in curves],
            xaxis=log_axis("drafts a step, p", sorted({p for of in curves for p in of.ps})),
            yaxis=axis("tokens a step"), shapes=[rule(y=oracle) for oracle in view.oracles],
        )  # fmt: skip
    return section


def _repetition(views: Sequence[TaskView], palette: Palette) -> Section:
    section = Section("repetition", (
        *DECODE, *columns(SHARE, "equal neighbours before", "after"),
        *columns(fixed(2), "mean longest run before", "after"),
    ))  # fmt: skip
    for view in views:
        lines = []
        for decode in view.rescored:
            of = decode.repetition
            if of is None or of.before.share is None or of.after.share is None:
                continue
            pen, shares = palette.pen(decode.rescorer, decode.p), [of.before.share, of.after.share]
            lines.append(line(
                shares, [pen.name] * 2, pen, size=[9, 10], marker_symbol=["circle-open", "circle"], marker_opacity=1,
                hover="%{x:.1%} of neighbours equal",
            ))  # fmt: skip
            runs = of.before.mean_longest_run, of.after.mean_longest_run
            section.rows.append([view.label, decode.rescorer, decode.p, *shares, *runs])
        trace = view.analysis.trace
        own = trace.repetition.output.share if trace is not None and trace.repetition is not None else None
        section.draw(
            view.label, lines, **one_below_the_other([of.name for of in lines]),
            xaxis=axis("equal neighbours in drafts", tickformat=".0%", rangemode="tozero"),
            shapes=[] if own is None else [rule(x=own, colour=UNRESCORED)],
            caption="" if own is None else f"the base model's own output: {own:.1%} (dashed)",
        )  # fmt: skip
    return section
