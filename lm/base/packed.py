"""Linear layers for steps of a few tokens on a CPU: oneDNN with weights that are laid out for it beforehand.

A step of decoding multiplies one to some dozen rows by every weight. As torch keeps them each further row costs almost
as much as the first; laid out for few rows they cost little more than reading the weights once. Prompts, which have
many rows, are multiplied as before. Results differ from the plain product by rounding only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from lm.base.fast.traceable import multiply

ROWS = 8  # that weights are laid out for
MOST_ROWS = 64  # of a product; with more the plain one is as fast


class PackedProduct:
    """The forward of a `Linear`: rows `[..., in_features]` -> `[..., out_features]`. Its weight must not change."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        self.linear = linear
        self.bias: torch.Tensor | None = linear.bias
        self.packed: Any = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_exporting() and rows.shape[:-1].numel() > MOST_ROWS:
            return functional.linear(rows, self.linear.weight, self.bias)
        return multiply(rows, self.packed, self.bias, self.linear.weight.shape[0])


def can_pack(model: torch.nn.Module) -> bool:
    """Whether this gains: float32 on a CPU, with a torch that has oneDNN."""
    first = next(model.parameters(), None)
    return (
        first is not None
        and first.device.type == "cpu"
        and first.dtype == torch.float32
        and not first.requires_grad
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


@torch.inference_mode()
def pack(model: torch.nn.Module) -> None:
    """Gives all plain `Linear`s of a model packed products, once; for inference only."""
    for module in model.modules():
        if type(module) is torch.nn.Linear and "forward" not in vars(module):
            module.forward = PackedProduct(module)  # type: ignore[assignment]
