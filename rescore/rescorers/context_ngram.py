"""`context-ngram`: an n-gram model mixed with one of the prompt and the output so far; a beam, beyond [A]."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self

import numpy as np

from lattices.context_search import ContextCounts, context_p_best
from lattices.errors import RescoreError
from lattices.lattice import Lattice
from lattices.ngram_search import NgramSearch
from lattices.ngrams import MAX_ORDER
from lattices.search import PBest
from rescore.rescorers.base import Context, Rescorer, Target
from rescore.rescorers.ngram import Ngram

NO_MODEL = "none"


class ContextNgram(Rescorer):
    """Scores drafts by the n-grams of the prompt and the output so far, backed by a general model.

    path: the general model, as `Ngram` takes it; `none` for none.
    share: of the context's n-grams in the mixture, 0 to 1.
    """

    alpha: float = 1.0  # best or near the best on all tasks of docs/results.md; twice the plain n-gram's

    def __init__(self, path: str = "", *, share: float = 0.5) -> None:
        if not 0 <= share <= 1:
            raise RescoreError(f"context-ngram: share = {share:g}; it is a number from 0 to 1")
        self.share = share
        self.general = None if path == NO_MODEL else Ngram(path)
        self.identity = f"context-ngram {self.general.identity if self.general else NO_MODEL} {share}"
        self._search: NgramSearch | None = None

    def fit(self, target: Target) -> Self:
        fitted = copy.copy(self)
        if self.general:
            search = self.general.fit(target).search()
            if not isinstance(search, NgramSearch):
                raise RescoreError(f"context-ngram can't use the KenLM binary {self.general.path}; give its ARPA file")
            fitted._search = search
        return fitted

    def coverage(self, token_ids: np.ndarray) -> float:
        """See `Rescorer.coverage`: that of the general model, 1 without one."""
        return self._search.coverage(token_ids) if self._search else 1.0

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        return self.best(lattices, contexts, p).drafts

    def best(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> PBest:
        """The p best drafts with their scores."""
        if self.general and self._search is None:
            raise RescoreError("a rescorer with an n-gram model must be fitted to a base LM first (fit)")
        counts = [_counts(context) for context in contexts]
        lefts = [context.last(MAX_ORDER - 1) for context in contexts]
        return context_p_best(lattices, self._search, lefts, counts, p, weight=self.alpha, share=self.share)


def _counts(context: Context) -> ContextCounts:
    """The context's n-grams, counted on from where they were at the step before."""
    counts: ContextCounts = context.state.setdefault("context n-grams", ContextCounts())
    counts.extend(context.since(len(counts.tokens)))
    return counts
