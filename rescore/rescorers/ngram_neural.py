"""`ngram-neural`: n-gram first, neural second; beyond [A].

An n-gram rescorer with its default weight gives its 8 best drafts; one forward of a small LM over their prefix tree
scores them all, and they are put in order by the n-gram's score + alpha x the LM's log-probs among the k tokens of each
slot. No sequential loop. alpha = 0: unrescored drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np

from lattices.errors import RescoreError
from lattices.lattice import Lattice
from lattices.prefix_tree import build_prefix_tree
from lattices.search import p_best
from lm.neural.model import NeuralLM
from rescore.rescorers.base import Context, Target
from rescore.rescorers.context_ngram import ContextNgram
from rescore.rescorers.neural import FollowsExamples, NeuralModel
from rescore.rescorers.neural_state import Group
from rescore.rescorers.ngram import Ngram

CANDIDATES = 8  # the forward reads every node of their tree


class NgramNeural(FollowsExamples):
    """A small LM chooses among the best drafts of an n-gram model.

    path: the LM, as `Neural` takes it.
    first: what gives the candidates, `context-ngram` or `ngram`.
    ngram: its model, as it takes it.
    share: of the context's n-grams (`context-ngram` only).
    """

    alpha: float = 0.1

    def __init__(
        self, path: str = "neural-61m", *, first: str = "context-ngram", ngram: str = "", share: float | None = None
    ) -> None:
        self.first: Ngram | ContextNgram
        if first == "ngram":
            if share is not None:
                raise RescoreError("ngram-neural: share is for first=context-ngram; drop it")
            self.first = Ngram(ngram)
        elif first == "context-ngram":
            self.first = ContextNgram(ngram) if share is None else ContextNgram(ngram, share=share)
        else:
            raise RescoreError(f"ngram-neural: first = {first}; what comes first is ngram or context-ngram")
        self.model = NeuralModel(path)
        self.identity = f"ngram-neural {self.first.identity} {self.first.alpha} {self.model.identity}"
        self.eos_token_ids: tuple[int, ...] = ()

    def fit(self, target: Target) -> Self:
        fitted = super().fit(target)
        fitted.first, fitted.eos_token_ids = self.first.fit(target), target.eos_token_ids
        return fitted

    def coverage(self, token_ids: np.ndarray) -> float:
        """See `Rescorer.coverage`: that of the n-gram."""
        return self.first.coverage(token_ids)

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        if self.alpha == 0:
            return p_best(lattices, p).drafts
        best = self.first.best(lattices, contexts, max(p, CANDIDATES))
        model, scores = self.model.load(), best.scores.copy()
        for group, rows in self._groups(contexts):
            logps = path_logps(model, group, lattices[rows], best.drafts[rows], self.eos_token_ids)
            scores[rows] += self.alpha * logps
        order = np.argsort(-scores, axis=1, kind="stable")[:, :p]  # equals stay in the n-gram's order
        return np.take_along_axis(best.drafts, order[:, :, None], axis=1)


def path_logps(
    model: NeuralLM, group: Group, lattices: Lattice, drafts: np.ndarray, eos_token_ids: Sequence[int]
) -> np.ndarray:
    """The LM's log-probs of drafts `[b, p, h]` of lattices `[b, h, k]`, among the k tokens of each slot: `[b, p]`.

    What stands after an end-of-text counts nothing. One forward: a draft's tokens from the second to the last but one
    are nodes of its row's tree, which the drafts share as far as they agree.
    """
    b, p, h = drafts.shape
    trees = [build_prefix_tree(row[:, 1 : h - 1]) for row in drafts]
    most = max(len(tree.tokens) for tree in trees)
    tokens, parents = np.zeros((b, most), dtype=np.int64), np.full((b, most), -1)
    for row, tree in enumerate(trees):
        tokens[row, : len(tree.tokens)] = tree.tokens
        parents[row, : len(tree.tokens)] = tree.parents
    counts = np.array([len(tree.tokens) for tree in trees])
    after_first, after_nodes = group.begin_with_trees(lattices.token_ids[:, 0, 0], tokens, parents, counts)
    total, ended = np.zeros((b, p)), np.zeros((b, p), dtype=bool)
    for slot in range(1, h):
        ids = lattices.token_ids[:, slot]  # [b, k]
        if slot == 1:
            hidden, place = after_first[:, None], np.zeros((b, p), dtype=np.int64)
        else:
            # A node's slot is its depth; each row's nodes of this slot, without repetition.
            nodes = [np.unique(tree.nodes[:, slot - 2], return_inverse=True) for tree in trees]
            width = max(len(unique) for unique, _ in nodes)
            at, place = np.zeros((b, width), dtype=np.int64), np.zeros((b, p), dtype=np.int64)
            for row, (unique, inverse) in enumerate(nodes):
                at[row, : len(unique)] = unique
                place[row] = inverse
            hidden = after_nodes[np.arange(b)[:, None], at]  # [b, width, d]
        logps = model.score(hidden, ids)
        logps -= np.logaddexp.reduce(logps, axis=-1, keepdims=True)  # [b, width, k]
        chosen = (ids[:, None] == drafts[:, :, slot, None]).argmax(-1)  # [b, p], place among the slot's tokens
        total += np.where(ended, 0.0, logps[np.arange(b)[:, None], place, chosen])
        ended |= np.isin(drafts[:, :, slot], eos_token_ids)
    return total
