"""How `joint:nodes=auto` spends a step's time: how many nodes of a tree, and whether the heads are asked.

With calibrated probabilities the first n of the likeliest nodes are the best tree of n, whose expected accepted length
is the sum of their probabilities; a table says what verifying n costs. The rate (expected tokens a millisecond) has one
best n. Where one draft alone has that price, it is so much of the tree's best branch. Only the table and the
probabilities decide, so a replay with the same table plans as live decoding does.
"""

from __future__ import annotations

import numpy as np

from lm.keys import key_of
from lm.records import plain
from rescore.costs.table import Costs, between

AUTO = "auto"
PLANNED_NODES = 32
TEXT_SOURCES = ("lookup",)  # what is asked first, because it costs next to nothing
SMOOTHING = 0.2  # of the running rate with heads
PATIENCE = 16  # steps without heads after which they are asked again


def best_size(logps: np.ndarray, milliseconds: np.ndarray) -> tuple[float, int]:
    """The highest rate, expected tokens a millisecond, and with how many nodes.

    logps `[n]`: of the likeliest nodes, in falling order, slot 1 first; milliseconds `[m]`, m >= n: of a step with 1
    to m.
    """
    rates = np.cumsum(np.exp(logps)) / milliseconds[: len(logps)]
    nodes = int(rates.argmax())
    return float(rates[nodes]), nodes + 1


class Planner:
    """What steps of 1 to `PLANNED_NODES` tokens take by a table of costs, and asking the heads.

    trees: whether the base verifies several drafts as a tree, whose tokens cost what those of one draft do.
    identity: a hash of all that plans follow from.
    """

    def __init__(self, costs: Costs) -> None:
        self._heads, self.trees = costs.heads, costs.tree_ms is not None
        self._contexts, self._curves = costs.contexts, costs.curves(PLANNED_NODES)
        self.identity = key_of([plain(self._heads), self._contexts, self._curves.tolist(), self.trees])

    def heads_ms(self, vocabulary: int | None) -> float:
        """Of heads that draft from so many tokens (None: all); 0 where no costs of heads are known."""
        return self._heads.of(vocabulary) if self._heads else 0.0

    def curve(self, context: int) -> np.ndarray:
        """Of a step with so many tokens before it, float64 `[PLANNED_NODES]`."""
        return between(self._contexts, self._curves, np.array(context))


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
