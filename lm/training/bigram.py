"""Trains a learned bigram (`lm.neural.learned_bigram`) on the heads' lattices of a corpus.

As a conditional random field: of all paths of a lattice, those that begin with the base's own continuation, as far as
the lattice holds it, should have the most probability.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from lattices.errors import InvalidDataError
from lattices.lattice import Lattice, concatenated
from lm.base.model import BaseLM
from lm.checkpoint import write_checkpoint
from lm.heads.block_heads import BlockHeads
from lm.keys import key_of
from lm.neural.learned_bigram import BigramConfig
from lm.training.data import HeadData, check_apart, chosen_share, kept_file, read_arrays
from lm.training.options import BigramOptions
from lm.training.trainer import Trainer

BATCH_ROWS = 256
SHARD_ROWS = 4096  # lattices that are kept together; what a kill can lose


@dataclass(frozen=True)
class TargetLattices:
    """Lattices of a corpus and what the base LM wrote there."""

    lattice: Lattice  # [n, h, k]
    targets: np.ndarray  # int [n, h], the base's continuation, -1 after its end
    segments: np.ndarray  # int64 [n], the segment of the corpus that each is of
    source: str
    sha256: str  # of the corpus
    inputs_sha256: str = ""  # of all that they follow from


def lattices_of_corpus(
    base: BaseLM,
    heads: BlockHeads,
    data: HeadData,
    *,
    k: int,
    rows: int,
    seed: int,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
) -> TargetLattices:
    """Lattices at up to `rows` positions of a corpus, drawn at random; targets as the corpus has them.

    cache: folder for them, from which an interrupted call goes on.
    """
    inputs_sha256 = _sha256_of_inputs(base, heads, data, k, rows, seed)
    folder = cache / f"lattices-{inputs_sha256[:16]}"
    rng = np.random.default_rng([seed, 0xB16])
    chosen = np.sort(rng.permutation(len(data))[:rows])
    segments = np.searchsorted(data.ends, chosen, side="right")
    places = chosen[:, None] + np.arange(heads.h)
    targets = np.where(
        places < data.ends[segments][:, None], data.targets[np.minimum(places, len(data) - 1)], -1
    )  # [n, h]

    def computed(start: int) -> Lattice:
        parts = []
        shard = chosen[start : start + SHARD_ROWS]
        for first in range(0, len(shard), BATCH_ROWS):
            states = data.states.at(shard[first : first + BATCH_ROWS])
            hidden = torch.from_numpy(states).to(base.device, base.dtype)
            parts.append(heads.lattice(base, hidden, base.project(hidden), k))
            if progress:
                progress(start + first + len(hidden), len(chosen))
        return concatenated(parts)

    def kept(start: int) -> Lattice:
        def write(stream: IO[bytes]) -> None:
            np.savez(stream, **vars(computed(start)))

        return Lattice(**kept_file(folder / f"{start:09d}.npz", "the lattices", read_arrays, write))

    lattice = concatenated([kept(start) for start in range(0, len(chosen), SHARD_ROWS)])
    return TargetLattices(lattice, targets, segments, data.source, data.sha256, inputs_sha256)


def _sha256_of_inputs(base: BaseLM, heads: BlockHeads, data: HeadData, k: int, rows: int, seed: int) -> str:
    """sha256 of all that lattices follow from; a corpus' own hash says neither how it was cut nor templated."""
    identity = {**dataclasses.asdict(base.identity), "name": None}
    settings = {
        "base": identity, "heads": heads.config, "heads_sha256": heads.sha256, "k": k, "rows": rows, "seed": seed,
        "shard_rows": SHARD_ROWS,
    }  # fmt: skip
    digest = hashlib.sha256(key_of(settings).encode())
    for tokens in (data.targets, data.ends, data.contexts, data.context_ends):
        digest.update(np.ascontiguousarray(tokens).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class HeldOutPaths:
    """What a bigram makes of held-out lattices."""

    loss: float  # mean, nats a lattice
    unrescored_loss: float  # without the scores
    lattices: int

    def line(self) -> str:
        """The same in words."""
        return (
            f"{self.loss:.4f} nats a held-out lattice, {self.unrescored_loss:.4f} without it ({self.lattices} lattices)"
        )


class BigramTrainer(Trainer[HeldOutPaths]):
    """One training of a learned bigram; see `Trainer.train`."""

    memory_option = "--batch"

    def __init__(self, base: BaseLM, data: Sequence[TargetLattices], options: BigramOptions) -> None:
        options.check()
        self.base, self.data, self.options = base, list(data), options
        check_apart(data)
        if sum(len(d.targets) for d in self.data) == 0:
            raise InvalidDataError("the corpus gives no lattices; a bigram needs text to learn from")
        self.lattice = concatenated([d.lattice for d in self.data])
        self.targets = np.concatenate([d.targets for d in self.data])
        # Whole segments are held out: neighbouring lattices share most of their targets.
        pairs = [np.stack([np.full(len(d.segments), i), d.segments], 1) for i, d in enumerate(self.data)]
        segment = np.unique(np.concatenate(pairs), axis=0, return_inverse=True)[1].reshape(-1)
        count = int(segment.max()) + 1
        if count < 2:
            raise InvalidDataError("the corpus has fewer than two segments of text; a bigram needs more to learn from")
        measured = np.isin(segment, chosen_share(count, options.held_out, options.seed)[0])
        self.held_out, self.rows = np.flatnonzero(measured), np.flatnonzero(~measured)
        self.embeddings = base.output_embeddings.weight.detach().float()
        torch.manual_seed(options.seed)
        d = self.embeddings.shape[1]
        scale = 1.0 / (self.embeddings.std().item() * math.sqrt(d))
        self.left = torch.nn.Parameter((torch.randn(d, options.rank) * scale).to(base.device))
        self.right = torch.nn.Parameter(torch.zeros(d, options.rank, device=base.device))
        super().__init__({"left": self.left, "right": self.right}, options, base.device)

    def _losses(self, step: int) -> Iterator[torch.Tensor]:
        rng = np.random.default_rng([self.options.seed, step])
        rows = self.rows[rng.integers(len(self.rows), size=self.options.batch)]
        mine = rows[self.workers.rank :: self.workers.count]
        if len(mine):
            yield self._path_losses(mine, weight=1.0).sum() / len(rows)

    def _path_losses(self, rows: np.ndarray, *, weight: float) -> torch.Tensor:
        """-log probability of the paths that hold each lattice's target as far as it goes, `[n]`."""
        ids = torch.from_numpy(self.lattice.token_ids[rows].astype(np.int64)).to(self.device)  # [n, h, k]
        logps = torch.from_numpy(self.lattice.logps[rows]).to(self.device)
        right = torch.from_numpy(self.targets[rows]).to(self.device)[:, :, None] == ids  # [n, h, k]
        right[:, 0, 1:] = False  # slot 1's token is fixed: where it is not the target, nothing is
        reached = right.any(-1).cumprod(dim=1).bool()  # the target is in every slot up to here
        allowed = right | ~reached[..., None]
        rows_of = self.embeddings[ids]  # [n, h, k, d]
        pairs = weight * (rows_of[:, :-1] @ self.left) @ (rows_of[:, 1:] @ self.right).transpose(-1, -2)
        return _log_mass(logps, pairs, torch.ones_like(allowed)) - _log_mass(logps, pairs, allowed)

    @torch.no_grad()
    def evaluate(self) -> HeldOutPaths:
        """The held-out loss, with and without the scores."""
        sums = {0.0: 0.0, 1.0: 0.0}
        for start in range(0, len(self.held_out), self.options.batch):
            rows = self.held_out[start : start + self.options.batch]
            for weight in sums:
                sums[weight] += float(self._path_losses(rows, weight=weight).sum())
        count = len(self.held_out)
        return HeldOutPaths(round(sums[1.0] / count, 4), round(sums[0.0] / count, 4), count)

    def _save(self, out: Path) -> None:
        identity = self.base.identity
        config = BigramConfig(
            hidden_size=self.embeddings.shape[1],
            rank=self.options.rank,
            base_name=identity.name,
            base_weights_sha256=identity.weights_sha256,
            tokenizer_sha256=identity.tokenizer_sha256,
        )
        write_checkpoint(out, self.parameters, config)

    def _settings(self) -> dict[str, Any]:
        return {
            "options": dataclasses.asdict(self.options),
            "base": dataclasses.asdict(self.base.identity),
            "data": [
                {"source": d.source, "sha256": d.sha256, "lattices": len(d.targets), "inputs_sha256": d.inputs_sha256}
                for d in self.data
            ],
        }


def _log_mass(logps: torch.Tensor, pairs: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """log of the summed exp-scores of the paths through allowed tokens: `[n, h, k]`, `[n, h-1, k, k]` -> `[n]`.

    The first slot's token is fixed.
    """
    barred = torch.where(allowed, 0.0, -math.inf)
    barred[:, 0, 1:] = -math.inf
    forward = barred[:, 0] + logps[:, 0]
    for slot in range(1, logps.shape[1]):
        into = torch.logsumexp(forward[:, :, None] + pairs[:, slot - 1], dim=1)
        forward = into + logps[:, slot] + barred[:, slot]
    return torch.logsumexp(forward, dim=-1)
