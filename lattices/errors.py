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
