"""`ngram`: the p best paths by the heads' log-probs + alpha x an n-gram LM's, exactly ([A] section 4).

`ngram:PATH` takes a folder of `rescore build-ngram`, its `automaton.bin`, an ARPA file (compiled once, then cached) or
a KenLM binary (slow: it can't be compiled); `ngram` alone the model that is shipped for the base.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lattices.errors import IncompatibleError, RescoreError
from lattices.lattice import Lattice
from lattices.ngram_search import NgramSearch
from lm.kenlm_search import KenlmSearch
from lm.ngram import SHIPPED_NGRAM, load_ngram
from rescore.rescorers.base import Context, Target

DEFAULT_ALPHA = 0.5


class Ngram:
    """Exact global rescoring with one n-gram automaton; see `rescore.rescorers.base.WeightedRescorer`."""

    def __init__(self, text: str = "", *, alpha: float = DEFAULT_ALPHA) -> None:
        self.path = Path(text).expanduser() if text else SHIPPED_NGRAM
        self.model = load_ngram(self.path)
        self.identity = f"ngram {self.model.sha256}"
        self.alpha = alpha
        self._search: NgramSearch | KenlmSearch | None = None

    def search(self) -> NgramSearch | KenlmSearch:
        """The search it was fitted with. Raises `RescoreError` if it was not."""
        if self._search is None:
            raise RescoreError("an n-gram rescorer must be fitted to a base LM first (fit)")
        return self._search

    def fit(self, target: Target) -> Ngram:
        """See `WeightedRescorer.fit`."""
        made_for = self.model.tokenizer_sha256
        if made_for and target.tokenizer_sha256 and made_for != target.tokenizer_sha256:
            raise IncompatibleError(
                f"the n-gram model {self.path} was made for another tokenizer than the base LM's; build one with "
                "rescore build-ngram --tokenizer BASE"
            )
        fitted = copy.copy(self)
        fitted._search = self.model.search(target.vocab_size, target.eos_token_ids)
        return fitted

    def weighted(self, alpha: float) -> Ngram:
        """See `WeightedRescorer.weighted`."""
        changed = copy.copy(self)
        changed.alpha = alpha
        return changed

    def coverage(self, token_ids: np.ndarray) -> float:
        """See `WeightedRescorer.coverage`."""
        return self.search().coverage(token_ids)

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        """See `Rescorer.draft`."""
        lefts = [context.last(self.model.order - 1) for context in contexts]
        return self.search().p_best_after(lattices, lefts, p, weight=self.alpha).drafts
