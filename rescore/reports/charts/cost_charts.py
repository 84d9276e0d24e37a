"""Charts of what rescoring costs and what it is set to: time against gain, weights, the cost model of a token."""

from __future__ import annotations

from collections.abc import Sequence

from lattices.errors import RescoreError
from rescore.reports.charts.figures import (
    DECODE,
    TASK,
    Section,
    axis,
    bar,
    columns,
    legend_of,
    line,
    log_axis,
    one_below_the_other,
    rule,
    whiskers,
)
from rescore.reports.charts.style import ORACLE, Palette, Pen
from rescore.reports.sources import TaskView
from rescore.runs.records import Latency
from rescore.runs.tables import QUALITIES
from rescore.studies.cost.inputs import cost_inputs
from rescore.studies.cost.model import AUTOREGRESSIVE, MethodCost
from rescore.table import COUNT, GAIN, MILLISECONDS, NUMBER, PLAIN, TIMES, Column, fixed, percent

SHOWN_CONTEXT = 512  # tokens in the cache, of the cost model's charts; the table has all
QUANTITIES = {"weight_bytes": Pen("weights", "#2f7fd1"), "kv_bytes": Pen("KV cache", "#e0731d"),
              "flops": Pen("FLOPs", "#0f9d7a")}  # fmt: skip
COST_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)


def cost_sections(views: Sequence[TaskView], palette: Palette) -> list[Section]:
    """All sections of this module."""
    return [_time(views, palette), _alpha(views, palette), cost_model_section(views)]


def _time(views: Sequence[TaskView], palette: Palette) -> Section:
    """Time that a rescorer adds to a step against its gain; break-even: gain = added time / unrescored step."""
    scores = QUALITIES if any(view.mark for view in views) else ()
    section = Section("time", (
        *DECODE, *columns(GAIN, "gain"), *columns(MILLISECONDS, "greedy ms", "verify ms", "draft ms"),
        *columns(fixed(2), "rescore ms", "median", "95th percentile"), *columns(TIMES, "speed-up", "predicted"),
        *scores,
    ))  # fmt: skip
    for view in views:
        timed = [(r, r.latency) for r in view.results if r.latency is not None]
        section.rows += [
            [view.label, r.rescorer, r.p, r.gain, t.autoregressive_ms, t.verify_ms, t.draft_ms, t.rescore_ms,
             t.rescore_p50_ms, t.rescore_p95_ms, t.speedup, r.predicted_speedup,
             *(column.value(r) if r.mark else None for column in scores)]
            for r, t in timed
        ]  # fmt: skip
        step = next((_step_ms(t) for r, t in timed if r.is_unrescored), None)
        if step is None:
            continue
        marks, added = [], [0.0]
        for r, t in timed:
            if r.gain is None:
                continue
            pen = palette.pen(r.rescorer, r.p)
            added.append(_step_ms(t) - step)
            marks.append(line(
                added[-1:], [r.gain], pen, mode="markers", size=11, error_y=whiskers([r.gain], [r.gain_ci95], pen),
                customdata=[[t.rescore_ms, t.speedup]],
                hover="%{x:.2f} ms more a step (rescoring %{customdata[0]:.2f})<br>"
                "%{y:+.1%} tokens a step; %{customdata[1]:.2f}x autoregressive speed",
            ))  # fmt: skip
        if not marks:
            continue
        room = 0.08 * (max(added) - min(added) or 1.0)
        ends = [min(added) - room, max(added) + room]
        pen = Pen("break-even", ORACLE, None, "dash")
        marks.append(line(ends, [end / step for end in ends], pen, width=1.5, hoverinfo="skip"))
        section.draw(
            view.label, marks, height=320, xaxis=axis("ms a step more than unrescored"),
            yaxis=axis("gain", tickformat="+.0%"),
        )  # fmt: skip
    return section


def _step_ms(latency: Latency) -> float:
    return latency.verify_ms + latency.draft_ms + latency.rescore_ms


