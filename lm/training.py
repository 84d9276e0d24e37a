"""Trains block heads on a frozen base LM, from cached hidden states; the base itself is never run here.

Loss of head i at a position: cross-entropy against (1 - soft) x the token that stands i steps ahead + soft x the base's
own distribution there, which the cached state of that position gives through the vocabulary projection. A step draws
whole segments and a few of the heads. Everything random follows from (seed, step), so a resumed training is the same
training. Sources: [A] section 3 (sum of the heads' cross-entropies), [B] section 6 (distilled data, random heads).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lm.base import BaseLM
from lm.block_heads import BlockHeads, BlockHeadsConfig, heads_sha256, load_heads
from lm.head_data import HeadData
from lm.losses import (
    VocabularySubset,
    check_precision,
    choose_precision,
    frozen_projection,
    soft_cross_entropy,
    teacher_probabilities,
)
from lm.trainer import Trainer

HELD_OUT_POSITIONS = 4096
ACCURACY_AT = (1, 4, 16)


@dataclass(frozen=True)
class TrainingOptions:
    """How heads are trained. `positions` per step (whole segments), `heads_per_step` drawn with odds 1/i for head i,
    `vocabulary` most frequent target tokens in the loss plus `negatives` others drawn per step (None: all tokens),
    `soft` share of the base's distribution in the target, `precision` of the vocabulary products."""

    h: int = 9
    inner_size: int = 560
    token_size: int = 128
    steps: int = 2000
    positions: int = 2048
    heads_per_step: int = 4
    vocabulary: int | None = 8192
    negatives: int = 1024
    soft: float = 0.5
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    held_out: float = 0.03
    evaluate_every: int = 200
    seed: int = 0
    precision: str = "auto"

    def check(self) -> None:
        """Raises `RescoreError` for the first option that is out of its range."""
        for name, least in (
            ("h", 2), ("inner_size", 1), ("token_size", 0), ("steps", 1), ("positions", 1), ("heads_per_step", 1),
            ("vocabulary", 1), ("negatives", 0), ("warmup", 0), ("evaluate_every", 1), ("seed", 0), ("weight_decay", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise RescoreError(f"{name} = {value}; it must be at least {least}")
        if not 0 <= self.soft <= 1:
            raise RescoreError(f"soft = {self.soft}; it is a share, from 0 to 1")
        if not 0 < self.held_out < 1:
            raise RescoreError(f"held_out = {self.held_out}; it is a share, above 0 and below 1")
        if not 0 < self.learning_rate < math.inf:
            raise RescoreError(f"learning_rate = {self.learning_rate}; it must be above 0")
        check_precision(self.precision)


@dataclass(frozen=True)
class HeldOutAccuracy:
    """On held-out positions: `top[n][i]` = share where the token is among head i+1's best n (list of length h);
    `accepted` = mean accepted prefix of the arg-max draft, `accepted_16` = of the best path in the top 16."""

    top: dict[int, list[float]]
    accepted: float
    accepted_16: float


class HeadTrainer(Trainer[HeldOutAccuracy]):
    """One training: data, heads, optimiser. `train` runs it; `evaluate` measures the heads as they are.

    `initial` is a folder of heads to start from instead of untrained ones: the same h, at least this inner size (the
    units that weigh most stay), this token size or none.
    """

    def __init__(
        self, base: BaseLM, data: Sequence[HeadData], options: TrainingOptions, *, initial: Path | None = None
    ) -> None:
        options.check()
        self.dtype = choose_precision(options.precision, base.device)
        # What `auto` stands for depends on the machine; the record and a resumed run need the precision itself.
        options = dataclasses.replace(options, precision=str(self.dtype).removeprefix("torch."))
        self.base, self.data, self.options = base, list(data), options
        segments = [(place, int(a), int(b)) for place, d in enumerate(self.data) for a, b in d.segments() if b - a > 1]
        if len(segments) < 2:
            raise InvalidDataError("the corpus has fewer than two segments of text; heads need more to learn from")
        order = np.random.default_rng([options.seed, 0xDA7A]).permutation(len(segments))
        held = max(1, min(int(len(segments) * options.held_out), len(segments) - 1))
        self.held_out = _until(HELD_OUT_POSITIONS, [segments[i] for i in order[:held]])
        self.segments = [segments[i] for i in order[held:]]
        self.sizes = np.array([b - a for _, a, b in self.segments])
        config = BlockHeadsConfig(
            h=options.h,
            hidden_size=base.hidden_size,
            inner_size=options.inner_size,
            vocab_size=base.vocab_size,
            base_name=base.identity.name,
            tokenizer_sha256=base.identity.tokenizer_sha256,
            token_size=options.token_size,
        )
        torch.manual_seed(options.seed)
        self.heads = BlockHeads(config).to(base.device)
        self.initial_sha256: str | None = None
        if initial is not None:
            self._start_from(initial)
        targets = [d.targets for d in self.data]
        self.subset = VocabularySubset(targets, base.vocab_size, options.vocabulary, options.negatives)
        self.weight = frozen_projection(base, self.dtype)
        super().__init__(dict(self.heads.named_parameters()), options, base.device)

    def _start_from(self, folder: Path) -> None:
        earlier = load_heads(str(folder), self.base.identity, device=self.base.device)
        found, wanted = earlier.config, self.heads.config
        if (
            found.h != wanted.h
            or found.inner_size < wanted.inner_size
            or found.token_size not in (0, wanted.token_size)
        ):
            raise IncompatibleError(
                f"the heads in {folder} have h = {found.h}, inner size {found.inner_size} and token size "
                f"{found.token_size}; they can't become heads with {wanted.h}, {wanted.inner_size}, {wanted.token_size}"
            )
        weights = earlier.state_dict()
        if found.inner_size > wanted.inner_size:  # the units that weigh least go
            size = weights["inner.weight"].norm(dim=1) * weights["outer.weight"].norm(dim=2)  # [h-1, inner]
            kept = size.topk(wanted.inner_size, dim=1).indices.sort(dim=1).values
            for name, inner_last in (("inner.weight", True), ("outer.weight", False), ("token.weight", True)):
                if name in weights:
                    index = kept[:, None, :] if inner_last else kept[:, :, None]
                    weights[name] = torch.take_along_dim(weights[name], index, dim=2 if inner_last else 1)
            weights["inner.bias"] = torch.take_along_dim(weights["inner.bias"], kept, dim=1)
        self.heads.load_state_dict({**self.heads.state_dict(), **weights})
        self.initial_sha256 = heads_sha256(folder)

    def _batch(self, segments: Sequence[tuple[int, int, int]]) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """States `[n, d]`, targets `[n]` and each row's distance to its segment's end `[n]`."""
        states = np.concatenate([self.data[p].states[a:b] for p, a, b in segments])
        targets = np.concatenate([self.data[p].targets[a:b] for p, a, b in segments])
        remaining = np.concatenate([np.arange(b - a, 0, -1) for _, a, b in segments])
        return torch.from_numpy(states).to(self.base.device).float(), targets, remaining

    def _rows(self, tokens: np.ndarray) -> torch.Tensor:
        """The projection's rows of the tokens that head 1 chose, float32 `[n, d]`."""
        return self.weight[torch.from_numpy(tokens.astype(np.int64)).to(self.base.device)].float()

    def _losses(self, step: int) -> Iterator[torch.Tensor]:
        options, workers = self.options, self.workers
        rng = np.random.default_rng([options.seed, step])
        chosen = rng.permutation(len(self.segments))[: max(1, 4 * options.positions // int(self.sizes.mean()) + 1)]
        segments = _until(options.positions, [self.segments[i] for i in chosen])
        tokens = self.subset.draw(rng)
        odds = 1.0 / np.arange(2, options.h + 1)
        count = min(options.heads_per_step, options.h - 1)
        heads = np.sort(rng.choice(options.h - 1, count, replace=False, p=odds / odds.sum())).tolist()
        sizes = np.array([end - start for _, start, end in segments])
        in_all = [int(np.maximum(sizes - head - 1, 0).sum()) for head in heads]  # over all processes
        if segments := segments[workers.rank :: workers.count]:
            yield self._loss(segments, tokens, heads, in_all)

    def _loss(
        self, segments: list[tuple[int, int, int]], tokens: np.ndarray, heads: list[int], in_all: list[int]
    ) -> torch.Tensor:
        """Sum over `heads` (from 0 for head 2) of the loss at all rows of the segments / rows of all processes."""
        states, targets, remaining = self._batch(segments)
        projection = self.weight[torch.from_numpy(tokens).to(self.base.device)]  # [v, d]
        places = torch.from_numpy(self.subset.places(tokens, targets)).to(self.base.device)
        teacher = teacher_probabilities(states, projection)  # [n, v]
        outputs = self.heads(states, self._rows(targets), heads)  # [count, n, d]
        total: torch.Tensor = outputs.sum() * 0.0
        for output, head, count in zip(outputs, heads, in_all, strict=True):
            ahead = head + 1
            rows = torch.from_numpy(np.flatnonzero(remaining > ahead)).to(self.base.device)
            if len(rows):
                goals = places[rows + ahead], teacher[rows + ahead], self.options.soft
                total = total + soft_cross_entropy(output[rows], projection, *goals) / count
        return total

    @torch.no_grad()
    def evaluate(self) -> HeldOutAccuracy:
        """Accuracy on the held-out segments, over the whole vocabulary."""
        hits = {n: np.zeros(self.options.h) for n in ACCURACY_AT}
        counts = np.zeros(self.options.h)
        accepted = {1: 0.0, 16: 0.0}
        states, targets, remaining = self._batch(self.held_out)
        h = self.options.h
        for start in range(0, len(states), 256):
            rows = np.arange(start, min(start + 256, len(states)))
            block = states[rows]
            every = torch.cat([block[None], self.heads(block, self._rows(targets[rows]))]).to(self.dtype)  # [h, n, d]
            best = torch.stack([(x @ self.weight.T).topk(max(ACCURACY_AT), dim=-1).indices for x in every], dim=1)
            wanted = np.stack([targets[np.minimum(rows + i, len(targets) - 1)] for i in range(h)], axis=1)
            there = remaining[rows][:, None] > np.arange(h)  # [n, h]
            match = (best.cpu().numpy() == wanted[..., None]) & there[..., None]  # [n, h, 16]
            match[:, 0, 0] = True  # head 1 is the base LM: what it chose is the target
            counts += there.sum(0)
            for n in ACCURACY_AT:
                hits[n] += match[:, :, :n].any(-1).sum(0)
            for n in accepted:
                accepted[n] += np.cumprod(match[:, :, :n].any(-1), axis=1).sum()
        total = len(states)
        return HeldOutAccuracy(
            {n: (hits[n] / np.maximum(counts, 1)).round(4).tolist() for n in ACCURACY_AT},
            round(float(accepted[1]) / total, 4),
            round(float(accepted[16]) / total, 4),
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "options": dataclasses.asdict(self.options),
            "initial_sha256": self.initial_sha256,
            "base": dataclasses.asdict(self.base.identity),
            "data": [{"source": d.source, "sha256": d.sha256, "tokens": len(d)} for d in self.data],
        }

    def _save(self, out: Path) -> None:
        self.heads.save(out)


def _until(positions: int, segments: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The first segments that hold `positions` positions, the last one cut."""
    taken, left = [], positions
    for place, start, end in segments:
        if left <= 0:
            break
        taken.append((place, start, min(end, start + left)))
        left -= end - start
    return taken
