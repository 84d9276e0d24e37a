"""Where all that is random in sampled decoding comes from: verdicts on candidates, drawn tokens, drawn drafts."""

from __future__ import annotations

import numpy as np


class RandomSource:
    """Answers the two questions that sampled decoding asks, by numbers that follow from `seed`."""

    def __init__(self, *seed: int) -> None:
        self._numbers = np.random.default_rng(seed)

    def accepts(self, p: float, q: float = 1.0) -> bool:
        """True with probability min(1, p / q); q is above 0."""
        # Below, never equal: a random number may be 0, and what has no probability must not come.
        return bool(self._numbers.random() * q < p)

    def draw(self, probs: np.ndarray) -> int:
        """A place in probs `[n]` with the probability that stands there; of any positive sum."""
        sums = np.cumsum(probs)
        place = int(np.searchsorted(sums, self._numbers.random() * sums[-1], side="right"))
        return place if place < len(probs) else int(np.flatnonzero(probs)[-1])  # where the product was rounded up
