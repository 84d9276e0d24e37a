"""Trains small neural LMs as rescorers: from scratch ([A] section 5), or from layers of the base itself.

Data as for heads (`lm.training.data`): segments of text with the base's final states, best the base's own greedy output
after its prompts. Loss at a token of a segment: cross-entropy against (1 - soft) x the token + soft x the base's own
distribution there; a share of it (`lattice`) among the best tokens of one head only (of the step's vocabulary), drawn
anew each step with odds 1/i for head i, by the head's log-probabilities plus the rescorer's logits: what local
rescoring chooses by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lm.base.model import BaseLM
from lm.base.states import causal_arguments
from lm.checkpoint import write_tensors
from lm.files import replaced_files
from lm.heads.block_heads import BlockHeads
from lm.neural.model import DeltaConfig, save_delta, scratch_model, some_layers
from lm.training.data import HeadData, Segment, body_states, cached, tokens_read
from lm.training.losses import CHUNK_ROWS, soft_cross_entropy, teacher_probabilities
from lm.training.options import RescorerOptions
from lm.training.trainer import TextTrainer, Trainer, save_model
from lm.training.tuned_base import LORA_PART, low_rank_changes, with_low_rank

BEST_FILE = "best.safetensors"
TOP_K = 16  # of a head, among which it learns to choose
POOL = 8  # batches drawn at a time and sorted by length: less padding


@dataclass(frozen=True)
class HeldOutText:
    """What a rescorer makes of held-out segments, over the whole vocabulary."""

    loss: float  # mean, nats a token
    perplexity: float
    base_perplexity: float  # the base's own, on the same tokens
    agreement: float  # share of tokens that are the rescorer's arg-max
    tokens: int
    chosen: float | None = None  # share that is the best of head 2's best tokens by both scores, where heads are given
    unrescored: float | None = None  # by head 2's alone

    def line(self) -> str:
        """The same in words."""
        chosen = f", with head 2 {self.chosen:.1%} (alone {self.unrescored:.1%})" if self.chosen is not None else ""
        return (
            f"held-out perplexity {self.perplexity:.3f} (the base's own {self.base_perplexity:.3f}), "
            f"{self.agreement:.1%} of {self.tokens} tokens are its first choice{chosen}"
        )


class RescorerTrainer(TextTrainer[HeldOutText, RescorerOptions]):
    """One training of a rescorer; see `RescorerOptions` and `Trainer.train`."""

    memory_option = "--micro-batch"
    state_fields = (*Trainer.state_fields, "best", "since_best")
    learner = "rescorers"

    def __init__(
        self,
        base: BaseLM,
        data: Sequence[HeadData],
        options: RescorerOptions,
        *,
        heads: BlockHeads | None = None,
        held_out: HeadData | None = None,
    ) -> None:
        """`heads`: whose tokens it learns to choose among; `held_out`: as of `TextTrainer`."""
        if heads is not None and heads.projection is not None:
            raise IncompatibleError(
                "these heads have vocabulary projections of their own, and a rescorer learns from lattices over the "
                "base's; give other --heads, or leave out --lattice"
            )
        options.check()
        if not options.lattice:
            heads = None
        elif heads is None:
            raise RescoreError(f"lattice = {options.lattice}, but there are no heads to choose among the tokens of")
        self.heads = heads
        super().__init__(base, data, options, held_out=held_out)

    def _new_parameters(self) -> dict[str, torch.nn.Parameter]:
        self.lengths = np.array([tokens_read(self.data, s) for s in self.segments])
        self.best, self.since_best = math.inf, 0  # the best held-out loss, and evaluations since then
        self.takes_masks, self.model = self._new_model()
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _new_model(self) -> tuple[bool, Any]:
        """Whether the model takes a mask, and the model."""
        options, name, device = self.options, self.base.identity.name, self.base.device
        if options.init == "scratch":
            scratch: Any = scratch_model(options.size, self.base)
            return True, scratch.to(device)
        cut = some_layers(name, options.chosen_layers(), device=str(device))
        body = cut.model.base_model
        if not (hasattr(body, "layers") and hasattr(body, "norm") and cut.body_gives_states):
            raise IncompatibleError(f"{name} does not name its layers as Llama does; use --init scratch for it")
        below = max(0, len(body.layers) - options.tuned_layers)
        if options.lora_rank and below:
            with_low_rank(cut, options.lora_rank, list(range(below)))
        for part in (*body.layers[below:], body.norm):
            part.requires_grad_(True)
        return cut.supports_tree, cut.model

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "heads_sha256": self.heads.sha256 if self.heads else None}

    def _batch(self, rng: np.random.Generator) -> list[Segment]:
        """Segments of one step, of similar length: at most `positions` tokens with their padding, at least one."""
        drawn = rng.permutation(len(self.segments))
        pool = drawn[: max(1, POOL * self.options.positions // max(1, int(self.lengths.mean())))]
        pool = pool[np.argsort(self.lengths[pool], kind="stable")]
        first = int(rng.integers(len(pool)))
        chosen: list[Segment] = []
        longest = 0
        for index in [*pool[first:], *pool[:first][::-1]]:
            longest = max(longest, int(self.lengths[index]))
            if chosen and longest * (len(chosen) + 1) > self.options.positions:
                break
            chosen.append(self.segments[index])
        return chosen

    def _losses(self, step: int) -> Iterator[torch.Tensor]:
        rng = np.random.default_rng([self.options.seed, step])
        segments = self._batch(rng)
        tokens = self.subset.draw(rng)
        head = 0  # whose tokens the step is about, counted as always (the base is 1); 0: no head's
        if self.heads is not None:
            candidates = np.arange(2, self.heads.h + 1)
            head = int(rng.choice(candidates, p=(1.0 / candidates) / (1.0 / candidates).sum()))
        count = sum(s.targets for s in segments)  # over all processes
        for batch in self._micro_batches(segments)[self.workers.rank :: self.workers.count]:
            yield self._loss(batch, tokens, head) / count

    def _micro_batches(self, segments: list[Segment]) -> list[list[Segment]]:
        size = max(1, self.options.micro_batch // max(tokens_read(self.data, s) for s in segments))
        size = min(size, -(-len(segments) // self.workers.count))
        return [segments[i : i + size] for i in range(0, len(segments), size)]

    def _loss(self, segments: list[Segment], tokens: np.ndarray, head: int) -> torch.Tensor:
        """Sum over all targets of the segments of the loss over the vocabulary subset `tokens`."""
        hidden, states, targets = self._forward(segments)
        index = torch.from_numpy(tokens).to(self.device)
        weight = self.model.get_output_embeddings().weight
        places = torch.from_numpy(self.subset.places(tokens, targets)).to(self.device)
        projection = self.projection[index]
        teacher = teacher_probabilities(states, projection) if self.options.soft else None
        own = weight[index]
        soft = self.options.soft
        if weight.requires_grad:
            loss = _open_cross_entropy(hidden, own, places, teacher, soft)
        else:
            loss = soft_cross_entropy(hidden, own.to(self.dtype), places, teacher, soft)
        if not head:
            return loss
        at, found, logps = self._best_of_head(head, segments, states, targets, projection)
        scores = logps + (hidden[at][:, None] * own[found].float()).sum(-1)  # [m, k]
        goal = (1.0 - soft) * (found == places[at][:, None])
        if teacher is not None:
            goal = goal + soft * teacher[at].gather(1, found).float()
        known = places[at][:, None] >= 0  # as in the other part: other targets count nothing
        among = -(known * goal * torch.log_softmax(scores, dim=-1)).sum()
        return (1.0 - self.options.lattice) * loss + self.options.lattice * among

    @torch.no_grad()
    def _best_of_head(
        self, head: int, segments: list[Segment], states: torch.Tensor, targets: np.ndarray, projection: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The targets `[m]` that a head proposes something for; of its best tokens there the rows in `projection` and
        the log-probabilities `[m, k]`."""
        assert self.heads is not None
        offsets = np.concatenate([np.arange(s.targets) for s in segments])
        at = np.flatnonzero(offsets >= head - 1)
        drafted = at[:, None] - (head - 1) + np.arange(min(head - 1, max(1, self.heads.net.sees)))
        rows = self.projection[torch.from_numpy(targets[drafted].astype(np.int64)).to(self.device)].float()
        before = torch.from_numpy(at - (head - 1)).to(self.device)
        read = self.heads(states[before], rows, [head - 2])[0].to(projection.dtype)
        most = min(TOP_K, len(projection))
        parts = [torch.log_softmax((chunk @ projection.T).float(), -1).topk(most) for chunk in read.split(CHUNK_ROWS)]
        logps, found = (torch.cat(part) for part in zip(*parts, strict=True))
        return torch.from_numpy(at).to(self.device), found, logps

    def _forward(self, segments: list[Segment]) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Final states of the rescorer `[n, d]` and of the base `[n, d]` before each of the targets `[n]`."""
        hidden = body_states(
            self.model, self.data, segments, device=self.device, dtype=self.dtype,
            arguments=lambda _, ids: causal_arguments(self.model.base_model, ids, masked=self.takes_masks),
        )  # fmt: skip
        states, targets = cached(self.data, segments)
        return hidden, torch.from_numpy(states).to(self.device).float(), targets

    @torch.no_grad()
    def evaluate(self) -> HeldOutText:
        """Perplexity on the held-out segments, over the whole vocabulary, beside the base's."""
        weight = self.model.get_output_embeddings().weight.to(self.dtype)
        losses = [0.0, 0.0]  # the rescorer's, the base's
        agreed = 0.0
        count = 0
        of_head = np.zeros(3)  # right by both scores, right by head 2's, of so many
        for segment in self.held_out:
            hidden, states, targets = self._forward([segment])
            following = torch.from_numpy(targets.astype(np.int64)).to(self.device)
            for rows in torch.arange(len(following)).split(CHUNK_ROWS):
                for i, (read, projection) in enumerate(((hidden, weight), (states, self.projection))):
                    logits = (read[rows].to(self.dtype) @ projection.T).float()
                    losses[i] += float(torch.nn.functional.cross_entropy(logits, following[rows], reduction="sum"))
                    if i == 0:
                        agreed += float((logits.argmax(-1) == following[rows]).sum())
            count += len(following)
            if self.heads is not None:
                at, found, logps = self._best_of_head(2, [segment], states, targets, self.projection)
                scores = logps + (hidden[at][:, None] * weight[found].float()).sum(-1)
                for i, best in enumerate((scores.argmax(-1), logps.argmax(-1))):
                    of_head[i] += float((found.gather(1, best[:, None])[:, 0] == following[at]).sum())
                of_head[2] += len(at)
        loss, of_base = (total / count for total in losses)
        chosen, alone = np.round(of_head[:2] / of_head[2], 4).tolist() if of_head[2] else (None, None)
        return HeldOutText(
            round(loss, 4), _perplexity(loss), _perplexity(of_base), round(agreed / count, 4), count, chosen, alone
        )

    def _after_evaluation(self, measured: HeldOutText, out: Path) -> None:
        if not math.isfinite(measured.loss):
            raise self._diverged(f"the held-out loss is {measured.loss} at step {self.step}", out)
        if measured.loss < self.best:
            self.best, self.since_best = measured.loss, 0
            if self.workers.is_first:
                write_tensors(out / BEST_FILE, self.parameters)
        else:
            self.since_best += 1
            self.stopped = self.since_best >= self.options.patience

    @torch.no_grad()
    def _finish(self, out: Path) -> bool:
        try:
            best = load_file(out / BEST_FILE, device=str(self.device))
        except (OSError, SafetensorError) as error:
            raise InvalidDataError(
                f"can't read the best weights {out / BEST_FILE}; begin again with another --out ({error})"
            ) from error
        for name, parameter in self.parameters.items():
            parameter.copy_(best[name])
        return True

    def _save(self, out: Path) -> None:
        if self.options.init == "scratch":
            with replaced_files(out) as temporary:
                save_model(self.model, self.base, temporary)
            return
        identity = self.base.identity
        layers = self.options.chosen_layers()
        config = DeltaConfig(
            size=self.options.size,
            layers=layers,
            tuned_layers=min(self.options.tuned_layers, len(layers)),
            lora_rank=self.options.lora_rank,
            base_name=identity.name,
            base_weights_sha256=identity.weights_sha256,
            tokenizer_sha256=identity.tokenizer_sha256,
        )
        whole = sorted(name for name in self.parameters if LORA_PART not in name)
        save_delta(self.model, whole, config, out, changes=low_rank_changes(self.model))


def _perplexity(loss: float) -> float:
    return round(math.exp(min(loss, 700.0)), 3)  # of a larger loss it is no float


def _open_cross_entropy(
    states: torch.Tensor, projection: torch.Tensor, targets: torch.Tensor, teacher: torch.Tensor | None, soft: float
) -> torch.Tensor:
    """The same loss as `soft_cross_entropy` where the projection learns as well: the logits are kept."""
    logp = torch.log_softmax(states @ projection.T, dim=-1)
    known = targets >= 0
    hard = -logp.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    mixed = (1.0 - soft) * hard
    if teacher is not None:
        mixed = mixed - soft * (teacher.float() * logp).sum(-1)
    return (mixed * known).sum()
