"""What a decoded token costs by the cost model (docs/analyses.md): weights and cache read, arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from lattices.errors import RescoreError
from rescore.report.charts.cost_charts import rule
from rescore.report.charts.figures import NONE, Chart, Section, axis, figure, number, one_below_the_other
from rescore.report.sources import TaskView
from rescore.report.token_text import is_here
from rescore.studies.cost.inputs import cost_inputs_of_run
from rescore.studies.cost.model import AUTOREGRESSIVE, CostTable, cost_table

SHOWN_CONTEXT = 512  # tokens in the cache, of the charts; the table has all
QUANTITIES = (
    ("weights", "weight_bytes", "#2f7fd1"),
    ("KV cache", "kv_bytes", "#e0731d"),
    ("FLOPs", "flops", "#0f9d7a"),
)


def cost_model_section(views: Sequence[TaskView]) -> Section:
    """One chart a task, with the block efficiencies of its results; methods that were not run are left out of it."""
    charts: list[Chart] = []
    rows: list[tuple[str, ...]] = []
    for view in views:
        table = _table(view)
        if table is None:
            continue
        known = [c for c in table.costs if c.context == SHOWN_CONTEXT and c.weight_bytes is not None]
        if len(known) > 1:
            charts.append(Chart(view.label, _figure(table)))
        for c in table.costs:
            if c.weight_bytes is None or c.kv_bytes is None or c.flops is None:
                continue
            rows.append((
                view.label, c.method, str(c.p), str(c.context), number(c.block_efficiency, 3),
                number(c.weight_bytes / 1e9, 3), number(c.kv_bytes / 1e6, 2), number(c.flops / 1e9, 2),
                *map(_change, (c.weight_bytes_change, c.kv_bytes_change, c.flops_change)),
            ))  # fmt: skip
    return Section(
        "cost-model",
        "What a token costs, by the model's shape",
        "Counted from the base model's shape, not measured: what one decoded token reads of weights and of the cache "
        "of keys and values, and its arithmetic, as multiples of greedy decoding's (the dashed line at 1), with "
        f"{SHOWN_CONTEXT} tokens in the cache. Where memory is the limit, weights and cache left of the line are time "
        "saved; where arithmetic is, FLOPs beyond it are time lost.",
        tuple(charts),
        ("task", "method", "p", "cached tokens", "tokens a step", "weights, GB", "KV cache, MB", "GFLOPs", "weights ±",
         "KV cache ±", "FLOPs ±"),
        tuple(rows),
        lacking="The base model or its heads are not at hand here, or none of the methods of the cost model was run. "
        "rescore cost --base MODEL --results FOLDER --task TASK prints it.",
        legend=tuple((name, colour) for name, _, colour in QUANTITIES),
    )  # fmt: skip


def _change(share: float | None) -> str:
    return NONE if share is None else f"{share:+.0%}"


def _table(view: TaskView) -> CostTable | None:
    """The costs of the task's methods in the run's precision; None where the shape of the base model or of its heads
    can't be told."""
    from rescore.studies.cost.decoders import neural_for

    name = (view.run.config.traces[view.task].get("base") or {}).get("name")
    if not isinstance(name, str) or not is_here(name):
        return None
    try:
        found = cost_inputs_of_run(view.run, view.task, local_files_only=True)
        return cost_table(
            found.base, h=found.h, heads=found.heads, neural=neural_for(found.base), verify=found.verify,
            dtype=view.run.config.inputs[view.task].dtype, block_efficiency=found.block_efficiency,
        )  # fmt: skip
    except RescoreError:  # a model or heads that have gone since, or a kind that the model does not describe
        return None


def _figure(table: CostTable) -> dict[str, object]:
    costs = [c for c in table.costs if c.context == SHOWN_CONTEXT and c.weight_bytes is not None]
    plain = next(c for c in costs if c.method == AUTOREGRESSIVE)
    shown = [c for c in costs if c is not plain]
    bars = []
    for name, field, colour in QUANTITIES:
        times = [getattr(c, field) / getattr(plain, field) for c in shown]
        bars.append(
            go.Bar(
                x=[ratio - 1 for ratio in times],
                y=[c.method for c in shown],
                orientation="h",
                base=1,  # bars leave the line at 1, to either side
                customdata=times,
                name=name,
                marker={"color": colour},
                hovertemplate=f"<b>%{{y}}</b><br>{name}: %{{customdata:.2f}} times greedy's<extra></extra>",
            )
        )
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200]
    values = axis("times greedy decoding", type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    layout = one_below_the_other([c.method for c in shown])
    layout["height"] = 86 + 40 * len(shown)  # three bars each
    return figure(bars, barmode="group", shapes=[rule(x=1)], xaxis=values, **layout)
