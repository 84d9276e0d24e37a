"""What heads project to the vocabulary with where that is not the base's own projection, which is there anyway.

Others' Medusa heads bring projections along (`Projection`), one each or one for all of them, without bias. Heads that
draft from a part of the tokens only (`lm.draft_vocabulary`) use these rows of the base's (`DraftRows`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from msgspec import Meta
from torch import nn
from torch.nn import functional

from lm.base.fast.packed import PackedProduct, can_pack
from lm.checkpoint import Config

if TYPE_CHECKING:
    from lm.base.model import BaseLM


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


class DraftRows:
    """The rows of some tokens, copied out of the base's projection once, and laid out for few states as its own are.

    base: whose weights must not change meanwhile. token_ids: int64 `[m]`.
    """

    @torch.inference_mode()
    def __init__(self, base: BaseLM, token_ids: torch.Tensor) -> None:
        self.base, self.token_ids = base, token_ids.to(base.device)
        weight, bias = base.output_embeddings.weight, base.output_bias
        how = {"bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
        linear = nn.utils.skip_init(nn.Linear, weight.shape[1], len(token_ids), **how).requires_grad_(False)
        linear.weight.copy_(weight[self.token_ids])
        if bias is not None:
            linear.bias.copy_(bias[self.token_ids])
        packs = base.from_files and can_pack(linear)
        self.project: Callable[[torch.Tensor], torch.Tensor] = PackedProduct(linear) if packs else linear
        self._is_in = torch.zeros(len(weight), dtype=torch.bool, device=base.device)
        self._is_in[self.token_ids] = True

    @torch.inference_mode()
    def with_tokens(self, token_ids: Sequence[int]) -> DraftProjection:
        """The projection to these rows and those of further tokens."""
        given = torch.tensor(list(token_ids), dtype=torch.int64, device=self.base.device).unique()
        more = given[~self._is_in[given]]
        weight, bias = self.base.output_embeddings.weight, self.base.output_bias
        return DraftProjection(
            self, torch.cat([self.token_ids, more]), weight[more], None if bias is None else bias[more]
        )


@dataclass(frozen=True, eq=False)
class DraftProjection:
    """The projection of a request: the common rows and its own.

    token_ids int64 `[v]`: of the columns, in no order. weight `[more, d]`, bias `[more]`: of the last of them.
    """

    rows: DraftRows
    token_ids: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., d]` -> logits `[..., v]`, scaled as the base's own."""
        logits = torch.cat([self.rows.project(hidden), functional.linear(hidden, self.weight, self.bias)], dim=-1)
        return self.rows.base.scaling(logits)
