"""Writes docs/cli.md, the reference of all commands, from the commands themselves: `python docs/make_cli.py`.

A test compares the file with what this would write, so it can't fall behind.
"""

from __future__ import annotations

from pathlib import Path

import typer
import typer.main
from typer.cli import get_docs_for_click

PAGE = Path(__file__).parent / "cli.md"


def reference() -> str:
    """The whole page as Markdown."""
    from cli import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="rescore"), name="rescore")
    text = text.replace("# `rescore`", "# Commands", 1)
    return "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
