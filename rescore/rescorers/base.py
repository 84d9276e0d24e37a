"""What a rescorer is: lattices and their contexts in, drafts out."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from lattices.lattice import Lattice

if TYPE_CHECKING:
    from lm.base.model import BaseIdentity, BaseLM
    from lm.base.states import LayerStates
    from lm.heads.block_heads import BlockHeads
    from rescore.acceptance.rules import Drawn, RandomSource
    from rescore.costs.table import Costs
    from rescore.drafters.proposals import Proposals


@dataclass
class Context:
    """What stands before a lattice: one object per example, growing as its output does.

    prompt_ids, output_ids: the tokens so far.
    future: the greedy output, int `[t]`, where it is known already (replay, or after the baseline ran). Only the oracle
        may look at it.
    state: what rescorers and drafters remember about the example from step to step, by a name of their own.
    lattices: by drafter, where its lattice is known already (heads live; in replay all that are traced): gives the one
        that stands after the output so far, `[h, k]`, for a k.
    random_source: what random drafts are drawn by, in sampled decoding; drawn: what the last ones were drawn from.
    states: of the base at the tokens so far, live, where a drafter reads some (`Drafter.layers`).
    """

    prompt_ids: Sequence[int]
    output_ids: list[int] = field(default_factory=list)
    future: np.ndarray | None = None
    state: dict[str, Any] = field(default_factory=dict)
    lattices: Mapping[str, Callable[[int], Lattice]] = field(default_factory=dict)
    random_source: RandomSource | None = None
    drawn: Drawn | None = None
    states: LayerStates | None = None

    def last(self, count: int) -> list[int]:
        """The last `count` tokens before the lattice, fewer where there are not so many."""
        return self.since(max(0, len(self.prompt_ids) + len(self.output_ids) - max(0, count)))

    def since(self, count: int) -> list[int]:
        """The tokens after the first `count`."""
        before = len(self.prompt_ids)
        return self.output_ids[count - before :] if count >= before else [*self.prompt_ids[count:], *self.output_ids]


@dataclass(frozen=True)
class Target:
    """What a rescorer is to work for."""

    vocab_size: int  # of the base LM
    eos_token_ids: tuple[int, ...]
    tokenizer_sha256: str | None  # None where a trace does not say
    base: BaseIdentity | None = None  # None where a trace does not say
    device: str = "cpu"  # to work on
    shared: BaseLM | None = None  # the base LM where it is loaded: its weights need not be loaded twice
    sources: tuple[str, ...] = ()  # what it is to choose among (`rescore.drafters.base.Drafter.source`)
    models: Callable[[], tuple[BaseLM, BlockHeads | None]] | None = None  # gives base and heads; None: not at hand
    traced: str = ""  # identity of the drafter whose lattices a trace holds as the heads'; empty: they are the heads'
    costs: Costs | None = None  # what a step takes, for rescorers that draft by it

    @classmethod
    def of(
        cls,
        base: BaseIdentity | Mapping[str, Any] | None,
        vocab_size: int,
        eos_token_ids: Iterable[int] = (),
        *,
        device: str = "cpu",
        shared: BaseLM | None = None,
    ) -> Self:
        """Of a base LM's identity, or of what a trace says of it: all of that, a part of it, or nothing."""
        from lm.base.model import BaseIdentity

        said = asdict(base) if isinstance(base, BaseIdentity) else base if isinstance(base, Mapping) else {}
        names = [each.name for each in fields(BaseIdentity)]
        identity = BaseIdentity(**{name: said[name] for name in names}) if said.keys() >= set(names) else None
        return cls(vocab_size, tuple(sorted(eos_token_ids)), said.get("tokenizer_sha256"), identity, device, shared)


class Rescorer(ABC):
    """Turns lattices into drafts. `draft` is all that a rescorer must have.

    alpha: the weight of its own scores beside the heads', 0 giving the unrescored drafts; None: it has no weight.
    identity: what it scores with (hashes), so that tuned weights are known again and results say what made them; whole
        once it is fitted.
    longest: tokens of a draft, at most; None: those of what it drafts from.
    drafters: the specs of those it chooses among unless others are given.
    branches: of the tree that it drafts, at most: its drafts where p is not given (0: it drafts no tree).
    most_nodes: of the tree of all drafts, at most; None: as many as they have tokens.
    least_k: entries of a slot that it needs.
    random: it draws its drafts, which sampled decoding alone can verify.
    plans: it drafts by what a step costs, and must be fitted with that (`Target.costs`).
    """

    alpha: float | None = None
    identity: str = ""
    longest: int | None = None
    drafters: tuple[str, ...] = ("heads",)
    branches: int = 0
    most_nodes: int | None = None
    least_k: int = 1
    random: bool = False
    plans: bool = False

    @abstractmethod
    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        """Lattices `[n, h, k]` with their n contexts -> drafts int32 `[n, p', h]`, best first, p' <= p.

        The first token of every draft is the lattice's first: it is never rescored. Drafts of a rescorer that says how
        long they are at most (`longest`) may have fewer tokens than the array: -1 stands after their ends.
        """

    def fit(self, target: Target) -> Self:
        """The rescorer for a base LM. Raises `IncompatibleError` if it was made for another tokenizer."""
        return self

    def weighted(self, alpha: float) -> Self:
        """The same rescorer with another weight."""
        changed = copy.copy(self)
        changed.alpha = alpha
        return changed

    def coverage(self, token_ids: np.ndarray) -> float:
        """Share of these tokens that it knows."""
        return 1.0

    def prefill(self, contexts: Sequence[Context]) -> None:  # noqa: B027 (most have nothing to read)
        """Reads the prompts of new examples, before the first lattice comes; live decoding times that apart."""


class JoiningRescorer(Rescorer):
    """A rescorer that takes what several drafters propose together."""

    @abstractmethod
    def draft_joined(self, proposals: Proposals, contexts: Sequence[Context], p: int) -> np.ndarray:
        """What drafters propose at n positions, with their contexts -> drafts as `draft` gives them, of any lengths."""


class LocalRescorer(Rescorer):
    """A rescorer that can give the lattice itself, rescored slot by slot."""

    @abstractmethod
    def rescored(self, lattices: Lattice, contexts: Sequence[Context]) -> Lattice:
        """Lattices `[n, h, k]` with the same tokens, in the order of this rescorer's scores along its own draft."""


def check_drafts(drafts: np.ndarray, firsts: np.ndarray, p: int, longest: int) -> None:
    """Asserts what `Rescorer.draft` promises: one that breaks it would be credited with tokens it never drafted."""
    n = len(firsts)
    assert drafts.ndim == 3 and len(drafts) == n and 1 <= drafts.shape[1] <= p and 1 <= drafts.shape[2] <= longest, (
        f"a rescorer gave drafts of shape {list(drafts.shape)} where [{n}, 1 to {p}, 1 to {longest}] is due"
    )
    assert (np.diff((drafts < 0).astype(np.int8), axis=2) >= 0).all(), "tokens stand after a draft's end"
    assert (drafts[:, :, 0] == firsts[:, None]).all(), (
        "a rescorer gave a draft that does not begin with the lattice's first token"
    )
