"""The forward of a decoder layer that has a program: which calls the program takes, and what it is given for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lm.base.cache import KVCache, TreeCache
from lm.base.fast.layer_program import LEAST_CACHED, MOST_TOKENS, Input, Path, Signature, weights_of

Run = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]  # takes and gives tensors, in the order of `export`


@dataclass(frozen=True)
class _Expected:
    """What a tensor of a call must be."""

    path: Path
    is_mask: bool
    dtype: torch.dtype
    ndim: int
    sizes: tuple[tuple[int, int], ...]  # those that are always the same, with their places

    @classmethod
    def of(cls, given: Input) -> _Expected:
        sizes = tuple((place, size) for place, size in enumerate(given.sizes) if size is not None)
        return cls(given.path, given.is_mask, getattr(torch, given.dtype), len(given.sizes), sizes)

    def fits(self, tensor: torch.Tensor) -> bool:
        shape = tensor.shape
        same = tensor.dtype is self.dtype and len(shape) == self.ndim
        return same and all(shape[place] == size for place, size in self.sizes)


class CompiledLayer:
    """The forward of a decoder layer: its program for the calls that fit it, else the layer's own (`plain`)."""

    def __init__(self, layer: torch.nn.Module, place: int, signature: Signature, run: Run) -> None:
        self.plain, self._run, self._weights = layer.forward, run, weights_of(layer)
        self._place, self._signature = place, signature
        self._inputs = [_Expected.of(each) for each in signature.inputs]
        paths = [signature.cache, *(each.path for each in signature.inputs), *(path for path, _ in signature.constants)]
        names = {path[0] for path in paths}
        self._named = sum(isinstance(name, str) for name in names)
        self._placed = len(names) - self._named

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.compute(*args, **kwargs)
        return self.plain(*args, **kwargs) if output is None else output

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """What the program gives for a call, having written to the cache; None for a call that it does not take."""
        if len(args) != self._placed or len(kwargs) != self._named:
            return None
        try:
            cache = _at(self._signature.cache, args, kwargs)
            tensors = [_at(each.path, args, kwargs) for each in self._inputs]
            if any(_at(path, args, kwargs) != value for path, value in self._signature.constants):
                return None
        except (LookupError, TypeError):
            return None
        states = tensors[self._signature.states]
        if states is None or states.ndim != 3:
            return None
        rows, n, _ = states.shape
        if rows != 1 or n > MOST_TOKENS or not isinstance(cache, KVCache | TreeCache):
            return None
        for place, expected in enumerate(self._inputs):
            tensor = tensors[place]
            if tensor is None and expected.is_mask and n == 1:
                continue
            if tensor is None or not expected.fits(tensor):
                return None
            tensors[place] = tensor.contiguous()
        layer: Any = cache.layers[self._place]
        start = layer.room(rows, n)
        if start is None or start < LEAST_CACHED:
            return None
        tensors = [_seen(start + 1) if tensor is None else tensor for tensor in tensors]
        (states,) = self._run([_past(start), *layer.buffers, *tensors, *self._weights])
        return states if self._signature.nones is None else (states, *(None,) * self._signature.nones)


def _at(path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first, *rest = path
    found = args[first] if isinstance(first, int) else kwargs[first]
    for step in rest:
        found = found[step]
    return found


@functools.lru_cache(maxsize=1)
def _past(n: int) -> torch.Tensor:
    """A tensor of n numbers, of which a program reads only how many they are."""
    return torch.zeros(1).expand(n)


@functools.lru_cache(maxsize=1)
def _seen(n: int) -> torch.Tensor:
    """The mask `[1, 1, 1, n]` of a token that sees all."""
    return torch.ones(1, 1, 1, n, dtype=torch.bool)
