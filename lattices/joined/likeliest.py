"""The likeliest prefix tree of a joined lattice (`lattices.joined.candidates`), and the drafts that it is made of.

Probabilities fall along a path, so taking the likeliest open node again and again finds the likeliest nodes of all, in
falling order, and every parent before its children.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from lattices.automaton import advance as advance_ngram
from lattices.joined.candidates import candidates, score
from lattices.joined.lookup import NONE
from lattices.joined.lookup import advance as advance_match
from lattices.joined.sources import HEADS, Room, Sources, first_match, still_following


@njit(cache=True)
def likeliest_nodes(
    sources: Sources, weights: np.ndarray, first: int, count: int, deepest: int, ends: np.ndarray, room: Room
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The `count` likeliest prefixes of at most `deepest` tokens, in falling order; first: the token of slot 1.

    ends: tokens after which nothing is accepted, so that no path goes on from them.
    Returns for each the last token, the place of its parent (`NONE` for the first, which is slot 1), its depth (tokens
    of the path), the log-probability of the whole path, and where the last token comes from (bits).
    """
    most = 1 + count * (len(room.token_ids))
    tokens, parents = np.empty(most, dtype=np.int32), np.empty(most, dtype=np.int32)
    logps, origins = np.empty(most), np.empty(most, dtype=np.int32)
    depths, matched = np.empty(most, dtype=np.int32), np.empty((most, 2), dtype=np.int32)
    ngram_states, following = np.empty(most, dtype=np.int32), np.empty(most, dtype=np.int32)
    heap, waiting = np.empty(most, dtype=np.int32), 0
    chosen, number = np.empty(count, dtype=np.int32), np.full(most, NONE, dtype=np.int32)
    tokens[0], parents[0], logps[0], origins[0], depths[0] = first, NONE, 0.0, HEADS, 1
    matched[0, 0], matched[0, 1] = first_match(sources.lookup, first)
    ngram_states[0] = sources.ngram_state
    if len(sources.words):
        ngram_states[0] = advance_ngram(sources.cells, sources.roots, sources.ngram_state, sources.words[first])[1]
    following[0] = (1 << len(sources.chains.kinds)) - 1
    heap[0], waiting, made, taken = 0, 1, 1, 0
    while waiting and taken < count:
        node = heap[0]
        waiting -= 1
        heap[0] = heap[waiting]
        _sink(heap, waiting, logps)
        chosen[taken] = node
        number[node] = taken
        taken += 1
        if depths[node] == deepest or taken == count or (ends == tokens[node]).any():
            continue
        if node:  # most are never reached, so that these wait until here
            above = parents[node]
            state, length = advance_match(sources.lookup, matched[above, 0], matched[above, 1], tokens[node])
            matched[node, 0], matched[node, 1] = state, length
            following[node] = still_following(sources.chains, depths[above], following[above], tokens[node])
        found = candidates(
            sources, depths[node], tokens[node], matched[node, 0], matched[node, 1], ngram_states[node],
            following[node], room,
        )  # fmt: skip
        score(weights, found, room)
        for place in range(found):
            tokens[made], parents[made], depths[made] = room.token_ids[place], node, depths[node] + 1
            logps[made], origins[made] = logps[node] + room.logps[place], room.origins[place]
            ngram_states[made] = room.ngram_states[place]
            heap[waiting] = made
            waiting += 1
            _rise(heap, waiting - 1, logps)
            made += 1
    order = chosen[:taken]
    new_parents = np.empty(taken, dtype=np.int32)
    for place in range(taken):
        new_parents[place] = number[parents[order[place]]] if place else NONE
    return tokens[order], new_parents, depths[order], logps[order], origins[order]


@njit(cache=True)
def _before(logps: np.ndarray, a: int, b: int) -> bool:
    """Whether node a comes before b: likelier, of equals the one that was found first."""
    return logps[a] > logps[b] or (logps[a] == logps[b] and a < b)


@njit(cache=True)
def _rise(heap: np.ndarray, place: int, logps: np.ndarray) -> None:
    while place:
        above = (place - 1) >> 1
        if not _before(logps, heap[place], heap[above]):
            break
        heap[place], heap[above] = heap[above], heap[place]
        place = above


@njit(cache=True)
def _sink(heap: np.ndarray, size: int, logps: np.ndarray) -> None:
    place = 0
    while True:
        below = 2 * place + 1
        if below >= size:
            break
        if below + 1 < size and _before(logps, heap[below + 1], heap[below]):
            below += 1
        if not _before(logps, heap[below], heap[place]):
            break
        heap[place], heap[below] = heap[below], heap[place]
        place = below


@njit(cache=True)
def best_branches(parents: np.ndarray, logps: np.ndarray, p: int) -> np.ndarray:
    """Which nodes of a prefix tree stay, bool `[n]`, if it may have at most p leaves: those with the highest expected
    accepted length. The longest branch first, then what adds most; for any p no other choice of leaves is better."""
    n = len(parents)
    branch, heavy = np.exp(logps), np.full(n, NONE, dtype=np.int32)
    for node in range(n - 1, -1, -1):  # children come after their parents
        if heavy[node] != NONE:
            branch[node] += branch[heavy[node]]
        above = parents[node]
        if above != NONE and (heavy[above] == NONE or branch[node] >= branch[heavy[above]]):
            heavy[above] = node
    tops = np.empty(n, dtype=np.int32)
    found = 0
    for node in range(n):
        if node == 0 or heavy[parents[node]] != node:
            tops[found] = node
            found += 1
    order = np.argsort(-branch[tops[:found]], kind="mergesort")
    stays = np.zeros(n, dtype=np.bool_)
    for i in range(min(p, found)):
        node = tops[order[i]]
        while node != NONE:
            stays[node] = True
            node = heavy[node]
    return stays


@njit(cache=True)
def branches(token_ids: np.ndarray, parents: np.ndarray, depths: np.ndarray, stays: np.ndarray) -> np.ndarray:
    """The paths to the leaves of a prefix tree, as far as its nodes stay: int32 `[leaves, longest]`, `NONE` after their
    ends, that of the likeliest leaf first."""
    n = len(parents)
    is_leaf = stays.copy()
    for node in range(n - 1, 0, -1):
        if stays[node]:
            is_leaf[parents[node]] = False
    leaves = np.flatnonzero(is_leaf)
    drafts = np.full((len(leaves), depths[leaves].max()), NONE, dtype=np.int32)
    for row in range(len(leaves)):
        node = leaves[row]
        while node != NONE:
            drafts[row, depths[node] - 1] = token_ids[node]
            node = parents[node]
    return drafts
