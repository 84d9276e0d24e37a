"""The lines of an ARPA section, formatted by pyarrow: some million n-grams a second on one core.

Knows nothing about files. Numbers are written as `lmplz` writes them: plain from 1e-6 to 1e21, with an exponent
outside of that (`1e-7`), without zeros at the end, negative zero as 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal

import numpy as np
import pyarrow
import pyarrow.compute as pc

from lattices.ngrams import NgramArrays

BLOCK_ROWS = 1 << 16  # n-grams at a time
PLAIN_END = 1e21  # the first number that is written with an exponent


class LineFormatter:
    """Writes n-grams over one vocabulary as text."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self._words = pyarrow.array(vocabulary, pyarrow.string())

    def blocks(self, ngrams: NgramArrays, *, with_backoff: bool) -> Iterator[memoryview]:
        """`log10p TAB word ... [TAB log10 back-off]` for every n-gram, in blocks of whole lines.

        Numbers must be finite; they have the fewest digits that read back as the same float32.
        """
        for start in range(0, len(ngrams), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            words = [self._words.take(pyarrow.array(column)) for column in ngrams.words[rows].T]
            fields = [_numbers(ngrams.log10p[rows]), pc.binary_join_element_wise(*words, " ")]
            if with_backoff:
                fields.append(_numbers(ngrams.log10_backoff[rows]))
            lines = pc.binary_join_element_wise(pc.binary_join_element_wise(*fields, "\t"), "", "\n")
            yield memoryview(lines.buffers()[2])


def _numbers(values: np.ndarray) -> pyarrow.Array:
    texts = pc.cast(pyarrow.array(values + np.float32(0)), pyarrow.string())  # + 0: -0 becomes 0
    large = np.flatnonzero(np.abs(values) >= 1e7)  # arrow may write an exponent, with a plus
    if len(large):
        written = texts.to_pylist()
        for i in large:
            written[i] = written[i].replace("e+", "e") if abs(values[i]) >= PLAIN_END else f"{Decimal(written[i]):f}"
        texts = pyarrow.array(written, pyarrow.string())
    return texts
