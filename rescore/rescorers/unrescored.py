"""`none`: the p best drafts by the heads' own log-probabilities; p = 1 is the arg-max of every head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lattices.lattice import Lattice
from lattices.search import p_best
from rescore.rescorers.base import Context, Rescorer


class Unrescored(Rescorer):
    """p-best drafts of the lattice as it is ("p-best 0-gram" of [A])."""

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        """See `Rescorer.draft`."""
        return p_best(lattices, p).drafts
