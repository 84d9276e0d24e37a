"""What several drafters propose at the same positions, as one joined lattice (`lattices.joined`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from lattices.joined.lookup import NONE, Lookup
from lattices.joined.sources import Chains, Sources
from lattices.lattice import Lattice
from lattices.ngram_search import NgramSearch
from rescore.drafters.asked import continuations_of, lattices_of
from rescore.drafters.base import Continuations, Drafter, LatticeDrafter, TextDrafter
from rescore.drafters.heads import Heads
from rescore.drafters.lookup import lookup_of
from rescore.rescorers.base import Context

FROM_CORPUS = 4  # continuations of a corpus, in a joined lattice
NOTHING = Lookup().tables
NO_NGRAM = (np.zeros(0, dtype=np.int64), np.zeros((0, 0), dtype=np.int32), np.zeros(0, dtype=np.int32))
NO_PAIRS = np.zeros((0, 1), dtype=np.float32)
NO_CHAINS = Chains(
    np.zeros((0, 1, 1), dtype=np.int32), np.zeros((0, 1, 1), dtype=np.float32), np.zeros(0, dtype=np.int32)
)


class Statistics(NamedTuple):
    """What is known of a base's text beside what drafters propose.

    search: an n-gram model. left, right float32 `[vocab, r]`: of each token as the first and as the second of a pair
    (`lm.neural.learned_bigram`); empty without.
    """

    search: NgramSearch
    left: np.ndarray = NO_PAIRS
    right: np.ndarray = NO_PAIRS


@dataclass(eq=False)
class Proposals:
    """What drafters propose at n positions; lattices are asked for when they are first looked at.

    firsts int32 `[n]`: the tokens that the base has chosen already, slot 1 of all of them.
    continuations: n of each drafter (in a joined lattice not of drafters that copy from the context itself).
    in_context: whether one does. apart: continuations of each drafter where they are not joined; None: they are.
    asked bool `[n]`: where lattices were looked at.
    """

    drafters: Sequence[Drafter]
    contexts: Sequence[Context]
    firsts: np.ndarray
    k: int
    apart: int | None = None

    def __post_init__(self) -> None:
        self.firsts = self.firsts.astype(np.int32)
        self.asked = np.zeros(len(self.contexts), dtype=bool)
        text = [drafter for drafter in self.drafters if isinstance(drafter, TextDrafter)]
        self.in_context = any(drafter.in_context for drafter in text)
        self.continuations: dict[Drafter, list[Continuations]] = {
            drafter: continuations_of(drafter, self.contexts, self.firsts, self.apart or FROM_CORPUS)
            for drafter in text
            if self.apart or not drafter.in_context
        }

    @property
    def lattices(self) -> dict[Drafter, Lattice]:
        """`[n, h, k]` by drafter."""
        self.asked[:] = True
        return self._lattices

    @cached_property
    def _lattices(self) -> dict[Drafter, Lattice]:
        slots = [drafter for drafter in self.drafters if isinstance(drafter, LatticeDrafter)]
        return {drafter: lattices_of(drafter, self.contexts, self.firsts, self.k) for drafter in slots}

    @property
    def longest(self) -> int:
        """Tokens of what is proposed, at most."""
        return max([lattice.h for lattice in self.lattices.values()] + [d.longest or 1 for d in self.drafters])

    @property
    def heads_asked(self) -> np.ndarray:
        """Where block heads were asked, bool `[n]`."""
        return self.asked & any(isinstance(drafter, Heads) for drafter in self.drafters)

    @property
    def has_lattices(self) -> bool:
        """Whether there are any, without asking for them."""
        return any(isinstance(drafter, LatticeDrafter) for drafter in self.drafters)

    def sources(
        self, row: int, context: Context, statistics: Statistics | None = None, *, text_only: bool = False
    ) -> Sources:
        """The joined lattice of one position; `text_only`: of drafters that copy, without asking the others."""
        self.asked[row] |= not text_only
        lattices = {} if text_only else self._lattices
        heads = next((lattice[row] for d, lattice in lattices.items() if isinstance(d, Heads)), None)
        if heads is None:
            heads = Lattice(self.firsts[row].reshape(1, 1), np.zeros((1, 1), dtype=np.float32))
        cells, roots, words = NO_NGRAM
        left = right = NO_PAIRS
        state = 0
        if statistics:
            search, left, right = statistics.search, statistics.left, statistics.right
            cells, roots, words = search.automaton.cells, search.automaton.roots, search.words
            state = search.state_after(context.last(search.automaton.order - 1))
        lookup = lookup_of(context).tables if self.in_context else NOTHING
        return Sources(
            np.ascontiguousarray(heads.token_ids), np.ascontiguousarray(heads.logps), lookup, cells, roots, words,
            state, left, right, self._chains(row, lattices),
        )  # fmt: skip

    def _chains(self, row: int, lattices: Mapping[Drafter, Lattice]) -> Chains:
        chained = [
            (lattice.token_ids[row, 1:], lattice.logps[row, 1:], drafter.kind)
            for drafter, lattice in lattices.items()
            if not isinstance(drafter, Heads) and lattice.h > 1
        ]
        for drafter, each in self.continuations.items():
            found = each[row]
            chained += [
                (ids[:, None], logps[:, None], drafter.kind)
                for ids, logps in zip(found.token_ids, found.logps, strict=True)
            ]
        if not chained:
            return NO_CHAINS
        m, q = (max(ids.shape[axis] for ids, _, _ in chained) for axis in (0, 1))
        chains = Chains(
            np.full((len(chained), m, q), NONE, dtype=np.int32),
            np.zeros((len(chained), m, q), dtype=np.float32),
            np.array([kind for _, _, kind in chained], dtype=np.int32),
        )
        for place, (ids, logps, _) in enumerate(chained):
            chains.token_ids[place, : ids.shape[0], : ids.shape[1]] = ids
            chains.logps[place, : ids.shape[0], : ids.shape[1]] = logps
        return chains
