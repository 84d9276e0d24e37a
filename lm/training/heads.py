"""Trains block heads on a base LM: frozen (from cached states, without running it), or fine-tuned together with them.

Loss of head i at a position: cross-entropy against (1 - soft) x the token that stands i steps ahead + soft x the base's
own distribution there, which the cached state of that position gives through the vocabulary projection. A step draws
whole segments and some of the heads. With a base that is fine-tuned head 1, the base itself, is one of them: its
targets are the same text, so what it is taught is to write it. Sources: [A] section 3 (sum of the heads'
cross-entropies), [B] section 6 (distilled data, one random head a step, fine-tuning).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace

from lattices.errors import IncompatibleError, RescoreError
from lm.base.catalog import identify
from lm.base.model import BaseLM
from lm.heads.block_heads import HEADS_FOLDER, BlockHeads, heads_sha256, load_heads
from lm.heads.nets import FEED_FORWARD, MEDUSA, SEQUENTIAL, BlockHeadsConfig, as_sequential
from lm.training.data import HeadData, Segment, cached, tokens_read, until
from lm.training.losses import soft_cross_entropy, teacher_probabilities
from lm.training.options import BASE_LEARNING_RATES, FROZEN, INNER_SIZE, LORA_RANK, TrainingOptions
from lm.training.trainer import TextTrainer
from lm.training.tuned_base import TunedBase

HELD_OUT_POSITIONS = 4096
ACCURACY_AT = (1, 4, 16)
BASE = "base."  # begins the names of a tuned base's parameters
STORED = {"float16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True)
class HeldOutAccuracy:
    """Agreement with held-out text. Where that is not the base's own output (gold text, a base that was fine-tuned
    since), decoding accepts other numbers.

    The first token of a prefix is taken as right, none after the end of a segment.
    """

    top: dict[int, list[float]]  # by n: share of positions where the token is among head i+1's best n, [h]
    accepted: float  # mean accepted prefix of the arg-max draft
    accepted_16: float  # of the best path in the top 16
    positions: int
    segments: int  # outputs, chunks of text


class HeadTrainer(TextTrainer[HeldOutAccuracy, TrainingOptions]):
    """One training: data, heads, optimiser. `train` runs it; `evaluate` measures the heads as they are.

    `initial` is a folder of heads to start from instead of untrained ones, of the same shape; sequential ones may
    start from feed-forward ones, which they then equal. With a tuned base the model of `base` is changed in place.
    What is measured is a share of the segments of `data`, held out at random, or `held_out`: text of another origin.
    Segments of `data` can be neighbours (parts of a document, two questions about it), and a share of them flatters.
    """

    least_targets, measured_targets = 2, HELD_OUT_POSITIONS

    def __init__(
        self,
        base: BaseLM,
        data: Sequence[HeadData],
        options: TrainingOptions,
        *,
        initial: Path | None = None,
        held_out: HeadData | None = None,
    ) -> None:
        self.initial, self.begins_trained = initial, initial is not None
        self.initial_sha256: str | None = None
        super().__init__(base, data, options, held_out=held_out)
        self.mean_size = int(np.mean([s.targets for s in self.segments]))

    def _new_parameters(self) -> dict[str, torch.nn.Parameter]:
        options, identity, d = self.options, self.base.identity, self.base.hidden_size
        config = BlockHeadsConfig(
            h=options.h,
            hidden_size=d,
            inner_size=d if options.architecture == MEDUSA else options.inner_size or INNER_SIZE,
            vocab_size=self.base.vocab_size,
            base_name=identity.name,
            tokenizer_sha256=identity.tokenizer_sha256,
            architecture=options.architecture,
            token_size=options.token_size,
            blocks=options.blocks,
            base_weights_sha256=identity.weights_sha256,
        )
        self.heads = BlockHeads(config).to(self.base.device)
        if self.initial is not None:
            self._start_from(self.initial)
        parameters = dict(self.heads.net.named_parameters())
        self.tuned: TunedBase | None = None
        if options.tune != FROZEN:
            self.tuned = TunedBase(
                self.base, options.tune, self.dtype, rank=options.lora_rank or LORA_RANK, layers=options.tuned_layers,
                gradient_checkpointing=options.gradient_checkpointing,
            )  # fmt: skip
            parameters |= {BASE + name: p for name, p in self.tuned.parameters.items()}
        return parameters

    def _rates(self, names: Iterable[str]) -> dict[str, float]:
        rate = self.options.base_learning_rate or BASE_LEARNING_RATES.get(self.options.tune, 0.0)
        return {name: rate / self.options.learning_rate for name in names if name.startswith(BASE)}

    def _start_from(self, folder: Path) -> None:
        earlier = load_heads(self.base.identity, str(folder), device=self.base.device)
        grows = (earlier.config.architecture, self.heads.config.architecture) == (FEED_FORWARD, SEQUENTIAL)
        names = ("h", *(() if grows else ("architecture",)), "inner_size", "token_size", "blocks")
        differs = [n for n in names if getattr(earlier.config, n) != getattr(self.heads.config, n)]
        if differs:
            theirs, ours = (getattr(c, differs[0]) for c in (earlier.config, self.heads.config))
            raise IncompatibleError(
                f"the heads in {folder} have {differs[0]} = {theirs}, not {ours}; training starts from the same "
                f"shape: give --{differs[0].replace('_', '-')} {theirs}"
            )
        if earlier.projection is not None:
            raise IncompatibleError(
                f"the heads in {folder} have vocabulary projections of their own, and heads that are trained here use "
                "the base's; give other --initial heads"
            )
        state = earlier.net.state_dict()
        self.heads.net.load_state_dict(as_sequential(state) if grows else state)
        self.initial_sha256 = heads_sha256(folder)

    def _rows(self, targets: np.ndarray, offsets: np.ndarray) -> torch.Tensor:
        """The projection's rows of the tokens of the right draft from each position, as many as the heads see.

        `offsets` `[n, s]`: where they stand in `targets`. float32 `[n, s, d]`.
        """
        tokens = targets[np.minimum(offsets, len(targets) - 1)].astype(np.int64)
        return self.projection[torch.from_numpy(tokens).to(self.base.device)].float()

    def _losses(self, step: int) -> Iterator[torch.Tensor]:
        options, workers = self.options, self.workers
        rng = np.random.default_rng([options.seed, step])
        chosen = rng.permutation(len(self.segments))[: max(1, 4 * options.positions // self.mean_size + 1)]
        segments = until(options.positions, [self.segments[i] for i in chosen])
        tokens = self.subset.draw(rng)
        candidates = np.arange(2 if self.tuned is None else 1, options.h + 1)
        count = len(candidates) if options.heads_per_step is None else min(options.heads_per_step, len(candidates))
        odds = np.ones(len(candidates)) if count == 1 else 1.0 / candidates
        heads = np.sort(rng.choice(candidates, count, replace=False, p=odds / odds.sum())).tolist()
        sizes = np.array([s.targets for s in segments])
        in_all = [int(np.maximum(sizes - head + 1, 0).sum()) for head in heads]  # over all processes
        for part in self._micro_batches(segments)[workers.rank :: workers.count]:
            yield self._loss(part, tokens, heads, in_all)

    def _micro_batches(self, segments: list[Segment]) -> list[list[Segment]]:
        """The segments in parts: one for each process, and no larger than a tuned base should read at a time."""
        if self.tuned is None:
            return [part for rank in range(self.workers.count) if (part := segments[rank :: self.workers.count])]
        by_length = sorted(segments, key=lambda s: tokens_read(self.data, s))
        parts: list[list[Segment]] = [[]]
        for segment in by_length:
            if parts[-1] and tokens_read(self.data, segment) * (len(parts[-1]) + 1) > self.options.micro_batch:
                parts.append([])
            parts[-1].append(segment)
        return parts

    def _loss(self, segments: list[Segment], tokens: np.ndarray, heads: list[int], in_all: list[int]) -> torch.Tensor:
        """Sum over `heads` (counted as always, 1 is the base) of the loss at all rows of the segments / `in_all`."""
        from_cache, states, targets, remaining = self._batch(segments)
        projection = self.projection[torch.from_numpy(tokens).to(self.base.device)]  # [v, d]
        places = torch.from_numpy(self.subset.places(tokens, targets)).to(self.base.device)
        teacher = teacher_probabilities(from_cache, projection) if self.options.soft else None  # [n, v]
        rows = self._rows(targets, np.arange(len(targets))[:, None] + np.arange(max(1, self.heads.net.sees)))
        outputs: dict[int, torch.Tensor] = {1: states}
        if ahead_of := [head for head in heads if head > 1]:
            read = self.heads(states, rows, [head - 2 for head in ahead_of])  # [count, n, d]
            outputs |= dict(zip(ahead_of, read, strict=True))
        weights = self.options.head_weights or (1.0,) * (self.options.h - 1)
        total: torch.Tensor = sum((outputs[head].sum() * 0.0 for head in heads), torch.zeros((), device=states.device))
        for head, count in zip(heads, in_all, strict=True):
            at = torch.from_numpy(np.flatnonzero(remaining >= head)).to(self.base.device)
            if len(at):
                ahead = at + head - 1
                goals = places[ahead], None if teacher is None else teacher[ahead], self.options.soft
                weight = weights[head - 2] if head > 1 else 1.0
                total = total + soft_cross_entropy(outputs[head][at], projection, *goals) * (weight / count)
        return total

    def _batch(self, segments: list[Segment]) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
        """The base's cached states and those that the heads read, float32 `[n, d]` each, the targets `[n]`, and how
        many targets of its segment remain at each, `[n]`."""
        states, targets = cached(self.data, segments)
        from_cache = torch.from_numpy(states).to(self.base.device).float()
        remaining = np.concatenate([np.arange(s.targets, 0, -1) for s in segments])
        read = from_cache if self.tuned is None else self.tuned.states(self.data, segments)
        return from_cache, read, targets, remaining

    @torch.no_grad()
    def evaluate(self) -> HeldOutAccuracy:
        """Accuracy on the held-out segments, over the whole vocabulary."""
        h = self.options.h
        hits, accepted = np.zeros((len(ACCURACY_AT), h)), np.zeros(len(ACCURACY_AT))
        counts = np.zeros(h)
        total = 0
        for segments in self._micro_batches(self.held_out):
            _, states, targets, remaining = self._batch(segments)
            for start in range(0, len(states), 256):
                rows = np.arange(start, min(start + 256, len(states)))
                best = self._best(states[rows], targets[rows])  # [n, h, 16]
                ahead = np.stack([targets[np.minimum(rows + i, len(targets) - 1)] for i in range(h)], axis=1)
                there = remaining[rows][:, None] > np.arange(h)  # [n, h]
                match = (best == ahead[..., None]) & there[..., None]
                counts += there.sum(0)
                for i, n in enumerate(ACCURACY_AT):
                    among = match[:, :, :n].any(-1)  # [n, h]
                    hits[i] += among.sum(0)
                    among[:, 0] = True
                    accepted[i] += np.cumprod(among, axis=1).sum()
            total += len(states)
        shares = (hits / np.maximum(counts, 1)).round(4).tolist()
        first, *_, most = (round(float(sum_of_prefixes) / total, 4) for sum_of_prefixes in accepted)
        return HeldOutAccuracy(dict(zip(ACCURACY_AT, shares, strict=True)), first, most, total, len(self.held_out))

    def _best(self, states: torch.Tensor, first: np.ndarray) -> np.ndarray:
        """The 16 best tokens of every head after each of n states, where the first token is known: `[n, h, 16]`."""
        most = max(ACCURACY_AT)
        best = [(states.to(self.dtype) @ self.projection.T).topk(most, dim=-1).indices]
        drafted = [torch.from_numpy(first.astype(np.int64)).to(self.base.device)]
        for head in range(self.options.h - 1):
            rows = self.projection[torch.stack(drafted, dim=1)].float()  # [n, s, d]
            read = self.heads(states, rows, [head])[0]
            best.append((read.to(self.dtype) @ self.projection.T).topk(most, dim=-1).indices)
            if self.heads.net.sees > 1:
                drafted.append(best[-1][:, 0])
        tokens: np.ndarray = torch.stack(best, dim=1).cpu().numpy()
        return tokens

    def _check_place(self, out: Path) -> None:
        super()._check_place(out)
        here = {folder.resolve() for folder in (out, out / HEADS_FOLDER)}
        if self.initial is not None and self.initial.resolve() in here:
            raise RescoreError(f"{self.initial} would be replaced by what is trained from it; use another --out")

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "initial_sha256": self.initial_sha256}

    def _save(self, out: Path) -> None:
        stored = STORED[self.options.stored]
        if self.tuned is None:
            self.heads.save(out, dtype=stored)
        else:
            self.tuned.save(out)
            tuned = identify(str(out)).weights_sha256
            self.heads.config = replace(self.heads.config, base_weights_sha256=tuned)
            self.heads.save(out / HEADS_FOLDER, dtype=stored)
