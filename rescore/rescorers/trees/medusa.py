"""`medusa-tree`: the same tree of ranks at every step ([C] Medusa, `medusa_choices`)."""

from __future__ import annotations

import numpy as np

from lattices.joined.likeliest import best_branches
from lattices.joined.lookup import NONE
from lattices.lattice import Lattice
from lm.keys import key_of
from rescore.rescorers.trees.base import TreeRescorer
from rescore.rescorers.trees.choices import check_ranks, load_choices


class MedusaTree(TreeRescorer):
    """See `rescore.rescorers.base.Rescorer` and `TreeRescorer`.

    choices: the name of a published list, or a file of choices. Paths longer than there are heads are dropped.
    """

    def __init__(self, choices: str = "mc_sim_7b_63", *, scores: str = "") -> None:
        self.choices, self.name = load_choices(choices), choices
        super().__init__(f"medusa-tree {key_of(self.choices.paths, 16)}", scores)
        self.longest = 1 + self.choices.depth
        self.branches = len(self.choices.leaves)
        self.least_k = self.choices.ranks

    def branches_of(self, lattices: Lattice, p: int) -> np.ndarray:
        """See `TreeRescorer.branches_of`: those with the lowest ranks first. Raises `RescoreError` for k too small."""
        choices = self.choices.of_depth(lattices.h - 1)
        check_ranks(choices, lattices.k, f"medusa-tree:{self.name}")
        layout, n = choices.layout, len(lattices)
        slots = 1 + np.arange(choices.depth)
        drafts = np.full((n, len(layout.paths), 1 + choices.depth), NONE, dtype=np.int32)
        drafts[:, :, 0] = lattices.token_ids[:, :1, 0]
        drafts[:, :, 1:] = np.where(layout.paths == NONE, NONE, lattices.token_ids[:, slots, layout.paths.clip(min=0)])
        if p >= len(layout.paths):
            return drafts
        steps = lattices.logps[:, layout.depths, layout.ranks].astype(np.float64)  # [n, m]
        steps[:, 0] = 0.0  # the root is sure
        for node in range(1, len(layout.parents)):
            steps[:, node] += steps[:, layout.parents[node]]
        kept = np.array([best_branches(layout.parents, logps, p)[layout.leaves] for logps in steps])  # [n, leaves]
        worth_most: np.ndarray = drafts[kept].reshape(n, p, -1)
        return worth_most
