"""`heads`: the base's block heads. What they propose is in every trace; live the decoder asks them.

`heads:vocabulary=N` drafts from the N tokens that the base says most (`lm.draft_vocabulary`) and those of the prompt:
heads 2 to h project to no others, which is most of their work. Their log-probs are of these tokens, so that what is in
a trace of all does not tell them; they are recorded once with the states of the known output.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from lattices.errors import IncompatibleError, RescoreError
from lattices.joined.sources import HEADS
from lattices.lattice import Lattice
from lm.draft_vocabulary import find_draft_vocabulary
from rescore.drafters.base import LatticeDrafter
from rescore.rescorers.base import Context, Target
from rescore.traced_rows import lattices_along

if TYPE_CHECKING:
    from lm.base.model import BaseLM
    from lm.heads.projection import DraftProjection, DraftRows


class Heads(LatticeDrafter):
    """Proposes what the block heads do.

    vocabulary: of the most frequent tokens; None: all tokens. ranking: the file that ranks them; empty: the one that is
    shipped for the base's tokenizer.
    """

    name = identity = "heads"
    kind = HEADS
    traced = ""

    def __init__(self, vocabulary: int | None = None, *, ranking: str = "") -> None:
        if vocabulary is not None and vocabulary < 1:
            raise RescoreError(f"heads: vocabulary = {vocabulary}; give 1 token or more, or leave it out for all")
        if ranking and vocabulary is None:
            raise RescoreError("heads: a ranking is for heads that draft from a part of it; add vocabulary=N")
        self.size, self._ranking = vocabulary, ranking
        self.held = vocabulary
        self._target: Target | None = None
        self._token_ids = np.zeros(0, dtype=np.int64)  # that they draft from beside the prompt's; none: all
        self._rows: DraftRows | None = None

    def fit(self, target: Target) -> Self:
        """See `Drafter.fit`. Raises `RescoreError` for a vocabulary larger than the base's or without ranking."""
        fitted = copy.copy(self)
        fitted.traced, fitted._target, fitted._rows = target.traced, target, None
        if self.size is None:
            return fitted
        base = target.base.name if target.base else "the base"
        if self.size > target.vocab_size:
            raise IncompatibleError(
                f"heads: vocabulary = {self.size}, but {base} has {target.vocab_size} tokens; give fewer, or "
                "leave it out for all"
            )
        if self.size == target.vocab_size:
            return fitted
        found = find_draft_vocabulary(self._ranking, tokenizer_sha256=target.tokenizer_sha256, base=base)
        fitted._token_ids = found.ranked(target.vocab_size)[: self.size]
        digest = hashlib.sha256(np.sort(fitted._token_ids).tobytes()).hexdigest()
        fitted.identity = f"heads of {self.size} tokens {digest}"
        return fitted

    @property
    def draws_on_all(self) -> bool:
        """Whether they draft from all tokens, so that a trace has what they propose."""
        return not len(self._token_ids)

    @property
    def source(self) -> str:
        """See `Drafter.source`: weights for heads are none for the lattices of a trace of another drafter."""
        return f"heads-of-{' '.join(word[:12] for word in self.traced.split())}" if self.traced else "heads"

    def projection(self, base: BaseLM, prompt_ids: Sequence[int]) -> DraftProjection | None:
        """The projection to what they draft from at a request; None: to all tokens."""
        if self.draws_on_all:
            return None
        import torch

        from lm.heads.projection import DraftRows

        if self._rows is None or self._rows.base is not base or not base.from_files:  # weights in memory may change
            self._rows = DraftRows(base, torch.from_numpy(self._token_ids))
        return self._rows.with_tokens(prompt_ids)

    def computed(self, contexts: Sequence[Context], firsts: np.ndarray, k: int) -> Lattice:
        raise RescoreError("there are no block heads to draft with; give some (--heads), or other drafters only")

    def record(self, prompt_ids: np.ndarray, output_ids: np.ndarray, k: int) -> tuple[Lattice, np.ndarray]:
        """See `LatticeDrafter.record`: one pass of the base over prompt and output, with at most `vocabulary` entries a
        slot."""
        if self._target is None or self._target.models is None:
            raise RescoreError(
                f"{self.name} drafts with the base and its heads, and a trace that is given has only what they propose "
                "of all tokens; drop --trace"
            )
        base, heads = self._target.models()
        assert heads is not None, "what drafts with heads is refused without"
        base.unpack()  # what is recorded is the same to the last bit whatever was decoded before
        (hidden,) = base.states_before([prompt_ids.tolist()], [output_ids.tolist()])
        projection = self.projection(base, prompt_ids.tolist())
        states = hidden.to(base.heads_dtype).cpu().numpy()
        return lattices_along(base, heads, states, output_ids, min(k, self.size or k), projection)
