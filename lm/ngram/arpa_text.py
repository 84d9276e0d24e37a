"""The lines of an ARPA section, formatted by compiled code: about five million n-grams a second on one core.

Knows nothing about files. Numbers are written as `lmplz` writes them: plain from 1e-6 to 1e21, with an exponent
outside of that (`1e-7`), without zeros at the end, negative zero as 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numba import njit

from lattices.ngrams import NgramArrays

BLOCK_BYTES = 1 << 22  # of text at a time
NUMBERS_BYTES = 64  # two numbers (22 bytes each at most), separators and the line end
LARGEST_EXPONENT = 60  # float32 has 1e-45 to 3e38 and up to 9 digits
# From text, which rounds correctly: a power computed need not be the nearest float.
POWERS = np.array([float(f"1e{exponent}") for exponent in range(-LARGEST_EXPONENT, LARGEST_EXPONENT + 1)])
LEAST_DIGITS, MOST_DIGITS = 7, 9  # 9 always suffice
LOWEST_PLAIN, PLAIN_END = -6, 21  # exponents of numbers that are written without one
MINUS, POINT, ZERO, LETTER_E, TAB, SPACE, NEWLINE = b"-.0e\t \n"


class LineFormatter:
    """Writes n-grams over one vocabulary as text."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        words = [word.encode() for word in vocabulary]
        self._letters = np.frombuffer(b"".join(words), dtype=np.uint8)
        self._starts = np.cumsum([0, *map(len, words)], dtype=np.int64)
        self._longest = max(map(len, words), default=0)

    def blocks(self, ngrams: NgramArrays, *, with_backoff: bool) -> Iterator[memoryview]:
        """`log10p TAB word ... [TAB log10 back-off]` for every n-gram, in blocks of whole lines.

        A block holds until the next is asked for. Numbers must be finite; they have the fewest digits of 7 to 9 that
        read back as the same float32.
        """
        order = ngrams.words.shape[1]
        out = np.empty(max(BLOCK_BYTES, NUMBERS_BYTES + order * (self._longest + 1)), dtype=np.uint8)
        columns = (
            np.ascontiguousarray(ngrams.words, np.int32),
            np.ascontiguousarray(ngrams.log10p, np.float32),
            np.ascontiguousarray(ngrams.log10_backoff, np.float32),
        )
        row = 0
        while row < len(ngrams):
            row, size = _format_lines(*columns, with_backoff, self._letters, self._starts, POWERS, out, row)
            yield out[:size].data


@njit(cache=True, nogil=True)
def _format_lines(
    words: np.ndarray,
    log10p: np.ndarray,
    log10_backoff: np.ndarray,
    with_backoff: bool,
    letters: np.ndarray,
    starts: np.ndarray,
    powers: np.ndarray,
    out: np.ndarray,
    row: int,
) -> tuple[int, int]:
    """Lines from `row` on into `out` until another might not fit: (next row, bytes written)."""
    rows, order = words.shape
    at = 0
    while row < rows:
        needed = NUMBERS_BYTES + order
        for j in range(order):
            needed += starts[words[row, j] + 1] - starts[words[row, j]]
        if at + needed > len(out):
            break
        for field in range(2 if with_backoff else 1):  # a loop: _put_number is compiled into one place only
            at = _put_number(log10_backoff[row] if field else log10p[row], powers, out, at)
            if field:
                break
            for j in range(order):
                out[at] = SPACE if j else TAB
                at += 1
                for i in range(starts[words[row, j]], starts[words[row, j] + 1]):
                    out[at] = letters[i]
                    at += 1
            if with_backoff:
                out[at] = TAB
                at += 1
        out[at] = NEWLINE
        at += 1
        row += 1
    return row, at


@njit(cache=True, nogil=True)
def _put_number(value: float, powers: np.ndarray, out: np.ndarray, at: int) -> int:
    """A float32 at `out[at]`; returns the place behind it."""
    if value == 0:
        out[at] = ZERO
        return at + 1
    if value < 0:
        out[at] = MINUS
        at += 1
    size = abs(np.float64(value))
    exponent = int(np.floor(np.log10(size)))
    if size >= powers[exponent + 1 + LARGEST_EXPONENT]:  # the logarithm may be off by a little
        exponent += 1
    elif size < powers[exponent + LARGEST_EXPONENT]:
        exponent -= 1
    mantissa, decimals = np.int64(0), 0
    for digits in range(LEAST_DIGITS, MOST_DIGITS + 1):
        decimals = digits - 1 - exponent
        if decimals >= 0:
            mantissa = np.int64(np.rint(size * powers[decimals + LARGEST_EXPONENT]))
            back = mantissa / powers[decimals + LARGEST_EXPONENT]
        else:
            mantissa = np.int64(np.rint(size / powers[LARGEST_EXPONENT - decimals]))
            back = mantissa * powers[LARGEST_EXPONENT - decimals]
        if np.float32(back) == np.float32(size):
            break
    while mantissa % 10 == 0:
        mantissa //= 10
        decimals -= 1
    length, rest = 1, mantissa // 10
    while rest:
        length += 1
        rest //= 10
    exponent = length - 1 - decimals  # rounding may have made it one more
    plain = LOWEST_PLAIN <= exponent < PLAIN_END
    whole = exponent + 1 if plain else 1  # digits before the point
    if whole <= 0:
        out[at], out[at + 1] = ZERO, POINT
        at += 2
        for _ in range(-whole):
            out[at] = ZERO
            at += 1
        whole = length
    end = at + length + (1 if whole < length else 0)
    place = end - 1
    for left in range(length, 0, -1):
        if left == whole < length:
            out[place] = POINT
            place -= 1
        out[place] = ZERO + mantissa % 10
        mantissa //= 10
        place -= 1
    at = end
    for _ in range(whole - length):
        out[at] = ZERO
        at += 1
    if not plain:
        out[at] = LETTER_E
        at += 1
        if exponent < 0:
            out[at] = MINUS
            at += 1
            exponent = -exponent
        if exponent >= 10:
            out[at] = ZERO + exponent // 10
            at += 1
        out[at] = ZERO + exponent % 10
        at += 1
    return at
