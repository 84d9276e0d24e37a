"""Text of others on a terminal: shown as it is, but unable to control it."""

from __future__ import annotations

import unicodedata

# Categories that draw nothing themselves: control and format characters, surrogates, private use, unassigned, line and
# paragraph separators. Among them are escape sequences and the marks that turn the direction of a line round.
INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
JOINERS = "\u200c\u200d"  # inside emoji and words of some scripts
NAMED = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
RIGHT_TO_LEFT = ("R", "AL")
LEFT_TO_RIGHT_MARK = "\u200e"


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
    return (
        text
        if left_out <= 0
        else f"{text[:head]} ... ({left_out:,} characters) ... {text[len(text) - tail :]}".rstrip()
    )


def _shown(character: str, joiners: bool) -> str:
    if character in NAMED:
        return NAMED[character]
    if unicodedata.category(character) not in INVISIBLE or (joiners and character in JOINERS):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
