"""The oracle path: where the base LM's own tokens stand in its lattices, and how far a perfect choice would get.

`target_ranks` reads the lattices once; `oracle_accepted` answers for any k from the ranks alone. Targets are the
tokens that the base LM goes on to decode, -1 where none remains (after end-of-text or the length limit).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from lattices.errors import RescoreError


def target_ranks(lattice_ids: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The place, from 0, of every target in its slot.

    `lattice_ids` int32 `[n, h, K]`, `targets` int32 `[n, h]` -> int32 `[n, h]`; K where the slot lacks the target or
    the target is -1.
    """
    n, h = lattice_ids.shape[:2]
    assert targets.shape == (n, h), (lattice_ids.shape, targets.shape)
    ranks = np.empty((n, h), dtype=np.int32)
    ids, targets = np.ascontiguousarray(lattice_ids, np.int32), np.ascontiguousarray(targets, np.int32)
    _target_ranks(ids, targets, ranks)
    return ranks


@njit(cache=True, nogil=True)
def _target_ranks(lattice_ids: np.ndarray, targets: np.ndarray, ranks: np.ndarray) -> None:
    n, h, entries = lattice_ids.shape
    for i in range(n):
        for slot in range(h):
            target = targets[i, slot]
            rank = entries
            if target >= 0:
                for entry in range(entries):
                    if lattice_ids[i, slot, entry] == target:
                        rank = entry
                        break
            ranks[i, slot] = rank


def oracle_accepted(ranks: np.ndarray, k: int) -> np.ndarray:
    """How many tokens of the oracle path are accepted in the top-k lattice: ranks `[n, h]` -> int64 `[n]`.

    The leading run of ranks below k. Slot 1 is not chosen but fixed to its arg-max, so its rank must be 0, as a correct
    base's is: then 1 <= n <= h. Otherwise 0. `k` must not exceed the K of `target_ranks`: a rank of K means absent.
    Raises `RescoreError` if k < 1.
    """
    if k < 1:
        raise RescoreError(f"k = {k} leaves no lattice; choose k of at least 1")
    reached = ranks < k  # [n, h]
    reached[:, 0] = ranks[:, 0] == 0
    accepted: np.ndarray = np.where(reached.all(axis=1), ranks.shape[1], reached.argmin(axis=1))
    return accepted.astype(np.int64)


def oracle_path(token_ids: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The path with the longest accepted prefix: `[n, h, k]` and targets `[n, h]` -> int32 `[n, h]`.

    After that prefix it goes on with the arg-max of each slot.
    """
    h, k = token_ids.shape[1:]
    accepted = oracle_accepted(target_ranks(token_ids, targets), k)  # [n]
    return np.where(np.arange(h) < accepted[:, None], targets, token_ids[:, :, 0]).astype(np.int32)
