"""Linear layers for decoding on a CPU: oneDNN with weights that are laid out for it beforehand.

A step of decoding multiplies one to some dozen rows by every weight. As torch keeps them each further row costs almost
as much as the first; laid out for few rows they cost little more than reading the weights once, and prompts, which
have many rows, lose nothing. Results differ from the plain product by rounding only.

The weights are then in memory once. Plain ones that are mapped from a file leave it as soon as they are laid out, and
come back if somebody reads them; others (converted to another precision, or changed) are dropped, until `unpack`.
"""

from __future__ import annotations

from typing import Any

import torch

from lm.pages import release

ROWS = 8  # that weights are laid out for


class PackedProduct:
    """The forward of a `Linear`: rows `[..., in_features]` -> `[..., out_features]`. For inference only."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        self.bias = linear.bias
        self.packed: Any = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return product


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
def pack(model: torch.nn.Module, kept: torch.nn.Module | None = None) -> None:
    """Gives all plain `Linear`s of a model packed products. What no file holds of their weights is dropped but for its
    shape (on the device `meta`); not that of `kept`, of which single rows are read.

    At no time is more than one of them in memory twice, the largest while there is least beside it.
    """
    linears = [m for m in model.modules() if type(m) is torch.nn.Linear and product_of(m) is None]
    for weight in model.parameters() if linears else ():
        release(weight)
    for linear in sorted(linears, key=lambda each: -each.weight.numel()):
        linear.forward = PackedProduct(linear)  # type: ignore[assignment]
        if not release(linear.weight) and linear is not kept:
            linear.weight = torch.nn.Parameter(torch.empty_like(linear.weight, device="meta"), requires_grad=False)


def unpack(model: torch.nn.Module) -> None:
    """Takes back what `pack` did: the weights are bit for bit what they were."""
    for module in model.modules():
        if (product := product_of(module)) is not None:
            if module.weight.is_meta:
                module.weight = torch.nn.Parameter(product.packed.to_dense(), requires_grad=False)
            del module.forward


def product_of(module: torch.nn.Module) -> PackedProduct | None:
    """The packed product of a layer; None: it has none."""
    product = vars(module).get("forward")
    return product if isinstance(product, PackedProduct) else None
