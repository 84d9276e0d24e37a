"""What came after right prefixes, and the weights that make it likeliest: a convex loss and its gradient.

`rescore.rescorers.joint_fit` minimises it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from lattices.automaton import advance as advance_ngram
from lattices.joined.candidates import candidates, normalise
from lattices.joined.lookup import NONE
from lattices.joined.lookup import advance as advance_match
from lattices.joined.sources import ACTIVE, Room, Sources, find, first_match, still_following


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
    following = (1 << len(sources.chains.kinds)) - 1
    outcomes = 0
    for depth in range(1, len(path)):
        found = candidates(sources, depth, path[depth - 1], state, length, ngram_state, following, room)
        target = find(room, found, path[depth])
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
        following = still_following(sources.chains, depth, following, path[depth])
    return len(path) - 1, outcomes


@njit(cache=True)
def outcome_logps(weights: np.ndarray, data: Outcomes) -> np.ndarray:
    """Log-probabilities of all outcomes, float64 `[m]`."""
    logps = np.empty(len(data.used))
    start = 0
    for row in range(len(data.targets)):
        end = start + data.counts[row]
        for outcome in range(start, end):
            logps[outcome] = 0.0
            for i in range(data.used[outcome]):
                logps[outcome] += weights[data.places[outcome, i]] * data.values[outcome, i]
        normalise(logps[start:end])
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
