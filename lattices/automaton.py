"""The back-off n-gram automaton: flat arrays, minimised states, one file that is memory-mapped.

A state is what the model can still tell apart about the words so far: the longest suffix of them that is an n-gram with
a longer one behind it (or a back-off weight of its own); every suffix of a state is a state. State 0, the root, is the
empty suffix. A word is scored by the arc of the state if it has one, else by the state's back-off weight and the next
shorter suffix state; the root scores every word. This is the definition of the ARPA format, so scores equal KenLM's up
to rounding.

Scores are whole numbers, natural log-probabilities in units of 2^-22 (`SCORE_SCALE`): sums of them are exact in any
order, which the search relies on. Their rounding (1.2e-7) is of the size of the float32 that ARPA readers keep.

Layout, all int32:

    states  [s, 8]   0 first arc slot, 1 arc slots, 2 suffix state, 3 back-off, 4 bound, 5 context length, 6-7 unused
    arcs    [a, 4]   0 word (-1: empty slot), 1 next state, 2 score, 3 bound
    roots   [v, 4]   0 next state, 1 score, 2 bound, 3 base token id of the word (-1: not a number)

A state with up to `LINEAR` arcs keeps them in a row, sorted by word; one with more is a hash table with linear probing,
a power of two of slots. `bound` of an arc is the highest score that its word gets in any context that ends in the
state's; of a state, the most that back-off from longer contexts can add above it (at least 0).

File: 8 bytes magic, 8 bytes length of a JSON header, the header (`order`, `counts`, shapes and offsets), the arrays at
multiples of 64 bytes, the vocabulary as UTF-8 lines. Needs numpy and numba only.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numba import njit

from lattices.errors import InvalidDataError, RescoreError
from lattices.ngrams import SENTENCE_START, UNKNOWN, NgramModel

MAX_ORDER = 6
SCORE_SCALE = 1 << 22  # units per nat
LN10 = float(np.log(10.0))
LINEAR = 8
LOWEST = -(1 << 30)  # -256 nats; KenLM's log10 probability of -100 for an absent <unk> is -230
ROOT = 0
MAGIC = b"RSCNGRM1"
ALIGNMENT = 64

FIRST, SLOTS, SUFFIX, BACKOFF, STATE_BOUND, LENGTH = range(6)
WORD, NEXT, SCORE, BOUND = range(4)
ROOT_NEXT, ROOT_SCORE, ROOT_BOUND, ROOT_TOKEN = range(4)


@dataclass(frozen=True, eq=False)
class Automaton:
    """A compiled n-gram model; arrays as in the module's text. `counts[n - 1]`: n-grams of order n in the model."""

    order: int
    counts: tuple[int, ...]
    states: np.ndarray
    arcs: np.ndarray
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
        score, after = advance(self.states, self.arcs, self.roots, state, word)
        return score / (SCORE_SCALE * LN10), after

    def state_after(self, words: Iterable[int], *, state: int = ROOT) -> int:
        """The state after some words, from a state on."""
        for word in words:
            state = advance(self.states, self.arcs, self.roots, state, word)[1]
        return int(state)

    def advance_many(self, states: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`advance` for pairs: states and words `[n]` -> scores int64 `[n]` (units of 1 / SCORE_SCALE nat), states."""
        return _advance_many(self.states, self.arcs, self.roots, states.astype(np.int32), words.astype(np.int32))

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
        states, arcs, roots = _arrays(levels, len(model.vocabulary))
        roots[:, ROOT_TOKEN] = [int(w) if w.isascii() and w.isdecimal() else -1 for w in model.vocabulary]
        counts = tuple(len(order) for order in model.orders)
        return cls(model.order, counts, states, arcs, roots, np.frombuffer(vocabulary, dtype=np.uint8))

    def save(self, path: Path) -> None:
        """Writes the automaton, whole or not at all. `OSError` if the place can't be written to."""
        header: dict[str, object] = {"order": self.order, "counts": self.counts}
        arrays = {"states": self.states, "arcs": self.arcs, "roots": self.roots, "vocabulary": self.vocabulary_bytes}
        offset = 0
        for name, array in arrays.items():
            header[name] = {"shape": array.shape, "offset": offset}
            offset += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 16) % ALIGNMENT)
        temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        try:
            with temporary.open("wb") as stream:
                stream.write(MAGIC + len(text).to_bytes(8, "little") + text)
                for array in arrays.values():
                    stream.write(array.tobytes())
                    stream.write(bytes(-array.nbytes % ALIGNMENT))
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

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
            parts = {}
            for name in ("states", "arcs", "roots", "vocabulary"):
                shape, dtype = header[name]["shape"], np.uint8 if name == "vocabulary" else np.int32
                start = end + header[name]["offset"]
                stop = start + int(np.prod(shape)) * np.dtype(dtype).itemsize
                if stop > len(data):
                    raise broken
                parts[name] = np.frombuffer(data, dtype, int(np.prod(shape)), start).reshape(shape)
            order, counts = int(header["order"]), tuple(header["counts"])
        except (ValueError, KeyError, TypeError) as error:
            raise broken from error
        return cls(order, counts, parts["states"], parts["arcs"], parts["roots"], parts["vocabulary"])


