"""Exact p-best search: the p highest-scoring paths of every lattice of a batch.

Slot 1 is the base LM's own choice and stays its arg-max; a path picks one entry in each of the slots 2..h. Its score is
the sum of its log-probs in float64, added from slot 1 to slot h. Compiled with numba, one lattice after the other.

How the order is kept exact. Two paths with equal scores stand by lowest token ids (compared from slot 1 on), also where
place p cuts through them. Keeping the p best prefixes of every slot does not ensure that: adding the same number to two
different sums can round them to one, and then the prefix that was dropped as the lower one may have had the lower ids.
So the search goes over whole paths, depth first, and relies only on rounded addition being monotone (a >= b gives
fl(a + x) >= fl(b + x)): what a prefix can still reach is the sum that goes on with the arg-max of every later slot, an
exact bound. A prefix is given up once p paths are known that stand before everything it leads to. Entries are taken by
what they reach, best first, so the p paths are soon good ones.

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
    count, h, k = draft_count(lattice, p), lattice.h, lattice.k
    token_ids = lattice.token_ids.reshape(-1, h, k)
    logps = lattice.logps.reshape(-1, h, k)
    n = len(token_ids)
    drafts, scores = np.empty((n, count, h), dtype=np.int32), np.empty((n, count), dtype=np.float64)
    drafts[:, 0] = token_ids[:, :, 0]
    scores[:, 0] = logps[:, 0, 0]
    for slot in range(1, h):  # in order: np.sum may add in pairs
        scores[:, 0] += logps[:, slot, 0]
    if count > 1:
        _search(
            np.ascontiguousarray(token_ids),
            np.ascontiguousarray(logps),
            np.empty((h, k + 2), dtype=np.int32),
            np.empty((h, k + 1), dtype=np.float64),
            np.empty(h, dtype=np.int32),
            np.empty((2, count), dtype=np.float64),
            drafts,
            scores,
        )
    return PBest(drafts, scores)


def draft_count(lattice: Lattice, p: int) -> int:
    """How many drafts a search for the p best gives: no more than there are paths. Raises `RescoreError` if p < 1."""
    if p < 1:
        raise RescoreError(f"p = {p} asks for no drafts; choose p of at least 1")
    return int(min(p, lattice.k ** (lattice.h - 1)))


@njit(cache=True, nogil=True)
def _search(token_ids, logps, steps, reach, path, sums, drafts, scores):  # type: ignore[no-untyped-def]
    """`[n, h, k]` ids and log-probs -> the p best of each, after the first, which `drafts` and `scores` hold already.

    Room to work in: `steps[slot]`: the numbers of up to k entries, best first, then the place of the next one to take
    and how many there are; `reach[slot]`: what each entry reaches, then the sum of the prefix before the slot; `path`
    `[h]`; `sums` `[2, p]`.
    """
    n, h, k = token_ids.shape
    p = scores.shape[1]
    cursor, count = k, k + 1
    for i in range(n):
        ids, heads, best, best_scores = token_ids[i], logps[i], drafts[i], scores[i]
        threshold = _threshold(heads, sums)
        path[0] = ids[0, 0]
        reach[1, k] = heads[0, 0]
        slot, found = np.int64(1), np.int64(1)  # plain ones would be types of their own, compiled twice
        _expand(ids, heads, slot, threshold, steps, reach)
        while slot > 0:
            if steps[slot, cursor] == steps[slot, count]:
                slot -= 1
                continue
            e = steps[slot, steps[slot, cursor]]
            steps[slot, cursor] += 1
            path[slot] = ids[slot, e]
            score = reach[slot, e]
            if found == p and score == threshold and not stands_before(path, best, p - 1, slot + 1):
                continue
            if slot + 1 < h:
                reach[slot + 1, k] = reach[slot, k] + heads[slot, e]
                slot += 1
                _expand(ids, heads, slot, threshold, steps, reach)
                continue
            is_first = True
            for j in range(h):
                is_first &= path[j] == best[0, j]
            if not is_first:
                found = keep_path(path, score, found, 1, best, best_scores)


@njit(cache=True, nogil=True)
def _threshold(heads, sums):  # type: ignore[no-untyped-def]
    """The p-th best score over all paths of a lattice, from the p best sums of prefixes.

    A dropped sum has p at least as high beside it, and every continuation keeps it so.
    """
    h, k = heads.shape
    p = sums.shape[1]
    count = 1
    before, after = sums[0], sums[1]
    before[0] = heads[0, 0]
    for slot in range(1, h):
        grown = 0
        for rank in range(count):
            for e in range(k):
                total = before[rank] + heads[slot, e]
                place = grown
                if grown == p:
                    if total <= after[p - 1]:
                        break
                    place = p - 1
                else:
                    grown += 1
                while place > 0 and after[place - 1] < total:
                    after[place] = after[place - 1]
                    place -= 1
                after[place] = total
        before, after, count = after, before, grown
    return before[p - 1]


@njit(cache=True, nogil=True)
def _expand(ids, heads, slot, least, steps, reach):  # type: ignore[no-untyped-def]
    """The entries of a slot that reach `least` or more, best first, equals by token id."""
    h, k = ids.shape
    count = 0
    for e in range(k):
        total = reach[slot, k] + heads[slot, e]
        for later in range(slot + 1, h):
            total += heads[later, 0]
        if not total >= least:
            break  # log-probs fall, so nothing after this one reaches it
        reach[slot, e] = total
        place = count
        while place > 0:
            other = steps[slot, place - 1]
            if reach[slot, other] > total or ids[slot, other] < ids[slot, e]:
                break
            steps[slot, place] = other
            place -= 1
        steps[slot, place] = e
        count += 1
    steps[slot, k], steps[slot, k + 1] = 0, count


@njit(cache=True, nogil=True)
def keep_path(path, score, found, fixed, drafts, scores):  # type: ignore[no-untyped-def]
    """Puts a path among the `found` best, by score, then by ids, after the first `fixed`; returns how many there are.

    `drafts` `[p, h]` and `scores` `[p]` hold them; with p of them the last one is dropped, which must stand after it.
    """
    p, h = drafts.shape
    place = found if found < p else p - 1
    while place > fixed and (
        scores[place - 1] < score or (scores[place - 1] == score and stands_before(path, drafts, place - 1, h))
    ):
        scores[place] = scores[place - 1]
        for j in range(h):
            drafts[place, j] = drafts[place - 1, j]
        place -= 1
    scores[place] = score
    for j in range(h):
        drafts[place, j] = path[j]
    return found + 1 if found < p else p


@njit(cache=True, nogil=True)
def stands_before(path, drafts, place, length):  # type: ignore[no-untyped-def]
    """Whether the first `length` tokens of a path stand at or before those of a draft."""
    for j in range(length):
        if path[j] != drafts[place, j]:
            return path[j] < drafts[place, j]
    return True


@njit(cache=True, nogil=True)
def put_in_order(value, code, count, values, codes):  # type: ignore[no-untyped-def]
    """Puts a value and its code into a falling list, after its equals; with no place free the lowest is dropped.

    `values` and `codes` hold `count` of them; returns how many there are.
    """
    place = count
    if count == len(values):
        place -= 1
        if value <= values[place]:
            return count
    while place > 0 and values[place - 1] < value:
        values[place], codes[place] = values[place - 1], codes[place - 1]
        place -= 1
    values[place], codes[place] = value, code
    return min(count + 1, len(values))
