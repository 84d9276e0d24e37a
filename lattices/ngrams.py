"""A back-off n-gram model as arrays: what an ARPA file holds, what estimation makes and the automaton is compiled from.

Source: the ARPA format as `lmplz` writes it; scores are log10 there and here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNKNOWN, SENTENCE_START, SENTENCE_END = 0, 1, 2  # word ids of <unk>, <s>, </s> in every model
SPECIAL_WORDS = ("<unk>", "<s>", "</s>")
MAX_ORDER = 6  # length of the longest n-grams that any model may have


@dataclass(frozen=True, eq=False)
class NgramArrays:
    """All n-grams of one order, sorted by their words (first word first).

    `words` int32 `[m, n]`; `log10p` float32 `[m]`; `log10_backoff` float32 `[m]` (0 where the file has none, and for
    the highest order).
    """

    words: np.ndarray
    log10p: np.ndarray
    log10_backoff: np.ndarray

    def __len__(self) -> int:
        return len(self.log10p)


@dataclass(frozen=True, eq=False)
class NgramModel:
    """`vocabulary[i]` is the word with id i, the three special words first; `orders[n - 1]` holds the n-grams."""

    vocabulary: tuple[str, ...]
    orders: tuple[NgramArrays, ...]

    @property
    def order(self) -> int:
        """Length of the longest n-grams."""
        return len(self.orders)