@njit(cache=True, nogil=True, inline="always")
def find_arc(states: np.ndarray, arcs: np.ndarray, state: int, word: int) -> int:
    """The place of a word's arc in `arcs`, -1 if the state has none. Not for the root."""
    first, slots = states[state, FIRST], states[state, SLOTS]
    if slots <= LINEAR:
        for place in range(first, first + slots):
            if arcs[place, WORD] == word:
                return place
        return -1
    mask = slots - 1
    step = hash_word(word) & mask
    while True:
        found = arcs[first + step, WORD]
        if found == word:
            return first + step
        if found < 0:
            return -1
        step = (step + 1) & mask


@njit(cache=True, nogil=True, inline="always")
def hash_word(word: int) -> int:
    """Where the search for a word begins in a hash table, before the mask."""
    return np.int64((np.uint64(word) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33))


@njit(cache=True, nogil=True)
def advance(states: np.ndarray, arcs: np.ndarray, roots: np.ndarray, state: int, word: int) -> tuple[int, int]:
    """Score (units of 1 / SCORE_SCALE nat) of a word after a state, and the state after both."""
    passed = np.int64(0)
    while state != ROOT:
        place = find_arc(states, arcs, state, word)
        if place >= 0:
            return passed + arcs[place, SCORE], arcs[place, NEXT]
        passed += states[state, BACKOFF]
        state = states[state, SUFFIX]
    return passed + roots[word, ROOT_SCORE], roots[word, ROOT_NEXT]


