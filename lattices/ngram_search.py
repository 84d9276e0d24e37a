"""Exact p-best search over a lattice rescored by an n-gram automaton, after [A] section 4 (there: OpenFst composition).

A path picks one entry in each of the slots 2..h; slot 1 stays its arg-max. Its score is the sum over all slots of the
head's log-prob + weight x the n-gram's log-prob of the word after the true left context and the path so far. Scores are
whole numbers (units of 2^-38 nat: `ARC_SCALE`), so sums are exact in any order and ties are ties; of equal scores the
lowest token ids (compared from slot 1 on) come first.

A plain dynamic program looks up every arc of every (slot, automaton state) pair. Four things make this one quicker:

1. A state's k arcs are scored at once: they are those of its suffix state plus its back-off weight, overridden by its
   own few arcs. Such a row is made when it is first needed and kept for the lattice.
2. A bound. Arcs of states with one or two words of context carry the highest score that any longer context gives the
   word, so one backward pass over k x k pairs per slot bounds what any prefix can still gain.
3. A beam search with that bound finds p good paths. The worst of them is a floor: what can't reach it is not among the
   p best. The forward pass then makes only the states that can; it is exact, since it drops nothing else.
4. A backward pass over these states gives the exact best completion of each, so the last walk, depth first, meets
   hardly anything but the p best paths.

Rows, one for a pair of slot and state, lie in two arrays with these columns (k entries each where not said otherwise):

    row64  n-gram score of each word | head's log-prob + weight x it | best score to here, from here (one each)
    row32  state after each word | its row in the next slot (-1: on none of the p best paths)
           | entry that led here, queue (one each)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit

from lattices.automaton import (
    BACKOFF,
    BOUND,
    NEXT,
    ROOT,
    ROOT_NEXT,
    ROOT_SCORE,
    SCORE,
    SCORE_SCALE,
    SLOTS,
    STATE_BOUND,
    SUFFIX,
    WORD,
    Automaton,
    advance,
    find_arc,
)
from lattices.errors import RescoreError
from lattices.lattice import Lattice
from lattices.ngrams import UNKNOWN
from lattices.search import PBest, p_best

WEIGHT_SCALE = 1 << 16
ARC_SCALE = SCORE_SCALE * WEIGHT_SCALE  # units per nat of a path's score
MAX_WEIGHT = 64.0
LOWEST_HEAD = -1024.0  # nats; a head's log-prob below counts as this, so that sums stay in 64 bits
BEAM = 16  # narrowest beam; a wider one costs more than its better floor saves
NONE = -(1 << 60)  # no path
FIRST_ROWS = 2048
LAST_RUN = 1 << 22  # runs that the hash table's keys can tell apart


class _Room(NamedTuple):
    """Room to work in, kept between calls."""

    row64: np.ndarray  # [r, 2k + 2]
    row32: np.ndarray  # [r, 2k + 2]
    table: np.ndarray  # [t, 2] hash table: (run, slot, state) and row
    entry_of: np.ndarray  # [v] entry of a word in the current slot, -1: not there
    same: np.ndarray  # [h, k] another entry with the same word, -1: none
    bound: np.ndarray  # [h, k, k] the most that a path can gain after two neighbouring entries
    short: np.ndarray  # [h, k] row of the state that knows only the entry before the slot
    counters: np.ndarray  # 0 rows in use, 1 run


def checked_weight(p: int, weight: float) -> int:
    """The weight in units of 1 / `WEIGHT_SCALE`; raises `RescoreError` for p < 1 or a weight outside its range."""
    if p < 1:
        raise RescoreError(f"p = {p} asks for no drafts; choose p of at least 1")
    if not 0 <= weight <= MAX_WEIGHT:
        raise RescoreError(f"an n-gram weight of {weight}; choose one from 0 to {MAX_WEIGHT:g}")
    return round(weight * WEIGHT_SCALE)


class NgramSearch:
    """Searches lattices with one automaton; keeps its room to work in between calls, so it is not for two threads.

    `words` int32 `[vocab_size]` gives the automaton's word of every token id. With `end_token` (a token id) a path
    ends where it takes that token: what follows is neither scored nor searched, and filled with each slot's arg-max.
    """

    def __init__(self, automaton: Automaton, words: np.ndarray, *, end_token: int | None = None) -> None:
        self.automaton, self.words, self.end_token = automaton, words, end_token
        self._room: _Room | None = None

    def state_after(self, token_ids: Sequence[int] | np.ndarray, *, from_start: bool = False) -> int:
        """The state after tokens; only the last order - 1 matter. `from_start`: `<s>` stands before them."""
        needed = max(0, self.automaton.order - 1)
        state = self.automaton.start if from_start and len(token_ids) < needed else ROOT
        last = np.asarray(token_ids[max(0, len(token_ids) - needed) :], dtype=np.int64)
        return self.automaton.state_after(self.words[last].tolist(), state=state)

    def p_best_after(self, lattice: Lattice, lefts: Sequence[Sequence[int]], p: int, *, weight: float) -> PBest:
        """`p_best` of lattices that stand after these token ids."""
        states = np.array([self.state_after(left) for left in lefts], dtype=np.int32)
        return self.p_best(lattice, states, p, weight=weight)

    def coverage(self, token_ids: np.ndarray) -> float:
        """Share of these tokens that the automaton knows."""
        return float((self.words[token_ids] != UNKNOWN).mean()) if token_ids.size else 1.0

    def p_best(self, lattice: Lattice, states: np.ndarray, p: int, *, weight: float) -> PBest:
        """The p best drafts of every lattice `[n, h, k]` whose left context led to the automaton's `states` `[n]`.

        Gives p' = min(p, k^(h-1)) drafts each; `scores` in nats. A weight of 0 gives `lattices.search.p_best`, bit for
        bit. Raises `RescoreError` for p < 1 or a weight outside 0 to `MAX_WEIGHT`.
        """
        factor = checked_weight(p, weight)
        if factor == 0:
            return p_best(lattice, p)
        n, h, k = lattice.token_ids.shape
        token_ids = np.ascontiguousarray(lattice.token_ids)
        words = self.words[token_ids]
        heads = np.rint(np.maximum(lattice.logps, LOWEST_HEAD).astype(np.float64) * ARC_SCALE).astype(np.int64)
        count = min(p, k ** (h - 1))
        drafts, scores = np.zeros((n, count, h), dtype=np.int32), np.zeros((n, count), dtype=np.int64)
        end = -1 if self.end_token is None else int(self.end_token)
        states = np.asarray(states, dtype=np.int32)
        cells, roots, longer = self.automaton.cells, self.automaton.roots, self.automaton.level_starts[2]
        done, room = 0, self._room_for(h, k, FIRST_ROWS)
        while True:
            done = _search(
                cells, roots, longer, *room, token_ids, words, heads, states, factor, end, done, drafts, scores
            )
            if done == n:
                return PBest(drafts, scores / ARC_SCALE)
            room = self._room_for(h, k, 2 * len(room.row64))  # a lattice with more states than there is room for

    def _room_for(self, h: int, k: int, rows: int) -> _Room:
        if (old := self._room) is not None:
            if len(old.row64) >= rows and old.same.shape == (h, k):
                return old
            rows = max(rows, len(old.row64))
        self._room = _Room(
            row64=np.empty((rows, 2 * k + 2), dtype=np.int64),
            row32=np.empty((rows, 2 * k + 2), dtype=np.int32),
            table=np.zeros((4 * rows, 2), dtype=np.int64),
            entry_of=np.full(len(self.automaton.roots), -1, dtype=np.int32),
            same=np.empty((h, k), dtype=np.int32),
            bound=np.empty((h, k, k), dtype=np.int64),
            short=np.empty((h, k), dtype=np.int32),
            counters=np.zeros(2, dtype=np.int64),
        )
        return self._room


@njit(cache=True, nogil=True)
def _search(  # type: ignore[no-untyped-def]
    cells, roots, longer, row64, row32, table, entry_of, same, bound, short, counters,
    token_ids, words, heads, states, weight, end, begin, drafts, scores,
):  # fmt: skip
    """Lattices from `begin` on; returns how many are done, fewer than n where the room was too small."""
    n, h, k = token_ids.shape
    p = scores.shape[1]
    width = max(p, BEAM)
    beam32, beam64 = np.empty((4, width), np.int32), np.empty((3, width), np.int64)
    step32, step64 = np.empty((h + 1, k + 3), np.int32), np.empty((h + 1, k + 1), np.int64)
    path = np.empty(h, np.int32)
    for i in range(begin, n):
        counters[0] = 0
        counters[1] += 1
        if counters[1] == LAST_RUN:
            table[:] = 0
            counters[1] = 1
        ids, slot_words, logps = token_ids[i], words[i], heads[i]
        score, state = advance(cells, roots, states[i], slot_words[0, 0])
        first = logps[0, 0] + weight * score
        if h == 1 or ids[0, 0] == end:
            for j in range(h):
                drafts[i, :, j] = ids[j, 0]
            scores[i] = first
            continue
        # All rows that know one word of context, then the bounds that follow from them.
        if not _short_rows(cells, roots, row64, row32, table, entry_of, same, short, counters,
                           ids, slot_words, logps, weight, end):  # fmt: skip
            return i
        _bounds(cells, longer, row64, row32, entry_of, same, bound, short, ids, slot_words, logps, weight, end)
        floor = _beam(cells, roots, row64, row32, table, entry_of, same, bound, counters,
                      ids, slot_words, logps, weight, end, first, state, p, beam32, beam64)  # fmt: skip
        start = _forward(cells, roots, row64, row32, table, entry_of, same, bound, counters,
                         ids, slot_words, logps, weight, end, first, state, floor)  # fmt: skip
        if start < 0:
            return i
        _walk(row64, row32, ids, start, first, floor, drafts[i], scores[i], step32, step64, path)
    return n


@njit(cache=True, nogil=True, inline="always")
def _enter_slot(entry_of, words, j):  # type: ignore[no-untyped-def]
    for e in range(words.shape[1]):
        entry_of[words[j, e]] = e


@njit(cache=True, nogil=True, inline="always")
def _leave_slot(entry_of, words, j):  # type: ignore[no-untyped-def]
    for e in range(words.shape[1]):
        entry_of[words[j, e]] = -1


@njit(cache=True, nogil=True, inline="always")
def _place(table, key):  # type: ignore[no-untyped-def]
    """Where a key (run, slot, state) is in the hash table or goes; keys of earlier runs are free places."""
    mask = len(table) - 1
    place = np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)) & mask
    while table[place, 0] != key and table[place, 0] >> 40 == key >> 40:
        place = (place + 1) & mask
    return place


@njit(cache=True, nogil=True)
def _row(cells, roots, row64, row32, table, entry_of, same, counters, token_ids, words, heads, weight, end, j, state):  # type: ignore[no-untyped-def]
    """The row of a state in slot j (which must be entered), made if it is not there; -1: no room for it."""
    slot = (counters[1] << 40) | (np.int64(j) << 32)
    place = _place(table, slot | np.int64(state))
    if table[place, 0] == slot | np.int64(state):
        return table[place, 1]
    k = token_ids.shape[1]
    # The longest suffix state whose row is there (-1: none); then one row after the other down to the state's own.
    known = np.int64(-1)
    missing = 1
    shorter = np.int64(state)
    while shorter != ROOT and shorter != len(cells):
        shorter = np.int64(cells[shorter, SUFFIX])
        place = _place(table, slot | shorter)
        if table[place, 0] == slot | shorter:
            known = table[place, 1]
            break
        missing += 1
    if counters[0] + missing > len(row64):
        return np.int64(-1)
    while missing > 0:
        missing -= 1
        at_state = int(state)
        for _ in range(missing):
            at_state = int(cells[at_state, SUFFIX])
        row = counters[0]
        counters[0] = row + 1
        place = _place(table, slot | at_state)
        table[place, 0], table[place, 1] = slot | at_state, row
        row64[row, 2 * k] = NONE
        if at_state == len(cells):  # after end-of-text: one way on, which costs nothing
            for e in range(k):
                row64[row, k + e] = 0 if e == 0 else NONE
                row32[row, e] = at_state
            return row
        if at_state == ROOT:
            for e in range(k):
                row64[row, e] = roots[words[j, e], ROOT_SCORE]
                row32[row, e] = roots[words[j, e], ROOT_NEXT]
        else:
            backoff = np.int64(cells[at_state, BACKOFF])
            for e in range(k):
                row64[row, e] = row64[known, e] + backoff
                row32[row, e] = row32[known, e]
            slots = cells[at_state, SLOTS]
            if slots <= 2 * k:
                for at in range(at_state + 1, at_state + 1 + slots):
                    word = cells[at, WORD]
                    if word >= 0:
                        e = entry_of[word]
                        while e >= 0:
                            row64[row, e] = cells[at, SCORE]
                            row32[row, e] = cells[at, NEXT]
                            e = same[j, e]
            else:
                for e in range(k):
                    at = find_arc(cells, at_state, words[j, e])
                    if at >= 0:
                        row64[row, e] = cells[at, SCORE]
                        row32[row, e] = cells[at, NEXT]
        for e in range(k):
            row64[row, k + e] = heads[j, e] + weight * row64[row, e]
        if end >= 0:
            for e in range(k):
                if token_ids[j, e] == end:
                    row32[row, e] = len(cells)
        known = row
    return known


@njit(cache=True, nogil=True)
def _short_rows(  # type: ignore[no-untyped-def]
    cells, roots, row64, row32, table, entry_of, same, short, counters, token_ids, words, heads, weight, end
):
    """Makes the row of every state that knows one word; links entries with the same word. Whether there was room."""
    h, k = token_ids.shape
    for j in range(1, h):
        for e in range(k):
            # Several tokens of a slot can be one word (<unk>): `same` leads from an entry to the one before.
            same[j, e] = entry_of[words[j, e]]
            entry_of[words[j, e]] = e
        for v in range(k if j > 1 else 1):
            state = len(cells) if token_ids[j - 1, v] == end else roots[words[j - 1, v], ROOT_NEXT]
            row = _row(cells, roots, row64, row32, table, entry_of, same, counters,
                       token_ids, words, heads, weight, end, j, state)  # fmt: skip
            short[j, v] = row
            if row < 0:
                _leave_slot(entry_of, words, j)
                return False
        _leave_slot(entry_of, words, j)
    return True


@njit(cache=True, nogil=True)
def _bounds(  # type: ignore[no-untyped-def]
    cells, longer, row64, row32, entry_of, same, bound, short, token_ids, words, heads, weight, end
):
    """Fills `bound[j, u, v]`: the most that a path through entries u of slot j - 1 and v of slot j gains after v.

    It is exact where the automaton tells no more apart than these two words. States from `longer` on know two words or
    more.
    """
    h, k = token_ids.shape
    for u in range(k):
        for v in range(k):
            bound[h - 1, u, v] = 0
    for j in range(h - 1, 0, -1):
        _enter_slot(entry_of, words, j)
        for v in range(k if j > 1 else 1):
            row = short[j, v]
            best = np.int64(NONE)
            for e in range(k):
                best = max(best, row64[row, k + e] + bound[j, v, e])
            if token_ids[j - 1, v] == end:
                best = np.int64(0)
            for u in range(k):
                bound[j - 1, u, v] = best
        for u in range((k if j > 2 else 1) if j > 1 else 0):
            before = short[j - 1, u]
            for v in range(k):
                # A pair that is a state of its own: its own few arcs, and its back-off. What longer contexts can add is
                # in the arcs' and the state's bounds.
                state = row32[before, v]
                if state < longer or state == len(cells):
                    continue
                best = bound[j - 1, u, v] + weight * (np.int64(cells[state, BACKOFF]) + cells[state, STATE_BOUND])
                slots = cells[state, SLOTS]
                if slots <= 2 * k:
                    for at in range(state + 1, state + 1 + slots):
                        word = cells[at, WORD]
                        if word >= 0:
                            e = entry_of[word]
                            while e >= 0:
                                best = max(best, heads[j, e] + weight * cells[at, BOUND] + bound[j, v, e])
                                e = same[j, e]
                else:
                    for e in range(k):
                        at = find_arc(cells, state, words[j, e])
                        if at >= 0:
                            best = max(best, heads[j, e] + weight * cells[at, BOUND] + bound[j, v, e])
                bound[j - 1, u, v] = best
        _leave_slot(entry_of, words, j)


@njit(cache=True, nogil=True)
def _beam(  # type: ignore[no-untyped-def]
    cells, roots, row64, row32, table, entry_of, same, bound, counters,
    token_ids, words, heads, weight, end, first, state, p, beam32, beam64,
):  # fmt: skip
    """A floor for the p-th best score: that of the p-th of the paths that a beam search finds (NONE: found fewer).

    `beam32`: state and last entry of every path of the beam, then what the next ones come from (path, entry);
    `beam64`: their scores, the next ones', these with the bound added (falling).
    """
    h, k = token_ids.shape
    width = beam32.shape[1]
    beam32[0, 0], beam32[1, 0], beam64[0, 0] = state, 0, first
    count = 1
    for j in range(1, h):
        _enter_slot(entry_of, words, j)
        found = 0
        for b in range(count):
            row = _row(cells, roots, row64, row32, table, entry_of, same, counters,
                       token_ids, words, heads, weight, end, j, beam32[0, b])  # fmt: skip
            if row < 0:
                _leave_slot(entry_of, words, j)
                return np.int64(NONE)
            last, done = beam32[1, b], beam64[0, b]
            for e in range(k):
                most = done + row64[row, k + e]
                if row32[row, e] != len(cells):  # after end-of-text nothing is gained
                    most += bound[j, last, e]
                if found == width:
                    if most <= beam64[2, width - 1]:
                        continue
                    place = width - 1
                else:
                    if most < NONE // 2:
                        continue
                    place = found
                    found += 1
                while place > 0 and beam64[2, place - 1] < most:
                    beam64[2, place] = beam64[2, place - 1]
                    beam64[1, place] = beam64[1, place - 1]
                    beam32[2, place] = beam32[2, place - 1]
                    beam32[3, place] = beam32[3, place - 1]
                    place -= 1
                beam64[2, place] = most
                beam64[1, place] = done + row64[row, k + e]
                beam32[2, place] = row
                beam32[3, place] = e
        _leave_slot(entry_of, words, j)
        for b in range(found):
            row, e = beam32[2, b], beam32[3, b]
            beam32[0, b], beam32[1, b], beam64[0, b] = row32[row, e], e, beam64[1, b]
        count = found
    return beam64[2, p - 1] if count >= p else np.int64(NONE)


@njit(cache=True, nogil=True)
def _forward(  # type: ignore[no-untyped-def]
    cells, roots, row64, row32, table, entry_of, same, bound, counters,
    token_ids, words, heads, weight, end, first, state, floor,
):  # fmt: skip
    """Makes all rows on paths of at least `floor`, and their best scores to the end; the first row, or -1: no room."""
    h, k = token_ids.shape
    forward, backward, child_of, led_here, queue = 2 * k, 2 * k + 1, k, 2 * k, 2 * k + 1
    _enter_slot(entry_of, words, 1)
    start = _row(cells, roots, row64, row32, table, entry_of, same, counters,
                 token_ids, words, heads, weight, end, 1, state)  # fmt: skip
    _leave_slot(entry_of, words, 1)
    if start < 0:
        return start
    row64[start, forward] = first
    row32[start, led_here] = 0
    row32[0, queue] = start
    begin, stop = 0, 1
    for j in range(1, h):
        last = stop
        if j + 1 < h:
            _enter_slot(entry_of, words, j + 1)
        for at in range(begin, stop):
            row = row32[at, queue]
            before, done = row32[row, led_here], row64[row, forward]
            for e in range(k):
                total = done + row64[row, k + e]
                most = total if row32[row, e] == len(cells) else total + bound[j, before, e]
                if most < floor or total < NONE // 2:
                    row32[row, child_of + e] = -1
                    continue
                if j + 1 == h:
                    row32[row, child_of + e] = 0
                    continue
                child = _row(cells, roots, row64, row32, table, entry_of, same, counters,
                             token_ids, words, heads, weight, end, j + 1, row32[row, e])  # fmt: skip
                if child < 0:
                    _leave_slot(entry_of, words, j + 1)
                    return child
                row32[row, child_of + e] = child
                if row64[child, forward] == NONE:
                    row32[child, led_here] = e
                    row32[last, queue] = child
                    last += 1
                row64[child, forward] = max(row64[child, forward], total)
        if j + 1 < h:
            _leave_slot(entry_of, words, j + 1)
            begin, stop = stop, last
    # From the queue's end: the rows of the last slot end their paths, those before lead on.
    for at in range(stop - 1, -1, -1):
        row = row32[at, queue]
        best = np.int64(NONE)
        for e in range(k):
            child = row32[row, child_of + e]
            if child < 0:
                continue
            total = row64[row, k + e]
            if at < begin:
                if row64[child, backward] == NONE:
                    row32[row, child_of + e] = -1
                    continue
                total += row64[child, backward]
            best = max(best, total)
        row64[row, backward] = best
    return start


@njit(cache=True, nogil=True)
def _expand(row64, row32, token_ids, j, row, done, least, step32, step64):  # type: ignore[no-untyped-def]
    """The entries of a row that can end at `least` or more, best first, equals by token id: their places into
    `step32[j]`, what they reach (by entry) into `step64[j]`; returns how many."""
    h, k = token_ids.shape
    count = 0
    for e in range(k):
        child = row32[row, k + e]
        if child < 0:
            continue
        most = done + row64[row, k + e]
        if j + 1 < h:
            most += row64[child, 2 * k + 1]
        if most < least:
            continue
        step64[j, e] = most
        place = count
        while place > 0:
            other = step32[j, place - 1]
            if step64[j, other] > most or (step64[j, other] == most and token_ids[j, other] < token_ids[j, e]):
                break
            step32[j, place] = other
            place -= 1
        step32[j, place] = e
        count += 1
    return count


@njit(cache=True, nogil=True)
def _walk(row64, row32, token_ids, start, first, floor, drafts, scores, step32, step64, path):  # type: ignore[no-untyped-def]
    """The p best paths through the rows, depth first, best entries first, into `drafts` `[p, h]`, `scores` `[p]`.

    `step32[j]`: k entries, next of them to take, how many, row; `step64[j]`: what each reaches, score before slot j.
    """
    h, k = token_ids.shape
    p = len(scores)
    cursor, count, at = k, k + 1, k + 2
    found, least = 0, floor
    path[0] = token_ids[0, 0]
    j = 1
    step32[1, at], step64[1, k], step32[1, cursor] = start, first, 0
    step32[1, count] = _expand(row64, row32, token_ids, 1, start, first, least, step32, step64)
    while j > 0:
        if step32[j, cursor] == step32[j, count]:
            j -= 1
            continue
        e = step32[j, step32[j, cursor]]
        step32[j, cursor] += 1
        path[j] = token_ids[j, e]
        if step64[j, e] < least:
            step32[j, cursor] = step32[j, count]  # they fall
            continue
        if found == p and step64[j, e] == scores[p - 1] and not _before(path, drafts[p - 1], j + 1):
            continue
        row = step32[j, at]
        total = step64[j, k] + row64[row, k + e]
        if j + 1 < h:
            row = row32[row, k + e]
            j += 1
            step32[j, at], step64[j, k], step32[j, cursor] = row, total, 0
            step32[j, count] = _expand(row64, row32, token_ids, j, row, total, least, step32, step64)
            continue
        place = found if found < p else p - 1
        while place > 0 and (
            scores[place - 1] < total or (scores[place - 1] == total and _before(path, drafts[place - 1], h))
        ):
            scores[place] = scores[place - 1]
            drafts[place] = drafts[place - 1]
            place -= 1
        scores[place] = total
        drafts[place] = path
        if found < p:
            found += 1
        if found == p and scores[p - 1] > least:
            least = scores[p - 1]
    for place in range(found, p):  # end-of-text leaves fewer ways than places
        scores[place] = scores[0]
        drafts[place] = drafts[0]


@njit(cache=True, nogil=True)
def _before(path, other, length):  # type: ignore[no-untyped-def]
    """Whether the first `length` tokens of a path stand at or before those of another."""
    for j in range(length):
        if path[j] != other[j]:
            return path[j] < other[j]
    return True
