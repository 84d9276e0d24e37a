"""Words at white space and their ids, in the order of their first appearance: compiled, some ten million a second."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from numba import njit

from lattices.errors import InvalidDataError
from lattices.ngrams import SENTENCE_END, SPECIAL_WORDS


class WordNumbers:
    """Ids of words: an open-addressing hash table over bytes."""

    def __init__(self) -> None:
        self._slots = np.full(1 << 16, -1, np.int32)
        self._hashes = np.zeros(1 << 15, np.uint64)
        self._starts = np.zeros((1 << 15) + 1, np.int64)
        self._store = np.zeros(1 << 20, np.uint8)
        self._state = np.zeros(3, np.int64)  # words known, position in the text, ids written
        head = np.frombuffer(" ".join(SPECIAL_WORDS).encode(), np.uint8)
        self._scan(head, np.empty(len(head) + 1, np.int32), specials=0)

    def _scan(self, text: np.ndarray, ids: np.ndarray, *, specials: int) -> int:
        """Ids of the text's words into `ids`; returns -1, or the position of a special word."""
        self._state[1:] = 0
        while True:
            status = _scan_words(text, ids, specials, self._slots, self._hashes, self._starts, self._store, self._state)
            if status != _FULL:
                return int(self._state[1]) if status == _SPECIAL else -1
            known = int(self._state[0])
            if 2 * known >= len(self._hashes):
                self._hashes = np.concatenate([self._hashes, np.zeros_like(self._hashes)])
                self._starts = np.concatenate([self._starts, np.zeros(len(self._starts) - 1, np.int64)])
                self._slots = np.full(2 * len(self._slots), -1, np.int32)
                _refill_slots(self._slots, self._hashes, known)
            self._store = np.concatenate([self._store, np.zeros(len(self._store) + len(text), np.uint8)])

    def encode(self, block: bytes, place: Callable[[int], str]) -> np.ndarray:
        """int32 ids of whole lines, `</s>` at every line end; `place(i)` names line i of them, from 0, in errors."""
        text = np.frombuffer(block, np.uint8)
        ids = np.empty(len(text) + 1, np.int32)
        position = self._scan(text, ids, specials=len(SPECIAL_WORDS))
        if position >= 0:
            word = block[position : position + 6].split()[0].decode("utf-8", "replace")
            line = block.count(b"\n", 0, position)
            raise InvalidDataError(
                f"{place(line)} holds {word} as a word, which stands for something else in "
                "an n-gram model; replace it in the text"
            )
        return ids[: self._state[2]]

    def names(self) -> list[str]:
        """All words but the special ones."""
        known, store = int(self._state[0]), self._store.tobytes()
        starts = self._starts[: known + 1].tolist()
        return [store[a:b].decode("utf-8") for a, b in itertools.pairwise(starts[len(SPECIAL_WORDS) :])]


_DONE, _FULL, _SPECIAL = 0, 1, 2


@njit(cache=True, nogil=True)
def _scan_words(
    text: np.ndarray, ids: np.ndarray, specials: int, slots: np.ndarray, hashes: np.ndarray, starts: np.ndarray,
    store: np.ndarray, state: np.ndarray,
) -> int:  # fmt: skip
    """Goes on from `state`; stops at a word with an id below `specials`, and where a table is half full."""
    known, position, written = state[0], state[1], state[2]
    mask = len(slots) - 1
    status = _DONE
    while position < len(text):
        byte = text[position]
        if byte == 10:
            ids[written] = SENTENCE_END
            written += 1
            position += 1
            continue
        if byte == 32 or byte == 9 or byte == 13 or byte == 0:
            position += 1
            continue
        end = position
        digest = np.uint64(14695981039346656037)  # FNV-1a, then mixed, since its low bits alone are weak
        while end < len(text):
            byte = text[end]
            if byte == 32 or byte == 10 or byte == 9 or byte == 13 or byte == 0:
                break
            digest = (digest ^ np.uint64(byte)) * np.uint64(1099511628211)
            end += 1
        digest ^= digest >> np.uint64(32)
        digest *= np.uint64(0x9E3779B97F4A7C15)
        digest ^= digest >> np.uint64(29)
        slot = np.int64(digest & np.uint64(mask))
        word = -1
        while slots[slot] >= 0:
            candidate = slots[slot]
            begin = starts[candidate]
            if hashes[candidate] == digest and starts[candidate + 1] - begin == end - position:
                same = 0
                while same < end - position and store[begin + same] == text[position + same]:
                    same += 1
                if same == end - position:
                    word = candidate
                    break
            slot = (slot + 1) & mask
        if word < 0:
            if 2 * known >= len(hashes) or starts[known] + end - position > len(store):
                status = _FULL
                break
            word = known
            slots[slot] = known
            hashes[known] = digest
            for i in range(end - position):
                store[starts[known] + i] = text[position + i]
            starts[known + 1] = starts[known] + end - position
            known += 1
        elif word < specials:
            status = _SPECIAL
            break
        ids[written] = word
        written += 1
        position = end
    state[0], state[1], state[2] = known, position, written
    return status


@njit(cache=True, nogil=True)
def _refill_slots(slots: np.ndarray, hashes: np.ndarray, known: int) -> None:
    mask = len(slots) - 1
    for word in range(known):
        slot = np.int64(hashes[word] & np.uint64(mask))
        while slots[slot] >= 0:
            slot = (slot + 1) & mask
        slots[slot] = word
