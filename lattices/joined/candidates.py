"""The joined lattice: what all drafters propose at a position, with where it came from, and its likeliest prefix tree.

It is not laid out as slots: what a lookup proposes depends on the path before, so candidates are found path by path. A
path begins with the token that the base LM has already chosen (slot 1). The candidates after it are the entries of the
next head, what followed the path's longest suffixes earlier in the text (`lookup`), and the next tokens of chains that
other drafters gave. A log-linear model says how likely each of them is to be the base's own choice, or none
of them (`OTHER`): a softmax over weighted features, each a number or a mark by slot or by length of the match. With
these probabilities the expected accepted length of a prefix tree is the sum over its nodes of the products along their
paths, so the best tree of n nodes is the n likeliest nodes, found in falling order. Needs numpy and numba only.
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

HEADS, LOOKUP, CHAIN = 1, 2, 4  # bits of where a candidate comes from
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
CHAINS = NGRAM + 2  # [2] the chain's log-probability; it is the next token of a chain
OTHER_SLOT = CHAINS + 2  # [SLOTS + 1] of the outcome that it is none of them; the last: no head
OTHER_MATCH = OTHER_SLOT + SLOTS + 1  # [CLASSES]
OTHER_MASS = OTHER_MATCH + CLASSES  # log of what the head gives to tokens that it lacks
WEIGHTS = OTHER_MASS + 1
LEAST = -30.0  # of a log-probability, in nats: what is less likely is no more telling
ACTIVE = 8  # features that are not 0 of one candidate, at most


class Sources(NamedTuple):
    """What candidates come from, at one position.

    token_ids int32 `[h, k]`, logps float32 `[h, k]`: the heads' lattice, slot 1 first.
    lookup: the suffix automaton of the text so far, without the token of slot 1.
    cells, roots, words: an n-gram automaton and its word of each token id; empty without one.
    ngram_state: after the text so far.
    chains int32 `[c, m]`, chain_logps float32 `[c, m]`: continuations from slot 2 on, `NONE` after their end.
    """

    token_ids: np.ndarray
    logps: np.ndarray
    lookup: Tables
    cells: np.ndarray
    roots: np.ndarray
    words: np.ndarray
    ngram_state: int
    chains: np.ndarray
    chain_logps: np.ndarray


class Room(NamedTuple):
    """Scratch arrays for the candidates after one path.

    token_ids int32, origins int32 (bits) `[m]`; places int32, values float64 `[m + 1, ACTIVE]`: the
    features, those of `OTHER` last; used int32 `[m + 1]`: how many of them; ngram_states int32 `[m]`;
    logps float64 `[m + 1]`: of each candidate, and of none of them last.
    """

    token_ids: np.ndarray
    origins: np.ndarray
    places: np.ndarray
    values: np.ndarray
    used: np.ndarray
    ngram_states: np.ndarray
    logps: np.ndarray


def room_for(k: int, chains: int) -> Room:
    """Room for the candidates of heads with k entries and so many chains."""
    m = k + CONTINUATIONS + chains
    return Room(
        np.zeros(m, dtype=np.int32),
        np.zeros(m, dtype=np.int32),
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
def _find(room: Room, found: int, token: int) -> int:
    for place in range(found):
        if room.token_ids[place] == token:
            return place
    return NONE


@njit(cache=True)
def _gather(sources: Sources, depth: int, state: int, length: int, following: int, room: Room) -> int:
    """The candidates after a path of `depth` tokens: heads', then the text's, then the chains'."""
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
                    place = _find(room, found, edges[edge, TOKEN])
                    if place == NONE or not room.origins[place] & LOOKUP:
                        best, best_count, best_end = edge, count, end
                edge = edges[edge, NEXT]
            if best == NONE:
                break
            found = _propose(room, found, edges[best, TOKEN], LOOKUP)
            proposed += 1
        level = states[level, LINK]
    for chain in range(len(sources.chains)):
        if following >> chain & 1 and depth - 1 < sources.chains.shape[1] and sources.chains[chain, depth - 1] != NONE:
            found = _propose(room, found, sources.chains[chain, depth - 1], CHAIN)
    return found


@njit(cache=True)
def _propose(room: Room, found: int, token: int, origin: int) -> int:
    place = _find(room, found, token)
    if place == NONE:
        room.token_ids[found], room.origins[found] = token, origin
        return found + 1
    room.origins[place] |= origin
    return found


@njit(cache=True)
def candidates(
    sources: Sources, depth: int, state: int, length: int, ngram_state: int, following: int, room: Room
) -> int:
    """Fills `room` with the candidates after a path and their features; returns how many there are.

    depth: tokens of the path; state, length: its match in the text; ngram_state: after it.
    following: bits of the chains that it has followed so far.
    """
    h, k = sources.token_ids.shape
    states, edges = sources.lookup.states, sources.lookup.edges
    while state != ROOT and states[state, FIRST_EDGE] == NONE:  # it stands at the end of the text only
        state = states[state, LINK]
        length = states[state, LENGTH]
    found = _gather(sources, depth, state, length, following, room)
    has_head = depth < h
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
        probability, longest_target = UNIFORM, NONE
        for i in range(level_count - 1, -1, -1):
            target = step_match(sources.lookup, levels[i], token)
            count = states[target, COUNT] if target != NONE else 0
            kinds = states[levels[i], DEGREE]
            probability = (count + kinds * probability) / max(1, states[levels[i], COUNT] + kinds)
            longest_target = target
        if len(sources.lookup.tokens) and sources.lookup.sizes[TOKENS] > 0:
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
        for chain in range(len(sources.chains)):
            if following >> chain & 1 and room.origins[place] & CHAIN and sources.chains[chain, depth - 1] == token:
                used = _put(room, place, used, CHAINS, np.float64(sources.chain_logps[chain, depth - 1]))
                used = _put(room, place, used, CHAINS + 1, 1.0)
                break
        room.used[place] = used
    used = _put(room, found, 0, OTHER_SLOT + (slot if has_head else SLOTS), 1.0)
    used = _put(room, found, used, OTHER_MATCH + match, 1.0)
    if has_head:
        used = _put(room, found, used, OTHER_MASS, np.log(max(1.0 - head_mass, 1e-6)))
    room.used[found] = used
    return found


