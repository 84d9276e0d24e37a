"""CSV for spreadsheets: text of others stays text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from rescore.terminal import printable

FORMULA = ("=", "+", "-", "@")  # begins what a spreadsheet would compute


def csv_document(header: Sequence[str], rows: Iterable[Sequence[str | int | float | None]]) -> str:
    """Lines of CSV, numbers as they are, None as an empty cell; text can neither control a terminal nor be a
    formula."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    for row in (header, *rows):
        writer.writerow([plain(cell) if isinstance(cell, str) else "" if cell is None else cell for cell in row])
    return stream.getvalue()


def plain(text: str) -> str:
    """Text that a spreadsheet takes as text, on one line."""
    shown = printable(text)
    return f"'{shown}" if shown.startswith(FORMULA) else shown
