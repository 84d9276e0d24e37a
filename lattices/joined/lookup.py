"""A suffix automaton over one growing sequence of tokens: where have its last tokens stood before, and what followed?

Every state stands for the strings that end at the same places of the sequence; a step along a token takes amortised
constant time, and so does adding one (Blumer et al. 1985). Beside the classic fields a state counts its occurrences
and knows the last of them, so that what followed a string can be ranked by frequency and by recency. Needs numpy and
numba only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from lattices.errors import RescoreError

ROOT = 0
NONE = -1
FIRST_TOKENS = 1 << 10  # that there is room for at the beginning


class Tables(NamedTuple):
    """The arrays of an automaton, for compiled code.

    states int32 `[s, 6]`: length of the longest string, suffix link, occurrences, end of the last occurrence (place of
    its last token), first edge, edges.
    edges int32 `[e, 4]`: source state, token, target state, next edge of the source.
    slots int32 `[2^b]`: edges by a hash of source and token, `NONE` where empty.
    tokens int32 `[n]`: the sequence.
    sizes int64 `[4]`: states, edges, tokens, the state of the whole sequence.
    """

    states: np.ndarray
    edges: np.ndarray
    slots: np.ndarray
    tokens: np.ndarray
    sizes: np.ndarray


LENGTH, LINK, COUNT, END, FIRST_EDGE, DEGREE = range(6)
SOURCE, TOKEN, TARGET, NEXT = range(4)
STATES, EDGES, TOKENS, LAST = range(4)


class Lookup:
    """The suffix automaton of the tokens given so far."""

    def __init__(self, token_ids: Sequence[int] | np.ndarray = ()) -> None:
        self.tables = _tables(max(FIRST_TOKENS, len(token_ids)))
        self.extend(token_ids)

    def __len__(self) -> int:
        """Tokens of the sequence."""
        return int(self.tables.sizes[TOKENS])

    def extend(self, token_ids: Sequence[int] | np.ndarray) -> None:
        """Adds tokens at the end. Raises `RescoreError` for a negative one."""
        added = np.asarray(token_ids, dtype=np.int32).reshape(-1)
        if len(added) and added.min() < 0:
            raise RescoreError(f"token id {added.min()} is negative; give the ids of a tokenizer")
        needed = len(self) + len(added)
        if needed > len(self.tables.tokens):
            self.tables = _grown(self.tables, needed)
        extend(self.tables, added)

    def continuations(
        self,
        token_ids: Sequence[int] | np.ndarray = (),
        *,
        count: int = 1,
        length: int = 8,
        least: int = 1,
        most: int = 32,
        earliest: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """What followed earlier occurrences of the longest suffixes of the sequence and these further tokens.

        count: continuations, each another one; length: of each, in tokens.
        least, most: tokens of a match; a longer one counts as `most`.
        Returns tokens int32 `[c, length]`, `NONE` where the sequence ends, and lengths of the matches int32 `[c]`:
        longest match first, then the most recent (or the `earliest`); a continuation that begins another one is left
        out.
        """
        ids = np.asarray(token_ids, dtype=np.int32)
        return continuations(self.tables, ids, count, length, least, most, earliest)


def _tables(capacity: int) -> Tables:
    slots = 1 << int(np.ceil(np.log2(8 * capacity + 16)))
    states = np.zeros((2 * capacity + 2, 6), dtype=np.int32)
    states[ROOT] = (0, NONE, 0, NONE, NONE, 0)
    return Tables(
        states,
        np.full((4 * capacity + 4, 4), NONE, dtype=np.int32),
        np.full(slots, NONE, dtype=np.int32),
        np.zeros(capacity, dtype=np.int32),
        np.array([1, 0, 0, ROOT], dtype=np.int64),
    )


def _grown(tables: Tables, needed: int) -> Tables:
    """The same automaton with room for twice as many tokens as are needed."""
    larger = _tables(2 * needed)
    states, edges, tokens, _ = tables.sizes
    larger.states[:states] = tables.states[:states]
    larger.edges[:edges] = tables.edges[:edges]
    larger.tokens[:tokens] = tables.tokens[:tokens]
    larger.sizes[:] = tables.sizes
    _place_all(larger)
    return larger


@njit(cache=True)
def _slot(tables: Tables, state: int, token: int) -> Any:
    """Where the edge of a state along a token is, or would be placed."""
    slots, edges = tables.slots, tables.edges
    mask = len(slots) - 1
    mixed = np.uint64(state) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(token) * np.uint64(0xC2B2AE3D27D4EB4F)
    place = np.int64((mixed ^ (mixed >> np.uint64(29))) & np.uint64(mask))
    while slots[place] != NONE:
        edge = slots[place]
        if edges[edge, SOURCE] == state and edges[edge, TOKEN] == token:
            break
        place = (place + 1) & mask
    return place


@njit(cache=True)
def _place_all(tables: Tables) -> None:
    for edge in range(tables.sizes[EDGES]):
        tables.slots[_slot(tables, tables.edges[edge, SOURCE], tables.edges[edge, TOKEN])] = edge


@njit(cache=True)
def step(tables: Tables, state: int, token: int) -> Any:
    """The state along a token, `NONE` where nothing follows so."""
    edge = tables.slots[_slot(tables, state, token)]
    return NONE if edge == NONE else tables.edges[edge, TARGET]


@njit(cache=True)
def _add_edge(tables: Tables, state: int, token: int, target: int) -> None:
    place = _slot(tables, state, token)
    edge = tables.sizes[EDGES]
    tables.sizes[EDGES] += 1
    tables.edges[edge, SOURCE], tables.edges[edge, TOKEN], tables.edges[edge, TARGET] = state, token, target
    tables.edges[edge, NEXT] = tables.states[state, FIRST_EDGE]
    tables.states[state, FIRST_EDGE] = edge
    tables.states[state, DEGREE] += 1
    tables.slots[place] = edge


@njit(cache=True)
def _new_state(tables: Tables, length: int) -> Any:
    state = tables.sizes[STATES]
    tables.sizes[STATES] += 1
    tables.states[state, LENGTH] = length
    tables.states[state, LINK], tables.states[state, END], tables.states[state, FIRST_EDGE] = NONE, NONE, NONE
    tables.states[state, COUNT] = tables.states[state, DEGREE] = 0
    return state


@njit(cache=True)
def extend(tables: Tables, token_ids: np.ndarray) -> None:
    """Adds tokens at the end; there is room for them."""
    states = tables.states
    for token in token_ids:
        place = tables.sizes[TOKENS]
        current = _new_state(tables, place + 1)
        tables.tokens[place] = token
        tables.sizes[TOKENS] += 1
        state = tables.sizes[LAST]
        tables.sizes[LAST] = current
        while state != NONE and step(tables, state, token) == NONE:
            _add_edge(tables, state, token, current)
            state = states[state, LINK]
        if state == NONE:
            states[current, LINK] = ROOT
        else:
            states[current, LINK] = _split(tables, state, token)
        # All suffixes end here too; in text that is no repetition of itself there are few of these states.
        state = current
        while state != NONE:
            states[state, COUNT] += 1
            states[state, END] = place
            state = states[state, LINK]


@njit(cache=True)
def _split(tables: Tables, state: int, token: int) -> Any:
    """The state of a state's longest string and the token after it: cut off from that of longer strings, if need be."""
    states = tables.states
    target = step(tables, state, token)
    if states[target, LENGTH] == states[state, LENGTH] + 1:
        return target
    shorter = _new_state(tables, states[state, LENGTH] + 1)
    for field in (LINK, COUNT, END):
        states[shorter, field] = states[target, field]
    edge = states[target, FIRST_EDGE]
    while edge != NONE:
        _add_edge(tables, shorter, tables.edges[edge, TOKEN], tables.edges[edge, TARGET])
        edge = tables.edges[edge, NEXT]
    states[target, LINK] = shorter
    while state != NONE and step(tables, state, token) == target:
        tables.edges[tables.slots[_slot(tables, state, token)], TARGET] = shorter
        state = states[state, LINK]
    return shorter


