"""What a terminal shows: text of others, unable to control it; notices and a progress bar on stderr."""

from __future__ import annotations

import logging
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

# Categories that draw nothing themselves: control and format characters, surrogates, private use, unassigned, line and
# paragraph separators. Among them are escape sequences and the marks that turn the direction of a line round.
INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
JOINERS = "\u200c\u200d"  # inside emoji and words of some scripts
NAMED = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
RIGHT_TO_LEFT = ("R", "AL")
LEFT_TO_RIGHT_MARK = "\u200e"
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
LINE_EVERY = 60.0  # seconds between lines of progress where there is no terminal


class CutShortError(Exception):
    """A command ended by Ctrl-C or a broken pipe, its cause: what a command-line library would end silently."""


def printable(text: str, *, joiners: bool = False) -> str:
    """The text on one line; what could control a terminal is written as an escape (`\\n`, `\\x1b`, `\\u202e`).

    `joiners` are kept if asked for: emoji and some scripts are made with them.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(c, joiners) for c in text)


def isolated(text: str) -> str:
    """Printable text with a mark behind it if it runs from right to left, so that it does not pull its neighbours."""
    return text + LEFT_TO_RIGHT_MARK if any(unicodedata.bidirectional(c) in RIGHT_TO_LEFT for c in text) else text


def shortened(text: str, *, head: int, tail: int) -> str:
    """The text itself, or its first `head` and last `tail` characters and how many were left out between them."""
    left_out = len(text) - head - tail
    if left_out <= 0:
        return text
    return f"{text[:head]} ... ({left_out:,} characters) ... {text[len(text) - tail :]}".rstrip()


def _shown(character: str, joiners: bool) -> str:
    if character in NAMED:
        return NAMED[character]
    if unicodedata.category(character) not in INVISIBLE or (joiners and character in JOINERS):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def notify(line: str) -> None:
    """A line for the user, on stderr; where that is closed or full, nobody is told, and the work goes on."""
    if sys.stderr is None:  # closed
        return
    try:
        print(f"rescore: {printable(line, joiners=True)}", file=sys.stderr, flush=True)
    except OSError:
        # Given up: Python would try the rest again when it ends, and exit with a code of its own.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


class _Notices(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        notify(" ".join(record.getMessage().split()))


def print_notices() -> None:
    """What the project tells its logger (waits for another process, makes a broken cache again) is a notice, too."""
    logger = logging.getLogger("rescore")
    logger.handlers, logger.propagate = [_Notices()], False


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr; where stderr is no terminal, a line a minute."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        tasks: dict[str, TaskID] = {}
        says_lines = not console.is_terminal and os.environ.get("RANK", "0") == "0"  # one of several processes
        last_line = time.monotonic()

        def show(description: str, done: int, total: int) -> None:
            nonlocal last_line
            if says_lines and time.monotonic() - last_line >= LINE_EVERY:
                last_line = time.monotonic()
                notify(f"{description}: {done} of {total}")
            key = description.split(",")[0]
            if key not in tasks:
                tasks[key] = bar.add_task(description, total=total)
            bar.update(tasks[key], description=description, completed=done, total=total)

        yield show
