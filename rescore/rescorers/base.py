"""What a rescorer is: lattices and their contexts in, drafts out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import numpy as np

from lattices.lattice import Lattice

if TYPE_CHECKING:
    from lm.base.model import BaseIdentity, BaseLM


@dataclass
class Context:
    """What stands before a lattice: one object per example, growing as its output does.

    `prompt_ids` and `output_ids` so far; `future` (int `[t]`): the greedy tokens to come, where they are known already
    (replay, or after the baseline ran). Only the oracle may look at the future. `kept`: what rescorers keep about the
    example from step to step.
    """

    prompt_ids: Sequence[int]
    output_ids: list[int] = field(default_factory=list)
    future: np.ndarray | None = None
    kept: dict[str, Any] = field(default_factory=dict)

    def last(self, count: int) -> list[int]:
        """The last `count` tokens before the lattice, fewer where there are not so many."""
        if count <= 0:
            return []
        if len(self.output_ids) >= count:
            return self.output_ids[-count:]
        return [*self.prompt_ids, *self.output_ids][-count:]


@dataclass(frozen=True)
class Target:
    """What a rescorer is to work for: the base LM's vocabulary and identity (None where a trace does not say), the
    device to work on, and the base LM itself where it is loaded (`shared`: its weights need not be loaded twice)."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    tokenizer_sha256: str | None
    base: BaseIdentity | None = None
    device: str = "cpu"
    shared: BaseLM | None = None


class Rescorer(Protocol):
    """Turns lattices into drafts. The first token of every draft is the lattice's first: it is never rescored."""

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        """Lattices `[n, h, k]` with their n contexts -> drafts int32 `[n, p', h]`, best first, p' <= p."""
        ...


@runtime_checkable
class WeightedRescorer(Rescorer, Protocol):
    """A rescorer that adds `alpha` x its own scores to the heads': alpha = 0 gives the unrescored drafts.

    `identity` says what it scores with (hashes), so that tuned weights are found again.
    """

    alpha: float
    identity: str

    def fit(self, target: Target) -> WeightedRescorer:
        """The rescorer for a base LM. Raises `IncompatibleError` if it was made for another tokenizer."""
        ...

    def weighted(self, alpha: float) -> WeightedRescorer:
        """The same rescorer with another weight."""
        ...

    def coverage(self, token_ids: np.ndarray) -> float:
        """Share of these tokens that it knows."""
        ...


class Weighted:
    """The part of a `WeightedRescorer` that is the same in all of ours."""

    alpha: float

    def weighted(self, alpha: float) -> Self:
        """See `WeightedRescorer.weighted`."""
        changed = copy.copy(self)
        changed.alpha = alpha
        return changed


@runtime_checkable
class PrefilledRescorer(Rescorer, Protocol):
    """A rescorer that reads prompts before the first lattice comes; live decoding times that apart."""

    def prefill(self, contexts: Sequence[Context]) -> None:
        """Reads the prompts of new examples."""
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
