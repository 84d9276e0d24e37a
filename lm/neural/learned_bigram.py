"""The learned bigram: low-rank scores of neighbouring tokens in a draft, the cheapest neural rescorer; beyond [A].

score(a, b) = (E_a A) . (E_b B), with the base's embeddings E `[vocab, d]` and learned A, B `[d, rank]`: so few weights
that they can be trained on some ten thousand lattices (`lm.training.bigram`), and a search over their pair scores is
exact (`lattices.pair_search`). A checkpoint holds `left`, `right` `[d, rank]`, float16, and a `BigramConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lm.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Config, check_shapes, read_config, read_weights
from lm.files import SHIPPED, sha256_of_file
from lm.pages import release

FOLDER = "learned-bigram"


class BigramConfig(Config, frozen=True, kw_only=True):
    """For which base LM a bigram is."""

    hidden_size: int  # of its embeddings
    rank: int  # of the scores
    base_name: str
    base_weights_sha256: str
    tokenizer_sha256: str


@dataclass(frozen=True, eq=False)
class LearnedBigram:
    """The checkpoint in a folder: its configuration and A (`left`), B (`right`), float32 `[d, rank]`."""

    config: BigramConfig
    left: torch.Tensor
    right: torch.Tensor
    sha256: str

    def tables(self, embeddings: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """What each token has to say as the first and as the second of a pair: float32 `[vocab, rank]` each."""
        every = embeddings.float().cpu()
        tables = (every @ self.left).numpy(), (every @ self.right).numpy()
        release(embeddings)  # all of it was read, which is not needed any more
        return tables


def shipped_bigram(base_name: str) -> Path:
    """The folder of the learned bigram that is shipped for a base."""
    return SHIPPED / base_name / FOLDER


def load_bigram(folder: Path) -> LearnedBigram:
    """The checkpoint in a folder. Raises `RescoreError` if there is none, `InvalidDataError` for a broken one."""
    missing = f"no learned bigram in {folder}; train one: rescore train-bigram --corpus ... --out DIR"
    config = read_config(folder, BigramConfig, what="the configuration of a bigram", missing=missing)
    tensors = read_weights(folder, missing=missing)
    expected = {name: (config.hidden_size, config.rank) for name in ("left", "right")}
    check_shapes(folder, {name: value.shape for name, value in tensors.items()}, expected, CONFIG_FILE)
    left, right = tensors["left"].float(), tensors["right"].float()
    return LearnedBigram(config, left, right, sha256_of_file(folder / WEIGHTS_FILE))
