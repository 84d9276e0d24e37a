"""Commands that work on whole results: `compare` puts two side by side, `suite` makes a table of many, `inspect` shows
one example block by block."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from cli_options import INTERRUPTED, Json, notify, progress_bar

PLAIN_WIDTH = 160  # columns where stdout is no terminal and COLUMNS does not say

comparing = typer.Typer(rich_markup_mode=None)

Rescorer = Annotated[str | None, typer.Option(help="Compare this rescorer only; default: all that both have.")]


@comparing.command(name="compare")
def compare_command(
    a: Annotated[Path, typer.Argument(metavar="A", help="Results folder of rescore eval --out or rescore suite.")],
    b: Annotated[
        Path | None, typer.Argument(metavar="[B]", help="Another; default: A, with two rescorers or p of it.")
    ] = None,
    rescorer: Rescorer = None,
    p: Annotated[int | None, typer.Option(help="Compare results with this p only.")] = None,
    a_rescorer: Annotated[str | None, typer.Option("--a-rescorer", help="Rescorer of A, as it was typed.")] = None,
    b_rescorer: Annotated[str | None, typer.Option("--b-rescorer", help="Rescorer of B, as it was typed.")] = None,
    a_p: Annotated[int | None, typer.Option("--a-p", help="p of A.")] = None,
    b_p: Annotated[int | None, typer.Option("--b-p", help="p of B.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap intervals.")] = 0,
    as_json: Json = False,
) -> None:
    """Compare two results by example: difference in block efficiency with its paired interval, won, tied, lost."""
    from rescore.studies.comparison import Selection, compare_folders
    from rescore.studies.tables import comparison_table

    chosen = Selection(rescorer, p, a_rescorer, a_p, b_rescorer, b_p)
    comparison = compare_folders(a, b, selection=chosen, seed=seed)
    for line in comparison.notices:
        notify(line)
    print(json.dumps(comparison.as_dict()) if as_json else comparison_table(comparison).text())


@comparing.command(name="suite")
def suite_command(
    plan: Annotated[Path, typer.Argument(metavar="TABLE.yaml", help="Tasks, rescorers, k: see docs/formats.md.")],
    out: Annotated[Path, typer.Option(help="Folder for results, table.md and table.csv; resumable.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with TASK.jsonl (or .csv ...) for each task whose data the file does not name."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a whole table, tasks x rescorers x k, from one YAML file; goes on where it was stopped."""
    from lm.records import plain
    from rescore.runs.tables import suite_table
    from rescore.suites.plan import read_plan
    from rescore.suites.run import run_suite

    chosen = read_plan(plan, data=data)
    with progress_bar() as progress:
        suite = run_suite(chosen, out, source=plan.name, progress=progress, notify=notify)
    if as_json:
        print(json.dumps(plain(suite.document)))
    else:
        print(suite_table(suite.document.results).text() if suite.document.results else "no finished examples")
    if suite.interrupted:
        notify(f"interrupted; the finished examples are kept in {out}: the same command goes on")
        raise typer.Exit(INTERRUPTED)


@comparing.command(name="inspect")
def inspect_command(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="Folder of rescore eval --out or rescore suite.")],
    example: Annotated[str, typer.Option(help="Id of the example, or its number from 1.")] = "1",
    task: Annotated[str | None, typer.Option(help="Task, where the results have several.")] = None,
    steps: Annotated[str, typer.Option(help="Blocks to show: 3, 1-5, 6- or all.")] = "1-5",
    rescorer: Annotated[list[str] | None, typer.Option(help="Rescorer as it was typed; several. Default: all.")] = None,
    p: Annotated[int | None, typer.Option(help="Only the drafts with this p.")] = None,
    k: Annotated[int | None, typer.Option(help="Of a suite with several k: this one.")] = None,
    h: Annotated[int | None, typer.Option(help="Of a suite with several h: this one.")] = None,
    top: Annotated[int, typer.Option(help="Tokens of each slot of the lattice to show.")] = 3,
    as_json: Json = False,
) -> None:
    """Show one example block by block: the lattice, each rescorer's draft, what was accepted, what the base wanted."""
    from rich.console import Console

    from rescore.reports.inspection import inspect_example
    from rescore.reports.inspection_view import inspection_lines

    found = inspect_example(results, example, task=task, rescorers=rescorer or (), p=p, k=k, h=h, steps=steps, top=top)
    for line in found.notices:
        notify(line)
    if as_json:
        print(json.dumps(found.as_dict()))
        return
    console = Console(highlight=False, markup=False, emoji=False)
    colour = console.is_terminal and not os.environ.get("NO_COLOR")
    width = console.width if console.is_terminal else shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns
    lines = inspection_lines(found, width=width)
    for shown in lines:
        if colour:
            console.print(shown, soft_wrap=True)
        else:
            print(shown.plain)
