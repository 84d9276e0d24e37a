"""The product with a packed weight as an operator of its own, so that a program of tensors can have the weight as an
input: torch's compiler takes oneDNN's layout for constants only, which would be another program for every layer."""

from __future__ import annotations

import torch

_library = torch.library.Library("rescore", "FRAGMENT")
_library.define("packed_linear(Tensor rows, Tensor packed, Tensor? bias, int size) -> Tensor")


def _product(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, size: int) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return product


_library.impl("packed_linear", _product, "CompositeExplicitAutograd")


def _shape(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, size: int) -> torch.Tensor:
    return rows.new_empty(*rows.shape[:-1], size)


torch.library.register_fake("rescore::packed_linear", _shape)


def multiply(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, size: int) -> torch.Tensor:
    """Rows `[..., in]` by a weight that oneDNN laid out -> `[..., size]`."""
    if torch.compiler.is_exporting():
        traced: torch.Tensor = torch.ops.rescore.packed_linear(rows, packed, bias, size)
        return traced
    return _product(rows, packed, bias, size)
