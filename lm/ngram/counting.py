"""Counting n-grams of the highest order out of core: sorted runs on disk, merged. `lm.ngram.tables` has all orders.

Knows nothing about text or smoothing. Input is a stream of word ids in which `</s>` (2) ends a sentence, as does
`BREAK` (-1), which is not counted itself. Every sentence is preceded by as many `<s>` (1) as the order wants.

How it works. An n-gram of the highest order is packed into as few 64-bit keys as it needs, last word in the highest
bits, so that sorting numbers sorts n-grams by suffix. Chunks of the stream that fit the memory are sorted, counted and
written as runs; the runs are merged by ranges of keys.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

from lattices.ngrams import SENTENCE_END, SENTENCE_START
from lm.executors import HERE, Executor
from lm.files import write_array, writing

BREAK = -1
Run = tuple[np.ndarray, np.ndarray]  # keys uint64 [m, columns], rising, and counts int64 [m]
LEAST_CHUNK = 1 << 18  # tokens of a run, however little memory there is
Progress = Callable[[str, int, int], None]  # stage, done, total


def no_progress(stage: str, done: int, total: int) -> None:
    """Reports nothing."""


class Layout(NamedTuple):
    """How an n-gram lies in 64-bit keys: reversed word j (0 = the last word) in column `j // per_key` at bits
    `bits * (words of that column - 1 - j % per_key)`."""

    order: int
    bits: int  # of a word
    per_key: int  # words

    @property
    def columns(self) -> int:
        """Keys per n-gram."""
        return -(-self.order // self.per_key)


class FullCounts(NamedTuple):
    """N-grams of the highest order in suffix order."""

    keys: np.ndarray  # uint64 [m, columns]
    counts: np.ndarray  # int64 [m]
    order: int
    vocabulary_size: int


class Workspace:
    """Gives out arrays, in memory as long as they fit the budget (bytes), then as mapped files in a folder: their pages
    can be dropped when memory runs short."""

    def __init__(self, folder: Path, budget: int) -> None:
        self._folder, self._left, self._made = folder, budget, 0

    def empty(self, size: int, dtype: type | np.dtype) -> np.ndarray:
        """An uninitialised array `[size]`. Raises `OutputError` if the folder can't be written."""
        needed = size * np.dtype(dtype).itemsize
        if needed <= self._left or not size:
            self._left -= needed
            return np.empty(size, dtype)
        path = self._folder / f"table-{self._made:04d}.bin"
        self._made += 1
        with writing(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            mapped = np.memmap(path, dtype=dtype, mode="w+", shape=(size,))
        path.unlink()  # the mapping keeps it; nothing is left behind
        return np.asarray(mapped)


def key_layout(order: int, vocabulary_size: int) -> Layout:
    """The layout with the fewest keys."""
    bits = max(1, (vocabulary_size - 1).bit_length())
    return Layout(order, bits, min(order, 64 // bits))


def count_full(
    ids: np.ndarray,
    *,
    order: int,
    vocabulary_size: int,
    folder: Path,
    memory: int,
    threads: int,
    executor: Executor = HERE,
    progress: Progress = no_progress,
) -> FullCounts:
    """Counts the n-grams of the highest order in a stream `ids` int32 `[t]` (may be memory-mapped).

    Runs are written to `folder`; those that an earlier call with the same arguments finished are used again, so the
    caller empties the folder when anything changes. `memory` (bytes) bounds the arrays of all `threads` together.
    `executor`: who sorts and merges; runs are written here in any case. Its workers have their share of `memory` each;
    up to four runs of each wait in the cluster's own store.
    Raises `OutputError` if the folder can't be written.
    """
    layout = key_layout(order, vocabulary_size)
    columns = layout.columns
    per_token = 8 * columns * (2 if columns == 1 else 3) + 17
    chunk = max(LEAST_CHUNK, min(memory // (2 * threads * per_token), -(-len(ids) // threads)))
    starts = range(0, len(ids), chunk)

    def place(begin: int) -> Path:
        return folder / f"run-{chunk}-{begin // chunk:05d}.keys"

    def shard(begin: int) -> _Shard:
        return ids[max(0, begin - order + 1) : begin + chunk], min(begin, order - 1)

    def make(begin: int) -> Path:
        if not place(begin).is_file():
            _write_run(place(begin), *_counted(layout, shard(begin)))
        return place(begin)

    def by_workers() -> Iterator[Path]:
        missing = {begin: None for begin in starts if not place(begin).is_file()}  # in their order
        done = executor.map(partial(_counted, layout), map(shard, missing))
        for begin in starts:
            if begin in missing:
                _write_run(place(begin), *next(done))
            yield place(begin)

    with writing(folder), ThreadPoolExecutor(threads) as pool:
        folder.mkdir(parents=True, exist_ok=True)
        runs = []
        try:
            for path in pool.map(make, starts) if executor.is_local else by_workers():
                runs.append(_read_run(path, columns))
                progress("counting", min(len(ids), len(runs) * chunk), len(ids))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    keys, counts = runs[0] if len(runs) == 1 else _merge_runs(runs, folder, memory, threads, executor, progress)
    return FullCounts(keys, counts, order, vocabulary_size)


_Shard = tuple[np.ndarray, int]  # token ids, of which so many first ones only stand before the n-grams


def _counted(layout: Layout, shard: _Shard) -> Run:
    """The n-grams that end in a shard, sorted, and how often each is there."""
    ids, begin = shard
    keys = np.empty((len(ids) - begin, layout.columns), np.uint64)
    keys = _sorted(keys[: _fill_keys(ids, begin, len(ids), layout, keys)])
    is_new = np.ones(len(keys) + 1, np.bool_)
    is_new[1:-1] = np.any([column[1:] != column[:-1] for column in keys.T], axis=0)
    first = np.flatnonzero(is_new)
    return keys[first[:-1]], np.diff(first)


def _write_run(path: Path, keys: np.ndarray, counts: np.ndarray) -> None:
    # The keys take their name last: a run is there when its keys are.
    for array, ending in ((counts, ".counts"), (keys, ".part")):
        with path.with_suffix(ending).open("wb") as stream:
            write_array(stream, array)
    os.replace(path.with_suffix(".part"), path)


def _read_run(path: Path, columns: int) -> Run:
    # Mapped as writable though never written: numba compiles apart for arrays that are not.
    if not path.stat().st_size:
        return np.zeros((0, columns), np.uint64), np.zeros(0, np.int64)
    keys = np.memmap(path, np.uint64, "r+").reshape(-1, columns)
    return np.asarray(keys), np.asarray(np.memmap(path.with_suffix(".counts"), np.int64, "r+"))


def _merge_runs(
    runs: Sequence[Run], folder: Path, memory: int, threads: int, executor: Executor, progress: Progress
) -> Run:
    """One run out of several: ranges of keys, small enough for the memory, are merged side by side."""
    columns = runs[0][0].shape[1]
    entries = sum(len(counts) for _, counts in runs)
    room = memory // (2 * threads * 2 * 8 * (columns + 1))  # entries of a range: input and output, in all threads
    parts = max(threads, -(-entries // max(room, LEAST_CHUNK // 4)))
    sample = np.sort(np.concatenate([keys[:: max(1, len(keys) // 4096), 0] for keys, _ in runs]))
    borders = sample[np.linspace(0, len(sample), parts, endpoint=False).astype(np.int64)[1:]]
    edges = [np.concatenate(([0], np.searchsorted(k[:, 0], borders), [len(k)])) for k, _ in runs]

    def pieces(part: int) -> list[Run]:
        return [(k[e[part] : e[part + 1]], c[e[part] : e[part + 1]]) for (k, c), e in zip(runs, edges, strict=True)]

    path = folder / "merged.keys"
    with writing(path), ThreadPoolExecutor(threads) as pool, ExitStack() as stack:
        keys_out, counts_out = (stack.enter_context(p.open("wb")) for p in (path, path.with_suffix(".counts")))
        for begin in range(0, parts, threads):  # no more at a time than there is memory for
            some = map(pieces, range(begin, min(begin + threads, parts)))
            for keys, counts in pool.map(_merged, some) if executor.is_local else executor.map(_merged, some):
                write_array(keys_out, keys)
                write_array(counts_out, counts)
            progress("merging", min(begin + threads, parts), parts)
    return _read_run(path, columns)


def _merged(pieces: list[Run]) -> Run:
    while len(pieces) > 1:
        pieces = [_merge_two(*pieces[i : i + 2]) for i in range(0, len(pieces) - 1, 2)] + (
            pieces[-1:] if len(pieces) % 2 else []
        )
    return pieces[0]


def _merge_two(one: Run, two: Run) -> Run:
    size = len(one[1]) + len(two[1])
    keys, counts = np.empty((size, one[0].shape[1]), np.uint64), np.empty(size, np.int64)
    distinct = _merge_pair(one, two, keys, counts)
    return keys[:distinct], counts[:distinct]


def _sorted(keys: np.ndarray) -> np.ndarray:
    """Rows of `[m, columns]` in order; numpy's sort of single numbers is vectorised, so it does the most of it."""
    if keys.shape[1] == 1:
        keys[:, 0].sort()
        return keys
    if keys.shape[1] > 2:
        return keys[np.lexsort(keys.T[::-1])]
    result = keys[np.argsort(keys[:, 0])]
    _sort_ties(result)
    return result


@njit(cache=True, nogil=True)
def _sort_ties(keys: np.ndarray) -> None:
    """Rows with equal first columns are put in the order of the second."""
    begin = 0
    for i in range(1, len(keys) + 1):
        if i == len(keys) or keys[i, 0] != keys[begin, 0]:
            if i - begin > 1:
                keys[begin:i, 1] = np.sort(keys[begin:i, 1])
            begin = i


@njit(cache=True, nogil=True)
def _fill_keys(ids: np.ndarray, begin: int, end: int, layout: Layout, keys: np.ndarray) -> int:
    """Keys of the n-grams that end at `ids[begin:end]`; returns how many there are."""
    order, bits, per_key = layout
    history = np.full(order, SENTENCE_START, np.uint64)  # [0] is the last word
    start = begin
    while start > max(0, begin - order + 1) and ids[start - 1] != SENTENCE_END and ids[start - 1] != BREAK:
        start -= 1
    columns = keys.shape[1]
    rows = 0
    for i in range(start, end):
        word = ids[i]
        if word != BREAK:
            for j in range(order - 1, 0, -1):
                history[j] = history[j - 1]
            history[0] = np.uint64(word)
            if i >= begin:
                j = 0
                for column in range(columns):
                    key = np.uint64(0)
                    for _ in range(min(per_key, order - column * per_key)):
                        key = (key << np.uint64(bits)) | history[j]
                        j += 1
                    keys[rows, column] = key
                rows += 1
        if word in (BREAK, SENTENCE_END):
            history[:] = SENTENCE_START
    return rows


@njit(cache=True, nogil=True)
def _merge_pair(one: Run, two: Run, keys: np.ndarray, counts: np.ndarray) -> int:
    """Two sorted runs into one, counts of equal rows added; returns the number of rows."""
    keys_a, counts_a = one
    keys_b, counts_b = two
    columns = keys.shape[1]
    a = b = rows = 0
    while a < len(keys_a) or b < len(keys_b):
        order = 0  # of a against b
        if a == len(keys_a):
            order = 1
        elif b == len(keys_b):
            order = -1
        else:
            for c in range(columns):
                if keys_a[a, c] != keys_b[b, c]:
                    order = -1 if keys_a[a, c] < keys_b[b, c] else 1
                    break
        if order <= 0:
            for c in range(columns):
                keys[rows, c] = keys_a[a, c]
            counts[rows] = counts_a[a] + (counts_b[b] if order == 0 else 0)
            a, b = a + 1, b + (order == 0)
        else:
            for c in range(columns):
                keys[rows, c] = keys_b[b, c]
            counts[rows] = counts_b[b]
            b += 1
        rows += 1
    return rows
