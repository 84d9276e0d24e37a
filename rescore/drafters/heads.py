"""`heads`: the base's block heads. What they propose is in every trace; live the decoder asks them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self

import numpy as np

from lattices.errors import RescoreError
from lattices.joined.sources import HEADS
from lattices.lattice import Lattice
from rescore.drafters.base import LatticeDrafter
from rescore.rescorers.base import Context, Target


class Heads(LatticeDrafter):
    """See `rescore.drafters.base.LatticeDrafter`."""

    name = identity = "heads"
    kind = HEADS
    traced = ""

    def fit(self, target: Target) -> Self:
        """See `Drafter.fit`."""
        fitted = copy.copy(self)
        fitted.traced = target.traced
        return fitted

    @property
    def source(self) -> str:
        """See `Drafter.source`: weights for heads are none for the lattices of a trace of another drafter."""
        return f"heads-of-{' '.join(word[:12] for word in self.traced.split())}" if self.traced else "heads"

    def computed(self, contexts: Sequence[Context], firsts: np.ndarray, k: int) -> Lattice:
        """See `LatticeDrafter.computed`."""
        raise RescoreError("there are no block heads to draft with; give some (--heads), or other drafters only")
