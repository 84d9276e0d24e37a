"""`context-ngram`: an n-gram model mixed with one of the prompt and the output so far; a beam, beyond [A].

`context-ngram[:[PATH][@SHARE]]`: the general model is `ngram`'s, `none` for none; SHARE (default 0.5) is the context's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self

import numpy as np

from lattices.automaton import MAX_ORDER
from lattices.context_search import ContextCounts, context_p_best
from lattices.errors import RescoreError
from lattices.lattice import Lattice
from lattices.ngram_search import NgramSearch
from lattices.search import PBest
from rescore.rescorers.base import Context, Rescorer, Target
from rescore.rescorers.ngram import Ngram

DEFAULT_ALPHA = 1.0  # best or near the best on all tasks of docs/results.md; twice the plain n-gram's
DEFAULT_SHARE = 0.5
NO_MODEL = "none"


class ContextNgram(Rescorer):
    """See `rescore.rescorers.base.Rescorer`."""

    alpha: float

    def __init__(self, text: str = "", *, alpha: float = DEFAULT_ALPHA) -> None:
        path, _, share = text.rpartition("@") if "@" in text else (text, "", str(DEFAULT_SHARE))
        try:
            self.share = float(share)
        except ValueError:
            self.share = -1.0
        if not 0 <= self.share <= 1:
            raise RescoreError(f"context-ngram:{text}: the share after @ is a number from 0 to 1, like @0.5")
        self.general = None if path == NO_MODEL else Ngram(path)
        self.identity = f"context-ngram {self.general.identity if self.general else NO_MODEL} {self.share}"
        self.alpha = alpha
        self._search: NgramSearch | None = None

    def fit(self, target: Target) -> Self:
        """See `Rescorer.fit`."""
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
        """See `Rescorer.draft`."""
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
    counts: ContextCounts = context.kept.setdefault("context n-grams", ContextCounts())
    done = len(counts.tokens)
    if done == 0:
        counts.extend(context.prompt_ids)
        done = len(context.prompt_ids)
    counts.extend(context.output_ids[done - len(context.prompt_ids) :])
    return counts
