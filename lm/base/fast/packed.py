"""Linear layers for decoding on a CPU: oneDNN with weights that are laid out for it beforehand.

A step of decoding multiplies one to some dozen rows by every weight. As torch keeps them each further row costs almost
as much as the first; laid out for few rows they cost little more than reading the weights once, and prompts, which
have many rows, lose nothing. Results differ from the plain product by rounding only.

Linear layers that read the same rows can be one product: queries, keys and values; a gate and what it lets through.
They are seen in a forward, not told by names: layers of one module that are given the very same tensor.

The weights are then in memory once. Plain ones that are mapped from a file leave it as soon as they are laid out, and
come back if somebody reads them; others (converted to another precision, or changed) are dropped, until `unpack`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lm.base.probe import attempt
from lm.pages import release

ROWS = 8  # that weights are laid out for
TOLERANCE = 1e-4  # share of the largest logit by which joined products may change any

# The product as an operator of its own, so that a program of tensors can have the packed weight as an input. torch's
# compiler takes oneDNN's layout for constants only, which would be another program for every layer.
_library = torch.library.Library("rescore", "FRAGMENT")
_library.define("packed_linear(Tensor rows, Tensor packed, Tensor? bias, int size) -> Tensor")


def _product(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, size: int) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return product


_library.impl("packed_linear", _product, "CompositeExplicitAutograd")


def _shape(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, size: int) -> torch.Tensor:
    return rows.new_empty(*rows.shape[:-1], size)


torch.library.register_fake("rescore::packed_linear", _shape)


class PackedProduct:
    """The forward of a `Linear`: rows `[..., in_features]` -> `[..., out_features]`. For inference only."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        self.bias: torch.Tensor | None = linear.bias
        self.size = linear.weight.shape[0]
        self.packed: Any = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            traced: torch.Tensor = torch.ops.rescore.packed_linear(rows, self.packed, self.bias, self.size)
            return traced
        return _product(rows, self.packed, self.bias, self.size)

    def weight(self) -> torch.Tensor:
        """The weight as it was, bit for bit."""
        weight: torch.Tensor = self.packed.to_dense()
        return weight


class Siblings:
    """Layers that read the same rows, as one product: it is computed when the first of them is called, and its parts
    given to the others. Every product costs a start, however small it is."""

    def __init__(self, linears: Sequence[torch.nn.Linear]) -> None:
        self.sizes = [linear.weight.shape[0] for linear in linears]
        joined = torch.nn.Linear(linears[0].weight.shape[1], sum(self.sizes), bias=False, device="meta")
        joined.weight = torch.nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
        if linears[0].bias is not None:
            joined.bias = torch.nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
        self.product = PackedProduct(joined)
        self._rows: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}

    def part(self, place: int, rows: torch.Tensor) -> torch.Tensor:
        """The product of one of the layers; a tensor of rows is multiplied once for all of them."""
        if rows is not self._rows or place not in self._parts:
            self._rows, self._parts = rows, dict(enumerate(self.product(rows).split(self.sizes, dim=-1)))
        part = self._parts.pop(place)
        if not self._parts:
            self._rows = None
        return part


class Sibling:
    """The forward of one of several layers that are one product."""

    def __init__(self, siblings: Siblings, place: int) -> None:
        self.siblings, self.place = siblings, place

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self.siblings.part(self.place, rows)

    def weight(self) -> torch.Tensor:
        """The layer's weight as it was, bit for bit."""
        weight: torch.Tensor = self.siblings.product.weight().split(self.siblings.sizes)[self.place].clone()
        return weight


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
def pack(
    model: torch.nn.Module,
    kept: torch.nn.Module | None = None,
    groups: Sequence[Sequence[torch.nn.Linear]] = (),
) -> None:
    """Gives all plain `Linear`s of a model packed products, those of each group one in common. What no file holds of
    their weights is dropped but for its shape (on the device `meta`); not that of `kept`, of which single rows are
    read.

    At no time are more than those of one product in memory twice, the largest while there is least beside it.
    """
    linears = plain_linears(model)
    for weight in model.parameters() if linears else ():
        release(weight)
    grouped = {linear for group in groups for linear in group}
    parts = [*groups, *([linear] for linear in linears if linear not in grouped)]
    for part in sorted(parts, key=lambda each: -sum(linear.weight.numel() for linear in each)):
        siblings = Siblings(part) if len(part) > 1 else None
        for place, linear in enumerate(part):
            linear.forward = Sibling(siblings, place) if siblings else PackedProduct(linear)  # type: ignore[assignment]
            if not release(linear.weight) and linear is not kept:
                linear.weight = torch.nn.Parameter(torch.empty_like(linear.weight, device="meta"), requires_grad=False)


def plain_linears(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """The `Linear`s of a model that are as torch has them."""
    return [m for m in model.modules() if type(m) is torch.nn.Linear and product_of(m) is None]


def unpack(model: torch.nn.Module) -> None:
    """Takes back what `pack` did: the weights are bit for bit what they were."""
    for module in model.modules():
        if (product := product_of(module)) is not None:
            if module.weight.is_meta:
                module.weight = torch.nn.Parameter(product.weight(), requires_grad=False)
            del module.forward


def product_of(module: torch.nn.Module) -> PackedProduct | Sibling | None:
    """The packed product of a layer, or its part in one; None: it has none."""
    product = vars(module).get("forward")
    return product if isinstance(product, PackedProduct | Sibling) else None


def products_in(module: torch.nn.Module) -> list[PackedProduct]:
    """The packed products of a module and of all in it, each once."""
    found = [product for each in module.modules() if (product := product_of(each)) is not None]
    whole = [product.siblings.product if isinstance(product, Sibling) else product for product in found]
    return list({id(product): product for product in whole}.values())


@torch.inference_mode()
def pack_joined(model: torch.nn.Module, kept: torch.nn.Linear, forward: Callable[[], torch.Tensor]) -> bool:
    """Packs what is not packed yet (`pack`), with one product for those that read the same rows.

    forward: of the whole model, gives its logits. If they would not be the same then, every layer has its own product;
    if not even then, since an architecture reads a layer's weight itself, none has, and it returns False.
    """
    if not plain_linears(model):
        return True
    joined, before = _watched(model, forward)
    for groups in (joined, ()):
        pack(model, kept, groups)
        after = attempt(forward)
        if after is not None and torch.allclose(
            after, before, rtol=TOLERANCE, atol=TOLERANCE * float(before.abs().max())
        ):
            release(kept.weight)  # whose rows were read meanwhile
            return True
        unpack(model)
    return False


def _watched(
    model: torch.nn.Module, forward: Callable[[], torch.Tensor]
) -> tuple[list[list[torch.nn.Linear]], torch.Tensor]:
    """Groups of plain linear layers of one module that a forward gives the same rows, in the order in which they are
    called; and what the forward gave. Layers that are called more than once are in none."""
    called: dict[torch.nn.Linear, list[torch.Tensor]] = defaultdict(list)  # their rows, kept until all are compared

    def watch(layer: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(layer, torch.nn.Linear)
        called[layer].append(args[0])

    plain = set(plain_linears(model))
    parents = {child: name for name, parent in model.named_modules() for child in parent.children() if child in plain}
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
