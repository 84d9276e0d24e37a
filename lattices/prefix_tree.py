"""Prefix tree: p drafts that share their common prefixes, laid out for one verify call.

One node per distinct draft prefix. The mask lets a node see itself and its ancestors, so that all drafts fit into one
row ([A] verifies the p drafts as a batch; tree attention is [C]'s).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """m nodes; a parent stands before its children, and nodes 0..h-1 are the first draft.

    `tokens` int64 `[m]`; `parents` int64 `[m]`, -1 at roots; `depths` int64 `[m]`, 0 at roots; `mask` bool `[m, m]`,
    true where the row's node sees the column's (itself and its ancestors); `nodes` int64 `[p, h]`, the node of every
    draft position.
    """

    tokens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    mask: np.ndarray
    nodes: np.ndarray


def build_prefix_tree(drafts: np.ndarray) -> PrefixTree:
    """The tree of drafts `[p, h]`. Drafts may share any prefix, none, or be equal.

    After the end of a shorter one stands -1, whose node is that of its last token.

    The first draft's nodes come first, so that the commonest acceptance keeps a contiguous block of the cache.
    """
    p, h = drafts.shape
    known: dict[tuple[int, int], int] = {}  # (parent, token) -> node
    depths: list[int] = []
    nodes: list[int] = []
    for draft in drafts.tolist():
        node = -1
        for depth, token in enumerate(draft):
            if token < 0:  # after the end of a shorter draft
                nodes.append(node)
                continue
            key = (node, token)
            node = known.setdefault(key, len(known))
            if node == len(depths):
                depths.append(depth)
            nodes.append(node)
    m = len(depths)
    edges = np.array(list(known), dtype=np.int64).reshape(m, 2)  # in the order of the nodes
    by_draft = np.array(nodes, dtype=np.int64).reshape(p, h)
    mask = np.zeros((m, m), dtype=np.bool_)
    rows, columns = _causal_pairs(h)
    mask[by_draft[:, rows], by_draft[:, columns]] = True
    return PrefixTree(
        tokens=np.ascontiguousarray(edges[:, 1]),
        parents=np.ascontiguousarray(edges[:, 0]),
        depths=np.array(depths, dtype=np.int64),
        mask=mask,
        nodes=by_draft,
    )


@cache
def _causal_pairs(h: int) -> tuple[np.ndarray, np.ndarray]:
    """Every (position, earlier or same position) of a draft: two index arrays `[h (h + 1) / 2]`."""
    rows, columns = np.tril_indices(h)
    return rows, columns
