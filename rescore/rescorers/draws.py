"""`draws`: drafts that are drawn from the lattice, for sampled output.

The p drafts differ in the second slot, whose tokens are drawn without replacement; each goes on with a token drawn from
every later slot. Rejected ones then cost less of the law than given ones would (`rescore.acceptance.sampling`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lattices.errors import RescoreError
from lattices.lattice import Lattice
from rescore.acceptance.rules import Drawn
from rescore.rescorers.base import Context, Rescorer


class Draws(Rescorer):
    """See `rescore.rescorers.base.Rescorer`.

    temperature: of the drawing; 1: as the lattice says.
    """

    random = True

    def __init__(self, temperature: float = 1.0) -> None:
        if not 0 < temperature < float("inf"):
            raise RescoreError(f"draws: temperature = {temperature:g}; give one above 0")
        self.temperature = temperature

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        """See `Rescorer.draft`."""
        scores = lattices.logps.astype(np.float64) / self.temperature
        probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
        probs /= probs.sum(axis=-1, keepdims=True)
        count = min(p, lattices.k) if lattices.h > 1 else 1
        drafts = np.zeros((len(contexts), count, lattices.h), dtype=np.int32)
        for row, context in enumerate(contexts):
            if context.random_state is None:
                raise RescoreError("draws draws its drafts, which is for sampled output only; add --temperature")
            ids, of_slots = lattices.token_ids[row], probs[row]
            drafts[row, :, 0] = ids[0, 0]
            for slot in range(1, lattices.h):
                apart = slot == 1
                possible = int((of_slots[slot] > 0).sum())
                drawn = context.random_state.choice(
                    ids[slot], size=min(count, possible) if apart else count, replace=not apart, p=of_slots[slot]
                )
                if len(drawn) < count:  # fewer tokens than drafts have any probability
                    count, drafts = len(drawn), drafts[:, : len(drawn)]
                drafts[row, :, slot] = drawn
            context.drawn = Drawn(ids, of_slots)
        return drafts
