"""Commands that work on whole results: `compare` puts two side by side, `suite` makes a table of many, `inspect` shows
one example block by block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cli_options import Json, notify

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
    from rescore.comparison import Selection, compare
    from rescore.comparison_table import comparison_table

    chosen = Selection(rescorer, p, a_rescorer, a_p, b_rescorer, b_p)
    comparison = compare(a, b, selection=chosen, seed=seed)
    for line in comparison.notices:
        notify(line)
    print(json.dumps(comparison.as_dict()) if as_json else comparison_table(comparison))
