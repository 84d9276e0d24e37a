"""`medusa-tree`: the same tree of ranks at every step ([C] Medusa, `medusa_choices`). `eagle2-tree`: the tree that
scores highest at each step, found level by level by a beam (EAGLE-2, Li et al. 2024, arXiv 2406.16858).

EAGLE-2's drafter is conditioned on the path; block heads are not, so that a node's log-probability is that of its entry
in its slot. The search is the same.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import numpy as np

from lattices.errors import RescoreError
from lattices.joined.likeliest import best_branches, branches
from lattices.joined.lookup import NONE
from lattices.lattice import Lattice
from lm.keys import key_of
from rescore.drafters.base import stacked
from rescore.rescorers.base import Context, LocalRescorer, Rescorer, Target
from rescore.rescorers.trees.choices import DEEPEST, MOST_NODES, load_choices


class TreeRescorer(Rescorer):
    """Drafts the branches of a tree of the lattice; with fewer drafts (p) than branches, those that are worth most.

    scores: the spec of a local rescorer (`neural-61m`, `neural:PATH`), whose rescored lattice the tree is made of;
    empty: the heads' own. Its weight is the tree's.
    """

    scored: LocalRescorer | None = None

    def __init__(self, name: str, scores: str) -> None:
        if scores:
            from rescore.rescorers import load_rescorer

            local = load_rescorer(scores)
            if not isinstance(local, LocalRescorer):
                raise RescoreError(f"{name}: scores={scores} does not rescore slot by slot; give a neural rescorer")
            self.scored = local
            self.alpha = self.scored.alpha
        self.identity = f"{name} {self.scored.identity if self.scored else ''}".strip()

    def fit(self, target: Target) -> Self:
        fitted = copy.copy(self)
        fitted.scored = self.scored and self.scored.fit(target)
        return fitted

    def weighted(self, alpha: float) -> Self:
        changed = super().weighted(alpha)
        changed.scored = self.scored and self.scored.weighted(alpha)
        return changed

    def prefill(self, contexts: Sequence[Context]) -> None:
        if self.scored:
            self.scored.prefill(contexts)

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        return self.branches_of(self.scored.rescored(lattices, contexts) if self.scored else lattices, p)

    @abstractmethod
    def branches_of(self, lattices: Lattice, p: int) -> np.ndarray:
        """The branches of the trees of lattices `[n, h, k]`, as `Rescorer.draft` gives drafts."""


class MedusaTree(TreeRescorer):
    """Drafts the same tree of ranks at every step.

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
        if choices.ranks > (k := lattices.k):
            path = next(path for path in choices.paths if max(path) >= k)
            raise RescoreError(
                f"medusa-tree:{self.name}: the choice {list(path)} takes entry {max(path)} of a slot, and k = {k} has "
                f"0 to {k - 1}; give k of {choices.ranks} or more, or another list"
            )
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
        chosen: np.ndarray = drafts[kept].reshape(n, p, -1)
        return chosen


class Eagle2Tree(TreeRescorer):
    """Drafts the tree that scores highest at each step; EAGLE-2's own settings are the defaults.

    nodes: of the tree, the base's own token included.
    depth: levels that are expanded after the first, so that paths have up to depth + 1 tokens after the base's own.
    beams: nodes of a level that are expanded, each into so many children.
    """

    def __init__(self, nodes: int = 60, *, depth: int = 7, beams: int = 10, scores: str = "") -> None:
        if not 1 <= nodes <= MOST_NODES or not 0 <= depth < DEEPEST or not 1 <= beams <= 1024:
            raise RescoreError(
                f"eagle2-tree: give nodes of 1 to {MOST_NODES:,}, depth of 0 to {DEEPEST - 1} and beams of 1 to 1,024"
            )
        super().__init__(f"eagle2-tree {nodes} {depth} {beams}", scores)
        self.nodes, self.depth, self.beams = nodes, depth, beams
        self.longest = depth + 2
        self.branches = nodes

    def branches_of(self, lattices: Lattice, p: int) -> np.ndarray:
        """See `TreeRescorer.branches_of`: that of the likeliest leaf first."""
        token_ids, parents, depths, logps = self._grown(lattices)
        order = np.argsort(-logps, axis=1, kind="stable")[:, : self.nodes]  # of equals what was found first: parents
        drafts = []
        for row, chosen in enumerate(order):
            number = np.full(logps.shape[1], NONE, dtype=np.int32)
            number[chosen] = np.arange(len(chosen))
            above = parents[row, chosen]
            own = np.where(above == NONE, NONE, number[above]).astype(np.int32)
            stays = best_branches(own, logps[row, chosen], p)
            drafts.append(branches(token_ids[row, chosen], own, depths[chosen], stays))
        return stacked(drafts)

    def _grown(self, lattices: Lattice) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """All m nodes that the beam meets, level by level: their tokens, the places of their parents and the
        log-probabilities of their paths, `[n, m]` each, and their depths `[m]`, 1 at the root."""
        n, width = len(lattices), min(self.beams, lattices.k)
        tokens = [lattices.token_ids[:, 0, :1]]
        parents = [np.full((n, 1), NONE, dtype=np.int64)]
        scores = [np.zeros((n, 1))]
        beams, of_beams, found = np.zeros((n, 1), dtype=np.int64), scores[0], 1  # their places, their scores
        for slot in range(1, min(lattices.h, self.depth + 2)):
            steps = lattices.logps[:, slot, :width].astype(np.float64)
            level = (of_beams[:, :, None] + steps[:, None]).reshape(n, -1)  # [n, beams * width]
            tokens.append(np.tile(lattices.token_ids[:, slot, :width], (1, beams.shape[1])))
            parents.append(np.repeat(beams, width, axis=1))
            scores.append(level)
            best = np.argsort(-level, axis=1, kind="stable")[:, : self.beams]
            beams, of_beams = found + best, np.take_along_axis(level, best, axis=1)
            found += level.shape[1]
        depths = np.repeat(np.arange(1, len(tokens) + 1, dtype=np.int32), [level.shape[1] for level in tokens])
        return np.concatenate(tokens, axis=1), np.concatenate(parents, axis=1), depths, np.concatenate(scores, axis=1)
