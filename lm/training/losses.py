"""Losses against a frozen vocabulary projection, without keeping the logits; the part of the vocabulary they see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lattices.errors import IncompatibleError, UnknownNameError
from lm.base.model import BaseLM

CHUNK_ROWS = 512  # rows of logits that are alive at a time: 512 x vocabulary floats
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class SoftCrossEntropy(torch.autograd.Function):
    """The gradient of `soft_cross_entropy`: the projection is frozen, so that to the states is (softmax - target) @
    projection, computed chunk by chunk while the logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        projection: torch.Tensor,
        targets: torch.Tensor,
        teacher: torch.Tensor | None,
        soft: float,
    ) -> torch.Tensor:
        gradient = torch.empty_like(states)
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        for start in range(0, len(states), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = (states[rows].to(projection.dtype) @ projection.T).float()
            log_normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
            known = targets[rows] >= 0
            hard = (1.0 - soft) * known.float()
            place = targets[rows].clamp(min=0)[:, None]
            target = torch.zeros_like(logits) if teacher is None else teacher[rows] * (soft * known.float())[:, None]
            target.scatter_add_(1, place, hard[:, None])
            mass = target.sum(-1, keepdim=True)
            total += (mass * log_normaliser).sum() - (target * logits).sum()
            error = torch.exp(logits - log_normaliser).mul_(mass).sub_(target)
            gradient[rows] = (error.to(projection.dtype) @ projection).to(states.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None, None


def soft_cross_entropy(
    states: torch.Tensor, projection: torch.Tensor, targets: torch.Tensor, teacher: torch.Tensor | None, soft: float
) -> torch.Tensor:
    """Sum over rows of the cross-entropy of `states` `[n, d]` @ `projection.T` `[d, v]` against mixed targets.

    Those are (1 - soft) x the token + soft x the distribution `teacher` `[n, v]` (None where `soft` is 0). `targets`
    `[n]` has the token's place in the vocabulary subset; rows of other tokens (-1) count nothing.
    """
    loss: torch.Tensor = SoftCrossEntropy.apply(states, projection, targets, teacher, soft)  # type: ignore[no-untyped-call]
    return loss


class VocabularySubset:
    """The most frequent target tokens, and per step some of the others: what a loss over part of the vocabulary sees.

    `limit` None stands for all tokens.
    """

    def __init__(self, targets: Sequence[np.ndarray], vocab_size: int, limit: int | None, negatives: int) -> None:
        counts = np.sum([np.bincount(t, minlength=vocab_size) for t in targets], axis=0)
        self.vocab_size, self.negatives = vocab_size, negatives
        self.frequent = np.sort(np.argsort(-counts, kind="stable")[: limit or vocab_size])

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Token ids of one step, int64 `[v]`."""
        if len(self.frequent) == self.vocab_size:
            return self.frequent
        others = np.setdiff1d(np.arange(self.vocab_size), self.frequent)
        extra = rng.choice(others, min(self.negatives, len(others)), replace=False)
        return np.concatenate([self.frequent, extra])

    def places(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Where each target stands in `tokens`, -1 where it does not; int64 `[n]`."""
        place_of = np.full(self.vocab_size, -1, dtype=np.int64)
        place_of[tokens] = np.arange(len(tokens))
        places: np.ndarray = place_of[targets]
        return places


def teacher_probabilities(states: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """The base's own distribution over the projection's rows, `[n, v]`, from its final states `[n, d]`."""
    dtype = projection.dtype
    with torch.no_grad():
        chunks = ((rows.to(dtype) @ projection.T).float() for rows in states.split(CHUNK_ROWS))
        return torch.cat([torch.softmax(logits, -1).to(dtype) for logits in chunks])


def frozen_projection(base: BaseLM, dtype: torch.dtype) -> torch.Tensor:
    """The base's vocabulary projection `[vocab, d]`, which must be all that makes logits of states.

    Raises `IncompatibleError` if the base scales, caps or shifts its logits.
    """
    weight: torch.Tensor = base.output_embeddings.weight.detach()
    # Large: a cap bends large logits only.
    probe = torch.full((1, base.hidden_size), 100.0, dtype=weight.dtype, device=weight.device)
    if not torch.allclose(base.project(probe), probe @ weight.T, rtol=1e-2, atol=1e-2):
        name = base.identity.name
        raise IncompatibleError(f"{name} scales, caps or shifts its logits; training on that is not possible yet")
    return weight.to(dtype)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The precision `float32` or `bfloat16`; `auto`: bfloat16 where the machine multiplies it natively."""
    if name not in ("auto", *PRECISIONS):
        raise UnknownNameError("precision", name, ("auto", *PRECISIONS))
    if name == "auto":
        native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    return PRECISIONS[name]
