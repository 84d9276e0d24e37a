"""What draft layers are, whoever trained them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lattices.errors import IncompatibleError
from lm.base.cache import TreeCache
from lm.base.model import BaseLM
from lm.keys import key_of, remembered_sha256


class DraftNet(ABC):
    """Draft layers beside a loaded base LM.

    base: whose embeddings or projection they may share.
    layers: of the base whose states they begin from (`lm.base.states`).
    config: of their own attention.
    token_ids: int64 `[v]`, the tokens that they have logits of; None: all of the base's.
    """

    base: BaseLM
    layers: tuple[int, ...]
    config: Any
    token_ids: torch.Tensor | None = None

    def new_cache(self) -> TreeCache:
        """An empty cache of one row."""
        return TreeCache(self.config, 1, self.base.device)

    @torch.inference_mode()
    def read(self, cache: TreeCache, tokens: np.ndarray, states: torch.Tensor, parents: np.ndarray) -> torch.Tensor:
        """Reads n new nodes of a tree, tokens and parents int `[n]` (earlier nodes, or -1), each with the state of the
        position before its token, `[n, d]`; the states after them `[n, d]`."""
        return self._read(cache, tokens, states, *cache.place(parents[None]))

    @torch.inference_mode()
    def read_text(self, cache: TreeCache, tokens: np.ndarray, states: torch.Tensor) -> torch.Tensor:
        """The same with n tokens that follow each other, which are settled."""
        after = self._read(cache, tokens, states, *cache.place_text(len(tokens)))
        cache.settle([range(len(tokens))])
        return after

    def _read(
        self, cache: TreeCache, tokens: np.ndarray, states: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64)).to(self.base.device)
        return self.forward(ids[None], states[None], cache, positions, mask)[0]

    def begun(self, states: torch.Tensor) -> torch.Tensor:
        """The base's states `[n, layers * d]` as the layers take them, `[n, d']`."""
        return states

    @abstractmethod
    def forward(
        self, tokens: torch.Tensor, states: torch.Tensor, cache: TreeCache, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Tokens `[1, n]` and states `[1, n, d]` at these positions `[1, n]`, under a mask bool `[1, 1, n, m]`: the
        states after them."""

    @abstractmethod
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits `[n, v]` after states `[n, d]`."""


class NetSource(ABC):
    """Draft layers on disk, looked up and checked but not read.

    name: as they were asked for, for messages. sha256: of all that they compute with.
    hidden_size, vocab_size: of the base that they are for; None: not told.
    """

    name: str
    sha256: str = ""
    _hashes: Mapping[Path, str]
    hidden_size: int | None = None
    vocab_size: int | None = None

    def _identify(self, files: Sequence[Path], *settings: Any) -> None:
        """Says what is in these files, read with these settings."""
        self._hashes = {file: remembered_sha256(file) for file in files}
        self.sha256 = key_of([*self._hashes.values(), *settings])

    def check_unchanged(self) -> None:
        """Raises `IncompatibleError` if the files are no longer those that were looked up."""
        if any(remembered_sha256(file) != known for file, known in self._hashes.items()):
            raise IncompatibleError(f"the files of {self.name} were replaced while they were read; run it again")

    @abstractmethod
    def layers(self, base: BaseLM) -> tuple[int, ...]:
        """`DraftNet.layers` beside this base. Raises `IncompatibleError` if it has too few."""

    @abstractmethod
    def load(self, base: BaseLM) -> DraftNet:
        """The layers. Raises `IncompatibleError` if they do not fit the base, `InvalidDataError` for broken files."""
