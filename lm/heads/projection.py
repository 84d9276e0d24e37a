"""Vocabulary projections that come with heads: others' Medusa heads have one each, or one for all of them.

The project's own heads use the base's projection, which is there anyway. Those here have no bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from msgspec import Meta
from torch import nn
from torch.nn import functional

from lm.checkpoint import Config


class OwnProjection(Config, frozen=True, kw_only=True):
    """What these projections are."""

    rows: Annotated[int, Meta(ge=1)]  # tokens that heads propose: all of the vocabulary, or those of a token map
    mapped: bool = False  # whether there is a token map
    shared: bool = False  # one for all heads, instead of one each
    scale: Annotated[float, Meta(gt=0)] = 1.0  # of the logits


class Projection(nn.Module):
    """`weight [h-1 (shared: 1), rows, d]`; mapped: `token_map int64 [rows]`, the token of each row."""

    def __init__(self, own: OwnProjection, heads: int, hidden_size: int) -> None:
        super().__init__()
        self.own = own
        self.weight = nn.Parameter(torch.empty(1 if own.shared else heads, own.rows, hidden_size))
        self.token_map: torch.Tensor | None
        self.register_buffer("token_map", torch.zeros(own.rows, dtype=torch.int64) if own.mapped else None)

    def forward(self, read: torch.Tensor, heads: Sequence[int], vocab_size: int) -> torch.Tensor:
        """What each of `heads` (from 0 for head 2) reads, `[len(heads), n, d]` -> logits `[len(heads), n, vocab_size]`;
        tokens outside the map have -inf."""
        # A head at a time: indexing the weights by a list would copy them.
        read, one = read.to(self.weight.dtype), self.own.shared
        each = [functional.linear(r, self.weight[0 if one else head]) for r, head in zip(read, heads, strict=True)]
        logits = torch.stack(each)
        if self.own.scale != 1.0:
            logits = logits * self.own.scale
        if self.token_map is None:
            return logits
        whole = logits.new_full((*logits.shape[:-1], vocab_size), -torch.inf)
        whole[..., self.token_map] = logits
        return whole

    def first(self, heads: int) -> Projection:
        """That of the first heads; shares memory with this one."""
        with torch.device("meta"):
            cut = Projection(self.own, heads, self.weight.shape[-1])
        state = {n: value[:heads] if n == "weight" else value for n, value in self.state_dict().items()}
        cut.load_state_dict(state, assign=True)
        return cut