def _alpha(views: Sequence[TaskView], palette: Palette) -> Section:
    """Block efficiency by weight, on the examples that the weights were tuned on."""
    section = Section("alpha", (*DECODE, Column("alpha", PLAIN), Column("block eff., held out", NUMBER), Column("")))
    for view in views:
        lines = []
        for tuned in view.sweeps:
            best = [alpha == tuned.alpha for alpha in tuned.alphas]
            lines.append(line(
                tuned.alphas, tuned.block_efficiency, palette.pen(tuned.rescorer, tuned.p),
                size=[12 if chosen else 5 for chosen in best], hover="alpha %{x}: %{y:.3f} tokens a step",
            ))  # fmt: skip
            section.rows += [
                [view.label, tuned.rescorer, tuned.p, alpha, value, "chosen" if chosen else ""]
                for alpha, value, chosen in zip(tuned.alphas, tuned.block_efficiency, best, strict=True)
            ]
        section.draw(view.label, lines, xaxis=axis("alpha", rangemode="tozero"), yaxis=axis("tokens a step (held out)"))
    return section


def cost_model_section(views: Sequence[TaskView]) -> Section:
    """What a decoded token costs by the cost model (docs/analyses.md), for the methods that a task was run with."""
    section = Section(
        "cost-model",
        (
            TASK, Column("method"), *columns(COUNT, "p", "cached tokens"), *columns(NUMBER, "tokens a step"),
            *columns(NUMBER, "weights, GB"), *columns(fixed(2), "KV cache, MB", "GFLOPs"),
            *columns(percent(0, sign=True), "weights ±", "KV cache ±", "FLOPs ±"),
        ),
        legend=legend_of(QUANTITIES.values()),
        numbers={"context": SHOWN_CONTEXT},
    )  # fmt: skip
    for view in views:
        known = [
            (c, (c.weight_bytes / 1e9, c.kv_bytes / 1e6, c.flops / 1e9))
            for c in _costs(view)
            if c.weight_bytes is not None and c.kv_bytes is not None and c.flops is not None
        ]
        section.rows += [
            [view.label, c.method, c.p, c.context, c.block_efficiency, *amounts, c.weight_bytes_change,
             c.kv_bytes_change, c.flops_change]
            for c, amounts in known
        ]  # fmt: skip
        shown = [c for c, _ in known if c.context == SHOWN_CONTEXT]
        greedy = next((c for c in shown if c.method == AUTOREGRESSIVE), None)
        if greedy is None or len(shown) < 2:
            continue
        shown.remove(greedy)
        methods = [c.method for c in shown]
        bars = []
        for field, pen in QUANTITIES.items():
            times = [getattr(c, field) / getattr(greedy, field) for c in shown]
            bars.append(bar(
                [ratio - 1 for ratio in times], methods, pen, base=1, customdata=times,  # from 1, to either side
                hover=f"{pen.name}: %{{customdata:.2f}} times greedy's",
            ))  # fmt: skip
        section.draw(
            view.label, bars, barmode="group", shapes=[rule(x=1)], xaxis=log_axis("times greedy decoding", COST_TICKS),
            **one_below_the_other(methods, each=40),
        )  # fmt: skip
    return section


def _costs(view: TaskView) -> Sequence[MethodCost]:
    """The costs of the task's methods in the run's precision; none where the shape of the base model or of its heads
    can't be read."""
    from lm.base.catalog import resolve_base

    name = view.base.get("name")
    if not isinstance(name, str):
        return ()
    try:
        resolve_base(name, local_files_only=True)  # and what it is an adapter of; nothing is fetched for a page
        inputs = cost_inputs(view.run, view.task, local_files_only=True)
        return inputs.table(str(view.base.get("dtype", "float32"))).costs
    except RescoreError:  # a model or heads that have gone since, or a kind that the model does not describe
        return ()
