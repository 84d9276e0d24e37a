"""What a rescorer is: lattices and their contexts in, drafts out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from lattices.lattice import Lattice


@dataclass
class Context:
    """What stands before a lattice: one object per example, growing as its output does.

    `prompt_ids` and `output_ids` so far; `future` (int `[t]`): the greedy tokens to come, where they are known already
    (replay, or after the baseline ran). Only the oracle may look at the future.
    """

    prompt_ids: Sequence[int]
    output_ids: list[int] = field(default_factory=list)
    future: np.ndarray | None = None


class Rescorer(Protocol):
    """Turns lattices into drafts. The first token of every draft is the lattice's first: it is never rescored."""

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        """Lattices `[n, h, k]` with their n contexts -> drafts int32 `[n, p', h]`, best first, p' <= p."""
        ...
