"""Exact p-best search over a lattice rescored by an n-gram automaton, after [A] section 4 (there: OpenFst composition).

A path picks one entry in each of the slots 2..h; slot 1 stays its arg-max. Its score is the sum over all slots of the
head's log-prob + weight x the n-gram's log-prob of the word after the true left context and the path so far. Scores are
whole numbers (units of 2^-38 nat: `ARC_SCALE`), so sums are exact in any order and ties are ties; of equal scores the
lowest token ids (compared from slot 1 on) come first.

A plain dynamic program looks up every arc of every (slot, automaton state) pair. Four things make this one quicker:

1. A state's k arcs are scored at once: they are those of its suffix state plus its back-off weight, overridden by its
   own few arcs. Such a row is made when it is first needed and kept for the lattice (`lattices.ngram_rows`).
2. A bound. Arcs of states with one or two words of context carry the highest score that any longer context gives the
   word, so one backward pass over k x k pairs per slot bounds what any prefix can still gain.
3. A beam search with that bound finds p good paths. The worst of them is a floor: what can't reach it is not among the
   p best. The forward pass then makes only the states that can; it is exact, since it drops nothing else.
4. A backward pass over these states gives the exact best completion of each, so the last walk, depth first, meets
   hardly anything but the p best paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lattices.automaton import ROOT, SCORE_SCALE, Automaton, advance
from lattices.errors import RescoreError
from lattices.lattice import Lattice
from lattices.ngram_rows import (
    NONE,
    WORST,
    Model,
    Query,
    Room,
    ask_for,
    compiled,
    enter_slot,
    leave_slot,
    make_bounds,
    make_room,
    row_of,
    short_rows,
)
from lattices.ngrams import UNKNOWN
from lattices.search import PBest, draft_count, keep_path, p_best, put_in_order, stands_before

WEIGHT_SCALE = 1 << 16
ARC_SCALE = SCORE_SCALE * WEIGHT_SCALE  # units per nat of a path's score
MAX_WEIGHT = 64.0
LOWEST_HEAD = -1024.0  # nats; a head's log-prob below counts as this, so that sums stay in 64 bits
BEAM = 6  # narrowest beam; a wider one costs more than its better floor saves
FIRST_ROWS = 2048
LAST_RUN = 1 << 22  # runs that the hash table's keys can tell apart


def checked_weight(weight: float) -> int:
    """The weight in units of 1 / `WEIGHT_SCALE`; raises `RescoreError` for one outside its range."""
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
        self._room: Room | None = None

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
        count, factor = draft_count(lattice, p), checked_weight(weight)
        if factor == 0:
            return p_best(lattice, p)
        n, h, k = lattice.token_ids.shape
        token_ids, logps = np.ascontiguousarray(lattice.token_ids), np.ascontiguousarray(lattice.logps, np.float64)
        drafts, scores = np.empty((n, count, h), dtype=np.int32), np.empty((n, count), dtype=np.int64)
        end = -1 if self.end_token is None else int(self.end_token)
        states = np.asarray(states, dtype=np.int32)
        model = Model(self.automaton.cells, self.automaton.roots, self.automaton.level_starts[2], self.words)
        done, room = 0, self._room_for(h, k, count, FIRST_ROWS)
        while True:
            done = _search(model, room, token_ids, logps, states, factor, end, done, drafts, scores)
            if done == n:
                return PBest(drafts, scores / ARC_SCALE)
            room = self._room_for(h, k, count, 2 * len(room.row64))  # a lattice with more states than room

    def _room_for(self, h: int, k: int, p: int, rows: int) -> Room:
        width = max(p, BEAM)
        if (old := self._room) is not None:
            if len(old.row64) >= rows and old.same.shape == (h, k) and old.beam32.shape[1] >= width:
                return old
            rows = max(rows, len(old.row64))
        self._room = make_room(h, k, rows, len(self.automaton.roots), width)
        return self._room


@compiled
def _search(model, room, token_ids, logps, states, weight, end, begin, drafts, scores):  # type: ignore[no-untyped-def]
    """Lattices from `begin` on; returns how many are done, fewer than n where the room was too small."""
    n, h, k = token_ids.shape
    p = scores.shape[1]
    cells, counters, words, heads = model.cells, room.counters, room.words, room.heads
    for i in range(begin, n):
        counters[0] = 0
        counters[1] += 1
        if counters[1] == LAST_RUN:
            room.table[:] = 0
            counters[1] = 1
        ids = token_ids[i]
        query = Query(ids, weight, end)
        for j in range(h):
            for e in range(k):
                words[j, e] = model.word_of[ids[j, e]]
                heads[j, e] = np.rint(max(logps[i, j, e], LOWEST_HEAD) * ARC_SCALE)
        score, state = advance(cells, model.roots, states[i], words[0, 0])
        first = heads[0, 0] + weight * score
        if h == 1 or ids[0, 0] == end:
            for q in range(p):
                for j in range(h):
                    drafts[i, q, j] = ids[j, 0]
                scores[i, q] = first
            continue
        # All rows that know one word of context, then the bounds that follow from them.
        if not short_rows(model, room, query):
            return i
        make_bounds(model, room, query)
        enter_slot(room, 1)
        start = row_of(model, room, query, 1, np.int64(state))
        leave_slot(room, 1)
        if start < 0:
            return i
        floor = _beam(model, room, query, start, first, p)
        if not _forward(model, room, query, start, first, floor):
            return i
        _walk(room, ids, start, first, floor, drafts[i], scores[i])
    return n


@compiled
def _beam(model, room, query, start, first, p):  # type: ignore[no-untyped-def]
    """A floor for the p-th best score: that of the p-th of the paths that a beam search finds (`WORST`: found fewer).

    `beam32`: row and last entry of every path, twice (before and after a slot); `beam64`: scores of the paths, twice,
    what the best next steps reach, falling, and their codes (path and entry).
    """
    cells, row64, row32, bound = model.cells, room.row64, room.row32, room.bound
    h, k = query.token_ids.shape
    width = p if model.longer == len(cells) else max(p, BEAM)  # where no state knows two words, the bound is exact
    rows, lasts = room.beam32[0:2], room.beam32[2:4]
    scores, reaches, codes = room.beam64[0:2], room.beam64[2, :width], room.beam64[3, :width]
    rows[0, 0], lasts[0, 0], scores[0, 0] = start, 0, first
    count, now = 1, 0
    for j in range(1, h):
        grown: Any = np.int64(0)
        least = np.int64(WORST)
        for b in range(count):
            row, last, done = rows[now, b], lasts[now, b], scores[now, b]
            for e in range(k):
                reach = done + row64[row, e] + bound[j, last, e]
                if reach > least:
                    grown = put_in_order(reach, b << 32 | e, grown, reaches, codes)
                    if grown == width:
                        least = reaches[width - 1]
        count = grown
        if j + 1 == h:
            break
        for i in range(count):
            b, e = codes[i] >> 32, codes[i] & 0xFFFFFFFF
            ask_for(cells, row32[rows[now, b], e])
        enter_slot(room, j + 1)
        for i in range(count):
            b, e = codes[i] >> 32, codes[i] & 0xFFFFFFFF
            state = row32[rows[now, b], e]
            row = row_of(model, room, query, j + 1, state)
            if row < 0:
                leave_slot(room, j + 1)
                return np.int64(WORST)
            # Nothing is gained after end-of-text: its bound is that of entry k.
            rows[1 - now, i], lasts[1 - now, i] = row, (k if state == len(cells) else e)
            scores[1 - now, i] = scores[now, b] + row64[rows[now, b], e]
        leave_slot(room, j + 1)
        now = 1 - now
    return reaches[p - 1] if count >= p else np.int64(WORST)


@compiled
def _forward(model, room, query, start, first, floor):  # type: ignore[no-untyped-def]
    """Makes all rows on paths of at least `floor`, and their best scores to the end; whether there was room."""
    cells, row64, row32, bound = model.cells, room.row64, room.row32, room.bound
    h, k = query.token_ids.shape
    forward, backward, child_of, led_here, queue = k, k + 1, k, 3 * k + 1, 3 * k + 2
    entries, totals = room.list32[0], room.list64[0]
    row64[start, forward] = first
    row32[start, led_here] = 0
    row32[0, queue] = start
    begin, stop = 0, 1
    for j in range(1, h):
        last = stop
        if j + 1 < h:
            enter_slot(room, j + 1)
        for at in range(begin, stop):
            row = row32[at, queue]
            before, done = row32[row, led_here], row64[row, forward]
            kept = 0
            for e in range(k):
                total = done + row64[row, e]
                on = total + bound[j, before, e] >= floor
                entries[kept], totals[kept] = e, total
                kept += on
                row32[row, child_of + e] = on - 1
            if j + 1 == h:
                continue
            for i in range(kept):
                ask_for(cells, row32[row, entries[i]])
            for i in range(kept):
                e, total = entries[i], totals[i]
                state = row32[row, e]
                child = row_of(model, room, query, j + 1, state)
                if child < 0:
                    leave_slot(room, j + 1)
                    return False
                row32[row, child_of + e] = child
                if row64[child, forward] == NONE:
                    row32[child, led_here] = k if state == len(cells) else e
                    row32[last, queue] = child
                    last += 1
                row64[child, forward] = max(row64[child, forward], total)
        if j + 1 < h:
            leave_slot(room, j + 1)
            begin, stop = stop, last
    # From the queue's end: the rows of the last slot end their paths, those before lead on.
    for at in range(stop - 1, -1, -1):
        row = row32[at, queue]
        best = np.int64(NONE)
        for e in range(k):
            child = row32[row, child_of + e]
            if child < 0:
                continue
            total = row64[row, e]
            if at < begin:
                if row64[child, backward] == NONE:
                    row32[row, child_of + e] = -1
                    continue
                total += row64[child, backward]
            best = max(best, total)
        row64[row, backward] = best
    return True


@compiled
def _expand(row64, row32, token_ids, j, row, done, least, step32, step64):  # type: ignore[no-untyped-def]
    """The entries of a row that can end at `least` or more, best first, equals by token id: their places into
    `step32[j]`, what they reach (by entry) into `step64[j]`; returns how many."""
    h, k = token_ids.shape
    count = 0
    for e in range(k):
        child = row32[row, k + e]
        if child < 0:
            continue
        most = done + row64[row, e]
        if j + 1 < h:
            most += row64[child, k + 1]
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


@compiled
def _walk(room, token_ids, start, first, floor, drafts, scores):  # type: ignore[no-untyped-def]
    """The p best paths through the rows, depth first, best entries first, into `drafts` `[p, h]`, `scores` `[p]`.

    `step32[j]`: k entries, next of them to take, how many, row; `step64[j]`: what each reaches, score before slot j.
    """
    h, k = token_ids.shape
    p = len(scores)
    row64, row32, step32, step64, path = room.row64, room.row32, room.step32, room.step64, room.path
    cursor, count, at = k, k + 1, k + 2
    found, least = np.int64(0), floor
    path[0] = token_ids[0, 0]
    j = np.int64(1)
    step32[1, at], step64[1, k], step32[1, cursor] = start, first, 0
    step32[1, count] = _expand(row64, row32, token_ids, j, np.int64(start), first, least, step32, step64)
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
        if found == p and step64[j, e] == scores[p - 1] and not stands_before(path, drafts, p - 1, j + 1):
            continue
        row = step32[j, at]
        total = step64[j, k] + row64[row, e]
        if j + 1 < h:
            row = np.int64(row32[row, k + e])
            j += 1
            step32[j, at], step64[j, k], step32[j, cursor] = row, total, 0
            step32[j, count] = _expand(row64, row32, token_ids, j, row, total, least, step32, step64)
            continue
        found = keep_path(path, total, found, 0, drafts, scores)
        if found == p and scores[p - 1] > least:
            least = scores[p - 1]
    for place in range(found, p):  # end-of-text leaves fewer ways than places
        scores[place] = scores[0]
        for i in range(h):
            drafts[place, i] = drafts[0, i]
