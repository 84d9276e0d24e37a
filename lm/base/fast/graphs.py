"""Forwards of fixed shapes: what a GPU can record once (a CUDA graph) and play back, without Python and a launch for
each of its hundreds of small kernels.

What changes from call to call lies in tensors that stay where they are: the tokens, padded to one of few sizes, their
positions, the columns of the cache that they are written to, and what each of them sees of the whole cache. The rows
that pad see what is settled, are written after the others, where nothing is kept of them, and are not given back.
On a CPU the same is computed and nothing recorded.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from lattices.errors import first_line
from lm.base.cache import BufferLayer, KVCache
from lm.locks import warn

SIZES = (1, 2, 4, 8, 16, 32, 64)  # tokens of a forward, padding included
ROOM = 256  # a capacity is a multiple of it, so that most decodes find what was recorded for another one
WARM_UPS = 2  # forwards before one is recorded, as torch asks for
Outputs = tuple[torch.Tensor, torch.Tensor]
Forward = Callable[[torch.Tensor, KVCache, torch.Tensor, torch.Tensor], Outputs]


class FixedLayer(BufferLayer):
    """A layer of a `FixedCache`: while a forward of a fixed shape runs, it writes to the cache's `columns` and gives
    the whole buffers."""

    def __init__(self, cache: FixedCache, place: int) -> None:
        super().__init__(cache)
        self.cache: FixedCache = cache
        self.place = place

    def allocate(self, states: tuple[torch.Tensor, torch.Tensor], capacity: int) -> None:
        if not self.is_initialized:
            self.lazy_initialization(*states)
            self.buffers = self.cache.forwards.buffers_like(states, self.place)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if (columns := self.cache.columns) is None:
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = self.buffers
        return keys.index_copy_(2, columns, key_states), values.index_copy_(2, columns, value_states)


class FixedCache(KVCache):
    """A `KVCache` whose buffers belong to `forwards`, which lends them to one cache after the other."""

    def __init__(self, config: PreTrainedConfig, forwards: FixedForwards) -> None:
        self.forwards = forwards
        self.columns: torch.Tensor | None = None
        self._made = 0
        super().__init__(config, forwards.capacity)

    def _new_layer(self) -> BufferLayer:
        self._made += 1
        return FixedLayer(weakref.proxy(self), self._made - 1)  # a cycle would keep the cache until it is looked for

    def prepare(self, most: int) -> None:
        """See `KVCache.prepare`: it has what a GPU is to play back recorded."""
        self.forwards.record(self, most)


@dataclass(frozen=True)
class Shape:
    """The tensors of forwards of one size.

    ids, positions: `[1, size]`. columns: `[size]`, where keys and values are written. sees: bool `[1, 1, size,
    capacity]`.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    columns: torch.Tensor
    sees: torch.Tensor

    @classmethod
    def of(cls, size: int, capacity: int, device: torch.device) -> Shape:
        """Tensors without content."""
        ids, positions, columns = (torch.zeros(1, size, dtype=torch.int64, device=device) for _ in range(3))
        sees = torch.zeros(1, 1, size, capacity, dtype=torch.bool, device=device)
        return cls(ids, positions, columns[0], sees)

    def fill(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None, length: int) -> None:
        """Makes it n tokens `[1, n]` after `length` cached positions; mask as `BaseLM.forward` takes it."""
        n = ids.shape[1]
        self.ids.zero_()
        self.ids[:, :n] = ids
        self.positions.fill_(length)
        self.positions[:, :n] = positions
        torch.arange(length, length + len(self.columns), out=self.columns)
        self.sees[..., :length] = True
        self.sees[..., length:] = False
        block = self.sees[0, 0, :n, : length + n]
        if mask is None:
            block[:, length:] = torch.ones(n, n, dtype=torch.bool, device=ids.device).tril()
        else:
            block.copy_(mask[0, 0])


