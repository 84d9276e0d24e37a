"""States inside a base LM at the positions that its cache keeps, for drafters that read them.

A `KVCache` that is made with layers notes what goes into these at every forward, and keeps of it what it keeps of keys
and values. Without, nothing is noted.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lattices.errors import IncompatibleError

if TYPE_CHECKING:
    from lm.base.model import BaseLM

FINAL = -1  # in place of a layer: what the vocabulary projection reads


class LayerStates:
    """The states `[n, d]` that enter each of some layers, at the n = `length` positions kept so far.

    layers: counted from 0, or `FINAL`. capacity: positions.
    logits: `[1, vocab]`, after the last position.
    """

    def __init__(self, layers: Collection[int], capacity: int) -> None:
        self.layers = tuple(sorted(set(layers)))
        self.capacity, self.length = capacity, 0
        self.logits = torch.zeros(1, 0)
        self._kept: dict[int, torch.Tensor] = {}
        self._noted: dict[int, torch.Tensor] = {}  # of the last forward, [b, m, d]
        self._projected = torch.zeros(1, 0, 0)  # of its last positions

    def since(self, layers: Sequence[int], start: int) -> torch.Tensor:
        """The states of these layers side by side, from position `start` on: `[n - start, layers * d]`."""
        return torch.cat([self._kept[layer][start : self.length] for layer in layers], dim=-1)

    @contextmanager
    def noting(self, base: BaseLM) -> Iterator[None]:
        """Notes the states of a forward of the base. Raises as `check_layers`."""
        check_layers(base, self.layers)
        hooks = []
        for layer in self.layers:
            if layer == FINAL:
                hooks.append(base.model.base_model.register_forward_hook(self._note_output))
            else:
                note = partial(self._note_input, layer)
                hooks.append(decoder_layers(base)[layer].register_forward_pre_hook(note, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note_input(self, layer: int, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._noted[layer] = args[0] if args else kwargs["hidden_states"]

    def _note_output(self, _module: torch.nn.Module, _args: Any, output: Any) -> None:
        self._noted[FINAL] = output[0]

    def note_logits(self, logits: torch.Tensor) -> None:
        """Notes the logits `[b, l, vocab]` of the last positions of a forward."""
        self._projected = logits

    def keep(self, columns: Sequence[int], row: int) -> None:
        """Of the last forward keeps `columns` of batch row `row`; see `KVCache.keep`."""
        if not columns:
            return
        for layer, noted in self._noted.items():
            if layer not in self._kept:
                self._kept[layer] = noted.new_empty(self.capacity, noted.shape[-1])
            self._kept[layer][self.length : self.length + len(columns)] = noted[row, list(columns)]
        behind = next(iter(self._noted.values())).shape[1] - columns[-1]  # projected are the last positions, or none
        if behind <= self._projected.shape[1]:
            self.logits = self._projected[row, -behind][None]
        self.length += len(columns)
        self._noted.clear()


def decoder_layers(base: BaseLM) -> torch.nn.ModuleList:
    """The layers of a base LM. Raises `IncompatibleError` for one that has them in no list."""
    layers = getattr(base.model.get_decoder(), "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise IncompatibleError(f"{base.identity.name} has no list of layers whose states could be read")
    return layers


def check_layers(base: BaseLM, layers: Collection[int]) -> None:
    """Raises `IncompatibleError` if a base LM lacks one of the layers, or has no final states to read."""
    if FINAL in layers and not base.body_gives_states:
        raise IncompatibleError(f"{base.identity.name} changes its final states before they are projected")
    inner = [layer for layer in layers if layer != FINAL]
    if inner and not 0 <= min(inner) <= max(inner) < (count := len(decoder_layers(base))):
        raise IncompatibleError(
            f"{base.identity.name} has {count} layers, and the states before layers "
            f"{', '.join(map(str, sorted(inner)))} (from 0) are needed"
        )


def causal_arguments(body: torch.nn.Module, ids: torch.Tensor, *, masked: bool) -> dict[str, Any]:
    """What the body of a causal LM is given to make states of whole texts int64 `[b, n]`, padded at the end: there no
    token sees what stands after it. masked: whether it takes a mask, which makes attention faster."""
    rows, longest = ids.shape
    arguments: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if masked:
        causal = torch.ones(longest, longest, dtype=torch.bool, device=ids.device).tril()
        arguments["attention_mask"] = causal.expand(rows, 1, -1, -1)
    if "position_ids" in inspect.signature(body.forward).parameters:  # as `BaseLM.forward` gives them
        arguments["position_ids"] = torch.arange(longest, device=ids.device).expand(rows, -1)
    return arguments
