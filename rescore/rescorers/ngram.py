"""`ngram`: the p best paths by the heads' log-probs + alpha x an n-gram LM's, exactly ([A] section 4).

Nothing after end-of-text is ever accepted. Of several drafts a step none repeats another up to there: paths that
differ after it only are one, scored up to it. With p = 1 every path is scored to its end: a path that stops early adds
up fewer log-probs, so it would win too often, and with one draft a wrong end costs the step (measured on 60 examples of
each task, alpha 0.5: with paths that end, block efficiency at p = 16 is +2.2 % on samsum, +3.0 % on squad, +0.3 % on
xsum, -0.3 % on gsm8k; at p = 1 it would be -2.2 %, -0.1 %, -0.8 %, -0.6 %). The search knows one end-of-text: of
several it is the highest id, as the end of a chat's turn came into vocabularies after the end of a text.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self

import numpy as np

from lattices.errors import IncompatibleError, RescoreError
from lattices.lattice import Lattice
from lattices.ngram_search import NgramSearch
from lattices.paths import user_path
from lattices.search import PBest
from lm.ngram.kenlm import KenlmSearch
from lm.ngram.load import SHIPPED_NGRAM, load_ngram
from rescore.rescorers.base import Context, Rescorer, Target

DEFAULT_ALPHA = 0.5


class Ngram(Rescorer):
    """Exact global rescoring with one n-gram automaton; see `rescore.rescorers.base.Rescorer`.

    path: a folder of `rescore build-ngram`, its `automaton.bin`, an ARPA file (compiled once, then cached) or a KenLM
    binary (slow: it can't be compiled); empty: the model that is shipped for the base.
    """

    alpha: float = DEFAULT_ALPHA

    def __init__(self, path: str = "") -> None:
        self.path = user_path(path, "ngram:") if path else SHIPPED_NGRAM
        self.model = load_ngram(self.path)
        self.identity = f"ngram {self.model.sha256}"
        self._search: NgramSearch | KenlmSearch | None = None
        self._ending: NgramSearch | KenlmSearch | None = None  # the same with paths that end at end-of-text

    def search(self) -> NgramSearch | KenlmSearch:
        """The search it was fitted with. Raises `RescoreError` if it was not."""
        if self._search is None:
            raise RescoreError("an n-gram rescorer must be fitted to a base LM first (fit)")
        return self._search

    def fit(self, target: Target) -> Self:
        made_for = self.model.tokenizer_sha256
        if made_for and target.tokenizer_sha256 and made_for != target.tokenizer_sha256:
            base = target.base.name if target.base else "BASE"
            raise IncompatibleError(
                f"the n-gram model {self.path} was made for another tokenizer than the base LM's; build one, rescore "
                f"build-ngram CORPUS --base {base} --out DIR, and name it: ngram:DIR, context-ngram:DIR or "
                "joint:ngram=DIR (context-ngram:none needs none)"
            )
        fitted = copy.copy(self)
        fitted._search = self.model.search(target.vocab_size, target.eos_token_ids)
        ends = [token for token in target.eos_token_ids if token < target.vocab_size]
        fitted._ending = (
            self.model.search(target.vocab_size, target.eos_token_ids, end_token=max(ends)) if ends else None
        )
        return fitted

    def coverage(self, token_ids: np.ndarray) -> float:
        return self.search().coverage(token_ids)

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        return self.best(lattices, contexts, p).drafts

    def best(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> PBest:
        """The p best drafts with their scores."""
        lefts = [context.last(self.model.order - 1) for context in contexts]
        search = self._ending if p > 1 and self._ending else self.search()
        return search.p_best_after(lattices, lefts, p, weight=self.alpha)
