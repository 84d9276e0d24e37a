"""How the drafts of a step are made: drafters propose, a rescorer chooses among what they propose.

One lattice: the rescorer's drafts of it. Text alone: what it continues with. Several drafters and a rescorer that takes
all of them together (`JoiningRescorer`): its drafts of the joined lattice. Several drafters and another rescorer: each
drafter has its share of the p drafts, rescored where they are of a lattice; the first places go to copied text that
matches well enough (`SURE`), then to lattices, then to the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lattices.errors import RescoreError
from lattices.joined.lookup import NONE
from rescore.drafters import HEADS
from rescore.drafters.base import SURE, Drafter, LatticeDrafter, as_drafts, is_lattice_alone, stacked
from rescore.drafters.heads import Heads
from rescore.drafters.proposals import Proposals
from rescore.rescorers.base import Context, JoiningRescorer, Rescorer, check_drafts

HEADS_ALONE: tuple[Drafter, ...] = (Heads(),)


@dataclass(frozen=True)
class Drafting:
    """Drafters and rescorer of a run, fitted to its base.

    k: lattice entries of a slot; p: drafts of a step.
    """

    rescorer: Rescorer
    drafters: Sequence[Drafter] = HEADS_ALONE
    k: int = 1
    p: int = 1

    @property
    def heads(self) -> Heads | None:
        """The block heads among the drafters."""
        return next((drafter for drafter in self.drafters if isinstance(drafter, Heads)), None)

    @property
    def layers(self) -> tuple[int, ...]:
        """Of the base, whose states its drafters read (`lm.base.states`)."""
        return tuple(sorted({layer for drafter in self.drafters for layer in drafter.layers}))

    def longest(self, h: int) -> int:
        """Tokens of a draft, at most, with so many heads."""
        own = self.rescorer.longest
        if own is not None and (isinstance(self.rescorer, JoiningRescorer) or not self.rescorer.branches):
            return own
        proposed = max((drafter.longest or h for drafter in self.drafters), default=1)
        if own is None or not is_lattice_alone(self.drafters):
            return proposed
        return min(own, proposed)  # a tree is no deeper than the slots

    def most_tokens(self, h: int) -> int:
        """Tokens of all drafts of a step, at most, with so many heads."""
        tokens, nodes = self.p * self.longest(h), self.rescorer.most_nodes
        return tokens if nodes is None else min(tokens, nodes)

    def prefill(self, contexts: Sequence[Context]) -> None:
        """Reads the prompts of new examples."""
        for drafter in self.drafters:
            drafter.prefill(contexts)
        self.rescorer.prefill(contexts)

    def propose(self, contexts: Sequence[Context], firsts: np.ndarray) -> Proposals:
        """What the drafters say comes after `firsts` int `[n]`, the tokens that the base has chosen."""
        apart = None if isinstance(self.rescorer, JoiningRescorer) else self.p
        return Proposals(self.drafters, contexts, firsts, self.k, apart)

    def choose(self, proposals: Proposals, contexts: Sequence[Context]) -> np.ndarray:
        """Drafts int32 `[n, p', l]` of what was proposed, best first, p' <= p; -1 stands after the end of a shorter
        one."""
        joins = isinstance(self.rescorer, JoiningRescorer)
        if isinstance(self.rescorer, JoiningRescorer):
            drafts = self.rescorer.draft_joined(proposals, contexts, self.p)
        elif len(self.drafters) == 1 and proposals.has_lattices:
            (lattice,) = proposals.lattices.values()
            drafts = self.rescorer.draft(lattice, contexts, self.p)
        else:
            drafts = self._by_shares(proposals, contexts)
        asked = self.rescorer.longest is None or not joins  # to look at lattices would be to ask for them
        h = max((lattice.h for lattice in proposals.lattices.values()), default=1) if asked else 1
        check_drafts(drafts, proposals.firsts, self.p, self.longest(h))
        return drafts

    def _by_shares(self, proposals: Proposals, contexts: Sequence[Context]) -> np.ndarray:
        """Of each drafter its share of the p drafts."""
        rescored = {
            drafter: self.rescorer.draft(lattice, contexts, self.p) for drafter, lattice in proposals.lattices.items()
        }
        copied = proposals.continuations
        chosen = []
        for row, first in enumerate(proposals.firsts.tolist()):
            sure = [drafter for drafter, found in copied.items() if found[row].match >= SURE]
            order = [*sure, *rescored, *(drafter for drafter in copied if drafter not in sure)]
            each = []
            for place, drafter in enumerate(order):
                share = self.p // len(order) + (place < self.p % len(order))
                own = rescored[drafter][row] if drafter in rescored else as_drafts(copied[drafter][row], first)
                each.append(own[:share])
            longest = max(drafts.shape[1] for drafts in each)
            padded = [np.pad(d, ((0, 0), (0, longest - d.shape[1])), constant_values=NONE) for d in each]
            chosen.append(np.concatenate(padded))
        return stacked(chosen)


def check_drafters(drafters: Sequence[Drafter], *, live: bool) -> None:
    """Raises `RescoreError` for what can't be joined, or not be decoded with."""
    names = [HEADS if isinstance(drafter, Heads) else drafter.name for drafter in drafters]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RescoreError(f"--drafter {twice} is there twice; give it once")
    for drafter in drafters if live else ():
        if isinstance(drafter, LatticeDrafter) and not drafter.decodes:
            raise RescoreError(f"--drafter {drafter.name} is a trace, which can be replayed only; drop --mode live")
