"""`ngram`: the p best paths by the heads' log-probs + alpha x an n-gram LM's, exactly ([A] section 4).

`ngram:PATH` takes a folder of `rescore build-ngram`, its `automaton.bin`, or an ARPA file (compiled when loaded);
`ngram` alone the model that is shipped for the base.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lattices.automaton import Automaton
from lattices.errors import IncompatibleError, RescoreError
from lattices.lattice import Lattice
from lattices.ngram_search import NgramSearch
from lattices.ngrams import UNKNOWN
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
        self._search: NgramSearch | None = None

    @property
    def automaton(self) -> Automaton:
        """The compiled model."""
        return self.model.automaton

    @property
    def words(self) -> np.ndarray:
        """The model's word of every token id of the base it was fitted to."""
        return self._fitted().words

    def fit(self, target: Target) -> Ngram:
        """See `WeightedRescorer.fit`."""
        made_for = self.model.tokenizer_sha256
        if made_for and target.tokenizer_sha256 and made_for != target.tokenizer_sha256:
            raise IncompatibleError(
                f"the n-gram model {self.path} was made for another tokenizer than the base LM's; build one with "
                "rescore build-ngram --tokenizer BASE"
            )
        words = self.model.words_of_tokens(target.vocab_size, target.eos_token_ids)
        fitted = copy.copy(self)
        fitted._search = NgramSearch(self.automaton, words)
        return fitted

    def weighted(self, alpha: float) -> Ngram:
        """See `WeightedRescorer.weighted`."""
        changed = copy.copy(self)
        changed.alpha = alpha
        return changed

    def coverage(self, token_ids: np.ndarray) -> float:
        """See `WeightedRescorer.coverage`."""
        return float((self.words[token_ids] != UNKNOWN).mean()) if token_ids.size else 1.0

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        """See `Rescorer.draft`."""
        search = self._fitted()
        needed = self.automaton.order - 1
        states = np.array([search.state_after(context.last(needed)) for context in contexts], dtype=np.int32)
        return search.p_best(lattices, states, p, weight=self.alpha).drafts

    def _fitted(self) -> NgramSearch:
        if self._search is None:
            raise RescoreError("an n-gram rescorer must be fitted to a base LM first (fit)")
        return self._search