class FixedForwards:
    """The forwards of one base LM on a cache of `capacity` positions, at all of which every call looks.

    forward: the model's own, from tokens, cache, positions and mask to logits and states.
    """

    def __init__(self, forward: Forward, config: PreTrainedConfig, capacity: int, device: torch.device) -> None:
        self.capacity = -(-(capacity + SIZES[-1]) // ROOM) * ROOM  # what pads is written as well
        self._forward, self._config, self._device = forward, config, device
        self._records = device.type == "cuda"
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._shapes: dict[int, Shape] = {}
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, Outputs]] = {}
        self._lent: weakref.ref[FixedCache] | None = None

    def has_room(self, capacity: int) -> bool:
        """Whether it can lend its buffers for so many positions now: nobody else has a cache of them."""
        return capacity + SIZES[-1] <= self.capacity and (self._lent is None or self._lent() is None)

    @torch.inference_mode()
    def new_cache(self) -> FixedCache:
        """An empty cache. What another one left in its buffers is cleared: all of them is read, and what is no number
        comes through a mask."""
        for buffer in (buffer for pair in self._buffers.values() for buffer in pair):
            buffer.zero_()
        cache = FixedCache(self._config, self)
        self._lent = weakref.ref(cache)
        return cache

    def buffers_like(self, states: tuple[torch.Tensor, torch.Tensor], place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers of a layer. They begin as zeros: what is masked must still be a number."""
        if place not in self._buffers:
            keys, values = (s.new_zeros(*s.shape[:2], self.capacity, s.shape[3]) for s in states)
            self._buffers[place] = (keys, values)
        return self._buffers[place]

    def __call__(
        self, ids: torch.Tensor, cache: FixedCache, positions: torch.Tensor, mask: torch.Tensor | None
    ) -> Outputs:
        """Logits `[1, n, vocab]` and states `[1, n, d]` of at most `SIZES[-1]` tokens after what the cache holds."""
        n = ids.shape[1]
        size = next(size for size in SIZES if size >= n)
        shape = self._shape(size)
        shape.fill(ids, positions, mask, cache.length)
        if self._records and size not in self._recorded:
            self._record(size, cache)
        if size in self._recorded:
            graph, outputs = self._recorded[size]
            graph.replay()
        else:
            outputs = self._compute(shape, cache)
        cache.written = cache.length + n
        for layer in cache.buffers:
            layer.block = None
        logits, states = (each[:, :n].clone() for each in outputs)  # the next call writes over them
        return logits, states

    def record(self, cache: FixedCache, most: int) -> None:
        """Records forwards of all sizes of up to `most` tokens that are not recorded yet, where they are at all. What
        they write after the cache's positions is not kept."""
        for before, size in zip((0, *SIZES), SIZES, strict=False):
            if self._records and before < most and size not in self._recorded:
                one = torch.zeros(1, 1, dtype=torch.int64, device=self._device)  # more might not fit into the context
                self._shape(size).fill(one, one + cache.length, None, cache.length)
                self._record(size, cache)

    def _shape(self, size: int) -> Shape:
        if size not in self._shapes:
            self._shapes[size] = Shape.of(size, self.capacity, self._device)
        return self._shapes[size]

    def _compute(self, shape: Shape, cache: FixedCache) -> Outputs:
        cache.columns = shape.columns
        try:
            return self._forward(shape.ids, cache, shape.positions, shape.sees)
        finally:
            cache.columns = None

    @torch.inference_mode()
    def _record(self, size: int, cache: FixedCache) -> None:
        """Records a forward of a size, with what its tensors hold: each time it writes the same."""
        shape, graph, stream = self._shapes[size], torch.cuda.CUDAGraph(), torch.cuda.Stream(self._device)
        try:
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._compute(shape, cache)
            torch.cuda.current_stream(self._device).wait_stream(stream)
            with torch.cuda.graph(graph):
                outputs = self._compute(shape, cache)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the forward asks the GPU for a number on its way
            self._records = False
            warn(f"decodes without CUDA graphs: a forward can't be recorded ({first_line(error)})")
            return
        self._recorded[size] = graph, outputs
