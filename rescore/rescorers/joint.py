"""`joint`: the likeliest prefix tree of what drafters and n-gram statistics propose together.

A log-linear model with a few dozen weights (`lattices.joined`) says how likely each candidate is to be the base's own
choice; its weights are fitted on held-out traces (`rescore.runs.tuning.fit_joint`). Drafts are chosen as a set: the p
branches of the tree with the highest expected accepted length. They may be longer than the heads' blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from lattices.errors import IncompatibleError, RescoreError
from lattices.joined.likeliest import best_branches, branches, likeliest_nodes
from lattices.joined.sources import Room, Sources, room_for
from lattices.lattice import Lattice
from lattices.ngram_search import NgramSearch
from lattices.paths import user_path
from lm.keys import key_of
from lm.neural.learned_bigram import shipped_bigram
from rescore.drafters.base import MOST_TOKENS, stacked
from rescore.drafters.proposals import Proposals, Statistics
from rescore.rescorers.base import Context, JoiningRescorer, Target
from rescore.rescorers.joint_plan import AUTO, PLANNED_NODES, TEXT_SOURCES, Plan, Planner, Tree
from rescore.rescorers.joint_weights import read_fits, read_weights, shipped_weights
from rescore.rescorers.learned_bigram import LearnedBigram
from rescore.rescorers.ngram import Ngram

NONE = "none"
LONGEST = 16  # tokens of a draft, the base's own included
MOST_NODES = 1 << 16
EXPLORED = (24, 3)  # nodes of the tree that is searched: so many, and so many more a draft


class Joint(JoiningRescorer):
    """Chooses the drafts that are likeliest to be accepted, among what all drafters propose.

    path: the folder of fitted weights; empty: those that are shipped for the base.
    ngram: the n-gram model as `Ngram` takes it; empty: the one that is shipped.
    bigram: a learned bigram; empty: the one that is shipped for the base, if one is; `none`: none.
    tokens: of a draft after the base's own, at most.
    nodes: of the tree of all drafts, the base's own token included; 0: as many as p branches have; `auto`: as many as
        are worth their time, by a table of costs, and heads are asked only where text alone promises less.
    """

    drafters = ("heads", "lookup")

    def __init__(
        self,
        path: str = "",
        *,
        ngram: str = "",
        bigram: str = "",
        tokens: int = LONGEST - 1,
        nodes: str = "0",
    ) -> None:
        whole = 0 if nodes == AUTO else int(nodes) if str(nodes).isdecimal() else -1
        if not 1 <= tokens <= MOST_TOKENS or not 0 <= whole <= MOST_NODES:
            raise RescoreError(
                f"joint: give tokens of 1 to {MOST_TOKENS:,} after the base's own, and nodes of 1 to {MOST_NODES:,} "
                "(0: any), or auto"
            )
        self.nodes, self.plans = whole, nodes == AUTO
        self.longest: int = tokens + 1
        self.most_nodes = PLANNED_NODES if self.plans else whole or None
        self.ngram, self._bigram = Ngram(ngram), bigram
        self.path = user_path(path, "joint:") if path else None
        if self.path:
            read_fits(self.path, self.ngram)  # what is broken is refused before any work
        self.identity = f"joint {self.ngram.identity} {tokens} {nodes}"
        self._weights: np.ndarray | None = None
        self._statistics: Statistics | None = None
        self._planner: Planner | None = None
        self._text_weights: np.ndarray | None = None
        self._room: Room | None = None
        self._ends = np.zeros(0, dtype=np.int32)

    def fit(self, target: Target) -> Self:
        fitted = copy.copy(self)
        fitted._statistics, bigram = self.statistics_for(target)
        fitted._ends = np.array(target.eos_token_ids, dtype=np.int32)
        folder = self.path or shipped_weights(target, self.ngram)
        weights = read_weights(folder, target.sources, self.ngram, bigram)
        fitted._weights = weights
        fitted.identity = f"{self.identity} {bigram} {key_of(weights.tolist())}"
        if self.plans:
            if target.costs is None:
                raise RescoreError(f"joint with {AUTO} nodes drafts by what a step costs; give its costs")
            fitted._planner = Planner(target.costs)
            text = [source for source in target.sources if source in TEXT_SOURCES]
            with suppress(IncompatibleError):  # without weights for text alone heads are always asked
                fitted._text_weights = read_weights(folder, text, self.ngram, bigram) if text else None
            fitted.identity += f" {fitted._planner.identity}"
        return fitted

    def statistics_for(self, target: Target) -> tuple[Statistics, str]:
        """N-gram model and learned bigram for a base LM, and the hash of the latter (empty: none). Raises as `fit`."""
        search = self.ngram.fit(target).search()
        if not isinstance(search, NgramSearch):
            raise RescoreError(f"joint can't use the KenLM binary {self.ngram.path}; give its ARPA file")
        folder = self._bigram or (target.base and shipped_bigram(target.base.name))
        if self._bigram == NONE or not folder or (not self._bigram and not Path(folder).is_dir()):
            return Statistics(search), ""
        bigram = LearnedBigram(str(folder)).fit(target)
        return Statistics(search, *bigram.pair_tables()), bigram.model.sha256

    def coverage(self, token_ids: np.ndarray) -> float:
        """See `Rescorer.coverage`: that of the n-gram model."""
        return self._statistics.search.coverage(token_ids) if self._statistics else 1.0

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        raise RescoreError("joint takes what drafters propose together (draft_joined)")

    def draft_joined(self, proposals: Proposals, contexts: Sequence[Context], p: int) -> np.ndarray:
        if self._statistics is None or self._weights is None:
            raise RescoreError("joint must be fitted to a base LM first (fit)")
        if self._planner is not None:
            each = [self._planned(proposals, row, context, self._planner, p) for row, context in enumerate(contexts)]
            return stacked(each)
        count = self.nodes or EXPLORED[0] + EXPLORED[1] * p
        drafts = []
        for row, context in enumerate(contexts):
            sources, first = proposals.sources(row, context, self._statistics), int(proposals.firsts[row])
            drafts.append(self._cut(self._tree(sources, self._weights, first, count), count, p))
        return stacked(drafts)

    def _planned(self, proposals: Proposals, row: int, context: Context, planner: Planner, p: int) -> np.ndarray:
        """The drafts that promise most tokens a second; heads are asked where text alone does not promise as much."""
        curve = planner.curve(len(context.prompt_ids) + len(context.output_ids))
        plan: Plan = context.state.setdefault("plan", Plan())
        assert self._weights is not None
        statistics, first = self._statistics, int(proposals.firsts[row])

        def planned(sources: Sources, weights: np.ndarray, milliseconds: np.ndarray) -> tuple[float, int, Tree]:
            """The tree of p branches, or its best one alone, with the higher rate; and how much of it."""
            tree = self._tree(sources, weights, first, PLANNED_NODES)
            shapes = [of_best_branches(tree, p)] if planner.trees and p > 1 else []
            if not shapes or planner.tree_ms:
                shapes.append(of_best_branches(tree, 1))
            each = [(*planner.best_size(shape, milliseconds), shape) for shape in shapes]
            return max(each, key=lambda one: one[0])

        if self._text_weights is not None and proposals.has_lattices:
            text = proposals.sources(row, context, statistics, text_only=True)
            rate, nodes, tree = planned(text, self._text_weights, curve)
            if not plan.asks(rate):
                plan.took(heads=False)
                return self._cut(tree, nodes, p)
        curve = curve + planner.drafting_ms(proposals.drafters, proposals.k)
        rate, nodes, tree = planned(proposals.sources(row, context, statistics), self._weights, curve)
        plan.took(heads=proposals.has_lattices, rate=rate)
        return self._cut(tree, nodes, p)

    def _tree(self, sources: Sources, weights: np.ndarray, first: int, count: int) -> Tree:
        self._room = room_for(sources, self._room)
        found: Any = likeliest_nodes(sources, weights, first, count, self.longest, self._ends, self._room)
        token_ids, parents, depths, logps, _ = found
        return token_ids, parents, depths, logps

    @staticmethod
    def _cut(tree: Tree, nodes: int, p: int) -> np.ndarray:
        token_ids, parents, depths, logps = (part[:nodes] for part in tree)
        return branches(token_ids, parents, depths, best_branches(parents, logps, p))


def of_best_branches(tree: Tree, p: int) -> Tree:
    """As much of a tree as the p branches have that are worth most together."""
    stays = best_branches(tree[1], tree[3], p)
    token_ids, above, depths, logps = (part[stays] for part in tree)
    places = np.cumsum(stays, dtype=np.int32) - 1  # of what stays
    return token_ids, np.where(above < 0, above, places[above]), depths, logps
