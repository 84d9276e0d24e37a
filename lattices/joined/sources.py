"""What drafters propose after a path, with where it came from: the candidates of a joined lattice.

It is not laid out as slots: what a lookup proposes depends on the path before, so candidates are found path by path. A
path begins with the token that the base LM has already chosen (slot 1). The candidates after it are the entries of the
next head, what followed the path's longest suffixes earlier in the text (`lookup`), and the next tokens of chains that
other drafters gave.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from lattices.joined.lookup import (
    COUNT,
    END,
    FIRST_EDGE,
    LAST,
    LENGTH,
    LINK,
    NEXT,
    NONE,
    ROOT,
    TARGET,
    TOKEN,
    TOKENS,
    Tables,
)
from lattices.joined.lookup import advance as advance_match

HEADS, LOOKUP, MODEL, CORPUS, TRACED = 1, 2, 4, 8, 16  # bits of where a candidate comes from
KINDS = 3  # of chains: by a draft model, from a corpus, of a trace
CONTINUATIONS = 8  # tokens that the text so far proposes after a path, at most
LEAST = -30.0  # of a log-probability, in nats: what is less likely is no more telling
ACTIVE = 14 + 2 * KINDS  # features of one candidate that are not 0, at most
LEFT, FOLLOWED = 1, 2  # what a path has done with the chains of a kind, if there are any (0)
GONE = 3


class Chains(NamedTuple):
    """Lattices `[m, q]` from slot 2 on whose entries are conditioned on the first entries of the slots before.

    token_ids int32 `[c, m, q]`, `NONE` where there is none; logps float32 `[c, m, q]`; kinds int32 `[c]`: bits.
    Continuations have one entry a slot, and say nothing of paths that have left them; others do.
    """

    token_ids: np.ndarray
    logps: np.ndarray
    kinds: np.ndarray


class Sources(NamedTuple):
    """What candidates come from, at one position.

    token_ids int32 `[h, k]`, logps float32 `[h, k]`: the heads' lattice, slot 1 first.
    lookup: the suffix automaton of the text so far, without the token of slot 1; of nothing where it is no source.
    cells, roots, words: an n-gram automaton and its word of each token id; empty without one.
    ngram_state: after the text so far.
    left, right float32 `[vocab, r]`: a pair's score is their product; empty without a learned bigram.
    chains: what other drafters propose.
    """

    token_ids: np.ndarray
    logps: np.ndarray
    lookup: Tables
    cells: np.ndarray
    roots: np.ndarray
    words: np.ndarray
    ngram_state: int
    left: np.ndarray
    right: np.ndarray
    chains: Chains


class Room(NamedTuple):
    """Scratch arrays for the candidates after one path.

    token_ids int32, origins int32 (bits) `[m]`; chain_logps float64 `[m, KINDS]`, -inf where the chains lack a token.
    followed int32, floors float64 `[KINDS]`: what the path has done with the chains, and the least they give.
    places int32, values float64 `[m + 1, ACTIVE]`: the features, those of `OTHER` last; used int32 `[m + 1]`: how many
    of them; ngram_states int32 `[m]`; logps float64 `[m + 1]`: of each candidate, and of none of them last.
    """

    token_ids: np.ndarray
    origins: np.ndarray
    chain_logps: np.ndarray
    followed: np.ndarray
    floors: np.ndarray
    places: np.ndarray
    values: np.ndarray
    used: np.ndarray
    ngram_states: np.ndarray
    logps: np.ndarray


def room_for(sources: Sources, room: Room | None = None) -> Room:
    """Room for the candidates after any path: `room` itself where it is large enough."""
    c, _, q = sources.chains.token_ids.shape
    m = sources.token_ids.shape[1] + CONTINUATIONS + c * q
    if room is not None and len(room.token_ids) >= m:
        return room
    return Room(
        np.zeros(m, dtype=np.int32),
        np.zeros(m, dtype=np.int32),
        np.zeros((m, KINDS)),
        np.zeros(KINDS, dtype=np.int32),
        np.zeros(KINDS),
        np.zeros((m + 1, ACTIVE), dtype=np.int32),
        np.zeros((m + 1, ACTIVE)),
        np.zeros(m + 1, dtype=np.int32),
        np.zeros(m, dtype=np.int32),
        np.zeros(m + 1),
    )


@njit(cache=True)
def find(room: Room, found: int, token: int) -> int:
    """The place of a token among the first so many candidates, or `NONE`."""
    for place in range(found):
        if room.token_ids[place] == token:
            return place
    return NONE


@njit(cache=True)
def gather(sources: Sources, depth: int, state: int, following: int, room: Room) -> int:
    """The candidates after a path of `depth` tokens: the head's, then the text's, then the chains'.

    state: its match in the text; following: bits of the chains that it has followed so far. Returns how many.
    """
    h, k = sources.token_ids.shape
    found = 0
    if depth < h:
        for entry in range(k):
            room.token_ids[found] = sources.token_ids[depth, entry]
            room.origins[found] = HEADS
            found += 1
    states, edges = sources.lookup.states, sources.lookup.edges
    proposed = 0
    level = state
    while level != ROOT and proposed < CONTINUATIONS:
        # The most frequent, of equals the most recent; they are few, so they are searched for one by one.
        while proposed < CONTINUATIONS:
            best, best_count, best_end = NONE, 0, 0
            edge = states[level, FIRST_EDGE]
            while edge != NONE:
                target = edges[edge, TARGET]
                count, end = states[target, COUNT], states[target, END]
                if count > best_count or (count == best_count and end > best_end):
                    place = find(room, found, edges[edge, TOKEN])
                    if place == NONE or not room.origins[place] & LOOKUP:
                        best, best_count, best_end = edge, count, end
                edge = edges[edge, NEXT]
            if best == NONE:
                break
            found, _ = _propose(room, found, edges[best, TOKEN], LOOKUP)
            proposed += 1
        level = states[level, LINK]
    return _gather_chains(sources.chains, depth, following, found, room) if len(sources.chains.kinds) else found


@njit(cache=True)
def _gather_chains(chains: Chains, depth: int, following: int, found: int, room: Room) -> int:
    """Adds what the chains propose: those that the path has followed, of a kind without such those that it has left."""
    c, m, q = chains.token_ids.shape
    room.chain_logps[:] = -np.inf
    room.followed[:] = 0
    room.floors[:] = 0.0
    for chain in range(c):
        kind = _kind_of(chains.kinds[chain])
        follows = (following >> chain) & 1
        if depth > m or chains.token_ids[chain, depth - 1, 0] == NONE or not (follows or _has_several(chains, chain)):
            does = GONE if room.followed[kind] == 0 else room.followed[kind]
        elif follows:
            does = FOLLOWED
        else:
            does = FOLLOWED if room.followed[kind] == FOLLOWED else LEFT
        room.followed[kind] = does
    for chain in range(c):
        kind = _kind_of(chains.kinds[chain])
        follows = (following >> chain) & 1
        if room.followed[kind] != (FOLLOWED if follows else LEFT) or depth > m:
            continue
        for entry in range(q):
            token = chains.token_ids[chain, depth - 1, entry]
            if token == NONE:
                break
            found, place = _propose(room, found, token, chains.kinds[chain])
            logp = max(LEAST, np.float64(chains.logps[chain, depth - 1, entry]))
            room.chain_logps[place, kind] = max(room.chain_logps[place, kind], logp)
            if _has_several(chains, chain):
                room.floors[kind] = min(room.floors[kind], logp)
    return found


@njit(cache=True)
def _has_several(chains: Chains, chain: int) -> bool:
    """Whether a chain has more than one entry a slot: it is no continuation."""
    return bool(chains.token_ids.shape[2] > 1 and chains.token_ids[chain, 0, 1] != NONE)


@njit(cache=True)
def _kind_of(bit: int) -> int:
    return 0 if bit == MODEL else 1 if bit == CORPUS else 2


@njit(cache=True)
def _propose(room: Room, found: int, token: int, origin: int) -> tuple[int, int]:
    place = find(room, found, token)
    if place == NONE:
        room.token_ids[found], room.origins[found] = token, origin
        room.chain_logps[found] = -np.inf
        return found + 1, found
    room.origins[place] |= origin
    return found, place


@njit(cache=True)
def still_following(chains: Chains, depth: int, following: int, token: int) -> int:
    """Which chains a path of `depth` tokens has followed when the token has come to it."""
    for chain in range(len(chains.kinds)):
        if depth > chains.token_ids.shape[1] or chains.token_ids[chain, depth - 1, 0] != token:
            following &= ~(1 << chain)
    return following


@njit(cache=True)
def match_before(lookup: Tables, state: int, length: int) -> tuple[int, int]:
    """The longest suffix of a match that something follows: at the end of the text stands what nothing does."""
    while state != ROOT and lookup.states[state, FIRST_EDGE] == NONE:
        state = lookup.states[state, LINK]
        length = lookup.states[state, LENGTH]
    return state, length


@njit(cache=True)
def first_match(lookup: Tables, first: int) -> tuple[int, int]:
    """The match of the text so far with the token of slot 1 after it: state and length."""
    return advance_match(lookup, lookup.sizes[LAST], lookup.sizes[TOKENS], first)


@njit(cache=True)
def sources_along(sources: Sources, path: np.ndarray, room: Room) -> np.ndarray:
    """Who proposes each token of a path after the tokens before it: bits, int32 `[m]`, 0 where nobody does.

    path int32 `[m]`: from slot 1 on, which is the base's own and so always there (`HEADS`). The oracle of the joined
    lattice accepts the tokens before the first 0.
    """
    origins = np.zeros(len(path), dtype=np.int32)
    origins[0] = HEADS
    state, length = first_match(sources.lookup, path[0])
    following = (1 << len(sources.chains.kinds)) - 1
    for depth in range(1, len(path)):
        found = gather(sources, depth, state, following, room)
        place = find(room, found, path[depth])
        if place != NONE:
            origins[depth] = room.origins[place]
        state, length = advance_match(sources.lookup, state, length, path[depth])
        following = still_following(sources.chains, depth, following, path[depth])
    return origins