@njit(cache=True)
def _put(room: Room, place: int, used: int, feature: int, value: float) -> int:
    room.places[place, used] = feature
    room.values[place, used] = value
    return used + 1


@njit(cache=True)
def score(weights: np.ndarray, found: int, room: Room) -> None:
    """Log-probabilities of the candidates, and of none of them, into `room.logps`."""
    highest = -np.inf
    for place in range(found + 1):
        total = 0.0
        for i in range(room.used[place]):
            total += weights[room.places[place, i]] * room.values[place, i]
        room.logps[place] = total
        highest = max(highest, total)
    norm = 0.0
    for place in range(found + 1):
        norm += np.exp(room.logps[place] - highest)
    norm = highest + np.log(norm)
    for place in range(found + 1):
        room.logps[place] -= norm


@njit(cache=True)
def first_match(lookup: Tables, first: int) -> tuple[int, int]:
    from_state, from_length = lookup.sizes[3], lookup.sizes[TOKENS]
    return advance_match(lookup, from_state, from_length, first)


class Outcomes(NamedTuple):
    """What came after right prefixes, for fitting the weights.

    targets, counts int32 `[n]`: which of a prefix's outcomes was right (the last is `OTHER`), and how many there are.
    used int32 `[m]`, places int16, values float32 `[m, ACTIVE]`: features of all outcomes, prefix by prefix.
    """

    targets: np.ndarray
    counts: np.ndarray
    used: np.ndarray
    places: np.ndarray
    values: np.ndarray


def outcomes_for(prefixes: int, room: Room) -> Outcomes:
    """Room for the outcomes after so many prefixes."""
    m = prefixes * (len(room.token_ids) + 1)
    return Outcomes(
        np.zeros(prefixes, dtype=np.int32),
        np.zeros(prefixes, dtype=np.int32),
        np.zeros(m, dtype=np.int32),
        np.zeros((m, ACTIVE), dtype=np.int16),
        np.zeros((m, ACTIVE), dtype=np.float32),
    )


@njit(cache=True)
def features_along(sources: Sources, path: np.ndarray, room: Room, data: Outcomes) -> tuple[int, int]:
    """Fills `data` with the candidates after every prefix of a path that is known to be right.

    path int32 `[m]`: from slot 1 on. Returns how many prefixes and outcomes there are.
    """
    state, length = first_match(sources.lookup, path[0])
    ngram_state = sources.ngram_state
    if len(sources.words):
        ngram_state = advance_ngram(sources.cells, sources.roots, ngram_state, sources.words[path[0]])[1]
    following = (1 << len(sources.chains)) - 1
    outcomes = 0
    for depth in range(1, len(path)):
        found = candidates(sources, depth, state, length, ngram_state, following, room)
        target = _find(room, found, path[depth])
        data.targets[depth - 1] = found if target == NONE else target
        data.counts[depth - 1] = found + 1
        for place in range(found + 1):
            data.used[outcomes] = room.used[place]
            data.places[outcomes] = room.places[place]
            data.values[outcomes] = room.values[place]
            outcomes += 1
        state, length = advance_match(sources.lookup, state, length, path[depth])
        if len(sources.words):
            ngram_state = advance_ngram(sources.cells, sources.roots, ngram_state, sources.words[path[depth]])[1]
        for chain in range(len(sources.chains)):
            if depth - 1 >= sources.chains.shape[1] or sources.chains[chain, depth - 1] != path[depth]:
                following &= ~(1 << chain)
    return len(path) - 1, outcomes


@njit(cache=True)
def outcome_logps(weights: np.ndarray, data: Outcomes) -> np.ndarray:
    """Log-probabilities of all outcomes, float64 `[m]`."""
    logps = np.empty(len(data.used))
    start = 0
    for row in range(len(data.targets)):
        end = start + data.counts[row]
        highest, norm = -np.inf, 0.0
        for outcome in range(start, end):
            logps[outcome] = 0.0
            for i in range(data.used[outcome]):
                logps[outcome] += weights[data.places[outcome, i]] * data.values[outcome, i]
            highest = max(highest, logps[outcome])
        for outcome in range(start, end):
            norm += np.exp(logps[outcome] - highest)
        logps[start:end] -= highest + np.log(norm)
        start = end
    return logps


@njit(cache=True)
def loss_and_gradient(weights: np.ndarray, data: Outcomes, gradient: np.ndarray) -> float:
    """Summed negative log-probability of what was right, and its gradient `[WEIGHTS]`; convex in the weights."""
    logps = outcome_logps(weights, data)
    gradient[:] = 0.0
    loss, start = 0.0, 0
    for row in range(len(data.targets)):
        right = start + data.targets[row]
        loss -= logps[right]
        for outcome in range(start, start + data.counts[row]):
            part = np.exp(logps[outcome]) - (1.0 if outcome == right else 0.0)
            for i in range(data.used[outcome]):
                gradient[data.places[outcome, i]] += part * data.values[outcome, i]
        start += data.counts[row]
    return loss
