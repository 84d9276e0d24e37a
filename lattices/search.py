"""Exact p-best search: the p highest-scoring paths of every lattice of a batch.

Slot 1 is the base LM's own choice and stays its arg-max; a path picks one entry in each of the slots 2..h. Its score is
the sum of its log-probs in float64, added from slot 1 to slot h. Compiled with numba, one lattice after the other.

How the order is kept exact. Two paths with equal scores stand by lowest token ids (compared from slot 1 on), also where
place p cuts through them. Keeping the p best prefixes of every slot does not ensure that: adding the same number to two
different sums can round them to one, and then the prefix that was dropped as the lower one may have had the lower ids.
So the search goes over the lattice twice, and relies only on rounded addition being monotone (a >= b gives
fl(a + x) >= fl(b + x)):

1. Scores alone, slot by slot: the p best sums of prefixes. A dropped sum has p sums at least as high beside it, and
   every continuation keeps it so; hence the p final sums are the p best scores, whatever happened among equals. The
   last of them is the threshold.
2. All paths that reach the threshold, depth first in the order of token ids. What a prefix can still reach is the sum
   that goes on with the arg-max of every later slot: by monotonicity an exact bound, so no branch is a dead end. Fewer
   than p paths lie above the threshold, and of those on it the first ones met are the ones with the lowest ids. Once
   their places are full, only branches that reach above the threshold are entered: fewer than 2 p leaves in all.

One rule stands above the ids: the unrescored draft comes first. No path scores higher, and one that only rounding made
equal does not displace it. Hence the first q of the p best are the q best, down to q = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from lattices.errors import RescoreError
from lattices.lattice import Lattice


@dataclass(frozen=True, eq=False)
class PBest:
    """The best paths of n lattices, best first.

    `drafts` int32 `[n, p', h]` (token ids) and `scores` float64 `[n, p']` (sums of natural log-probs).
    """

    drafts: np.ndarray
    scores: np.ndarray


def p_best(lattice: Lattice, p: int) -> PBest:
    """The p highest-scoring drafts of every lattice ("p-best 0-gram" of [A]); p = 1 gives the unrescored draft.

    `lattice` `[n, h, k]`, or `[h, k]` for n = 1, as `Lattice.validate` wants it. Gives p' = min(p, k^(h-1)) drafts
    each, since no lattice has more paths. Raises `RescoreError` if p < 1.
    """
    if p < 1:
        raise RescoreError(f"p = {p} asks for no drafts; choose p of at least 1")
    h, k = lattice.h, lattice.k
    token_ids = lattice.token_ids.reshape(-1, h, k)
    logps = lattice.logps.reshape(-1, h, k)
    count = min(p, k ** (h - 1))
    if count == 1:
        return _unrescored(token_ids, logps)
    drafts = np.zeros((len(token_ids), count, h), dtype=np.int32)
    scores = np.zeros((len(token_ids), count), dtype=np.float64)
    _search(np.ascontiguousarray(token_ids), np.ascontiguousarray(logps), drafts, scores)
    return PBest(drafts, scores)


def _unrescored(token_ids: np.ndarray, logps: np.ndarray) -> PBest:
    """The arg-max of every slot: `[n, h, k]` -> drafts `[n, 1, h]`."""
    scores = logps[:, 0, :1].astype(np.float64)  # [n, 1]
    for slot in range(1, logps.shape[1]):  # in order: np.sum may add in pairs
        scores += logps[:, slot, :1]
    return PBest(token_ids[:, None, :, 0].astype(np.int32), scores)


@njit(cache=True, nogil=True)
def _search(token_ids: np.ndarray, logps: np.ndarray, drafts: np.ndarray, scores: np.ndarray) -> None:
    """`[n, h, k]` ids and log-probs -> the p best of each, into `drafts` `[n, p, h]` and `scores` `[n, p]`."""
    n, h, k = token_ids.shape
    p = scores.shape[1]
    best = np.empty(p, dtype=np.float64)
    spare = np.empty(p, dtype=np.float64)
    places = np.empty(k, dtype=np.int64)
    frontier = np.empty((h, k), dtype=np.int64)
    reach = np.empty((h, k), dtype=np.float64)
    paths = np.empty((p, h), dtype=np.int32)
    for i in range(n):
        _best_scores(logps[i], best, spare, places)
        _collect(token_ids[i], logps[i], best, frontier, reach, paths, drafts[i], scores[i])


@njit(cache=True, nogil=True)
def _best_scores(logps: np.ndarray, best: np.ndarray, spare: np.ndarray, places: np.ndarray) -> None:
    """The p best scores over all paths of one lattice `[h, k]`, falling, into `best` `[p]`.

    `spare` `[p]` and `places` `[k]` are room to work in.
    """
    h, k = logps.shape
    p = len(best)
    sums, longer = best, spare
    sums[0] = logps[0, 0]
    count = 1
    for slot in range(1, h):
        # Entry e makes the falling row sums + logps[slot, e]; k rows are merged. A row that was not begun is no better
        # than the row before it, so the first such row ends the look-out.
        places[:] = 0
        grown = min(p, count * k)
        for rank in range(grown):
            row = -1
            highest = -np.inf
            for entry in range(k):
                place = places[entry]
                if place < count:
                    total = sums[place] + logps[slot, entry]
                    if row < 0 or total > highest:
                        row, highest = entry, total
                if place == 0:
                    break
            longer[rank] = highest
            places[row] += 1
        sums, longer = longer, sums
        count = grown
    if h % 2 == 0:  # the two arrays have changed roles h - 1 times
        best[:] = sums


@njit(cache=True, nogil=True)
def _reachable(total: float, logps: np.ndarray, slot: int) -> float:
    """The best score that a prefix with the sum `total` up to `slot` (exclusive) can end with."""
    for later in range(slot, logps.shape[0]):
        total += logps[later, 0]
    return total


@njit(cache=True, nogil=True)
def _expand(slot, total, threshold, token_ids, logps, frontier, reach):  # type: ignore[no-untyped-def]
    """The entries of `slot` that reach the threshold after a prefix with the sum `total`.

    Writes them into `frontier[slot]` by rising token id, and what each can reach into `reach[slot]` (indexed by
    entry); returns how many there are.
    """
    count = 0
    for entry in range(logps.shape[1]):
        reach[slot, entry] = _reachable(total + logps[slot, entry], logps, slot + 1)
        if not reach[slot, entry] >= threshold:
            break  # log-probs fall, so nothing after this one reaches it
        place = count
        while place > 0 and token_ids[slot, frontier[slot, place - 1]] > token_ids[slot, entry]:
            frontier[slot, place] = frontier[slot, place - 1]
            place -= 1
        frontier[slot, place] = entry
        count += 1
    return count


@njit(cache=True, nogil=True)
def _collect(token_ids, logps, best, frontier, reach, paths, drafts, scores):  # type: ignore[no-untyped-def]
    """Finds the paths of one lattice `[h, k]` that have the p `best` scores; fills `drafts` `[p, h]`, `scores` `[p]`.

    `frontier`, `reach` `[h, k]` and `paths` `[p, h]` are room to work in.
    """
    h = len(token_ids)
    p = len(best)
    threshold = best[p - 1]
    free = 0  # places still free for paths on the threshold
    while free < p and best[p - 1 - free] == threshold:
        free += 1

    order = np.empty(p, dtype=np.int64)  # the paths found, best first
    totals = np.empty(h + 1, dtype=np.float64)  # score of the current prefix before each slot
    counts = np.zeros(h, dtype=np.int64)  # entries of each slot's frontier, and the next to visit
    upcoming = np.zeros(h, dtype=np.int64)
    chosen = np.zeros(h, dtype=np.int64)

    scores[0] = best[0]
    paths[0] = token_ids[:, 0]
    order[0] = 0
    found = 1
    if free == p:  # the unrescored draft has its place without looking
        free -= 1

    totals[1] = logps[0, 0]
    slot = 1
    counts[1] = _expand(1, totals[1], threshold, token_ids, logps, frontier, reach)
    upcoming[1] = 0
    while slot > 0 and found < p:
        if upcoming[slot] == counts[slot]:
            slot -= 1
            continue
        entry = frontier[slot, upcoming[slot]]
        upcoming[slot] += 1
        if free == 0 and reach[slot, entry] == threshold:
            continue
        chosen[slot] = entry
        if slot + 1 < h:
            totals[slot + 1] = totals[slot] + logps[slot, entry]
            slot += 1
            counts[slot] = _expand(slot, totals[slot], threshold, token_ids, logps, frontier, reach)
            upcoming[slot] = 0
            continue
        if not chosen.any():
            continue  # the unrescored draft is in already
        total = reach[slot, entry]
        if total == threshold:
            free -= 1
        for j in range(h):
            paths[found, j] = token_ids[j, chosen[j]]
        place = found  # leaves come by rising ids: a new one goes behind its equals
        while place > 1 and scores[place - 1] < total:
            scores[place] = scores[place - 1]
            order[place] = order[place - 1]
            place -= 1
        scores[place] = total
        order[place] = found
        found += 1
    for place in range(found):
        drafts[place] = paths[order[place]]
