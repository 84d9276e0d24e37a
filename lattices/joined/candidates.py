"""How likely each candidate of a joined lattice is: a log-linear model of what sources and statistics say of it.

The candidates after a path (`lattices.joined.sources`) and the outcome that it is none of them (`OTHER`) have weighted
features, each a number or a mark; a softmax makes probabilities of them that the base says exactly this. With them the
expected accepted length of a prefix tree is the sum over its nodes of the products along their paths, so the best tree
of n nodes is the n likeliest nodes (`lattices.joined.likeliest`).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from lattices.automaton import SCORE_SCALE
from lattices.automaton import advance as advance_ngram
from lattices.joined.lookup import COUNT, DEGREE, END, FIRST_EDGE, LINK, NEXT, NONE, ROOT, TARGET, TOKENS
from lattices.joined.lookup import step as step_match
from lattices.joined.sources import FOLLOWED, GONE, HEADS, KINDS, LEAST, LEFT, Room, Sources, gather, match_before

LEVELS = 4  # suffixes of a path whose continuations are counted: the longest ones, and the empty one
UNIFORM = 1.0 / 50_000  # of a token that the text so far does not hold
MATCHES = np.array([1, 2, 3, 4, 6, 9, 16], dtype=np.int64)  # least lengths of the classes of matches after class 0
CLASSES = len(MATCHES) + 1
SLOTS = 9  # with weights of their own: slots 2 to 9 (later ones as the ninth), and slots without a head
NO_HEAD = SLOTS - 1  # the last

# Places of the weights. Most features have two: one by slot, and one by the class of the match.
BOTH = SLOTS + CLASSES
HEAD = 0  # [BOTH] log-probability by the head of the slot, that of its last entry for tokens that it lacks
LACKS = HEAD + BOTH  # [BOTH] the head lacks the token
TOP = LACKS + BOTH  # [BOTH] it is the head's arg-max
TEXT = TOP + BOTH  # [BOTH] log-probability by what followed in the text
NGRAM = TEXT + BOTH  # [BOTH] log-probability by an n-gram model
PAIR = NGRAM + BOTH  # [BOTH] score beside the token before by a learned bigram
RECENT = PAIR + BOTH  # [CLASSES] it followed the longest match the last time
COUNTED = RECENT + CLASSES  # [CLASSES] log of how often it did
ALONE = COUNTED + CLASSES  # [CLASSES] nothing else ever did
AGREE = ALONE + CLASSES  # [2] two sources propose it; three or more do
CHAINED = AGREE + 2  # [KINDS, 2] log-probability by a chain: that the path has left; that it has followed so far
CHAIN_LACKS = CHAINED + 2 * KINDS  # [KINDS, 2] the chain lacks the token
OTHER = CHAIN_LACKS + 2 * KINDS  # [BOTH] of the outcome that it is none of them
OTHER_MASS = OTHER + BOTH  # log of what the head gives to tokens that it lacks
OTHER_CHAINED = OTHER_MASS + 1  # [KINDS, 2] log of what the chains give to tokens that they lack
OTHER_GONE = OTHER_CHAINED + 2 * KINDS  # [KINDS] no chain has anything to say after the path
WEIGHTS = OTHER_GONE + KINDS


@njit(cache=True)
def _class_of(length: int) -> int:
    place = 0
    while place < len(MATCHES) and length >= MATCHES[place]:
        place += 1
    return place


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
    slot = min(depth - 1, NO_HEAD - 1) if has_head else NO_HEAD
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
            used = _put_both(room, place, used, HEAD, slot, match, logp)
            if in_head:
                head_mass += np.exp(logp)
            else:
                used = _put_both(room, place, used, LACKS, slot, match, 1.0)
            if place == 0:
                used = _put_both(room, place, used, TOP, slot, match, 1.0)
        probability, target, longest_target = UNIFORM, ROOT, NONE
        for i in range(level_count - 1, -1, -1):
            if target != NONE:  # what does not follow a suffix follows no longer one
                target = step_match(sources.lookup, levels[i], token)
            count = states[target, COUNT] if target != NONE else 0
            kinds = states[levels[i], DEGREE]
            probability = (count + kinds * probability) / max(1, states[levels[i], COUNT] + kinds)
            longest_target = target
        if sources.lookup.sizes[TOKENS] > 0:
            used = _put_both(room, place, used, TEXT, slot, match, np.log(probability))
        if state != ROOT and longest_target != NONE:
            if states[longest_target, END] == last_end:
                used = _put(room, place, used, RECENT + match, 1.0)
            used = _put(room, place, used, COUNTED + match, np.log(np.float64(states[longest_target, COUNT])))
            if states[state, DEGREE] == 1:
                used = _put(room, place, used, ALONE + match, 1.0)
        if len(sources.words):
            score, room.ngram_states[place] = advance_ngram(
                sources.cells, sources.roots, ngram_state, sources.words[token]
            )
            used = _put_both(room, place, used, NGRAM, slot, match, max(LEAST, score / SCORE_SCALE))
        if len(sources.left):
            pair = _product(sources.left[last], sources.right[token])
            used = _put_both(room, place, used, PAIR, slot, match, pair)
        agree = _bits(room.origins[place])
        if agree > 1:
            used = _put(room, place, used, AGREE + min(agree, 3) - 2, 1.0)
        if has_chains:
            used = _put_chains(room, place, used)
        room.used[place] = used
    used = _put_both(room, found, 0, OTHER, slot, match, 1.0)
    if has_head:
        used = _put(room, found, used, OTHER_MASS, np.log(max(1.0 - head_mass, 1e-6)))
    if has_chains:
        used = _put_chains_other(room, found, used)
    room.used[found] = used
    return found


@njit(cache=True, fastmath={"reassoc", "contract"})  # in any order, so that it takes few instructions
def _product(one: np.ndarray, other: np.ndarray) -> float:
    total = np.float32(0.0)
    for i in range(len(one)):
        total += one[i] * other[i]
    return np.float64(total)


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
def _put_both(room: Room, place: int, used: int, feature: int, slot: int, match: int, value: float) -> int:
    used = _put(room, place, used, feature + slot, value)
    return _put(room, place, used, feature + SLOTS + match, value)


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
