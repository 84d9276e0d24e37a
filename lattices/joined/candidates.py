"""The joined lattice: what all drafters propose at a position, with where it came from, and how likely it is.

It is not laid out as slots: what a lookup proposes depends on the path before, so candidates are found path by path. A
path begins with the token that the base LM has already chosen (slot 1). The candidates after it are the entries of the
next head, what followed the path's longest suffixes earlier in the text (`lookup`), and the next tokens of chains that
other drafters gave. A log-linear model says how likely each of them is to be the base's own choice, or none
of them (`OTHER`): a softmax over weighted features, each a number or a mark by slot or by length of the match. With
these probabilities the expected accepted length of a prefix tree is the sum over its nodes of the products along their
paths, so the best tree of n nodes is the n likeliest nodes (`lattices.joined.likeliest`). Needs numpy and numba only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from lattices.automaton import SCORE_SCALE
from lattices.automaton import advance as advance_ngram
from lattices.joined.lookup import (
    COUNT,
    DEGREE,
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
from lattices.joined.lookup import step as step_match

HEADS, LOOKUP, MODEL, CORPUS, TRACED = 1, 2, 4, 8, 16  # bits of where a candidate comes from
KINDS = 3  # of chains: by a draft model, from a corpus, of a trace
CONTINUATIONS = 8  # tokens that the text so far proposes after a path, at most
LEVELS = 4  # suffixes of a path whose continuations are counted: the longest ones, and the empty one
UNIFORM = 1.0 / 50_000  # of a token that the text so far does not hold
MATCHES = np.array([1, 2, 3, 4, 6, 9, 16], dtype=np.int64)  # least lengths of the classes of matches after class 0
CLASSES = len(MATCHES) + 1
SLOTS = 8  # slots with weights of their own, from slot 2 on; later ones share the last

# Places of the weights.
HEAD = 0  # [SLOTS] log-probability by the head of the slot, that of its last entry for tokens that it lacks
LACKS = HEAD + SLOTS  # [SLOTS] the head lacks the token
TEXT = LACKS + SLOTS  # [CLASSES] log-probability by what followed in the text
RECENT = TEXT + CLASSES  # [CLASSES] it followed the last time
ALONE = RECENT + CLASSES  # [CLASSES] nothing else ever followed
NGRAM = ALONE + CLASSES  # [2] log-probability by an n-gram model, where there is a head, where not
PAIR = NGRAM + 2  # [SLOTS + 1] score beside the token before by a learned bigram; the last: no head
AGREE = PAIR + SLOTS + 1  # [2] two sources propose it; three or more do
CHAINED = AGREE + 2  # [KINDS, 2] log-probability by a chain: that the path has left; that it has followed so far
CHAIN_LACKS = CHAINED + 2 * KINDS  # [KINDS, 2] the chain lacks the token
OTHER_SLOT = CHAIN_LACKS + 2 * KINDS  # [SLOTS + 1] of the outcome that it is none of them; the last: no head
OTHER_MATCH = OTHER_SLOT + SLOTS + 1  # [CLASSES]
OTHER_MASS = OTHER_MATCH + CLASSES  # log of what the head gives to tokens that it lacks
OTHER_CHAINED = OTHER_MASS + 1  # [KINDS, 2] log of what the chains give to tokens that they lack
OTHER_GONE = OTHER_CHAINED + 2 * KINDS  # [KINDS] no chain has anything to say after the path
WEIGHTS = OTHER_GONE + KINDS
LEAST = -30.0  # of a log-probability, in nats: what is less likely is no more telling
ACTIVE = 8 + 2 * KINDS  # features that are not 0 of one candidate, at most
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
def _class_of(length: int) -> int:
    place = 0
    while place < len(MATCHES) and length >= MATCHES[place]:
        place += 1
    return place


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
def candidates(
    sources: Sources, depth: int, last: int, state: int, length: int, ngram_state: int, following: int, room: Room
) -> int:
    """Fills `room` with the candidates after a path and their features; returns how many there are.

    depth: tokens of the path; last: the last of them; state, length: its match in the text; ngram_state: after it.
    following: bits of the chains that it has followed so far.
    """
    h, k = sources.token_ids.shape
    states, edges = sources.lookup.states, sources.lookup.edges
    state, length = match_before(sources.lookup, state, length)
    found = gather(sources, depth, state, following, room)
    has_head, has_chains = depth < h, len(sources.chains.kinds) > 0
    slot = min(depth - 1, SLOTS - 1)
    match = _class_of(length)
    levels = np.empty(LEVELS, dtype=np.int64)
    level_count, level = 0, state
    while level_count < LEVELS - 1 and level != ROOT:
        levels[level_count] = level
        level_count += 1
        level = states[level, LINK]
    levels[level_count] = ROOT
    level_count += 1
    last_end = NONE  # of what followed the longest match the last time
    edge = states[state, FIRST_EDGE] if state != ROOT else NONE
    while edge != NONE:
        last_end = max(last_end, states[edges[edge, TARGET], END])
        edge = edges[edge, NEXT]
    floor = max(LEAST, np.float64(sources.logps[depth, k - 1])) if has_head else 0.0
    head_mass = 0.0
    for place in range(found):
        token = room.token_ids[place]
        used = 0
        if has_head:
            in_head = room.origins[place] & HEADS
            logp = floor  # of entries of the head, which come first, their own
            if in_head:
                logp = max(LEAST, np.float64(sources.logps[depth, place]))
            used = _put(room, place, used, HEAD + slot, logp)
            if in_head:
                head_mass += np.exp(logp)
            else:
                used = _put(room, place, used, LACKS + slot, 1.0)
        probability, target, longest_target = UNIFORM, ROOT, NONE
        for i in range(level_count - 1, -1, -1):
            if target != NONE:  # what does not follow a suffix follows no longer one
                target = step_match(sources.lookup, levels[i], token)
            count = states[target, COUNT] if target != NONE else 0
            kinds = states[levels[i], DEGREE]
            probability = (count + kinds * probability) / max(1, states[levels[i], COUNT] + kinds)
            longest_target = target
        if sources.lookup.sizes[TOKENS] > 0:
            used = _put(room, place, used, TEXT + match, np.log(probability))
        if state != ROOT and longest_target != NONE:
            if states[longest_target, END] == last_end:
                used = _put(room, place, used, RECENT + match, 1.0)
            if states[state, DEGREE] == 1:
                used = _put(room, place, used, ALONE + match, 1.0)
        if len(sources.words):
            score, room.ngram_states[place] = advance_ngram(
                sources.cells, sources.roots, ngram_state, sources.words[token]
            )
            used = _put(room, place, used, NGRAM + (0 if has_head else 1), max(LEAST, score / SCORE_SCALE))
        if len(sources.left):
            pair = np.float64(0.0)
            for i in range(sources.left.shape[1]):
                pair += sources.left[last, i] * sources.right[token, i]
            used = _put(room, place, used, PAIR + (slot if has_head else SLOTS), pair)
        agree = _bits(room.origins[place])
        if agree > 1:
            used = _put(room, place, used, AGREE + min(agree, 3) - 2, 1.0)
        if has_chains:
            used = _put_chains(room, place, used)
        room.used[place] = used
    used = _put(room, found, 0, OTHER_SLOT + (slot if has_head else SLOTS), 1.0)
    used = _put(room, found, used, OTHER_MATCH + match, 1.0)
    if has_head:
        used = _put(room, found, used, OTHER_MASS, np.log(max(1.0 - head_mass, 1e-6)))
    if has_chains:
        used = _put_chains_other(room, found, used)
    room.used[found] = used
    return found


@njit(cache=True)
def _bits(origins: int) -> int:
    count = 0
    while origins:
        count += origins & 1
        origins >>= 1
    return count


@njit(cache=True)
def _put_chains(room: Room, place: int, used: int) -> int:
    for kind in range(KINDS):
        does = room.followed[kind]
        if does in (LEFT, FOLLOWED):
            column = 2 * kind + does - LEFT
            logp = room.chain_logps[place, kind]
            if logp == -np.inf:
                logp = room.floors[kind]
                used = _put(room, place, used, CHAIN_LACKS + column, 1.0)
            if logp != 0.0:
                used = _put(room, place, used, CHAINED + column, logp)
    return used


@njit(cache=True)
def _put_chains_other(room: Room, found: int, used: int) -> int:
    for kind in range(KINDS):
        does = room.followed[kind]
        if does in (LEFT, FOLLOWED):
            mass = 0.0
            for place in range(found):
                mass += np.exp(room.chain_logps[place, kind])
            used = _put(room, found, used, OTHER_CHAINED + 2 * kind + does - LEFT, np.log(max(1.0 - mass, 1e-6)))
        elif does == GONE:
            used = _put(room, found, used, OTHER_GONE + kind, 1.0)
    return used


@njit(cache=True)
def _put(room: Room, place: int, used: int, feature: int, value: float) -> int:
    room.places[place, used] = feature
    room.values[place, used] = value
    return used + 1


@njit(cache=True)
def normalise(scores: np.ndarray) -> None:
    """Makes log-probabilities of scores, in place."""
    highest = scores.max()
    norm = 0.0
    for score in scores:
        norm += np.exp(score - highest)
    scores -= highest + np.log(norm)


@njit(cache=True)
def score(weights: np.ndarray, found: int, room: Room) -> None:
    """Log-probabilities of the candidates, and of none of them, into `room.logps`."""
    for place in range(found + 1):
        total = 0.0
        for i in range(room.used[place]):
            total += weights[room.places[place, i]] * room.values[place, i]
        room.logps[place] = total
    normalise(room.logps[: found + 1])


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
        from_state, _ = match_before(sources.lookup, state, length)
        found = gather(sources, depth, from_state, following, room)
        place = find(room, found, path[depth])
        if place != NONE:
            origins[depth] = room.origins[place]
        state, length = advance_match(sources.lookup, state, length, path[depth])
        following = still_following(sources.chains, depth, following, path[depth])
    return origins
