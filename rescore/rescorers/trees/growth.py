"""Trees of ranks from how often which entries were right: by joint frequencies, or by products of marginals.

`hits` says which rank was right in each slot of a position. A tree's expected accepted length there is one (the base's
own token) and, of its nodes, the share of positions whose first ranks are the node's path. Grown greedily: of the next
sibling and the first child of every node, the one that adds most. [C] (Medusa) takes for a path the product of the
heads' accuracies, as if they were right independently of one another; counted together they are not.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from rescore.rescorers.trees.choices import Path_

MISSED, BEYOND = -1, -2  # the right token is not among the entries; the output has ended
Value = Callable[[Path_], tuple[float, ...]]


def hits(token_ids: np.ndarray, output_ids: np.ndarray, ranks: int) -> np.ndarray:
    """Ranks int32 `[t, h - 1]` of the right token in the slots from the second on, among the first `ranks` entries;
    `MISSED` and `BEYOND` otherwise. Lattices `[t, h, k]` that stand before the tokens of an output `[t]`."""
    t, h, _ = token_ids.shape
    found = np.full((t, h - 1), BEYOND, dtype=np.int32)
    for slot in range(1, min(h, t)):
        right = token_ids[: t - slot, slot, :ranks] == output_ids[slot:, None]  # [t - slot, ranks]
        found[: t - slot, slot - 1] = np.where(right.any(axis=1), right.argmax(axis=1), MISSED)
    return found


class Frequencies:
    """How often paths of ranks were right, of `hits` `[n, depth]` with ranks below `ranks`."""

    def __init__(self, found: np.ndarray, ranks: int) -> None:
        self.positions = len(found)
        self.counts: Counter[Path_] = Counter()
        for row in found.tolist():
            for length, rank in enumerate(row, start=1):
                if rank < 0:
                    break
                self.counts[tuple(row[:length])] += 1
        there = np.maximum((found != BEYOND).sum(axis=0), 1)  # [depth]
        self.accuracies = np.array([(found == rank).sum(axis=0) / there for rank in range(ranks)]).T  # [depth, ranks]

    def joint(self, path: Path_) -> tuple[float, ...]:
        """How often all of a path was right; of equals (most where nothing was seen) the product decides."""
        return float(self.counts[path]), *self.product(path)

    def product(self, path: Path_) -> tuple[float, ...]:
        """The product of the accuracies of a path's entries."""
        value = 1.0
        for slot, rank in enumerate(path):
            value *= float(self.accuracies[slot, rank])
        return (value,)

    def expected(self, paths: Iterable[Path_]) -> float:
        """Expected accepted length of a tree at one of the positions, the base's own token included."""
        return 1.0 + sum(self.counts[path] for path in paths) / max(1, self.positions)


def grow(value: Value, *, count: int, depth: int, ranks: int) -> tuple[Path_, ...]:
    """The `count` choices of a tree (fewer where there are no more) in the order of its growth, each with its parent
    and its lower siblings before it. Of equals the shortest, then the lowest."""
    frontier: list[tuple[tuple[float, ...], int, Path_]] = []

    def push(path: Path_) -> None:
        heapq.heappush(frontier, (tuple(-part for part in value(path)), len(path), path))

    grown: list[Path_] = []
    push((0,))
    while frontier and len(grown) < count:
        *_, path = heapq.heappop(frontier)
        grown.append(path)
        if path[-1] + 1 < ranks:
            push((*path[:-1], path[-1] + 1))
        if len(path) < depth:
            push((*path, 0))
    return tuple(grown)
