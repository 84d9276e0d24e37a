"""The learned bigram: low-rank scores of neighbouring tokens in a draft, the cheapest neural rescorer; beyond [A].

score(a, b) = (E_a A) . (E_b B), with the base's embeddings E `[vocab, d]` and learned A, B `[d, rank]`: so few weights
that they can be trained on some ten thousand lattices, and a search over their pair scores is exact
(`lattices.pair_search`). Trained as a conditional random field: of all paths of a lattice, those that begin with the
base's own continuation, as far as the lattice holds it, should have the most probability. A checkpoint is a folder:
`model.safetensors` (`left`, `right` `[d, rank]`, float16) and `config.json` (`BigramConfig`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save as arrays_to_bytes
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from lattices.errors import InvalidDataError, RescoreError
from lattices.lattice import Lattice
from lm.base.model import BaseLM
from lm.files import SHIPPED, atomic_file, read_json_object, sha256_of_file, write_json
from lm.heads.block_heads import BlockHeads
from lm.keys import key_of
from lm.locks import tell
from lm.training.data import HeadData, check_apart
from lm.training.trainer import Trainer, check_training

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
FOLDER = "learned-bigram"
BATCH_ROWS = 256
SHARD_ROWS = 4096  # lattices that are kept together; what a kill can lose


@dataclass(frozen=True)
class BigramConfig:
    """For which base: `hidden_size` of its embeddings and `rank` of the scores."""

    hidden_size: int
    rank: int
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
        return (every @ self.left).numpy(), (every @ self.right).numpy()


def shipped_bigram(base_name: str) -> Path:
    """The folder of the learned bigram that is shipped for a base."""
    return SHIPPED / base_name / FOLDER


def load_bigram(folder: Path) -> LearnedBigram:
    """The checkpoint in a folder. Raises `RescoreError` if there is none, `InvalidDataError` for a broken one."""
    missing = f"no learned bigram in {folder}; train one: rescore train-bigram --corpus ... --out DIR"
    fields = read_json_object(folder / CONFIG_FILE, missing=missing)
    try:
        config = BigramConfig(**fields)
        tensors = load_file(folder / WEIGHTS_FILE)
    except TypeError as error:
        reason = str(error).removeprefix("BigramConfig.__init__() ")
        raise InvalidDataError(f"{folder / CONFIG_FILE} is not the configuration of a bigram: {reason}") from error
    except OSError as error:
        raise RescoreError(f"{missing} ({error.strerror or error})") from error
    except SafetensorError as error:
        raise InvalidDataError(f"can't read {folder / WEIGHTS_FILE}: {error}; get or train it again") from error
    shapes = {name: list(value.shape) for name, value in tensors.items()}
    if shapes != {name: [config.hidden_size, config.rank] for name in ("left", "right")}:
        raise InvalidDataError(f"{folder / WEIGHTS_FILE} does not fit its {CONFIG_FILE}: it holds {shapes}")
    left, right = tensors["left"].float(), tensors["right"].float()
    return LearnedBigram(config, left, right, sha256_of_file(folder / WEIGHTS_FILE))


@dataclass(frozen=True)
class TargetLattices:
    """Lattices int32, float32 `[n, h, k]`, the base's continuation `[n, h]` (-1 behind its end), and the segment of
    the corpus that each is of, int64 `[n]`. `sha256` is the corpus', `made_of` of all that they follow from."""

    lattice: Lattice
    targets: np.ndarray
    segments: np.ndarray
    source: str
    sha256: str
    made_of: str = ""


