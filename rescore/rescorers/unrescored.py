"""Drafts of a lattice as it is, by the heads' own log-probabilities.

`none`: the p best; p = 1 is the arg-max of every head. `draws`: p that are drawn, for sampled output, where rejected
ones cost less of the law than the best ones would (`rescore.acceptance.sampling`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lattices.errors import RescoreError
from lattices.lattice import Lattice
from lattices.search import p_best
from rescore.acceptance.rules import SAMPLE, Drawn
from rescore.rescorers.base import Context, Rescorer


class Unrescored(Rescorer):
    """p-best drafts of the lattice as it is ("p-best 0-gram" of [A])."""

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        return p_best(lattices, p).drafts


class Draws(Rescorer):
    """Draws drafts from the lattice: the p drafts differ in the second slot, whose tokens are drawn without
    replacement; each goes on with a token drawn from every later slot.

    temperature: of the drawing; 1: as the lattice says.
    """

    random = True

    def __init__(self, temperature: float = 1.0) -> None:
        if not 0 < temperature < float("inf"):
            raise RescoreError(f"draws: temperature = {temperature:g}; give one above 0")
        self.temperature = temperature

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        scores = lattices.logps.astype(np.float64) / self.temperature
        probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
        probs /= probs.sum(axis=-1, keepdims=True)
        count = min(p, lattices.k) if lattices.h > 1 else 1
        drafts = np.zeros((len(contexts), count, lattices.h), dtype=np.int32)
        for row, context in enumerate(contexts):
            if (source := context.random_source) is None:
                raise RescoreError(f"draws draws its drafts, which is for sampled output only; {SAMPLE}")
            ids, of_slots = lattices.token_ids[row], probs[row]
            drafts[row, :, 0] = ids[0, 0]
            for slot in range(1, lattices.h):
                left = of_slots[slot].copy()
                if slot == 1 and (possible := int((left > 0).sum())) < count:
                    count, drafts = possible, drafts[:, :possible]  # fewer tokens than drafts have any probability
                for draft in range(count):
                    place = source.draw(left)
                    drafts[row, draft, slot] = ids[slot, place]
                    if slot == 1:  # without replacement
                        left[place] = 0.0
            context.drawn = Drawn(ids, of_slots)
        return drafts
