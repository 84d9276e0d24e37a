"""`oracle`: the path of the lattice that the base LM will accept most of; what a perfect rescorer could reach."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lattices.lattice import Lattice
from lattices.oracle import oracle_path
from rescore.rescorers.base import Context, Rescorer


class Oracle(Rescorer):
    """The oracle path of each lattice; it reads the context's future, so one draft (p = 1) says all."""

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        """See `Rescorer.draft`; the contexts must know their future."""
        targets = np.full((len(contexts), lattices.h), -1, dtype=np.int32)
        for row, context in enumerate(contexts):
            assert context.future is not None, "the oracle needs the greedy output"
            done = len(context.output_ids)
            ahead = context.future[done : done + lattices.h]
            targets[row, : len(ahead)] = ahead
        return oracle_path(lattices.token_ids, targets)[:, None]