def lattices_of_corpus(
    base: BaseLM,
    heads: BlockHeads,
    data: HeadData,
    *,
    k: int,
    rows: int,
    seed: int,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TargetLattices:
    """Lattices at up to `rows` positions of a corpus, drawn at random; targets as the corpus has them.

    In the folder `cache` they are kept as they come, and what is there already, and whole, is not made again.
    """
    h = heads.h
    made_of = _made_of(base, heads, data, k, rows, seed)
    kept = cache / f"lattices-{made_of[:16]}" if cache else None
    rng = np.random.default_rng([seed, 0xB16])
    chosen = np.sort(rng.permutation(len(data))[:rows])
    segments = np.searchsorted(data.ends, chosen, side="right")
    ends = data.ends[segments]
    places = chosen[:, None] + np.arange(h)
    targets = np.where(places < ends[:, None], data.targets[np.minimum(places, len(data) - 1)], -1)

    def made(count: int) -> None:
        if progress:
            progress(count, len(chosen))

    parts = []
    for start in range(0, len(chosen), SHARD_ROWS):
        path = kept / f"{start:09d}.safetensors" if kept else None
        places_here = chosen[start : start + SHARD_ROWS]
        held = _read_shard(path, (len(places_here), h, k)) if path is not None else None
        if held is not None:
            parts.append(held)
        else:
            parts.append(_lattices_at(base, heads, data, places_here, k, start, made))
            if path is not None:
                shard = {"token_ids": parts[-1].token_ids, "logps": parts[-1].logps}
                with atomic_file(path) as temporary:
                    temporary.write_bytes(arrays_to_bytes(shard))
    lattices = Lattice(np.concatenate([p.token_ids for p in parts]), np.concatenate([p.logps for p in parts]))
    return TargetLattices(lattices, targets, segments, data.source, data.sha256, made_of)


def _lattices_at(
    base: BaseLM,
    heads: BlockHeads,
    data: HeadData,
    places: np.ndarray,
    k: int,
    before: int,
    made: Callable[[int], None],
) -> Lattice:
    ids, logps = [], []
    for start in range(0, len(places), BATCH_ROWS):
        hidden = torch.from_numpy(data.states.at(places[start : start + BATCH_ROWS])).to(base.device, base.dtype)
        lattice = heads.lattice(base, hidden, base.project(hidden), k)
        ids.append(lattice.token_ids)
        logps.append(lattice.logps)
        made(before + start + len(hidden))
    return Lattice(np.concatenate(ids), np.concatenate(logps))


def _read_shard(path: Path, shape: tuple[int, int, int]) -> Lattice | None:
    """Lattices that are kept; None if there are none, or broken ones, which are made again."""
    if not path.is_file():
        return None
    try:
        tensors = load_arrays(path)
        lattice = Lattice(tensors["token_ids"], tensors["logps"])
        if lattice.token_ids.shape == lattice.logps.shape == shape:
            return lattice
        reason = f"they have the shape {lattice.token_ids.shape}"
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = str(error)
    tell(f"the lattices in {path} are broken ({reason}); they are made again")
    return None


def _made_of(base: BaseLM, heads: BlockHeads, data: HeadData, k: int, rows: int, seed: int) -> str:
    """sha256 of all that lattices follow from; a corpus' own hash says neither how it was cut nor templated."""
    identity = {**dataclasses.asdict(base.identity), "name": None}
    settings = {
        "base": identity, "heads": heads.config, "k": k, "rows": rows, "seed": seed, "shard_rows": SHARD_ROWS
    }  # fmt: skip
    digest = hashlib.sha256(key_of(settings).encode())
    for tokens in (data.targets, data.ends, data.contexts, data.context_ends):
        digest.update(np.ascontiguousarray(tokens).tobytes())
    for _, value in sorted(heads.net.state_dict().items()):
        digest.update(value.float().cpu().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class BigramOptions:
    """How a bigram is trained: `rank`, `rows` lattices of each corpus with `k` tokens, `batch` of them per step."""

    rank: int = 128
    k: int = 16
    rows: int = 30000
    batch: int = 512
    steps: int = 1500
    learning_rate: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.05
    held_out: float = 0.05
    evaluate_every: int = 250
    seed: int = 0

    def check(self) -> None:
        """Raises `RescoreError` for the first option that is out of its range."""
        check_training(self, {"rank": 1, "k": 2, "rows": 2, "batch": 1})


@dataclass(frozen=True)
class HeldOutPaths:
    """On held-out lattices: mean `loss` (nats a lattice) with the scores, and `unrescored_loss` without."""

    loss: float
    unrescored_loss: float
    lattices: int


class BigramTrainer(Trainer[HeldOutPaths]):
    """One training of a learned bigram; see `Trainer.train`."""

    memory_option = "--batch"

    def __init__(self, base: BaseLM, data: Sequence[TargetLattices], options: BigramOptions) -> None:
        options.check()
        self.base, self.data, self.options = base, list(data), options
        check_apart(data)
        if sum(len(d.targets) for d in self.data) == 0:
            raise InvalidDataError("the corpus gives no lattices; a bigram needs text to learn from")
        self.ids = np.concatenate([d.lattice.token_ids for d in self.data])
        self.logps = np.concatenate([d.lattice.logps for d in self.data])
        self.targets = np.concatenate([d.targets for d in self.data])
        # Whole segments are held out: neighbouring lattices share most of their targets.
        pairs = np.concatenate(
            [np.stack([np.full(len(d.segments), i), d.segments], 1) for i, d in enumerate(self.data)]
        )
        segment = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
        count = int(segment.max()) + 1
        if count < 2:
            raise InvalidDataError("the corpus has fewer than two segments of text; a bigram needs more to learn from")
        held = max(1, min(int(count * options.held_out), count - 1))
        chosen = np.random.default_rng([options.seed, 0xDA7A]).permutation(count)[:held]
        is_held = np.isin(segment, chosen)
        self.held_out, self.rows = np.flatnonzero(is_held), np.flatnonzero(~is_held)
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
        ids = torch.from_numpy(self.ids[rows].astype(np.int64)).to(self.device)  # [n, h, k]
        logps = torch.from_numpy(self.logps[rows]).to(self.device)
        right = torch.from_numpy(self.targets[rows]).to(self.device)[:, :, None] == ids  # [n, h, k]
        right[:, 0, 1:] = False  # slot 1's token is fixed: where it is not the target, nothing is
        held = right.any(-1).cumprod(dim=1).bool()  # the target is in every slot up to here
        allowed = right | ~held[..., None]
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
        tensors = {n: p.detach().to("cpu", torch.float16).contiguous() for n, p in self.parameters.items()}
        with atomic_file(out / WEIGHTS_FILE) as temporary:
            temporary.write_bytes(to_bytes(tensors))
        write_json(out / CONFIG_FILE, dataclasses.asdict(config))

    def _settings(self) -> dict[str, Any]:
        return {
            "options": dataclasses.asdict(self.options),
            "base": dataclasses.asdict(self.base.identity),
            "data": [
                {"source": d.source, "sha256": d.sha256, "lattices": len(d.targets), "made_of": d.made_of}
                for d in self.data
            ],
        }


def _log_mass(logps: torch.Tensor, pairs: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """log of the summed exp-scores of the paths through allowed tokens: `[n, h, k]`, `[n, h-1, k, k]` -> `[n]`.

    The first slot's token is fixed.
    """
    barred = torch.where(allowed, 0.0, -math.inf)
    forward = barred[:, 0] + logps[:, 0]
    first_only = torch.full_like(forward, -math.inf)
    first_only[:, 0] = forward[:, 0]
    forward = first_only
    for slot in range(1, logps.shape[1]):
        into = torch.logsumexp(forward[:, :, None] + pairs[:, slot - 1], dim=1)
        forward = into + logps[:, slot] + barred[:, slot]
    return torch.logsumexp(forward, dim=-1)
