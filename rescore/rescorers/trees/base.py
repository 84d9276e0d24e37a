"""What rescorers that draft trees share: whose scores the tree is of, and p branches of it."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import numpy as np

from lattices.errors import RescoreError
from lattices.lattice import Lattice
from rescore.rescorers.base import Context, LocalRescorer, Rescorer, Target


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
        """See `Rescorer.fit`."""
        fitted = copy.copy(self)
        fitted.scored = self.scored and self.scored.fit(target)
        return fitted

    def weighted(self, alpha: float) -> Self:
        """See `Rescorer.weighted`."""
        changed = super().weighted(alpha)
        changed.scored = self.scored and self.scored.weighted(alpha)
        return changed

    def prefill(self, contexts: Sequence[Context]) -> None:
        """See `Rescorer.prefill`."""
        if self.scored:
            self.scored.prefill(contexts)

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        """See `Rescorer.draft`."""
        return self.branches_of(self.scored.rescored(lattices, contexts) if self.scored else lattices, p)

    @abstractmethod
    def branches_of(self, lattices: Lattice, p: int) -> np.ndarray:
        """The branches of the trees of lattices `[n, h, k]`, as `Rescorer.draft` gives drafts."""