@njit(cache=True, nogil=True)
def _advance_many(
    states: np.ndarray, arcs: np.ndarray, roots: np.ndarray, at: np.ndarray, words: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    scores, after = np.empty(len(words), dtype=np.int64), np.empty(len(words), dtype=np.int32)
    for i in range(len(words)):
        scores[i], after[i] = advance(states, arcs, roots, at[i], words[i])
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
    absent = np.iinfo(np.int64).min
    for n in range(model.order - 1, 0, -1):  # words[n] has n-grams of order n + 1
        needed = np.concatenate([words[n][:, :-1], words[n][:, 1:]])
        place = _places(words[n - 1], needed)
        if (place < 0).any():
            new = np.unique(needed[place < 0], axis=0)
            joined = np.concatenate([words[n - 1], new])
            order = np.lexsort(joined.T[::-1])
            words[n - 1] = joined[order]
            scores[n - 1] = np.concatenate([scores[n - 1], np.full(len(new), absent)])[order]
            backoffs[n - 1] = np.concatenate([backoffs[n - 1], np.zeros(len(new), dtype=np.int64)])[order]
    levels: list[_Level] = []
    for n in range(model.order):
        none = np.zeros(len(words[n]), dtype=np.int64)
        prefix = _places(words[n - 1], words[n][:, :-1]) if n else none
        suffix = _places(words[n - 1], words[n][:, 1:]) if n else none
        blank = scores[n] == absent
        if n:
            scores[n][blank] = levels[-1].backoff[prefix[blank]] + levels[-1].score[suffix[blank]]
        levels.append(_Level(words[n], scores[n], backoffs[n], prefix, suffix))
    return levels


def _places(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Place of each wanted row in sorted rows int32 `[m, n]`, -1 where absent."""
    if not len(rows):
        return np.full(len(wanted), -1, dtype=np.int64)
    keys, sought = _keys(rows), _keys(wanted)
    place = np.minimum(np.searchsorted(keys, sought), len(keys) - 1)
    return np.where(keys[place] == sought, place, -1)


def _keys(rows: np.ndarray) -> np.ndarray:
    """One sortable key per row: bytes compare as the words do."""
    width = rows.shape[1]
    if width == 1:
        return rows[:, 0].astype(np.uint64)
    if width == 2:
        return (rows[:, 0].astype(np.uint64) << np.uint64(32)) | rows[:, 1].astype(np.uint64)
    big_endian = np.ascontiguousarray(rows.astype(">u4"))
    return big_endian.view(f"S{4 * width}")[:, 0]


def _arrays(levels: list[_Level], vocabulary_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    order = len(levels)
    # Which n-grams are states: those that something follows or that have a weight of their own, and their suffixes.
    is_state = [level.backoff != 0 for level in levels[:-1]]
    for n in range(order - 2, -1, -1):
        is_state[n][levels[n + 1].prefix] = True
        if n + 2 < order:
            is_state[n][levels[n + 1].suffix[is_state[n + 1]]] = True
    number = [np.full(len(level.score), -1, dtype=np.int64) for level in levels]
    count = 1
    for n, chosen in enumerate(map(np.flatnonzero, is_state)):
        number[n][chosen] = count + np.arange(len(chosen))
        count += len(chosen)
    target: list[np.ndarray] = []  # the state after each n-gram
    for n, level in enumerate(levels):
        shorter = target[n - 1][level.suffix] if n else np.zeros(len(level.score), dtype=np.int64)
        target.append(np.where(number[n] >= 0, number[n], shorter))

    states = np.zeros((count, 8), dtype=np.int32)
    for n in range(order - 1):
        chosen = np.flatnonzero(number[n] >= 0)
        rows = number[n][chosen]
        if n:
            states[rows, SUFFIX] = target[n - 1][levels[n].suffix[chosen]]
        states[rows, BACKOFF] = levels[n].backoff[chosen]
        states[rows, LENGTH] = n + 1
    above = np.zeros(count, dtype=np.int64)
    for row in _by_falling_length(states):
        np.maximum.at(above, states[row, SUFFIX], states[row, BACKOFF] + above[row])
    states[:, STATE_BOUND] = above

    bounds = [level.score.copy() for level in levels]
    for n in range(order - 1, -1, -1):
        at = number[n - 1][levels[n].prefix] if n else np.zeros(len(levels[n].score), dtype=np.int64)
        assert n == 0 or (at >= 0).all(), "what precedes an n-gram is a state"
        bounds[n] += above[at]
        if n + 1 < order:
            np.maximum.at(bounds[n], levels[n + 1].suffix, bounds[n + 1])

    roots = np.zeros((vocabulary_size, 4), dtype=np.int32)
    unigrams = levels[0].words[:, 0]
    unknown = np.flatnonzero(unigrams == UNKNOWN)
    default = levels[0].score[unknown[0]] if len(unknown) else _fixed(np.array([-100.0]))[0]
    roots[:, ROOT_SCORE] = default
    roots[:, ROOT_BOUND] = default + above[ROOT]
    roots[unigrams, ROOT_NEXT] = target[0]
    roots[unigrams, ROOT_SCORE] = levels[0].score
    roots[unigrams, ROOT_BOUND] = bounds[0]

    owner = [number[n - 1][levels[n].prefix] for n in range(1, order)]
    packed = [
        np.stack([level.words[:, -1], target[n], level.score, bounds[n]], axis=1).astype(np.int32)
        for n, level in enumerate(levels)
        if n
    ]
    if not packed:
        return states, np.zeros((0, 4), dtype=np.int32), roots
    arcs = _place_arcs(states, np.concatenate(owner), np.concatenate(packed))
    return states, arcs, roots


def _by_falling_length(states: np.ndarray) -> list[np.ndarray]:
    """State numbers in groups of one context length, longest first."""
    lengths = states[:, LENGTH]
    return [np.flatnonzero(lengths == n) for n in range(int(lengths.max(initial=0)), 0, -1)]


def _place_arcs(states: np.ndarray, owner: np.ndarray, packed: np.ndarray) -> np.ndarray:
    """Gives every state its slots and fills them; `states` is changed in place."""
    order = np.lexsort((packed[:, WORD], owner))
    owner, packed = owner[order], packed[order]
    degree = np.bincount(owner, minlength=len(states)).astype(np.int64)
    slots = degree.copy()
    hashed = degree > LINEAR
    slots[hashed] = 1 << np.ceil(np.log2(degree[hashed] * 1.5)).astype(np.int64)
    first = np.concatenate([[0], np.cumsum(slots)])
    if first[-1] >= 1 << 31:
        raise RescoreError("the n-gram model is too large for one automaton (2^31 arc slots); prune it")
    states[:, FIRST], states[:, SLOTS] = first[:-1], slots
    arcs = np.zeros((int(first[-1]), 4), dtype=np.int32)
    arcs[:, WORD] = -1
    _fill(states, owner, packed, arcs)
    return arcs


@njit(cache=True, nogil=True)
def _fill(states: np.ndarray, owner: np.ndarray, packed: np.ndarray, arcs: np.ndarray) -> None:
    for i in range(len(owner)):
        first, slots = states[owner[i], FIRST], states[owner[i], SLOTS]
        if slots <= LINEAR:
            place = first
            while arcs[place, WORD] >= 0:
                place += 1
        else:
            step = hash_word(packed[i, WORD]) & (slots - 1)
            while arcs[first + step, WORD] >= 0:
                step = (step + 1) & (slots - 1)
            place = first + step
        arcs[place] = packed[i]
