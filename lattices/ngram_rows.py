"""Rows of the n-gram search: every arc of a (slot, automaton state) pair, scored at once, and the bounds they give.

A row is made when it is first needed and kept for the lattice. It is that of its suffix state plus its back-off
weight, overridden by the state's own few arcs; a word that the suffix state has no arc for has none here either, so few
look-ups are left. Rows that know one word only stand first, one for each slot and entry before it: slot j's after entry
v is row (j - 1) k + v. They hold most of the look-ups, so these are free of branches, and memory is asked for ahead.

Rows lie in two arrays with these columns (k of each where not said otherwise):

    row64  head's log-prob + weight x n-gram score of each word | best score to here, from here (one each)
    row32  state after each word | its row in the next slot (-1: on none of the p best paths)
           | entries that the state has an arc for
           | how many these are, entry that led here (k: end-of-text), queue (one each)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lattices.automaton import (
    BACKOFF,
    BOUND,
    LINEAR,
    NEXT,
    ROOT_NEXT,
    ROOT_SCORE,
    SCORE,
    SLOTS,
    STATE_BOUND,
    SUFFIX,
    WORD,
    find_arc,
    hash_word,
)
from lattices.search import put_in_order

NONE = -(1 << 60)  # no path
WORST = NONE // 2  # real paths score more


# Without reference counts, which cost more than the work here; nothing compiled so can make an array.
_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "_nrt": False}
compiled: Any = njit(**_OPTIONS)
inlined: Any = njit(**_OPTIONS, inline="always")


class Model(NamedTuple):
    """An automaton's arrays, and what they say of the base LM's tokens."""

    cells: np.ndarray
    roots: np.ndarray
    longer: int  # states from here on know two words or more
    word_of: np.ndarray  # int32 [vocab_size], the word of a token id


class Query(NamedTuple):
    """One lattice and how it is scored."""

    token_ids: np.ndarray  # [h, k]
    weight: int  # of the n-gram model, in units of 1 / WEIGHT_SCALE
    end: int  # the token id that ends a path, -1: none


class Room(NamedTuple):
    """Arrays to work in, kept between calls."""

    row64: np.ndarray  # [r, k + 2]
    row32: np.ndarray  # [r, 3k + 3]
    table: np.ndarray  # [t, 2] hash table: (run, slot, state) and row
    entry_of: np.ndarray  # [v + 1] entry of a word in the current slot, -1: not there (also for word -1, the last)
    same: np.ndarray  # [h, k] another entry with the same word, -1: none
    most: np.ndarray  # [h, k, k] the most that an arc of a row with one word gives, in the order of the row's arcs
    bound: np.ndarray  # [h, k + 1, k] the most that a path can gain after two neighbouring entries
    list32: np.ndarray  # [3, k] short lists
    list64: np.ndarray  # [4, k]
    counters: np.ndarray  # 0 rows in use, 1 run
    words: np.ndarray  # [h, k] the lattice's words
    heads: np.ndarray  # [h, k] the lattice's log-probs
    beam32: np.ndarray  # [4, width]
    beam64: np.ndarray  # [4, width]
    step32: np.ndarray  # [h + 1, k + 3]
    step64: np.ndarray  # [h + 1, k + 1]
    path: np.ndarray  # [h]


def make_room(h: int, k: int, rows: int, words: int, width: int) -> Room:
    """Room for lattices `[h, k]`, a number of rows, an automaton with so many words."""
    return Room(
        row64=np.empty((rows, k + 2), dtype=np.int64),
        row32=np.empty((rows, 3 * k + 3), dtype=np.int32),
        table=np.zeros((4 * rows, 2), dtype=np.int64),
        entry_of=np.full(words + 1, -1, dtype=np.int32),
        same=np.empty((h, k), dtype=np.int32),
        most=np.empty((h, k, k), dtype=np.int64),
        bound=np.zeros((h, k + 1, k), dtype=np.int64),
        list32=np.empty((3, k), dtype=np.int32),
        list64=np.empty((4, k), dtype=np.int64),
        counters=np.zeros(2, dtype=np.int64),
        words=np.empty((h, k), dtype=np.int32),
        heads=np.empty((h, k), dtype=np.int64),
        beam32=np.empty((4, width), dtype=np.int32),
        beam64=np.empty((4, width), dtype=np.int64),
        step32=np.empty((h + 1, k + 3), dtype=np.int32),
        step64=np.empty((h + 1, k + 1), dtype=np.int64),
        path=np.empty(h, dtype=np.int32),
    )


def _ask_for(typing_context: Any, cells: Any, at: Any) -> Any:
    """Asks for the cache line of `cells[at]` (C-contiguous) without waiting for it."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        from llvmlite import ir  # type: ignore[import-untyped]

        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        index = builder.sext(arguments[1], ir.IntType(64)) if arguments[1].type.width < 64 else arguments[1]
        width = builder.extract_value(array.strides, 0)
        address = builder.add(builder.ptrtoint(array.data, ir.IntType(64)), builder.mul(index, width))
        pointer = builder.inttoptr(address, cgutils.voidptr_t)
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        insert: Any = cgutils.get_or_insert_function
        prefetch = insert(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(prefetch, [pointer, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(cells, at), build


ask_for: Any = intrinsic(_ask_for)


@inlined
def enter_slot(room, j):  # type: ignore[no-untyped-def]
    """Notes for each word of slot j which of its tokens it is."""
    for e in range(room.words.shape[1]):
        room.entry_of[room.words[j, e]] = e


@inlined
def leave_slot(room, j):  # type: ignore[no-untyped-def]
    """Takes the notes of slot j back."""
    for e in range(room.words.shape[1]):
        room.entry_of[room.words[j, e]] = -1


@inlined
def _place(table, key):  # type: ignore[no-untyped-def]
    """Where a key (run, slot, state) is in the hash table or goes; keys of earlier runs are free places."""
    mask = len(table) - 1
    place = np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)) & mask
    while table[place, 0] != key and table[place, 0] >> 40 == key >> 40:
        place = (place + 1) & mask
    return place


@inlined
def _key_of(room, j, state):  # type: ignore[no-untyped-def]
    return (room.counters[1] << 40) | (np.int64(j) << 32) | np.int64(state)


@inlined
def row_of(model, room, query, j, state):  # type: ignore[no-untyped-def]
    """The row of a state in slot j (which must be entered), made if it is not there; -1: no room for it."""
    key = _key_of(room, j, state)
    place = _place(room.table, key)
    if room.table[place, 0] == key:
        return room.table[place, 1]
    return _new_row(model, room, query, np.int64(j), np.int64(state))


@inlined
def _add_row(room, key):  # type: ignore[no-untyped-def]
    """The next free row (there must be one), for this key."""
    row = room.counters[0]
    room.counters[0] = row + 1
    place = _place(room.table, key)
    room.table[place, 0], room.table[place, 1] = key, row
    return row


@inlined
def _end_row(room, row, state):  # type: ignore[no-untyped-def]
    """The row after end-of-text: one way on, which costs nothing."""
    k = room.words.shape[1]
    for e in range(k):
        room.row64[row, e] = 0 if e == 0 else NONE
        room.row32[row, e] = state
    room.row64[row, k] = NONE
    room.row32[row, 3 * k] = 0


@inlined
def _mark_end(cells, query, room, j, row):  # type: ignore[no-untyped-def]
    """Entries that are end-of-text lead to the state that stands for it, beyond the automaton's."""
    if query.end >= 0:
        for e in range(query.token_ids.shape[1]):
            if query.token_ids[j, e] == query.end:
                room.row32[row, e] = len(cells)


@compiled
def _new_row(model, room, query, j, state):  # type: ignore[no-untyped-def]
    """Makes the row of a state that knows two words or more (those with one are there) after those of its suffixes, or
    that after end-of-text."""
    cells, weight, row64, row32, table = model.cells, query.weight, room.row64, room.row32, room.table
    words, heads = room.words, room.heads
    k = words.shape[1]
    arcs, count = 2 * k, 3 * k
    if state == len(cells):
        if room.counters[0] == len(row64):
            return np.int64(-1)
        row = _add_row(room, _key_of(room, j, state))
        _end_row(room, row, state)
        return row
    known, missing, shorter = np.int64(-1), 0, state
    while known < 0:
        ask_for(cells, shorter + 4)  # the arcs after the header
        shorter = np.int64(cells[shorter, SUFFIX])
        key = _key_of(room, j, shorter)
        place = _place(table, key)
        if table[place, 0] == key:
            known = table[place, 1]
        missing += 1
    if room.counters[0] + missing > len(row64):
        return np.int64(-1)
    while missing > 0:
        missing -= 1
        at_state = state
        for _ in range(missing):
            at_state = np.int64(cells[at_state, SUFFIX])
        row = _add_row(room, _key_of(room, j, at_state))
        backoff = weight * np.int64(cells[at_state, BACKOFF])
        for e in range(k):
            row64[row, e] = row64[known, e] + backoff
        for e in range(k):
            row32[row, e] = row32[known, e]
        row64[row, k] = NONE
        found = 0
        slots = cells[at_state, SLOTS]
        if slots <= LINEAR:
            for at in range(at_state + 1, at_state + 1 + slots):
                e = room.entry_of[cells[at, WORD]]
                while e >= 0:
                    row64[row, e] = heads[j, e] + weight * cells[at, SCORE]
                    row32[row, e] = cells[at, NEXT]
                    row32[row, arcs + found] = e
                    found += 1
                    e = room.same[j, e]
        else:
            for i in range(row32[known, count]):
                e = row32[known, arcs + i]
                at = find_arc(cells, int(at_state), words[j, e])
                if at >= 0:
                    row64[row, e] = heads[j, e] + weight * cells[at, SCORE]
                    row32[row, e] = cells[at, NEXT]
                    row32[row, arcs + found] = e
                    found += 1
        row32[row, count] = found
        _mark_end(cells, query, room, j, row)
        known = row
    return known


@compiled
def short_rows(model, room, query):  # type: ignore[no-untyped-def]
    """Makes the row of every state that knows one word; links entries with the same word. Whether there was room."""
    cells, roots, token_ids, weight, end = model.cells, model.roots, query.token_ids, query.weight, query.end
    row64, table, entry_of, same = room.row64, room.table, room.entry_of, room.same
    words, heads = room.words, room.heads
    root_scores, root_states, homes = room.list64[0], room.list32[0], room.list64[1]
    h, k = token_ids.shape
    if (h - 1) * k > len(row64):
        return False
    room.counters[0] = (h - 1) * k
    for j in range(h - 1):
        for v in range(k if j else 1):
            ask_for(cells, roots[words[j, v], ROOT_NEXT])
    for j in range(1, h):
        for e in range(k):
            word = words[j, e]
            # Several tokens of a slot can be one word (<unk>): `same` leads from an entry to the one before.
            same[j, e] = entry_of[word]
            entry_of[word] = e
            root_scores[e] = heads[j, e] + weight * roots[word, ROOT_SCORE]
            root_states[e] = roots[word, ROOT_NEXT]
            homes[e] = hash_word(word)
        for v in range(k if j > 1 else 1):
            row = (j - 1) * k + v
            state: Any = np.int64(roots[words[j - 1, v], ROOT_NEXT])
            if v + 1 < k:
                _ask_for_arcs(cells, np.int64(roots[words[j - 1, v + 1], ROOT_NEXT]), homes)
            if token_ids[j - 1, v] == end:
                state = len(cells)
            key = _key_of(room, j, state)
            place = _place(table, key)
            if table[place, 0] != key:
                table[place, 0], table[place, 1] = key, row
            _short_row(cells, room, weight, j, v, row, state)
            _mark_end(cells, query, room, j, row)
        leave_slot(room, j)
    return True


@inlined
def _ask_for_arcs(cells, state, homes):  # type: ignore[no-untyped-def]
    """Asks for the cells that `_short_row` will look at: four in a row, so two cache lines."""
    slots = cells[state, SLOTS]
    if slots > LINEAR:
        for e in range(len(homes)):
            first = state + 1 + (homes[e] & (slots - 1))
            ask_for(cells, first)
            ask_for(cells, first + 3)


@compiled
def _short_row(cells, room, weight, j, v, row, state):  # type: ignore[no-untyped-def]
    """The row of a state that knows one word, none, or end-of-text."""
    row64, row32, most = room.row64, room.row32, room.most
    root_scores, root_states, homes = room.list64[0], room.list32[0], room.list64[1]
    k = room.words.shape[1]
    arcs, count = 2 * k, 3 * k
    if state == len(cells):
        _end_row(room, row, state)
        return
    row64[row, k] = NONE
    slots = np.int64(cells[state, SLOTS])
    found = 0
    totals, after, arc_list, tops = row64[row], row32[row], row32[row, arcs:], most[j, v]
    words, heads = room.words[j], room.heads[j]
    if slots <= LINEAR:
        backoff = weight * np.int64(cells[state, BACKOFF]) if state else 0
        for e in range(k):
            totals[e] = root_scores[e] + backoff
        for e in range(k):
            after[e] = root_states[e]
        for at in range(state + 1, state + 1 + slots):
            e = room.entry_of[cells[at, WORD]]
            while e >= 0:
                totals[e] = heads[e] + weight * cells[at, SCORE]
                after[e] = cells[at, NEXT]
                arc_list[found] = e
                tops[found] = heads[e] + weight * cells[at, BOUND]
                found += 1
                e = room.same[j, e]
        row32[row, count] = found
        return
    first, mask = state + 1, slots - 1
    for e in range(k):
        word, home = words[e], homes[e]
        # Four cells at once, without branches: which of them it is can't be foreseen. No arc: `cell` stays the header,
        # whose columns are what back-off needs (the suffix state is the root, 0).
        a, b = np.uintp(first + (home & mask)), np.uintp(first + (home + 1 & mask))
        c, d = np.uintp(first + (home + 2 & mask)), np.uintp(first + (home + 3 & mask))
        word_a, word_b, word_c, word_d = cells[a, WORD], cells[b, WORD], cells[c, WORD], cells[d, WORD]
        cell: Any = state
        cell = np.int64(a) if word_a == word else cell
        cell = np.int64(b) if word_b == word else cell
        cell = np.int64(c) if word_c == word else cell
        cell = np.int64(d) if word_d == word else cell
        if (cell == state) & ((word_a | word_b | word_c | word_d) >= 0):
            cell = max(find_arc(cells, state, word), state)
        is_arc = cell != state
        found_at = np.uintp(cell)
        totals[e] = weight * cells[found_at, SCORE] + (heads[e] if is_arc else root_scores[e])
        after[e] = cells[found_at, NEXT] + (0 if is_arc else root_states[e])
        place = np.uintp(found)
        arc_list[place] = e
        tops[place] = heads[e] + weight * cells[found_at, BOUND]
        found += is_arc
        ask_for(cells, after[e])  # for the bounds of pairs
    row32[row, count] = found


@compiled
def make_bounds(model, room, query):  # type: ignore[no-untyped-def]
    """Fills `bound[j, u, v]`: the most that a path through entries u of slot j - 1 and v of slot j gains after v.

    It is exact where the automaton tells no more apart than these two words.
    """
    row64, bound, token_ids, end = room.row64, room.bound, query.token_ids, query.end
    h, k = token_ids.shape
    for u in range(k):
        for v in range(k):
            bound[h - 1, u, v] = 0
    for j in range(h - 1, 0, -1):
        for v in range(k if j > 1 else 1):
            row = (j - 1) * k + v
            best = np.int64(NONE)
            for e in range(k):
                best = max(best, row64[row, e] + bound[j, v, e])
            if token_ids[j - 1, v] == end:
                best = np.int64(0)
            for u in range(k):
                bound[j - 1, u, v] = best
            if j > 1 and model.longer < len(model.cells) and token_ids[j - 1, v] != end:
                _pair_bounds(model, room, query.weight, j, v, best)


@compiled
def _pair_bounds(model, room, weight, j, v, shorter):  # type: ignore[no-untyped-def]
    """The bounds of entry v of slot j - 1 after every entry u before it with which it is a state of its own: its own
    arcs and its back-off from `shorter`. What longer contexts can add is in the arcs' and the state's bounds."""
    cells, longer, words, heads = model.cells, model.longer, room.words, room.heads
    row32, bound, most = room.row32, room.bound, room.most
    pairs, pair_states, best_arcs, tops = room.list32[1], room.list64[2], room.list32[2], room.list64[3]
    k = words.shape[1]
    count = 0
    before = (j - 2) * k
    for u in range(k if j > 2 else 1):
        state = row32[before + u, v]
        pairs[count], pair_states[count] = u, state
        count += (state >= longer) & (state < len(cells))
    if not count:
        return
    # Only words that v has an arc for can follow a pair by an arc; those that give most come first.
    row = (j - 1) * k + v
    arcs = np.int64(0)
    for i in range(row32[row, 3 * k]):
        e = row32[row, 2 * k + i]
        arcs = put_in_order(most[j, v, i] + bound[j, v, e], e, arcs, tops, best_arcs)
    for i in range(count):
        state = pair_states[i]
        best = shorter + weight * (np.int64(cells[state, BACKOFF]) + cells[state, STATE_BOUND])
        for a in range(arcs):
            if tops[a] <= best:
                break
            e = best_arcs[a]
            at = find_arc(cells, state, words[j, e])
            if at >= 0:
                best = max(best, heads[j, e] + weight * cells[at, BOUND] + bound[j, v, e])
        bound[j - 1, pairs[i], v] = best
