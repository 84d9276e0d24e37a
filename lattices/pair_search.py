"""Exact p-best over a lattice whose neighbouring tokens have pair scores: the search of the learned bigram.

Score of a path: the sum of the heads' log-probs and of the pair scores along it. From the last slot back, every token
of a slot keeps its p best continuations in order (score, then lowest ids), merged from those of the next slot's tokens:
exact, since a path's rank among those that begin with a token can't rise by what stands before it. Scores are fixed
point, so that sums do not depend on their order and equal scores are equal.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from lattices.lattice import Lattice
from lattices.search import PBest, draft_count, p_best

SCALE = 2.0**22  # fixed-point steps of a nat
LOWEST = -1e9  # nats; a lower score counts as this


def pair_p_best(lattice: Lattice, pairs: np.ndarray, p: int, *, weight: float) -> PBest:
    """The p best drafts of lattices `[n, h, k]` with pair scores `[n, h-1, k, k]` (token a of a slot, b of the next).

    Slot 1's token is fixed. Gives p' = min(p, k^(h-1)) drafts; equal scores stand by lowest ids. A weight of 0 gives
    `lattices.search.p_best`, bit for bit. Raises `RescoreError` if p < 1.
    """
    count = draft_count(lattice, p)
    if weight == 0:
        return p_best(lattice, p)
    n, h, _ = lattice.token_ids.shape
    steps = lattice.logps[:, 1:, None, :].astype(np.float64) + weight * pairs  # [n, h-1, k, k]
    fixed = np.rint(np.maximum(steps, LOWEST) * SCALE).astype(np.int64)
    first = np.rint(np.maximum(lattice.logps[:, 0, 0], LOWEST).astype(np.float64) * SCALE).astype(np.int64)
    drafts, scores = np.zeros((n, count, h), dtype=np.int32), np.zeros((n, count), dtype=np.int64)
    by_ids = np.argsort(lattice.token_ids, axis=-1)
    _search(np.ascontiguousarray(lattice.token_ids), by_ids, fixed, drafts, scores)
    return PBest(drafts, (scores + first[:, None]) / SCALE)


@njit(cache=True, nogil=True)
def _search(token_ids, by_ids, steps, drafts, scores):  # type: ignore[no-untyped-def]
    """Ids and their order in each slot `[n, h, k]`, steps int64 `[n, h-1, k, k]` -> drafts `[n, p, h]`, scores."""
    n, h, k = token_ids.shape
    p = scores.shape[1]
    best = np.empty((h, k, p), dtype=np.int64)  # the p best continuations behind each token of each slot
    after = np.empty((h, k, p), dtype=np.int64)  # the next token of each (its place) x p + its rank there
    counts = np.empty(h, dtype=np.int64)  # how many there are
    taken = np.empty(k, dtype=np.int64)
    for i in range(n):
        counts[h - 1] = 1
        best[h - 1, :, 0] = 0
        for slot in range(h - 2, -1, -1):
            there = counts[slot + 1]
            counts[slot] = min(p, there * k)
            for a in range(k if slot > 0 else 1):
                taken[:] = 0
                for rank in range(counts[slot]):
                    chosen, value = -1, 0
                    for place in range(k):  # in the order of ids: the first of equals is the lowest
                        b = by_ids[i, slot + 1, place]
                        if taken[b] < there:
                            score = steps[i, slot, a, b] + best[slot + 1, b, taken[b]]
                            if chosen < 0 or score > value:
                                chosen, value = b, score
                    best[slot, a, rank] = value
                    after[slot, a, rank] = chosen * p + taken[chosen]
                    taken[chosen] += 1
        for rank in range(p):
            scores[i, rank] = best[0, 0, rank]
            token, place = 0, rank
            for slot in range(h):
                drafts[i, rank, slot] = token_ids[i, slot, token]
                if slot < h - 1:
                    code = after[slot, token, place]
                    token, place = code // p, code % p
