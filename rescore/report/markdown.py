"""Markdown made of others' text: nothing in it becomes markup or HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rescore.report.token_text import harmless


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; its cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(c if c == "---" else escaped(c) for c in line) + " |" for line in lines)


def escaped(text: str) -> str:
    """Text that Markdown and the HTML in it leave as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", " ".join(harmless(text).split()))
