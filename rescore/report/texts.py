"""The report as Markdown and CSV: the same numbers as the page, for pull requests and spreadsheets."""

from __future__ import annotations

from collections.abc import Sequence

from rescore.report.charts.figures import Section
from rescore.report.headline import Cell, Headline
from rescore.report.sources import TaskView
from rescore.runs.tables import results_csv
from rescore.table import (
    COUNT,
    GAIN,
    GAIN_INTERVAL,
    NUMBER,
    NUMBER_INTERVAL,
    TIMES,
    Column,
    Format,
    Table,
    escaped,
    percent,
)


def csv_text(views: Sequence[TaskView]) -> str:
    """A line for every task, rescorer and p, with a header; empty cells where a number is not known."""
    tables = [
        results_csv(view.results, task=view.label, mode=view.analysis.mode, folder=view.run.folder) for view in views
    ]
    columns = max((table.columns for table in tables), key=len)  # shorter blocks have fewer
    rows = [[*row, *[None] * (len(columns) - len(row))] for table in tables for row in table.rows]
    return Table(columns, rows).csv()


def markdown_text(
    views: Sequence[TaskView], headline: Headline, sections: Sequence[Section], missing: Sequence[str]
) -> str:
    """Sentences, the table of rescorers x tasks, and the numbers of every chart."""
    parts = ["# How many tokens does a step accept?", *map(escaped, headline.sentences)]
    if missing:
        lines = "\n".join(f"- {escaped(line)}" for line in missing)
        parts.append(f"**To know: what the numbers are of, and what is not shown here**\n\n{lines}")
    cell = Format(_shown, left=True)
    tasks = (Column(f"{view.label} (examples: {view.n}, groups: {view.groups})", cell) for view in views)
    rows = [[row.rescorer, row.p, *row.cells] for row in headline.rows]
    parts.append(Table([Column("rescorer"), Column("p", COUNT), *tasks], rows, none="").markdown())
    parts.append(
        "Tokens a step (block efficiency); in brackets the gain over the unrescored draft with its 95 % interval, "
        "and the share of the oracle's gap recovered."
    )
    for section in sections:
        body = section.table.markdown() if section.rows else escaped(section.words.lacking)
        parts.append(f"## {section.words.title}\n\n{escaped(section.words.reading)}\n\n{body}")
    return "\n\n".join(parts) + "\n"


def _shown(cell: Cell) -> str:
    r = cell.result
    facts = []
    if r.gain is not None:
        facts.append(GAIN.show(r.gain) + (f", {GAIN_INTERVAL.show(r.gain_ci95)}" if r.gain_ci95 else ""))
        facts += [f"{percent(0).show(cell.share)} of the gap"] if cell.share is not None else []
        facts += [f"{TIMES.show(cell.speedup)} the speed"] if cell.speedup is not None else []
    elif r.block_efficiency_ci95:
        facts.append(NUMBER_INTERVAL.show(r.block_efficiency_ci95))
    return NUMBER.show(r.block_efficiency) + (f" ({'; '.join(facts)})" if facts else "")
