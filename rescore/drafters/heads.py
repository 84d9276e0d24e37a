"""`heads`: the base's block heads. What they propose is in every trace; live the decoder asks them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lattices.errors import RescoreError
from lattices.joined.sources import HEADS
from lattices.lattice import Lattice
from rescore.drafters.base import LatticeDrafter
from rescore.rescorers.base import Context


class Heads(LatticeDrafter):
    """See `rescore.drafters.base.LatticeDrafter`."""

    name = "heads"
    kind = HEADS

    def computed(self, contexts: Sequence[Context], firsts: np.ndarray, k: int) -> Lattice:
        """See `LatticeDrafter.computed`."""
        raise RescoreError("there are no block heads to draft with; give some (--heads), or other drafters only")
