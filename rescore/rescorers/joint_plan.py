"""How `joint:nodes=auto` spends a step's time: how many nodes of a tree, and whether the heads are asked.

With calibrated probabilities the first n of the likeliest nodes are the best tree of n, whose expected accepted length
is the sum of their probabilities; a table says what verifying n costs. The rate (expected tokens a millisecond) has one
best n. Where one draft alone has that price, or a tree's mask is worth more than its branches, it is so much of the
tree's best branch. Only the table and the probabilities decide, so a replay with the same table plans as live decoding
does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm.keys import key_of
from lm.records import plain
from rescore.costs.table import Costs, between
from rescore.drafters import DRAFTERS, HEADS
from rescore.drafters.base import Drafter, LatticeDrafter
from rescore.drafters.heads import Heads

# Tokens, parents, depths, log-probabilities of whole paths, as of `lattices.joined.likeliest.likeliest_nodes`.
Tree = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

AUTO = "auto"
PLANNED_NODES = 32
TEXT_SOURCES = ("lookup",)  # what is asked first, because it costs next to nothing
SMOOTHING = 0.2  # of the running rate with heads
PATIENCE = 16  # steps without heads after which they are asked again


class Planner:
    """What steps of 1 to `PLANNED_NODES` tokens take by a table of costs, and asking drafters.

    trees: whether the base verifies several drafts as a tree, whose tokens cost what those of one draft do.
    tree_ms: what a tree adds to a step, by its mask.
    identity: a hash of all that plans follow from.
    """

    def __init__(self, costs: Costs) -> None:
        self._heads, self.trees, self.tree_ms = costs.heads, costs.tree_ms is not None, costs.tree_ms or 0.0
        self._contexts, self._curves = costs.contexts, costs.curves(PLANNED_NODES)
        names = {choice.rescorer: choice.rescorer.partition(":")[0] for choice in costs.choices}
        drafters = {spec for spec, name in names.items() if DRAFTERS.has(name) and name not in (*TEXT_SOURCES, HEADS)}
        self._drafters = {(c.rescorer, c.k): c.ms for c in costs.choices if c.rescorer in drafters and c.p == 1}
        known = sorted([*key, ms] for key, ms in self._drafters.items())
        self.identity = key_of([plain(self._heads), self._contexts, self._curves.tolist(), costs.tree_ms, known])

    def drafting_ms(self, drafters: Sequence[Drafter], k: int) -> float:
        """Of all of these that are asked, with k entries of a slot: of heads what the table says, from the tokens that
        they draft from; of others what their own drafts took, if the table has that; of copied text nothing."""
        asked = [drafter for drafter in drafters if isinstance(drafter, LatticeDrafter)]
        return sum(
            (self._heads.of(drafter.size) if self._heads else 0.0)
            if isinstance(drafter, Heads)
            else self._drafters.get((drafter.name, k), 0.0)
            for drafter in asked
        )

    def curve(self, context: int) -> np.ndarray:
        """Of a step of one draft with so many tokens before it, float64 `[PLANNED_NODES]`."""
        return between(self._contexts, self._curves, np.array(context))

    def best_size(self, tree: Tree, milliseconds: np.ndarray) -> tuple[float, int]:
        """The highest rate, expected tokens a millisecond, and with how many nodes of a tree, the likeliest first.

        milliseconds `[m]`: of a step of one draft with 1 to m tokens, m the nodes at least; from where the tree
        branches on, its mask takes time.
        """
        _, parents, _, logps = tree
        branches = np.flatnonzero(parents != np.arange(-1, len(parents) - 1))
        whole = milliseconds[: len(logps)].copy()
        if len(branches):
            whole[branches[0] :] += self.tree_ms
        rates = np.cumsum(np.exp(logps)) / whole
        nodes = int(rates.argmax())
        return float(rates[nodes]), nodes + 1


class Plan:
    """What the steps of one example promised so far.

    rate: running, of steps that asked the heads (None: there was none yet); since: steps without heads after the last.
    """

    def __init__(self) -> None:
        self.rate: float | None = None
        self.since = 0

    def asks(self, rate: float) -> bool:
        """Whether heads are asked where text alone promises this rate."""
        return self.rate is None or rate < self.rate or self.since >= PATIENCE

    def took(self, *, heads: bool, rate: float = 0.0) -> None:
        """Notes a step."""
        self.since = 0 if heads else self.since + 1
        if heads:
            self.rate = rate if self.rate is None else self.rate + SMOOTHING * (rate - self.rate)