@njit(cache=True)
def advance(tables: Tables, state: int, length: int, token: int) -> tuple[int, int]:
    """The match after one more token, a state and a length: the longest suffix that still stands in the sequence."""
    while True:
        target = step(tables, state, token)
        if target != NONE:
            return target, length + 1
        if state == ROOT:
            return ROOT, 0
        state = tables.states[state, LINK]
        length = tables.states[state, LENGTH]


@njit(cache=True)
def follow(tables: Tables, token_ids: np.ndarray) -> tuple[int, int]:
    """The longest suffix of the sequence and these further tokens that stands in the sequence and is followed by
    something there: state and length, (`ROOT`, 0) without any."""
    states = tables.states
    state = tables.sizes[LAST]
    length = tables.sizes[TOKENS]
    for token in token_ids:
        state, length = advance(tables, state, length, token)
    # What stands at the end of the sequence alone is followed by nothing.
    while state != ROOT and states[state, FIRST_EDGE] == NONE:
        state = states[state, LINK]
        length = states[state, LENGTH]
    return state, length


@njit(cache=True)
def continuations(
    tables: Tables, token_ids: np.ndarray, count: int, length: int, least: int, most: int, earliest: bool
) -> tuple[np.ndarray, np.ndarray]:
    """See `Lookup.continuations`."""
    tokens, n, more = tables.tokens, tables.sizes[TOKENS], len(token_ids)
    runs = np.full((count, length), NONE, dtype=np.int32)
    matches = np.zeros(count, dtype=np.int32)
    found = 0
    state, longest = follow(tables, token_ids)
    while state != ROOT and tables.states[tables.states[state, LINK], LENGTH] >= most:
        state = tables.states[state, LINK]  # a shorter suffix has more occurrences
    longest = min(longest, most)
    if longest < least or longest == 0:
        return runs[:0], matches[:0]
    if count == 1 and not earliest:
        # The last occurrence that something follows is the last of the most recent continuation.
        start = _most_recent(tables, state)
        stop = min(n, start + length)
        runs[0, : stop - start] = tokens[start:stop]
        matches[0] = longest
        return runs, matches
    # Matches by the place after them: how long they are, and which are the longest and latest.
    whole = np.empty(n + more, dtype=np.int32)
    whole[:n] = tokens[:n]
    whole[n:] = token_ids
    lengths = np.zeros(n, dtype=np.int32)
    last = whole[n + more - 1]
    for place in range(1, n):
        if tokens[place - 1] == last:
            matched = 1
            while (
                matched < longest and matched < place and tokens[place - 1 - matched] == whole[n + more - 1 - matched]
            ):
                matched += 1
            lengths[place] = matched
    for matched in range(longest, least - 1, -1):
        for steps in range(1, n):
            place = steps if earliest else n - steps
            if lengths[place] == matched:
                stop = min(n, place + length)
                if _is_new(runs, found, tokens[place:stop]):
                    runs[found, : stop - place] = tokens[place:stop]
                    matches[found] = matched
                    found += 1
                    if found == count:
                        return runs, matches
    return runs[:found], matches[:found]


@njit(cache=True)
def _most_recent(tables: Tables, state: int) -> int:
    """The place after the last occurrence of a state's strings that something follows."""
    edge, best = tables.states[state, FIRST_EDGE], 0
    while edge != NONE:
        best = max(best, tables.states[tables.edges[edge, TARGET], END])
        edge = tables.edges[edge, NEXT]
    return best


@njit(cache=True)
def _is_new(runs: np.ndarray, found: int, run: np.ndarray) -> bool:
    """Whether no continuation so far begins with this one."""
    for other in runs[:found]:
        same = True
        for place in range(len(run)):
            if other[place] != run[place]:
                same = False
                break
        if same:
            return False
    return True
