"""Beam search over a lattice rescored by an n-gram model interpolated with one of the context itself.

Answers and summaries copy from their prompt. `ContextCounts` counts the n-grams of prompt and output so far, grows as
the output does, and gives Witten-Bell probabilities (Witten and Bell 1991, method C): with c(h) occurrences of a
history before some word and T(h) different words after it, P(w | h) = (c(hw) + T(h) P(w | shorter h)) / (c(h) + T(h));
the shortest level is the share of the word among all. A word's probability is then

    (1 - share) x P_general(w | true left context and path) + share x P_context(w | the same)

Such a mixture has no small automaton, so the search is a beam (width `BEAM`), not exact: paths are ranked by their
score and the most that the heads alone can still give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from lattices.automaton import ROOT, ROOT_SCORE, SCORE_SCALE, advance
from lattices.errors import RescoreError
from lattices.lattice import Lattice
from lattices.ngram_search import NgramSearch
from lattices.search import PBest, draft_count, p_best, put_in_order

CONTEXT_ORDER = 4
BEAM = 64
FIRST_SLOTS = 1 << 12
UNIFORM = 50_000  # words that are equally likely where there is no general model
# The same tokens have two keys: by the one they are counted as an n-gram, by the other as what stands before a token.
AS_GRAM, AS_HISTORY = np.int64(0x5555), -7


class _Mixture(NamedTuple):
    """The general model's arrays (`lattices.automaton`), the context's table, and what each counts for."""

    cells: np.ndarray
    roots: np.ndarray
    table: np.ndarray
    weight: float  # of the mixture beside the heads
    share: float  # of the context in the mixture


class ContextCounts:
    """N-grams of order 1 to `CONTEXT_ORDER` of a growing sequence of token ids.

    `table` int64 `[t, 4]`: key (a 64-bit hash of the n-gram's length and tokens), how often it occurs, how often a
    token follows it, and how many different ones do. Two n-grams with one hash would be one; at the 10^4 n-grams of a
    prompt this happens once in 10^11.
    """

    def __init__(self) -> None:
        self.tokens = np.zeros(0, dtype=np.int64)
        self.table = np.zeros((FIRST_SLOTS, 4), dtype=np.int64)
        self.used = 0

    def extend(self, token_ids: Sequence[int]) -> None:
        """Adds the tokens that follow those counted before."""
        if not len(token_ids):
            return
        done = len(self.tokens)
        self.tokens = np.concatenate([self.tokens, np.asarray(token_ids, dtype=np.int64)])
        if 2 * (self.used + CONTEXT_ORDER * len(token_ids)) > len(self.table):
            slots = len(self.table)
            while 2 * CONTEXT_ORDER * len(self.tokens) > slots:
                slots *= 2
            self.table, self.used, done = np.zeros((2 * slots, 4), dtype=np.int64), 0, 0
        self.used = _count(self.table, self.tokens, done, self.used)

    def last_tokens(self) -> np.ndarray:
        """The tokens that the next one depends on: int64 `[CONTEXT_ORDER - 1]`, -1 in front where there are fewer."""
        padded = np.full(CONTEXT_ORDER - 1, -1, dtype=np.int64)
        last = self.tokens[max(0, len(self.tokens) - len(padded)) :]
        padded[len(padded) - len(last) :] = last
        return padded


def context_p_best(
    lattice: Lattice,
    general: NgramSearch | None,
    lefts: Sequence[Sequence[int]],
    counts: Sequence[ContextCounts],
    p: int,
    *,
    weight: float,
    share: float,
) -> PBest:
    """Good drafts (up to p, best first) of every lattice `[n, h, k]`, rescored with the mixture of the module's text.

    `counts` know all tokens before each lattice, `lefts` the last of them; `general` holds the general model (None:
    every token is equally likely). A weight of 0 gives `lattices.search.p_best`. Raises `RescoreError` for a share
    outside 0 to 1 or p < 1.
    """
    if not 0 <= share <= 1:
        raise RescoreError(f"a share of {share:g} for the context; it is from 0 to 1")
    count = draft_count(lattice, p)
    if weight == 0:
        return p_best(lattice, p)
    n, h, k = lattice.token_ids.shape
    states = [ROOT] * n
    if general is None:
        cells, roots = np.zeros((1, 4), dtype=np.int32), np.zeros((1, 4), dtype=np.int32)
        roots[0, ROOT_SCORE] = -round(np.log(UNIFORM) * SCORE_SCALE)  # one word, one state: the same for every token
        slot_words = np.zeros((n, h, k), dtype=np.int32)
    else:
        states = [general.state_after(left) for left in lefts]
        cells, roots, slot_words = general.automaton.cells, general.automaton.roots, general.words[lattice.token_ids]
    drafts, scores = np.zeros((n, count, h), dtype=np.int32), np.full((n, count), -np.inf)
    token_ids, logps = np.ascontiguousarray(lattice.token_ids), np.ascontiguousarray(lattice.logps)
    for i in range(n):
        mixture = _Mixture(cells, roots, counts[i].table, float(weight), float(share))
        slots = counts[i].last_tokens(), token_ids[i], slot_words[i], logps[i]
        _search(mixture, int(states[i]), slots, max(BEAM, p), drafts[i], scores[i])
    return PBest(drafts, scores)


@njit(cache=True, nogil=True, inline="always")
def _mix(key, token):  # type: ignore[no-untyped-def]
    """The hash of an n-gram with one more token in front of what `key` stands for."""
    mixed = (np.uint64(key) ^ (np.uint64(token) + np.uint64(0x9E3779B97F4A7C15))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
    return np.int64(mixed ^ (mixed >> np.uint64(32))) | 1  # never 0, which is an empty slot


@njit(cache=True, nogil=True, inline="always")
def _find(table, key):  # type: ignore[no-untyped-def]
    """The slot of a key, or the empty one where it would stand."""
    mask = len(table) - 1
    slot = (key >> 1) & mask
    while table[slot, 0] != 0 and table[slot, 0] != key:
        slot = (slot + 1) & mask
    return slot


@njit(cache=True, nogil=True)
def _count(table, tokens, begin, used):  # type: ignore[no-untyped-def]
    """Counts the n-grams that end at places from `begin` on; returns the slots in use."""
    for i in range(begin, len(tokens)):
        for n in range(1, min(CONTEXT_ORDER, i + 1) + 1):
            # Keys are built from the last token backwards, so that the history of a path is extended cheaply.
            history = np.int64(1)
            for j in range(1, n):
                history = _mix(history, tokens[i - j])
            gram = _find(table, _mix(history ^ AS_GRAM, tokens[i]))
            new = table[gram, 0] == 0
            if new:
                table[gram, 0] = _mix(history ^ AS_GRAM, tokens[i])
                used += 1
            table[gram, 1] += 1
            before = _find(table, _mix(history, AS_HISTORY))
            if table[before, 0] == 0:
                table[before, 0] = _mix(history, AS_HISTORY)
                used += 1
            table[before, 2] += 1
            if new:
                table[before, 3] += 1
    return used


@njit(cache=True, nogil=True)
def _search(mixture, state, slots, width, drafts, scores):  # type: ignore[no-untyped-def]
    """`slots`: the tokens before the lattice, its ids, their words, its log-probs."""
    cells, roots, table, weight, share = mixture
    left, token_ids, words, logps = slots
    h, k = token_ids.shape
    order = CONTEXT_ORDER
    remaining = np.zeros(h)  # the most that the heads give after each slot
    for j in range(h - 2, -1, -1):
        remaining[j] = remaining[j + 1] + logps[j + 1, 0]
    paths = np.empty((2, width, h), np.int32)
    states = np.empty((2, width), np.int64)
    sums = np.empty((2, width))
    gained = np.empty((width, k))  # score of every path with one more entry
    reach, codes = np.empty(width), np.empty(width, np.int64)  # of the best of them, falling: path x k + entry
    history, total_of, types_of = np.empty(order, np.int64), np.empty(order, np.int64), np.empty(order, np.int64)
    _, after = advance(cells, roots, state, words[0, 0])
    paths[0, 0, 0], states[0, 0], sums[0, 0] = token_ids[0, 0], after, logps[0, 0]
    now, count = 0, 1
    for j in range(1, h):
        candidates: Any = np.int64(0)
        for b in range(count):
            # What the context knows of this path's histories, shortest first; it ends with the first unknown one.
            levels = 0
            key = np.int64(1)
            for n in range(order):
                if n > 0:
                    token = paths[now, b, j - n] if j - n >= 0 else left[len(left) + j - n]
                    if token < 0:
                        break
                    key = _mix(key, token)
                slot = _find(table, _mix(key, AS_HISTORY))
                if table[slot, 0] == 0:
                    break
                history[n], total_of[n], types_of[n] = key, table[slot, 2], table[slot, 3]
                levels = n + 1
            for e in range(k):
                general, _ = advance(cells, roots, states[now, b], words[j, e])
                likely = 0.0
                for n in range(levels):
                    slot = _find(table, _mix(history[n] ^ AS_GRAM, token_ids[j, e]))
                    occurred = table[slot, 1] if table[slot, 0] != 0 else 0
                    if n == 0:
                        likely = occurred / total_of[0]
                    else:
                        likely = (occurred + types_of[n] * likely) / (total_of[n] + types_of[n])
                mixed = (1.0 - share) * np.exp(general / SCORE_SCALE) + share * likely
                total = sums[now, b] + logps[j, e] + weight * np.log(max(mixed, 1e-30))
                gained[b, e] = total
                candidates = put_in_order(total + remaining[j], b * k + e, candidates, reach, codes)
        after_slot = 1 - now
        for place in range(candidates):
            b, e = codes[place] // k, codes[place] % k
            for i in range(j):
                paths[after_slot, place, i] = paths[now, b, i]
            paths[after_slot, place, j] = token_ids[j, e]
            states[after_slot, place] = advance(cells, roots, states[now, b], words[j, e])[1]
            sums[after_slot, place] = gained[b, e]
        now, count = after_slot, candidates
    for place in range(len(scores)):
        chosen = min(place, count - 1)
        for j in range(h):
            drafts[place, j] = paths[now, chosen, j]
        scores[place] = sums[now, chosen]
