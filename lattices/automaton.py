"""The back-off n-gram automaton: flat arrays, minimised states, one file that is memory-mapped.

A state is what the model can still tell apart about the words so far: the longest suffix of them that is an n-gram with
a longer one behind it (or a back-off weight of its own); every suffix of a state is a state. State 0, the root, is the
empty suffix. A word is scored by the arc of the state if it has one, else by the state's back-off weight and the next
shorter suffix state; the root scores every word. This is the definition of the ARPA format, so scores equal KenLM's up
to rounding.

Scores are whole numbers, natural log-probabilities in units of 2^-22 (`SCORE_SCALE`): sums of them are exact in any
order, which the search relies on. Their rounding (1.2e-7) is of the size of the float32 that ARPA readers keep.

Layout, all int32:

    cells   [c, 4]   a state is its header cell and the cells of its arcs behind it; its number is the header's place
            header   0 arc cells, 1 suffix state, 2 back-off, 3 bound
            arc      0 word (-1: empty), 1 next state, 2 score, 3 bound
    roots   [v, 4]   0 next state, 1 score, 2 bound, 3 base token id of the word (-1: not a number)

The root is cell 0, without arcs. A state with up to `LINEAR` arcs keeps them in a row, sorted by word; one with more is
a hash table with linear probing, a power of two of cells. States stand by rising context length: those with n words of
context or more are the numbers from `level_starts[n]` on. `bound` of an arc is the highest score that its word gets in
any context that ends in the state's; of a state, the most that back-off from longer contexts can add above it (at
least 0).

File: 8 bytes magic, 8 bytes length of a JSON header, the header (`order`, `counts`, `level_starts`, shapes and
offsets), the arrays at multiples of 64 bytes, the vocabulary as UTF-8 lines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from lattices.errors import InvalidDataError, RescoreError
from lattices.ngrams import MAX_ORDER, SENTENCE_START, UNKNOWN, NgramModel

SCORE_SCALE = 1 << 22  # units per nat
LN10 = float(np.log(10.0))
LINEAR = 8
LOWEST = -(1 << 30)  # -256 nats; KenLM's log10 probability of -100 for an absent <unk> is -230
ABSENT = np.iinfo(np.int64).min
ROOT = 0
MAGIC = b"RSCNGRM1"
ALIGNMENT = 64

SLOTS, SUFFIX, BACKOFF, STATE_BOUND = range(4)
WORD, NEXT, SCORE, BOUND = range(4)
ROOT_NEXT, ROOT_SCORE, ROOT_BOUND, ROOT_TOKEN = range(4)


@dataclass(frozen=True, eq=False)
class Automaton:
    """A compiled n-gram model; arrays as in the module's text. `counts[n - 1]`: n-grams of order n in the model."""

    order: int
    counts: tuple[int, ...]
    level_starts: tuple[int, ...]  # MAX_ORDER + 1 of them
    cells: np.ndarray
    roots: np.ndarray
    vocabulary_bytes: np.ndarray  # uint8, words in UTF-8 with a line end after each

    @property
    def vocabulary(self) -> list[str]:
        """The words by id."""
        return self.vocabulary_bytes.tobytes().decode().split("\n")[:-1]

    @property
    def start(self) -> int:
        """The state after `<s>`."""
        return int(self.roots[SENTENCE_START, ROOT_NEXT])

    def advance(self, state: int, word: int) -> tuple[float, int]:
        """log10 probability of a word after a state, and the state after both. Word ids as in the vocabulary."""
        score, after = advance(self.cells, self.roots, state, word)
        return score / (SCORE_SCALE * LN10), after

    def state_after(self, words: Iterable[int], *, state: int = ROOT) -> int:
        """The state after some words, from a state on."""
        for word in words:
            state = advance(self.cells, self.roots, state, word)[1]
        return int(state)

    def advance_many(self, states: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`advance` for pairs: states and words `[n]` -> scores int64 `[n]` (units of 1 / SCORE_SCALE nat), states."""
        return _advance_many(self.cells, self.roots, states.astype(np.int32), words.astype(np.int32))

    def words_of_tokens(self, vocab_size: int) -> np.ndarray:
        """Word id of every base token id, int32 `[vocab_size]`, for words that are decimal token ids; others: `<unk>`.

        Raises `InvalidDataError` if no word is a token id of such a vocabulary or one is beyond it.
        """
        tokens = self.roots[:, ROOT_TOKEN]
        known = np.flatnonzero(tokens >= 0)
        if not len(known):
            raise InvalidDataError("the words of this n-gram model are no token ids; build it with --tokenizer")
        if (highest := int(tokens.max())) >= vocab_size:
            raise InvalidDataError(
                f"the n-gram model has token id {highest}, the base LM's vocabulary ends at {vocab_size - 1}; "
                "it was made for another tokenizer"
            )
        words = np.full(vocab_size, UNKNOWN, dtype=np.int32)
        words[tokens[known]] = known
        return words

    @classmethod
    def compile(cls, model: NgramModel) -> Automaton:
        """Compiles a model of order 1 to 6. Raises `RescoreError` for a higher order."""
        if not 1 <= model.order <= MAX_ORDER:
            raise RescoreError(f"an n-gram model of order {model.order}; orders 1 to {MAX_ORDER} can be used")
        levels = _closed(model)
        vocabulary = "".join(f"{word}\n" for word in model.vocabulary).encode()
        cells, roots, starts = _arrays(levels, len(model.vocabulary))
        roots[:, ROOT_TOKEN] = [
            int(w) if w.isascii() and w.isdecimal() and len(w) < 10 else -1 for w in model.vocabulary
        ]
        counts = tuple(len(order) for order in model.orders)
        return cls(model.order, counts, starts, cells, roots, np.frombuffer(vocabulary, dtype=np.uint8))

    def save(self, path: Path) -> None:
        """Writes the automaton. `OSError` if the place can't be written to, which may leave a part of it."""
        header: dict[str, object] = {"order": self.order, "counts": self.counts, "level_starts": self.level_starts}
        arrays = {"cells": self.cells, "roots": self.roots, "vocabulary": self.vocabulary_bytes}
        offset = 0
        for name, array in arrays.items():
            header[name] = {"shape": array.shape, "offset": offset}
            offset += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 16) % ALIGNMENT)
        with path.open("wb") as stream:
            stream.write(MAGIC + len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                stream.write(array.tobytes())
                stream.write(bytes(-array.nbytes % ALIGNMENT))

    @classmethod
    def load(cls, path: Path) -> Automaton:
        """Maps a file of `save` into memory; nothing is read before it is needed.

        Raises `RescoreError` if there is no file, `InvalidDataError` if it is not an automaton or was cut short.
        """
        try:
            data = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise RescoreError(f"can't read {path}: {getattr(error, 'strerror', None) or 'it is empty'}") from error
        broken = InvalidDataError(f"{path} is not a whole n-gram automaton; build it again (rescore build-ngram)")
        if data[:8].tobytes() != MAGIC or len(data) < 16:
            raise broken
        end = 16 + int.from_bytes(data[8:16].tobytes(), "little")
        try:
            header = json.loads(data[16:end].tobytes())
            counts, starts = _numbers(header["counts"]), _numbers(header["level_starts"])
            cells, roots = (_mapped(data[end:], header[name], np.int32) for name in ("cells", "roots"))
            vocabulary = _mapped(data[end:], header["vocabulary"], np.uint8)
            if (header["order"], len(starts)) != (len(counts), MAX_ORDER + 1):
                raise broken
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise broken from error
        return cls(len(counts), counts, starts, cells, roots, vocabulary)


def _numbers(given: object) -> tuple[int, ...]:
    """A header's list of counts. Raises `ValueError` for anything else."""
    if not isinstance(given, list) or not all(type(each) is int and each >= 0 for each in given):
        raise ValueError
    return tuple(given)


def _mapped(data: np.ndarray, part: dict[str, Any], dtype: type[np.generic]) -> np.ndarray:
    """An array of a file, int32 in rows of four or uint8. Raises `ValueError` where the file does not hold it."""
    shape, (offset,) = _numbers(part["shape"]), _numbers([part["offset"]])
    count = math.prod(shape)  # of Python's numbers, which don't overflow
    if shape[1:] != ((4,) if dtype is np.int32 else ()) or offset + count * np.dtype(dtype).itemsize > len(data):
        raise ValueError
    return np.frombuffer(data, dtype, count, offset).reshape(shape)


@njit(cache=True, nogil=True, inline="always")
def find_arc(cells: np.ndarray, state: int, word: int) -> int:
    """The cell of a word's arc, -1 if the state has none."""
    first, slots = state + 1, cells[state, SLOTS]
    if slots <= LINEAR:
        for place in range(first, first + slots):
            if cells[place, WORD] == word:
                return int(place)
        return -1
    step = hash_word(word) & (slots - 1)
    while True:
        found = cells[first + step, WORD]
        if found == word:
            return int(first + step)
        if found < 0:
            return -1
        step = (step + 1) & (slots - 1)


@njit(cache=True, nogil=True, inline="always")
def hash_word(word: int) -> int:
    """Where the search for a word begins in a hash table, before the mask."""
    return int(np.int64((np.uint64(word) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33)))


@njit(cache=True, nogil=True)
def advance(cells: np.ndarray, roots: np.ndarray, state: int, word: int) -> tuple[int, int]:
    """Score (units of 1 / SCORE_SCALE nat) of a word after a state, and the state after both."""
    passed = 0
    while state != ROOT:
        place = find_arc(cells, state, word)
        if place >= 0:
            return passed + cells[place, SCORE], cells[place, NEXT]
        passed += cells[state, BACKOFF]
        state = cells[state, SUFFIX]
    return passed + roots[word, ROOT_SCORE], roots[word, ROOT_NEXT]


@njit(cache=True, nogil=True)
def _advance_many(
    cells: np.ndarray, roots: np.ndarray, at: np.ndarray, words: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    scores, after = np.empty(len(words), dtype=np.int64), np.empty(len(words), dtype=np.int32)
    for i in range(len(words)):
        scores[i], after[i] = advance(cells, roots, at[i], words[i])
    return scores, after


@dataclass(eq=False)
class _Level:
    """N-grams of one order: `words` `[m, n]`, fixed-point `score`, `backoff`; places of their prefix (all but the last
    word) and suffix (all but the first) one level below."""

    words: np.ndarray
    score: np.ndarray
    backoff: np.ndarray
    prefix: np.ndarray
    suffix: np.ndarray


def _fixed(log10: np.ndarray) -> np.ndarray:
    scaled = np.rint(log10.astype(np.float64) * (LN10 * SCORE_SCALE))
    return np.clip(scaled, LOWEST, -LOWEST).astype(np.int64)


def _closed(model: NgramModel) -> list[_Level]:
    """The model's levels with every prefix and suffix present.

    Pruning by other tools can leave an n-gram whose suffix is gone. The missing one is put in with the score that
    back-off gives it and no back-off weight, which changes no probability.
    """
    words = [order.words.astype(np.int32) for order in model.orders]
    scores = [_fixed(order.log10p) for order in model.orders]
    backoffs = [_fixed(order.log10_backoff) for order in model.orders]
    links = _links(words, len(model.vocabulary))
    if links is None:
        _fill_holes(words, scores, backoffs)
        links = _links(words, len(model.vocabulary))
        assert links is not None, "holes were filled"
    levels: list[_Level] = []
    for n, (prefix, suffix) in enumerate(links):
        blank = scores[n] == ABSENT
        if n:
            scores[n][blank] = levels[-1].backoff[prefix[blank]] + levels[-1].score[suffix[blank]]
        levels.append(_Level(words[n], scores[n], backoffs[n], prefix, suffix))
    return levels


def _links(words: list[np.ndarray], vocabulary_size: int) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Places of every n-gram's prefix and suffix one level below; None if one is missing."""
    none = np.zeros(len(words[0]), dtype=np.int64)
    links = [(none, none)]
    unigram = np.full(vocabulary_size, -1, dtype=np.int64)
    unigram[words[0][:, 0]] = np.arange(len(words[0]))
    keys: list[np.ndarray] = []  # of levels 2 and up: place of the prefix x vocabulary + last word, rising
    for n in range(1, len(words)):
        found = []
        for part in (words[n][:, :-1], words[n][:, 1:]):
            place = unigram[part[:, 0]]
            for level, last in zip(keys, part.T[1:], strict=True):
                key = place * vocabulary_size + last
                place = np.minimum(np.searchsorted(level, key), len(level) - 1)
                place[level[place] != key] = -1
            if (place < 0).any():
                return None
            found.append(place)
        links.append((found[0], found[1]))
        keys.append(found[0] * vocabulary_size + words[n][:, -1])
        if not len(keys[-1]) and n + 1 < len(words):
            keys[-1] = np.array([-1])  # so that a search in an empty level finds nothing
    return links


def _fill_holes(words: list[np.ndarray], scores: list[np.ndarray], backoffs: list[np.ndarray]) -> None:
    """Puts the missing prefixes and suffixes in, in place; their scores are `ABSENT`."""
    for n in range(len(words) - 1, 0, -1):
        needed = np.concatenate([words[n][:, :-1], words[n][:, 1:]])
        joined, first = np.unique(np.concatenate([words[n - 1], needed]), axis=0, return_index=True)
        old = first < len(words[n - 1])  # the first place of a row that was there is its old one
        for values, default in ((scores, ABSENT), (backoffs, 0)):
            values[n - 1] = np.where(old, values[n - 1][np.where(old, first, 0)], default)
        words[n - 1] = joined


def _arrays(levels: list[_Level], vocabulary_size: int) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    order = len(levels)
    # Which n-grams are states: those that something follows or that have a weight of their own, and their suffixes.
    is_state = [level.backoff != 0 for level in levels[:-1]]
    for n in range(order - 2, -1, -1):
        is_state[n][levels[n + 1].prefix] = True
        if n + 2 < order:
            is_state[n][levels[n + 1].suffix[is_state[n + 1]]] = True

    # Their numbers: one header cell and the arcs' cells each.
    cells_of: list[np.ndarray] = []  # arc cells of each n-gram's state
    number: list[np.ndarray] = []  # -1: no state
    starts, count = [0], 1
    for n in range(order - 1):
        starts.append(count)
        chosen = np.flatnonzero(is_state[n])
        degree = np.bincount(levels[n + 1].prefix, minlength=len(levels[n].score))
        table = np.exp2(np.ceil(np.log2(np.maximum(degree, 1) * 1.5))).astype(np.int64)
        cells_of.append(np.where(degree > LINEAR, table, degree))
        taken = cells_of[n][chosen] + 1
        number.append(np.full(len(levels[n].score), -1, dtype=np.int64))
        number[n][chosen] = count + np.cumsum(taken) - taken
        count += int(taken.sum())
    if count >= 1 << 31:
        raise RescoreError("the n-gram model is too large for one automaton (2^31 cells); prune it")
    starts += [count] * (MAX_ORDER + 1 - len(starts))

    target: list[np.ndarray] = []  # the state after each n-gram
    for n, level in enumerate(levels):
        shorter = target[n - 1][level.suffix] if n else np.zeros(len(level.score), dtype=np.int64)
        target.append(np.where(number[n] >= 0, number[n], shorter) if n + 1 < order else shorter)

    # Bounds, from the longest contexts down: what back-off can add above a state, the best score of an arc's word.
    above = [np.zeros(len(level.score), dtype=np.int64) for level in levels]
    root_above = 0
    for n in range(order - 2, -1, -1):
        chosen = np.flatnonzero(is_state[n])
        most = levels[n].backoff[chosen] + above[n][chosen]
        if n:
            np.maximum.at(above[n - 1], levels[n].suffix[chosen], most)
        else:
            root_above = max(0, int(most.max(initial=0)))
    bounds = [level.score + (above[n - 1][level.prefix] if n else root_above) for n, level in enumerate(levels)]
    for n in range(order - 1, 0, -1):
        np.maximum.at(bounds[n - 1], levels[n].suffix, bounds[n])

    cells = np.zeros((count, 4), dtype=np.int32)
    cells[1:, WORD] = -1
    for n in range(order - 1):
        chosen = np.flatnonzero(is_state[n])
        headers = number[n][chosen]
        cells[headers, SLOTS] = cells_of[n][chosen]
        cells[headers, SUFFIX] = target[n - 1][levels[n].suffix[chosen]] if n else ROOT
        cells[headers, BACKOFF] = levels[n].backoff[chosen]
        cells[headers, STATE_BOUND] = above[n][chosen]
        longer = levels[n + 1]
        arcs = np.stack([longer.words[:, -1], target[n + 1], longer.score, bounds[n + 1]], axis=1).astype(np.int32)
        _fill(cells, number[n][longer.prefix], arcs)

    roots = np.zeros((vocabulary_size, 4), dtype=np.int32)
    unigrams = levels[0].words[:, 0]
    unknown = np.flatnonzero(unigrams == UNKNOWN)
    default = levels[0].score[unknown[0]] if len(unknown) else _fixed(np.array([-100.0]))[0]
    roots[:, ROOT_SCORE], roots[:, ROOT_BOUND] = default, default + root_above
    roots[unigrams, ROOT_NEXT], roots[unigrams, ROOT_SCORE] = target[0], levels[0].score
    roots[unigrams, ROOT_BOUND] = bounds[0]
    return cells, roots, tuple(starts)


@njit(cache=True, nogil=True)
def _fill(cells: np.ndarray, owner: np.ndarray, arcs: np.ndarray) -> None:
    """Puts arcs (sorted by owner and word) into the cells of the states that own them."""
    for i in range(len(owner)):
        first, slots = owner[i] + 1, cells[owner[i], SLOTS]
        step = 0 if slots <= LINEAR else hash_word(arcs[i, WORD]) & (slots - 1)
        while cells[first + step, WORD] >= 0:
            step += 1
            if slots > LINEAR:
                step &= slots - 1
        for column in range(4):  # a row at once takes numba seconds longer to compile
            cells[first + step, column] = arcs[i, column]
