"""What a drafter is: it says what may come next at a position.

Two kinds. A `LatticeDrafter` gives slots of tokens with log-probabilities, as block heads do; where a trace holds what
it gave, that is read. A `TextDrafter` copies what once followed the last tokens, as prompt lookup does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from lattices.errors import RescoreError
from lattices.joined.lookup import NONE
from lattices.lattice import Lattice, concatenated, stacked_lattices
from rescore.rescorers.base import Context, Target

MOST_TOKENS = 1024  # of a draft, or of a match: what is longer is a slip, and would fill the memory
SURE = 2  # tokens of a match from which on a copied draft goes before the others' (docs/drafters.md)


class Drafter(ABC):
    """What all drafters have.

    name: its spec.
    kind: where its candidates come from: a bit of `lattices.joined.sources`, called as
        `rescore.runs.records.SOURCES` has it.
    identity: what it drafts with (hashes), so that results say what made them; whole once it is fitted.
    longest: tokens of a draft, the base's own first one included; None: those of the heads.
    held: entries of a slot that it has at most (None: as many as are asked for).
    vocabulary: tokens of the base that it was fitted to (`rescore.drafters.asked`); 0: not known.
    layers: of the base, whose states it reads in `Context.states` (`lm.base.states`); set once it is fitted.
    """

    name: str = ""
    kind: int
    identity: str = ""
    longest: int | None = None
    held: int | None = None
    vocabulary: int = 0
    layers: tuple[int, ...] = ()

    def fit(self, target: Target) -> Self:
        """The drafter for a base LM. Raises `IncompatibleError` if it was made for another tokenizer."""
        return self

    @property
    def source(self) -> str:
        """What weights that are fitted for it depend on: its name, and the model if it has one."""
        return self.name.partition(":")[0]

    def prefill(self, contexts: Sequence[Context]) -> None:  # noqa: B027 (most have nothing to read)
        """Reads the prompts of new examples, before the first position comes; live decoding times that apart."""


class LatticeDrafter(Drafter):
    """A drafter whose proposals are slots of k tokens.

    decodes: it can be asked live, not only read from a trace.
    """

    decodes: bool = True

    def lattices(self, contexts: Sequence[Context], firsts: np.ndarray, k: int) -> Lattice:
        """`[n, h, k]` for n positions; firsts int `[n]`: the token that the base has chosen, entry 0 of slot 1."""
        given = [context.lattices.get(self.name) for context in contexts]
        if None in given:
            return self.computed(contexts, firsts, k)
        return stacked_lattices([lattice(k) for lattice in given if lattice is not None])

    @abstractmethod
    def computed(self, contexts: Sequence[Context], firsts: np.ndarray, k: int) -> Lattice:
        """The same where it is not known from a trace."""

    def record(self, prompt_ids: np.ndarray, output_ids: np.ndarray, k: int) -> tuple[Lattice, np.ndarray]:
        """The same for every position of a known output, `[t, h, k]`, and the entropies of the slots `[t, h]`, nats."""
        context = Context(prompt_ids.tolist())
        each = []
        for token in output_ids:
            each.append(self.computed([context], np.array([token]), k))
            context.output_ids.append(int(token))
        lattice = concatenated(each)
        # Of the k entries only: a lattice does not tell the rest.
        mass = np.exp(lattice.logps.astype(np.float64))
        return lattice, -(mass * lattice.logps).sum(axis=-1).astype(np.float32)


def is_lattice_alone(drafters: Sequence[Drafter]) -> bool:
    """Whether what is proposed are the slots of one drafter."""
    return len(drafters) == 1 and isinstance(drafters[0], LatticeDrafter)


@dataclass(frozen=True)
class Continuations:
    """What once followed, at one position.

    token_ids int32 `[c, m]` from slot 2 on, `NONE` after their ends, the best first; logps float32 `[c, m]`.
    match: how many of the last tokens stood before them.
    """

    token_ids: np.ndarray
    logps: np.ndarray
    match: int


class TextDrafter(Drafter):
    """A drafter that copies what once followed the last tokens.

    in_context: it copies from prompt and output so far; a joined lattice then asks their suffix automaton itself, after
    every path.
    """

    in_context: bool = False

    @abstractmethod
    def continuations(self, contexts: Sequence[Context], firsts: np.ndarray, count: int) -> list[Continuations]:
        """At most `count` continuations for each of n positions, after the token that the base has chosen there."""


def check_lengths(name: str, tokens: int, least: int, most: int) -> None:
    """Raises `RescoreError` for drafts or matches of no sensible length."""
    if not 1 <= tokens <= MOST_TOKENS or not 1 <= least <= most <= MOST_TOKENS:
        raise RescoreError(
            f"{name}: give tokens of 1 to {MOST_TOKENS:,}, and matches of least to most tokens, 1 to {MOST_TOKENS:,}"
        )


def as_drafts(found: Continuations, first: int) -> np.ndarray:
    """Continuations as drafts int32 `[c, 1 + m]`, one at least."""
    drafts = np.full((max(1, len(found.token_ids)), 1 + found.token_ids.shape[1]), NONE, dtype=np.int32)
    drafts[:, 0] = first
    drafts[: len(found.token_ids), 1:] = found.token_ids
    return drafts


def stacked(drafts: Sequence[np.ndarray]) -> np.ndarray:
    """Drafts `[p_i, l_i]` of n examples as one array `[n, p, l]`: `NONE` after the ends, the first draft again where an
    example has fewer."""
    p, length = max(len(each) for each in drafts), max(each.shape[1] for each in drafts)
    whole = np.full((len(drafts), p, length), NONE, dtype=np.int32)
    for rows, each in zip(whole, drafts, strict=True):
        rows[:, : each.shape[1]] = each[0]
        rows[: len(each), : each.shape[1]] = each
    return whole
