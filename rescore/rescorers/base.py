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


def check_drafts(drafts: np.ndarray, lattices: Lattice, p: int) -> None:
    """Asserts what `Rescorer.draft` promises: one that breaks it would be credited with tokens it never drafted."""
    n, h, _ = lattices.token_ids.shape
    assert drafts.ndim == 3 and drafts.shape[::2] == (n, h) and 1 <= drafts.shape[1] <= p, (
        f"a rescorer gave drafts of shape {list(drafts.shape)} where [{n}, 1 to {p}, {h}] is due"
    )
    assert (drafts[:, :, 0] == lattices.token_ids[:, :1, 0]).all(), (
        "a rescorer gave a draft that does not begin with the lattice's first token"
    )
