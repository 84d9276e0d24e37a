"""Which linear layers read the same rows, so that they can be one product: queries, keys and values; a gate and what it
lets through. Seen in a forward, not told by names: they are layers of one module that are given the very same tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch

from lm.base.fast.packed import pack, plain_linears, unpack
from lm.base.probe import attempt
from lm.pages import release

TOLERANCE = 1e-4  # share of the largest logit by which joined products may change any


@torch.inference_mode()
def pack_joined(model: torch.nn.Module, kept: torch.nn.Linear, forward: Callable[[], torch.Tensor]) -> bool:
    """Packs what is not packed yet (`lm.base.fast.packed.pack`), with one product for those that read the same rows.

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
