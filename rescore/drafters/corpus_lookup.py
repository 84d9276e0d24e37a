"""`corpus-lookup:DIR`: what followed the last tokens in a fixed corpus, by its suffix index (REST, He et al. 2024)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self

import numpy as np

from lattices.errors import RescoreError
from lattices.joined.sources import CORPUS
from lm.lookup_index import LookupIndex, open_lookup
from rescore.drafters.base import Continuations, TextDrafter, check_lengths
from rescore.rescorers.base import Context, Target

TOKENS = 10


class CorpusLookup(TextDrafter):
    """Proposes what followed the last tokens in a corpus.

    path: the folder of `rescore build-lookup`.
    tokens: of a draft after the base's own, at most; least, most: tokens of a match.
    """

    kind = CORPUS

    def __init__(self, path: str = "", *, tokens: int = TOKENS, least: int = 2, most: int = 16) -> None:
        if not path:
            raise RescoreError("corpus-lookup needs an index (rescore build-lookup); write corpus-lookup:DIR")
        check_lengths("corpus-lookup", tokens, least, most)
        self.tokens, self.least, self.most = tokens, least, most
        self.longest = tokens + 1
        self._take(open_lookup(path))

    def _take(self, index: LookupIndex) -> None:
        self.index = index
        self.identity = f"corpus-lookup {index.identity} {self.tokens} {self.least} {self.most}"

    @property
    def source(self) -> str:
        return f"corpus-lookup {self.index.identity[:12]}"

    def fit(self, target: Target) -> Self:
        fitted = copy.copy(self)
        fitted._take(open_lookup(
            self.index.path, tokenizer_sha256=target.tokenizer_sha256, vocab_size=target.vocab_size,
            base=target.base.name if target.base else "the base LM",
        ))  # fmt: skip
        return fitted

    def continuations(self, contexts: Sequence[Context], firsts: np.ndarray, count: int) -> list[Continuations]:
        how = {"count": count, "length": self.tokens, "least": self.least, "most": self.most}
        return [
            Continuations(*self.index.corpus.continuations([*context.last(self.most - 1), int(first)], **how))
            for context, first in zip(contexts, firsts, strict=True)
        ]
