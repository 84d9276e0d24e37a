"""A report as Markdown and as CSV: the same numbers for papers, pull requests and spreadsheets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rescore.report.charts.figures import Section, interval, number, percent
from rescore.report.csv_table import csv_document
from rescore.report.headline import Headline, recovered
from rescore.report.markdown import escaped, markdown_table
from rescore.report.sources import TaskView
from rescore.report.tables import OUTCOMES
from rescore.runs.records import Result

COLUMNS = (
    "task",
    "rescorer",
    "p",
    "k",
    "h",
    "mode",
    "alpha",
    "examples",
    "groups",
    "steps",
    "tokens",
    "block_efficiency",
    "block_efficiency_low",
    "block_efficiency_high",
    "block_efficiency_macro",
    "oracle_block_efficiency",
    "gain",
    "gain_low",
    "gain_high",
    "oracle_gap_recovered",
    "won",
    "tied",
    "lost",
    "quality",
    "cut_at_limit",
    "verify_ms",
    "heads_ms",
    "rescore_ms",
    "autoregressive_ms",
    "speedup",
    "results",
)


def csv_text(views: Sequence[TaskView]) -> str:
    """A line for every task, rescorer and p, with a header; empty cells where a number is not known."""
    header = [*COLUMNS, *(f"marginal_{i}" for i in range(1, _most(views) + 1))]
    return csv_document(header, [_line(view, r) for view in views for r in view.results])


def _line(view: TaskView, r: Result) -> list[str | int | float | None]:
    outcomes, latency = r.against_unrescored, r.latency
    return [
        view.label,
        r.rescorer,
        r.p,
        r.k,
        r.h,
        view.analysis.mode,
        _cell(r.alpha),
        r.n,
        r.groups,
        r.steps,
        r.tokens,
        _cell(r.block_efficiency),
        *map(_cell, r.block_efficiency_ci95 or (None, None)),
        _cell(r.block_efficiency_macro),
        _cell(r.oracle_block_efficiency),
        _cell(r.gain),
        *map(_cell, r.gain_ci95 or (None, None)),
        _cell(recovered(r, view.unrescored)),
        *(_cell(getattr(outcomes, name, None)) for name in OUTCOMES),
        "; ".join(f"{name} {value:.4f}" for name, value in r.quality.items()),
        _cell(r.cut_at_limit),
        *(
            _cell(getattr(latency, name, None))
            for name in ("verify_ms", "heads_ms", "rescore_ms", "autoregressive_ms", "speedup")
        ),
        str(view.run.folder),
        *map(_cell, r.marginal),
    ]


def _most(views: Sequence[TaskView]) -> int:
    return max(r.h for view in views for r in view.results)


def _cell(value: float | None) -> float | None:
    """A number to six digits."""
    return None if value is None else float(f"{value:.6g}")


def markdown_text(
    views: Sequence[TaskView], headline: Headline, sections: Sequence[Section], missing: Sequence[str]
) -> str:
    """Sentences, the table of rescorers x tasks, and the numbers of every chart."""
    parts = ["# How many tokens does a step accept?", *map(escaped, headline.sentences)]
    if missing:
        lines = "\n".join(f"- {escaped(line)}" for line in missing)
        parts.append(f"**To know: what the numbers are of, and what is not shown here**\n\n{lines}")
    rows = [[row.rescorer, str(row.p), *(_headline_cell(cell) for cell in row.cells)] for row in headline.rows]
    parts.append(markdown_table(["rescorer", "p", *map(_titled, views)], rows))
    parts.append(
        "Tokens a step (block efficiency); in brackets the gain over the unrescored draft with its 95 % interval, "
        "and the share of the oracle's gap recovered."
    )
    for section in sections:
        body = markdown_table(section.header, section.rows) if section.rows else escaped(section.lacking)
        parts.append(f"## {section.title}\n\n{escaped(section.reading)}\n\n{body}")
    return "\n\n".join(parts) + "\n"


def _titled(view: TaskView) -> str:
    n, groups = (max(getattr(r, name) for r in view.results) for name in ("n", "groups"))
    return f"{view.label} (examples: {n}, groups: {groups})"


def _headline_cell(cell: Any) -> str:
    if cell is None:
        return ""
    r = cell.result
    if r.gain is None:
        return f"{number(r.block_efficiency)} ({interval(r.block_efficiency_ci95)})"
    found = [percent(r.gain, sign=True)]
    if r.gain_ci95:
        found[0] += f", {interval(r.gain_ci95, gain=True)}"
    if cell.share is not None:
        found.append(f"{percent(cell.share, 0)} of the gap")
    if cell.speedup is not None:
        found.append(f"{cell.speedup:.2f}x the speed")
    return f"{number(r.block_efficiency)} ({'; '.join(found)})"
