"""The table of all orders of n-grams with its links, from the sorted counts of the highest (`lm.ngram.counting`).

In suffix order every lower order is a change of prefix of the key, so one pass over the counts gives all orders, each
entry with the index of its suffix. The index of its context is found from the context of its suffix: the two differ by
the first word only.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
from numba import njit

from lattices.errors import RescoreError
from lattices.ngrams import SENTENCE_START
from lm.ngram.counting import FullCounts, Layout, Workspace, key_layout


class NgramTable(NamedTuple):
    """All n-grams of orders 1 to N in one flat numbering, order after order, each order sorted by suffix."""

    offsets: np.ndarray  # int64 [N + 1]: order n has the indices offsets[n - 1] : offsets[n]; of unigrams the word ids
    first: np.ndarray  # int32, first word of each
    last: np.ndarray  # int32, its last
    suffix: np.ndarray  # int32, index of the n-gram without its first word, -1 for unigrams
    context: np.ndarray  # int32, of the n-gram without its last word
    raw: np.ndarray  # int64, occurrences
    adjusted: np.ndarray  # int64, distinct words to the left; raw for the highest order and for what begins with <s>
    closing: np.ndarray  # indices of the lower-order n-grams that end the very last entry: see `estimation`

    @property
    def order(self) -> int:
        """Length of the longest n-grams."""
        return len(self.offsets) - 1

    def span(self, n: int) -> slice:
        """Indices of order n."""
        return slice(int(self.offsets[n - 1]), int(self.offsets[n]))


def build_table(full: FullCounts, workspace: Workspace, *, threads: int = 1) -> NgramTable:
    """All orders, with adjusted counts and links, from the counts of the highest.

    Raises `RescoreError` if there are more n-grams than 32-bit indices (2.1e9).
    """
    order, size = full.order, full.vocabulary_size
    layout = key_layout(order, size)
    sizes = np.zeros(order + 1, np.int64)
    if order > 1:
        _table_sizes(full.keys, layout, sizes)
    sizes[1] = size
    offsets = np.cumsum(sizes)
    total = int(offsets[-1])
    if total >= 1 << 31:
        raise RescoreError(f"{total:,} n-grams are more than 2.1 billion; lower the order or take less text")
    first, last, suffix, context = (workspace.empty(total, np.int32) for _ in range(4))
    raw, adjusted = (workspace.empty(total, np.int64) for _ in range(2))
    table = NgramTable(offsets, first, last, suffix, context, raw, adjusted, np.zeros(0, np.int64))
    first[:size] = last[:size] = np.arange(size, dtype=np.int32)
    suffix[:size] = context[:size] = -1
    raw[: offsets[order - 1]] = adjusted[: offsets[order - 1]] = 0
    if order == 1:
        raw[:], adjusted[:] = 0, 0
        words = full.keys[:, 0].astype(np.int64)
        raw[words] = adjusted[words] = full.counts
        return table
    current = np.zeros(order + 1, np.int64)
    depth = _fill_table(full.keys, full.counts, layout, table, current)
    children = workspace.empty(int(offsets[order - 1]) + 1, np.int32)
    _child_ranges(suffix, offsets[1], children)
    with ThreadPoolExecutor(threads) as pool:
        for n in range(2, order + 1):
            edges = np.linspace(offsets[n - 1], offsets[n], 4 * threads + 1).astype(np.int64)
            list(pool.map(partial(_link_contexts, table, children, n), edges[:-1], edges[1:]))
    return table._replace(closing=current[1 : depth + 1].copy())


@njit(cache=True, nogil=True)
def _unpack(keys: np.ndarray, row: int, layout: Layout, words: np.ndarray) -> None:
    """Words of a row, last word first."""
    order, bits, per_key = layout
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    for column in range(keys.shape[1]):
        begin = column * per_key
        key = keys[row, column]
        for j in range(min(order, begin + per_key) - 1, begin - 1, -1):
            words[j] = np.int64(key & mask)
            key >>= np.uint64(bits)


@njit(cache=True, nogil=True)
def _agreement(words: np.ndarray, before: np.ndarray) -> tuple[int, int]:
    """(how many last words two rows share, length of the longest n-gram that ends a row: back to the first `<s>`)."""
    order = len(words)
    same, longest = 0, 1
    while same < order and words[same] == before[same]:
        same += 1
    while longest < order and words[longest - 1] != SENTENCE_START:
        longest += 1
    return same, longest


@njit(cache=True, nogil=True)
def _table_sizes(keys: np.ndarray, layout: Layout, sizes: np.ndarray) -> None:
    """How many n-grams every order has, into `sizes[n]`."""
    words, before = np.zeros(layout.order, np.int64), np.full(layout.order, -1, np.int64)
    for i in range(len(keys)):
        _unpack(keys, i, layout, words)
        same, longest = _agreement(words, before)
        for n in range(same + 1, longest + 1):
            sizes[n] += 1
        words, before = before, words


@njit(cache=True, nogil=True)
def _fill_table(keys: np.ndarray, counts: np.ndarray, layout: Layout, table: NgramTable, current: np.ndarray) -> int:
    """Fills the table but for contexts; `current[n]` is the n-gram that ends the last row, up to the returned n."""
    order = layout.order
    first, last, suffix, raw, adjusted = table.first, table.last, table.suffix, table.raw, table.adjusted
    words, before = np.zeros(order, np.int64), np.full(order, -1, np.int64)
    free = table.offsets.copy()  # next index of order n is free[n - 1]
    depth = 0
    for i in range(len(keys)):
        _unpack(keys, i, layout, words)
        same, longest = _agreement(words, before)
        depth = min(longest, order - 1)
        for n in range(same + 1, longest + 1):
            if n == 1:
                current[1] = words[0]
                continue
            at = free[n - 1]
            free[n - 1] += 1
            first[at], last[at], suffix[at] = words[n - 1], words[0], current[n - 1]
            raw[at] = adjusted[at] = 0
            adjusted[current[n - 1]] += 1  # one more word to the left of its suffix
            current[n] = at
        for n in range(1, depth + 1):
            raw[current[n]] += counts[i]
        # The highest order has no words to its left to count, nor has what begins with <s>: occurrences stand for them.
        if longest == order:
            raw[current[order]] = counts[i]
        adjusted[current[longest]] = counts[i]
        words, before = before, words
    return depth


@njit(cache=True, nogil=True)
def _child_ranges(suffix: np.ndarray, begin: int, children: np.ndarray) -> None:
    """`children[i] : children[i + 1]` are the n-grams with suffix i; they are sorted by it, order after order."""
    at = begin
    for i in range(len(children)):
        while at < len(suffix) and suffix[at] < i:
            at += 1
        children[i] = at


@njit(cache=True, nogil=True)
def _link_contexts(table: NgramTable, children: np.ndarray, n: int, begin: int, end: int) -> None:
    """Contexts of the n-grams `begin:end` of order n, whose suffixes are linked already.

    The context of (w1, ..., wn) is w1 before the context of its suffix, hence one of that one's children.
    """
    first, suffix, context = table.first, table.suffix, table.context
    for i in range(begin, end):
        if n == 2:
            context[i] = first[i]
            continue
        inner = context[suffix[i]]
        low, high = children[inner], children[inner + 1]
        while low < high:
            middle = (low + high) // 2
            if first[middle] < first[i]:
                low = middle + 1
            else:
                high = middle
        context[i] = low
