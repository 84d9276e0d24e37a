"""The vocabulary projection of a part of the tokens, for heads that draft from these only (`lm.draft_vocabulary`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from lm.base.fast.packed import PackedProduct, can_pack
from lm.base.model import BaseLM


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
