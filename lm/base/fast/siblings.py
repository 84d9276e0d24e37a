"""Linear layers that read the same rows, as one product: queries, keys and values; a gate and what it lets through.

A step of decoding asks for some hundred products, and each one costs a start however small it is. Which layers are
siblings is seen in a forward, not told by names: those of one module that are given the very same tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from lm.base.packed import PackedProduct

TOLERANCE = 1e-4  # share of the largest logit by which the joined products may change any


class Siblings:
    """The product of some layers' weights, one below the other, which may not change: computed when the first of them
    is called, and given to the others."""

    def __init__(self, layers: Sequence[torch.nn.Linear]) -> None:
        self.sizes = [layer.weight.shape[0] for layer in layers]
        joined = torch.nn.Linear(layers[0].weight.shape[1], sum(self.sizes), bias=False, device="meta")
        joined.weight = torch.nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
        if layers[0].bias is not None:
            joined.bias = torch.nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
        self.product = PackedProduct(joined)
        self._rows: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}

    def part(self, place: int, rows: torch.Tensor) -> torch.Tensor:
        """The product of one layer `[..., out_features]`, once for the same rows."""
        if rows is not self._rows or place not in self._parts:
            self._rows, self._parts = rows, dict(enumerate(self.product(rows).split(self.sizes, dim=-1)))
        part = self._parts.pop(place)
        if not self._parts:
            self._rows = None
        return part


class Sibling:
    """The forward of one of them: rows `[..., in_features]` -> `[..., out_features]`."""

    def __init__(self, siblings: Siblings, place: int) -> None:
        self.siblings, self.place = siblings, place

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self.siblings.part(self.place, rows)


@torch.inference_mode()
def join_siblings(model: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> None:
    """Gives siblings a packed product in common, for inference only; where the model's `forward`, which gives its
    logits, would not say the same then, all layers stay as they are."""
    groups, before = _found(model, forward)
    for group in groups:
        siblings = Siblings(group)
        for place, layer in enumerate(group):
            layer.forward = Sibling(siblings, place)  # type: ignore[assignment]
    try:
        same = torch.allclose(forward(), before, rtol=TOLERANCE, atol=TOLERANCE * float(before.abs().max()))
    except RuntimeError:  # of a view that the parts of a product do not have
        same = False
    for layer in (layer for group in groups if not same for layer in group):
        del layer.forward


def _found(
    model: torch.nn.Module, forward: Callable[[], torch.Tensor]
) -> tuple[list[list[torch.nn.Linear]], torch.Tensor]:
    """Groups of plain linear layers of one module that a forward gives the same rows, in the order in which they are
    called; and what the forward gave. Layers that are called more than once are in none."""
    called: dict[torch.nn.Linear, list[torch.Tensor]] = defaultdict(list)  # their rows, kept until all are compared

    def watch(layer: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(layer, torch.nn.Linear)
        called[layer].append(args[0])

    parents = {
        child: name for name, parent in model.named_modules() for child in parent.children()
        if type(child) is torch.nn.Linear and "forward" not in vars(child)
    }  # fmt: skip
    handles = [layer.register_forward_pre_hook(watch) for layer in parents]
    try:
        logits = forward()
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple[str, int, bool], list[torch.nn.Linear]] = defaultdict(list)
    for layer, rows in called.items():
        if len(rows) == 1:
            groups[parents[layer], id(rows[0]), layer.bias is None].append(layer)
    return [group for group in groups.values() if len(group) > 1], logits


def products_of(module: torch.nn.Module) -> list[PackedProduct]:
    """The packed products of a module and what is below, each once."""
    found: dict[int, PackedProduct] = {}
    for each in module.modules():
        forward = vars(each).get("forward")
        product = forward.siblings.product if isinstance(forward, Sibling) else forward
        if isinstance(product, PackedProduct):
            found[id(product)] = product
    return list(found.values())
