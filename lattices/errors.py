"""The one tree of errors that a user can cause and mend.

The command line prints the message of a `RescoreError` on one line and exits with code 2; anything else is a bug and
exits with code 1. A message says what is wrong and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RescoreError(Exception):
    """Something the user gave can't be used; the message says what and what to do."""


class UnknownNameError(RescoreError):
    """A name (model, task, rescorer, option) that nothing here answers to."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        advice = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
        super().__init__(f"unknown {kind} {name!r}; {advice}{f' ({hint})' if hint else ''}")


class InvalidDataError(RescoreError):
    """A file or array whose content breaks its format."""


class IncompatibleError(RescoreError):
    """Two things that do not belong together: heads and base, trace and settings, results and settings."""


class OutputError(RescoreError):
    """A place that can't be written to (full, read-only, in the way)."""


def first_line(error: BaseException) -> str:
    """An error's message cut to its first line, and the second where the first only announces it."""
    text = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def unreadable(path: object, error: OSError) -> RescoreError:
    """The error for a file that the user named, and that can't be opened."""
    return RescoreError(f"can't read {path}: {error.strerror or error}; check its name, or give another")
