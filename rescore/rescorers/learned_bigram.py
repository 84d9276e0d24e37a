"""`learned-bigram`: the p best paths by the heads' log-probs + alpha x learned pair scores, exactly."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import numpy as np

from lattices.errors import IncompatibleError, RescoreError
from lattices.lattice import Lattice
from lattices.pair_search import pair_p_best
from lattices.paths import user_path
from lattices.search import p_best
from lm.base.catalog import BUILT_IN, load_projection
from lm.neural.learned_bigram import load_bigram, shipped_bigram
from lm.neural.model import base_with
from rescore.rescorers.base import Context, Rescorer, Target

if TYPE_CHECKING:
    from lm.base.model import BaseLM


class LearnedBigram(Rescorer):
    """Scores neighbouring tokens of a draft by a trained low-rank table.

    path: a folder of `rescore train-bigram`; empty: the shipped one.
    """

    alpha: float = 1.0  # it was trained to stand beside the heads at this weight

    def __init__(self, path: str = "") -> None:
        self.path = user_path(path, "learned-bigram:") if path else shipped_bigram(BUILT_IN)
        self.model = load_bigram(self.path)
        self.identity = f"learned-bigram {self.model.sha256}"
        self._base: str | None = None
        self._shared: BaseLM | None = None  # the same, where it is in memory as it would be loaded
        # By base: what each token says as the first and as the second of a pair, float32 [vocab, rank] each. Made when
        # first needed, and one for all copies, whatever their weights.
        self._tables: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def fit(self, target: Target) -> Self:
        config = self.model.config
        if target.base is None:
            raise IncompatibleError(f"the trace does not name its base LM, and {self.path} needs its embeddings")
        base = base_with(config.base_weights_sha256, target.base)  # adapters leave the embeddings as they are
        if base is None:
            raise IncompatibleError(
                f"the learned bigram {self.path} was made for {config.base_name}, not for {target.base.name}; "
                "train one for it: rescore train-bigram"
            )
        fitted = copy.copy(self)
        fitted._base = base.name
        in_memory = target.shared is not None and target.shared.identity == replace(base, dtype="float32")
        fitted._shared = target.shared if in_memory else None
        return fitted

    def prefill(self, contexts: Sequence[Context]) -> None:
        """See `Rescorer.prefill`: makes the tables, once."""
        if self.alpha != 0:
            self.pair_tables()

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        if self.alpha == 0:
            return p_best(lattices, p).drafts
        left, right = self.pair_tables()
        ids = lattices.token_ids
        pairs = left[ids[:, :-1]] @ right[ids[:, 1:]].transpose(0, 1, 3, 2)  # [n, h-1, k, k]
        return pair_p_best(lattices, pairs, p, weight=self.alpha).drafts

    def pair_tables(self) -> tuple[np.ndarray, np.ndarray]:
        """What each token says as the first and as the second of a pair, float32 `[vocab, rank]` each."""
        base = self._base
        if base is None:
            raise RescoreError("a learned bigram must be fitted to a base LM first (fit)")
        if base not in self._tables:
            loaded = load_projection(base) if self._shared is None else self._shared
            if loaded.identity.weights_sha256 != self.model.config.base_weights_sha256:
                raise IncompatibleError(f"what {base} stands for has changed: the learned bigram needs other weights")
            self._tables[base] = self.model.tables(loaded.output_embeddings.weight)
        return self._tables[base]
