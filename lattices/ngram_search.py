"""Exact p-best search over a lattice rescored by an n-gram automaton, after [A] section 4 (there: OpenFst composition).

A path picks one entry in each of the slots 2..h; slot 1 stays its arg-max. Its score is the sum over all slots of the
head's log-prob + weight x the n-gram's log-prob of the word after the true left context and the path so far. Scores are
whole numbers (units of 2^-38 nat: `ARC_SCALE`), so sums are exact in any order and ties are ties; of equal scores the
lowest token ids (compared from slot 1 on) come first.

A plain dynamic program looks up every arc of every (slot, automaton state) pair. Four things make this one quicker:

1. A state's k arcs are scored at once: they are those of its suffix state plus its back-off weight, overridden by its
   own few arcs. Rows are made when first needed and kept for the lattice.
2. A bound. The arcs of the shortest states (one word of context) carry the highest score that any longer context gives
   the word, so one backward pass over k x k pairs per slot bounds what any prefix can still gain.
3. A beam search with that bound finds p good paths. The worst of them is a floor: what can't reach it is not among the
   p best. The forward pass then makes only the states that can; it is exact, since it drops nothing else.
4. A backward pass over these states gives the exact best completion of each, so the last walk, depth first, meets
   hardly anything but the p best paths.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from lattices.automaton import (
    BACKOFF,
    BOUND,
    FIRST,
    LENGTH,
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
from lattices.search import PBest, p_best

WEIGHT_SCALE = 1 << 16
ARC_SCALE = SCORE_SCALE * WEIGHT_SCALE  # units per nat of a path's score
MAX_WEIGHT = 64.0
LOWEST_HEAD = -1024.0  # nats; a head's log-prob below counts as this, so that sums stay in 64 bits
BEAM = 16  # narrowest beam; a wider one costs more than its better floor saves
NONE = -(1 << 60)  # no path
FIRST_ROWS = 4096
LAST_RUN = 1 << 22  # runs that the hash table's keys can tell apart


class _Tables(NamedTuple):
    states: np.ndarray
    arcs: np.ndarray
    roots: np.ndarray


class _Room(NamedTuple):
    """Room to work in. A row is a pair of slot and state; `score`, `arc`, `next`, `child` are its k arcs."""

    score: np.ndarray  # [r, k] n-gram score of each word
    arc: np.ndarray  # [r, k] head's log-prob + weight x score
    next: np.ndarray  # [r, k] state after the word
    child: np.ndarray  # [r, k] its row in the next slot, -1: can't be on one of the p best paths
    forward: np.ndarray  # [r] best score of a path to here
    backward: np.ndarray  # [r] best score from here to the end
    queue: np.ndarray  # [r] rows in the order they were reached
    keys: np.ndarray  # hash table (run, slot, state) -> row
    rows: np.ndarray
    entry_of: np.ndarray  # [v] entry of a word in the current slot, -1: not there
    same: np.ndarray  # [h, k] another entry with the same word, -1: none
    bound: np.ndarray  # [h, k, k] the most that a path can gain after two neighbouring entries
    short: np.ndarray  # [h, k] rows of the states that know the word before only
    before: np.ndarray  # [r] an entry of the slot before that leads to this row
    counters: np.ndarray  # 0 rows in use, 1 run


class NgramSearch:
    """Searches lattices with one automaton; keeps its room to work in between calls, so it is not for two threads.

    `words` int32 `[vocab_size]` gives the automaton's word of every token id. With `end_token` (a token id) a path
    ends where it takes that token: what follows is neither scored nor searched, and filled with each slot's arg-max.
    """

    def __init__(self, automaton: Automaton, words: np.ndarray, *, end_token: int | None = None) -> None:
        self.automaton, self.words, self.end_token = automaton, words, end_token
        self._tables = _Tables(automaton.states, automaton.arcs, automaton.roots)
        self._room: _Room | None = None

    def state_after(self, token_ids: np.ndarray | list[int], *, from_start: bool = False) -> int:
        """The state after tokens; only the last order - 1 matter. `from_start`: `<s>` stands before them."""
        needed = max(0, self.automaton.order - 1)
        state = self.automaton.start if from_start and len(token_ids) < needed else ROOT
        last = np.asarray(token_ids[max(0, len(token_ids) - needed) :], dtype=np.int64)
        return self.automaton.state_after(self.words[last].tolist(), state=state)

    def p_best(self, lattice: Lattice, states: np.ndarray, p: int, *, weight: float) -> PBest:
        """The p best drafts of every lattice `[n, h, k]` whose left context led to the automaton's `states` `[n]`.

        Gives p' = min(p, k^(h-1)) drafts each; `scores` in nats. A weight of 0 gives `lattices.search.p_best`, bit for
        bit. Raises `RescoreError` for p < 1 or a weight outside 0 to `MAX_WEIGHT`.
        """
        if p < 1:
            raise RescoreError(f"p = {p} asks for no drafts; choose p of at least 1")
        if not 0 <= weight <= MAX_WEIGHT:
            raise RescoreError(f"an n-gram weight of {weight}; choose one from 0 to {MAX_WEIGHT:g}")
        factor = round(weight * WEIGHT_SCALE)
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
        done, room = 0, self._room_for(h, k, FIRST_ROWS)
        while True:
            done = _search(self._tables, room, token_ids, words, heads, states, factor, end, done, drafts, scores)
            if done == n:
                return PBest(drafts, scores / ARC_SCALE)
            room = self._room_for(h, k, 2 * len(room.forward))  # a lattice with more states than there is room for

    def _room_for(self, h: int, k: int, rows: int) -> _Room:
        if (old := self._room) is not None:
            if len(old.forward) >= rows and old.score.shape[1] == k and old.same.shape[0] == h:
                return old
            rows = max(rows, len(old.forward))
        table = 4 * rows
        self._room = _Room(
            score=np.empty((rows, k), dtype=np.int64), arc=np.empty((rows, k), dtype=np.int64),
            next=np.empty((rows, k), dtype=np.int32), child=np.empty((rows, k), dtype=np.int32),
            forward=np.empty(rows, dtype=np.int64), backward=np.empty(rows, dtype=np.int64),
            queue=np.empty(rows, dtype=np.int32), keys=np.zeros(table, dtype=np.int64),
            rows=np.empty(table, dtype=np.int32),
            entry_of=np.full(len(self.automaton.roots), -1, dtype=np.int32),
            same=np.empty((h, k), dtype=np.int32), bound=np.empty((h, k, k), dtype=np.int64),
            short=np.empty((h, k), dtype=np.int32), before=np.empty(rows, dtype=np.int32),
            counters=np.zeros(2, dtype=np.int64),
        )  # fmt: skip
        return self._room


@njit(cache=True, nogil=True)
def _search(tables, room, token_ids, words, heads, states, weight, end, begin, drafts, scores):  # type: ignore[no-untyped-def]
    """Lattices from `begin` on; returns how many are done, fewer than n where the room was too small."""
    n, h, k = token_ids.shape
    p = scores.shape[1]
    width = max(p, BEAM)
    beam_rows, beam_sums, beam_reach = (
        np.empty((4, width), np.int32),
        np.empty((2, width), np.int64),
        np.empty(width, np.int64),
    )
    order, reach, cursor = np.empty((h, k), np.int32), np.empty((h, k), np.int64), np.empty(h + 1, np.int32)
    counts, path_rows = np.empty(h + 1, np.int32), np.empty(h + 1, np.int32)
    sums, path = np.empty(h + 1, np.int64), np.empty(h, np.int32)
    for i in range(begin, n):
        room.counters[0] = 0
        room.counters[1] += 1
        if room.counters[1] == LAST_RUN:
            room.keys[:] = 0
            room.counters[1] = 1
        score, state = advance(tables.states, tables.arcs, tables.roots, states[i], words[i, 0, 0])
        first = heads[i, 0, 0] + weight * score
        if h == 1 or token_ids[i, 0, 0] == end:
            for j in range(h):
                drafts[i, :, j] = token_ids[i, j, 0]
            scores[i] = first
            continue
        _link_same_words(room, words[i])
        if not _bounds(tables, room, token_ids[i], words[i], heads[i], weight, end):
            return i
        floor = _beam(tables, room, token_ids[i], words[i], heads[i], weight, end, first, state, p,
                      beam_rows, beam_sums, beam_reach)  # fmt: skip
        start = _forward(tables, room, token_ids[i], words[i], heads[i], weight, end, first, state, floor)
        if start < 0:
            return i
        _walk(room, token_ids[i], start, first, floor, drafts[i], scores[i],
              order, reach, cursor, counts, path_rows, sums, path)  # fmt: skip
    return n


@njit(cache=True, nogil=True)
def _link_same_words(room, words):  # type: ignore[no-untyped-def]
    """Several tokens of a slot can be one word (`<unk>`): `same` leads from an entry to the one before."""
    h, k = words.shape
    for j in range(h):
        for e in range(k):
            room.same[j, e] = -1
            for other in range(e - 1, -1, -1):
                if words[j, other] == words[j, e]:
                    room.same[j, e] = other
                    break


@njit(cache=True, nogil=True)
def _enter_slot(room, words, j):  # type: ignore[no-untyped-def]
    for e in range(words.shape[1]):
        room.entry_of[words[j, e]] = e


@njit(cache=True, nogil=True)
def _leave_slot(room, words, j):  # type: ignore[no-untyped-def]
    for e in range(words.shape[1]):
        room.entry_of[words[j, e]] = -1


@njit(cache=True, nogil=True)
def _new_row(room, key, place):  # type: ignore[no-untyped-def]
    row = room.counters[0]
    if row == len(room.forward):
        return np.int64(-1)
    room.counters[0] = row + 1
    room.keys[place] = key
    room.rows[place] = row
    room.forward[row] = NONE
    return row


@njit(cache=True, nogil=True)
def _row(tables, room, token_ids, words, heads, weight, end, j, state):  # type: ignore[no-untyped-def]
    """The row of a state in slot j (its word stamps entered), made if it is not there; -1: no room."""
    mask = len(room.keys) - 1
    key = (room.counters[1] << 40) | (np.int64(j) << 32) | np.int64(state)
    place = (key * np.int64(0x9E3779B97F4A7C1)) >> 20 & mask
    while room.keys[place] >> 40 == room.counters[1]:  # rows of earlier lattices are free places
        if room.keys[place] == key:
            return np.int64(room.rows[place])
        place = (place + 1) & mask
    k = token_ids.shape[1]
    if state == len(tables.states):  # after end-of-text: one way on, which costs nothing
        row = _new_row(room, key, place)
        if row >= 0:
            for e in range(k):
                room.score[row, e], room.arc[row, e], room.next[row, e] = 0, 0 if e == 0 else NONE, state
        return row
    if state == ROOT:
        row = _new_row(room, key, place)
        if row >= 0:
            for e in range(k):
                room.score[row, e] = tables.roots[words[j, e], ROOT_SCORE]
                room.next[row, e] = tables.roots[words[j, e], ROOT_NEXT]
            _finish_row(tables, room, token_ids, heads, weight, end, j, row)
        return row
    shorter = _row(tables, room, token_ids, words, heads, weight, end, j, tables.states[state, SUFFIX])
    while room.keys[place] >> 40 == room.counters[1]:  # making the shorter one may have taken the place
        place = (place + 1) & mask
    row = _new_row(room, key, place)
    if row < 0 or shorter < 0:
        return np.int64(-1)
    backoff = np.int64(tables.states[state, BACKOFF])
    for e in range(k):
        room.score[row, e] = room.score[shorter, e] + backoff
        room.next[row, e] = room.next[shorter, e]
    first, slots = tables.states[state, FIRST], tables.states[state, SLOTS]
    if slots <= 2 * k:
        for at in range(first, first + slots):
            word = tables.arcs[at, WORD]
            if word >= 0:
                e = room.entry_of[word]
                while e >= 0:
                    room.score[row, e] = tables.arcs[at, SCORE]
                    room.next[row, e] = tables.arcs[at, NEXT]
                    e = room.same[j, e]
    else:
        for e in range(k):
            at = find_arc(tables.states, tables.arcs, state, words[j, e])
            if at >= 0:
                room.score[row, e] = tables.arcs[at, SCORE]
                room.next[row, e] = tables.arcs[at, NEXT]
    _finish_row(tables, room, token_ids, heads, weight, end, j, row)
    return row


@njit(cache=True, nogil=True)
def _finish_row(tables, room, token_ids, heads, weight, end, j, row):  # type: ignore[no-untyped-def]
    for e in range(token_ids.shape[1]):
        room.arc[row, e] = heads[j, e] + weight * room.score[row, e]
        if token_ids[j, e] == end:
            room.next[row, e] = len(tables.states)


@njit(cache=True, nogil=True)
def _bounds(tables, room, token_ids, words, heads, weight, end):  # type: ignore[no-untyped-def]
    """Fills `room.bound[j, u, v]`: the most that a path through entries u of slot j - 1 and v of slot j gains after v.

    It is exact where the automaton tells no more apart than these two words. Makes the rows of the shortest states on
    the way; returns whether there was room for them.
    """
    h, k = token_ids.shape
    room.bound[h - 1] = 0
    for j in range(h - 1, 0, -1):
        _enter_slot(room, words, j)
        fits = True
        for v in range(k if j > 1 else 1):
            if token_ids[j - 1, v] == end:
                room.bound[j - 1, :, v] = 0
                continue
            state = tables.roots[words[j - 1, v], ROOT_NEXT]
            row = _row(tables, room, token_ids, words, heads, weight, end, j, state)
            if row < 0:
                fits = False
                break
            room.short[j, v] = row
            best = np.int64(NONE)
            for e in range(k):
                total = room.arc[row, e] + room.bound[j, v, e]
                if total > best:
                    best = total
            room.bound[j - 1, :, v] = best
        if fits and j > 1:
            _sharpen(tables, room, token_ids, words, heads, weight, end, j)
        _leave_slot(room, words, j)
        if not fits:
            return False
    return True


@njit(cache=True, nogil=True)
def _sharpen(tables, room, token_ids, words, heads, weight, end, j):  # type: ignore[no-untyped-def]
    """Bounds of the pairs (u, v) before slot j that are states of two words: their own few arcs and back-off."""
    k = token_ids.shape[1]
    for u in range(k if j > 2 else 1):
        if token_ids[j - 2, u] == end:
            continue
        before = tables.roots[words[j - 2, u], ROOT_NEXT]
        if before == ROOT:
            continue
        for v in range(k):
            at = find_arc(tables.states, tables.arcs, before, words[j - 1, v])
            if at < 0 or token_ids[j - 1, v] == end:
                continue
            state = tables.arcs[at, NEXT]
            if tables.states[state, LENGTH] < 2:
                continue
            passed = np.int64(tables.states[state, BACKOFF]) + tables.states[state, STATE_BOUND]
            best = room.bound[j - 1, u, v] + weight * passed
            first, slots = tables.states[state, FIRST], tables.states[state, SLOTS]
            for place in range(first, first + slots):
                word = tables.arcs[place, WORD]
                if word >= 0:
                    e = room.entry_of[word]
                    while e >= 0:
                        total = heads[j, e] + weight * tables.arcs[place, BOUND] + room.bound[j, v, e]
                        if total > best:
                            best = total
                        e = room.same[j, e]
            room.bound[j - 1, u, v] = best


@njit(cache=True, nogil=True)
def _beam(tables, room, token_ids, words, heads, weight, end, first, state, p, rows, sums, reach):  # type: ignore[no-untyped-def]
    """A floor for the p-th best score: that of the p-th of the paths that a beam search finds (NONE: found fewer).

    `rows` holds the states of the beam's paths and their last entries, `sums` their scores, `reach` these with the
    bound added, falling.
    """
    h, k = token_ids.shape
    width = len(reach)
    now, after = 0, 1
    rows[0, 0], rows[2, 0], sums[0, 0] = state, 0, first
    count = 1
    for j in range(1, h):
        _enter_slot(room, words, j)
        found = 0
        for b in range(count):
            row = _row(tables, room, token_ids, words, heads, weight, end, j, rows[now, b])
            if row < 0:
                _leave_slot(room, words, j)
                return np.int64(NONE)
            for e in range(k):
                if room.arc[row, e] == NONE:
                    continue
                total = sums[now, b] + room.arc[row, e]
                most = total + room.bound[j, rows[now + 2, b], e]
                if found == width:
                    if most <= reach[width - 1]:
                        continue
                    place = width - 1
                else:
                    place = found
                    found += 1
                while place > 0 and reach[place - 1] < most:
                    reach[place] = reach[place - 1]
                    rows[after, place] = rows[after, place - 1]
                    rows[after + 2, place] = rows[after + 2, place - 1]
                    sums[after, place] = sums[after, place - 1]
                    place -= 1
                reach[place] = most
                rows[after, place] = room.next[row, e]
                rows[after + 2, place] = e
                sums[after, place] = total
        _leave_slot(room, words, j)
        now, after = after, now
        count = found
    return reach[p - 1] if count >= p else np.int64(NONE)


@njit(cache=True, nogil=True)
def _forward(tables, room, token_ids, words, heads, weight, end, first, state, floor):  # type: ignore[no-untyped-def]
    """Makes all rows on paths of at least `floor`, and their `backward`; gives the first row, or -1: no room."""
    h, k = token_ids.shape
    _enter_slot(room, words, 1)
    start = _row(tables, room, token_ids, words, heads, weight, end, 1, state)
    _leave_slot(room, words, 1)
    if start < 0:
        return start
    room.forward[start] = first
    room.before[start] = 0
    room.queue[0] = start
    begin, stop = 0, 1
    for j in range(1, h):
        if j + 1 < h:
            _enter_slot(room, words, j + 1)
        last = stop
        for at in range(begin, stop):
            row = room.queue[at]
            for e in range(k):
                room.child[row, e] = -1
                if room.arc[row, e] == NONE:
                    continue
                total = room.forward[row] + room.arc[row, e]
                if total + room.bound[j, room.before[row], e] < floor:
                    continue
                if j + 1 == h:
                    room.child[row, e] = 0
                    continue
                child = _row(tables, room, token_ids, words, heads, weight, end, j + 1, room.next[row, e])
                if child < 0:
                    _leave_slot(room, words, j + 1)
                    return child
                room.child[row, e] = child
                if room.forward[child] == NONE:
                    room.before[child] = e
                    room.queue[last] = child
                    last += 1
                if total > room.forward[child]:
                    room.forward[child] = total
        if j + 1 < h:
            _leave_slot(room, words, j + 1)
            begin, stop = stop, last
    # The rows of the last slot end their paths; what stands before them in the queue leads on.
    for at in range(stop - 1, -1, -1):
        row = room.queue[at]
        best = np.int64(NONE)
        for e in range(k):
            child = room.child[row, e]
            if child < 0:
                continue
            total = room.arc[row, e]
            if at < begin:
                if room.backward[child] == NONE:
                    room.child[row, e] = -1
                    continue
                total += room.backward[child]
            if total > best:
                best = total
        room.backward[row] = best
    return start


@njit(cache=True, nogil=True)
def _expand(room, token_ids, j, row, total, least, order, reach):  # type: ignore[no-untyped-def]
    """The entries of a row that can end at `least` or more, best first, equals by token id; returns how many."""
    h, k = token_ids.shape
    count = 0
    for e in range(k):
        child = room.child[row, e]
        if child < 0:
            continue
        most = total + room.arc[row, e]
        if j + 1 < h:
            most += room.backward[child]
        if most < least:
            continue
        reach[j, e] = most
        place = count
        while place > 0:
            other = order[j, place - 1]
            if reach[j, other] > most or (reach[j, other] == most and token_ids[j, other] < token_ids[j, e]):
                break
            order[j, place] = other
            place -= 1
        order[j, place] = e
        count += 1
    return count


@njit(cache=True, nogil=True)
def _walk(room, token_ids, start, first, floor, drafts, scores, order, reach, cursor, counts, rows, sums, path):  # type: ignore[no-untyped-def]
    """The p best paths through the rows, depth first, best entries first, into `drafts` `[p, h]`, `scores` `[p]`."""
    h = len(token_ids)
    p = len(scores)
    found = 0
    least = floor
    path[0] = token_ids[0, 0]
    rows[1], sums[1] = start, first
    cursor[1], counts[1] = 0, _expand(room, token_ids, 1, start, first, least, order, reach)
    j = 1
    while j > 0:
        if cursor[j] == counts[j]:
            j -= 1
            continue
        e = order[j, cursor[j]]
        cursor[j] += 1
        path[j] = token_ids[j, e]
        if reach[j, e] < least:
            cursor[j] = counts[j]  # they fall
            continue
        if found == p and reach[j, e] == scores[p - 1] and not _before(path, drafts[p - 1], j + 1):
            continue
        total = sums[j] + room.arc[rows[j], e]
        if j + 1 < h:
            rows[j + 1], sums[j + 1] = room.child[rows[j], e], total
            j += 1
            cursor[j], counts[j] = 0, _expand(room, token_ids, j, rows[j], total, least, order, reach)
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
