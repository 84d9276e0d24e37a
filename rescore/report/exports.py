"""A report as Markdown and as CSV: the same numbers for papers, pull requests and spreadsheets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rescore.report.charts.figures import Section, interval, number, percent
from rescore.report.headline import Headline
from rescore.report.sources import TaskView
from rescore.runs.tables import results_csv
from rescore.table import COUNT, Column, Table, escaped


def csv_text(views: Sequence[TaskView]) -> str:
    """A line for every task, rescorer and p, with a header; empty cells where a number is not known."""
    tables = [
        results_csv(view.results, task=view.label, mode=view.analysis.mode, folder=view.run.folder) for view in views
    ]
    most = max(tables, key=lambda table: len(table.columns))
    rows = [[*row, *[None] * (len(most.columns) - len(row))] for table in tables for row in table.rows]
    return Table(most.columns, rows).csv()


def markdown_text(
    views: Sequence[TaskView], headline: Headline, sections: Sequence[Section], missing: Sequence[str]
) -> str:
    """Sentences, the table of rescorers x tasks, and the numbers of every chart."""
    parts = ["# How many tokens does a step accept?", *map(escaped, headline.sentences)]
    if missing:
        lines = "\n".join(f"- {escaped(line)}" for line in missing)
        parts.append(f"**To know: what the numbers are of, and what is not shown here**\n\n{lines}")
    rows = [[row.rescorer, row.p, *(_headline_cell(cell) for cell in row.cells)] for row in headline.rows]
    columns = [Column("rescorer"), Column("p", COUNT), *(Column(_titled(view)) for view in views)]
    parts.append(Table(columns, rows).markdown())
    parts.append(
        "Tokens a step (block efficiency); in brackets the gain over the unrescored draft with its 95 % interval, "
        "and the share of the oracle's gap recovered."
    )
    for section in sections:
        columns = [Column(name) for name in section.header]
        body = Table(columns, section.rows).markdown() if section.rows else escaped(section.lacking)
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
