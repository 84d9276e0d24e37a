"""The command `report`: finished results as one HTML page, with the same as Markdown and CSV."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cli_options import Json, notify, progress_bar

reporting = typer.Typer(rich_markup_mode=None)


@reporting.command(name="report")
def report_command(
    results: Annotated[
        list[Path], typer.Argument(help="Folders of rescore eval --out or rescore suite, or a folder of such folders.")
    ],
    out: Annotated[
        Path, typer.Option(help="The page, a name that ends with .html; .md and .csv are written beside it.")
    ],
    examples: Annotated[int, typer.Option(help="Examples of each task in the lattice explorer; 0 leaves it out.")] = 8,
    as_json: Json = False,
) -> None:
    """Make one HTML page of results: tables, charts and a lattice explorer; works from disk, without network."""
    from rescore.reports.page import report

    with progress_bar() as progress:
        written = report(results, out, examples=examples, progress=progress)
    for line in written.missing:
        notify(line)
    files = [written.html, written.markdown, written.csv]
    if as_json:
        print(json.dumps({"files": [str(path) for path in files], "missing": list(written.missing)}))
    else:
        print("\n".join(f"{path} ({path.stat().st_size / 1e3:,.0f} kB)" for path in files))
