"""Key/value caches of decoders that read more tokens than they keep, for transformers' own forwards.

transformers' dynamic cache copies everything it holds at every step and can only be cut at the end. Verification and
rescoring write proposals after the kept tokens without copying these, and then keep an arbitrary path of them:

- `KVCache`, of the base LM: equally long rows; after a forward over proposals (a batch of drafts, or a tree in one row)
  the accepted ones of one row stay.
- `TreeCache`, of a rescorer: rows of different lengths, each with drafted trees after its settled tokens; a node sees
  these and its own ancestors. Accepted nodes join the settled tokens, so nothing is computed twice.

Knows nothing about heads, drafts or acceptance.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from lattices.errors import IncompatibleError
from lm.base.states import LayerStates

if TYPE_CHECKING:
    from lm.base.encoder_decoder import Source

GROWTH = 64  # positions by which a full buffer of a `TreeCache` grows
# Whose layers are keys and values of every token, and no more: what a mask hides of them is the model's affair.
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
# A layer that keeps nothing: it shares another one's keys and values, or has no attention.
EMPTY_LAYER = "DummyLayer"
Layer = TypeVar("Layer", bound=DynamicLayer)


def layer_types(config: Any) -> set[str]:
    """The kinds of a decoder's layers, as its configuration (`get_text_config`) names or implies them."""
    if types := getattr(config, "layer_types", None):
        return set(types)
    # Families from before `layer_types` have names of their own for a window: any number called one is taken for one.
    windows = [n for n, v in config.to_dict().items() if "window" in n and type(v) is int and v > 0]
    chunks = getattr(config, "attention_chunk_size", None)
    return {"sliding_attention" if windows or chunks else "full_attention"}


def cache_layers(config: PreTrainedConfig, make: Callable[[], Layer]) -> tuple[list[Any], list[Layer]]:
    """All layers of a model's cache, and those alone that hold keys and values, each of which is from `make`.

    Raises `IncompatibleError` if a layer keeps more than keys and values, so that it can't forget a rejected token.
    """
    config = config.get_text_config(decoder=True)
    other = {name for name in getattr(config, "layer_types", None) or () if name not in ATTENTION}
    layers = DynamicCache(config=config).layers if not other else []
    kinds = {type(layer).__name__ for layer in layers} - {EMPTY_LAYER}
    other |= kinds - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
    if other:
        raise IncompatibleError(f"has {', '.join(sorted(other))} layers, whose state can't forget rejected tokens")
    if not kinds:
        raise IncompatibleError("keeps no keys and values")
    buffers = [make() for layer in layers if type(layer).__name__ != EMPTY_LAYER]
    filled = iter(buffers)
    return [layer if type(layer).__name__ == EMPTY_LAYER else next(filled) for layer in layers], buffers


class _Buffers(DynamicLayer):
    """One layer's keys and values: two buffers `[b, heads, capacity, d_head]`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.buffers: tuple[torch.Tensor, ...] = ()

    def allocate(self, states: tuple[torch.Tensor, torch.Tensor], capacity: int) -> None:
        """Buffers for states like these `[b, heads, n, d_head]`, at the first forward."""
        if not self.is_initialized:
            self.lazy_initialization(*states)
            self.buffers = tuple(s.new_empty(*s.shape[:2], capacity, s.shape[3]) for s in states)

    @abstractmethod
    def room(self, rows: int, n: int) -> int | None:
        """Where a forward may write n positions into the buffers by itself, in place of `update`, and read all up to
        them; None where only `update` can."""

    def first(self, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the keys and values of the first `end` positions."""
        keys, values = (buffer[:, :, :end] for buffer in self.buffers)
        return keys, values


class BufferLayer(_Buffers):
    """A layer of a `KVCache`.

    `update` with the buffer's own batch size writes after the kept positions and returns a view, no copy. `update`
    with a batch of p on a buffer of one row (p drafts on the same past) leaves the buffer as it is, and returns copies.
    """

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        self.cache = cache
        self.block: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        states, length, capacity = (key_states, value_states), self.cache.length, self.cache.capacity
        self.allocate(states, capacity)
        rows, end = key_states.shape[0], length + key_states.shape[2]
        self.cache.written = end
        if rows != self.buffers[0].shape[0]:
            self.block = states
            keys, values = (past.expand(rows, -1, -1, -1) for past in self.first(length))
            return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)
        self.block = None  # of an earlier forward, of which nothing was kept
        assert end <= capacity, f"cache of {capacity} positions asked to hold {end}"
        for buffer, new in zip(self.buffers, states, strict=True):
            buffer[:, :, length:end] = new
        return self.first(end)

    def room(self, rows: int, n: int) -> int | None:
        length, end = self.cache.length, self.cache.length + n
        if not self.is_initialized or rows != self.buffers[0].shape[0] or end > self.cache.capacity:
            return None
        self.block, self.cache.written = None, end
        return length

    def get_seq_length(self) -> int:
        return self.cache.length


class KVCache(Cache):
    """Keys and values of every layer; `keep` after each forward says which of its positions stay.

    length: positions kept.
    written: those and the block of the last forward.
    states: the base's own at the kept positions, of one row, where some are asked for (`layers`).
    source: what an encoder made of the prompts, where there is one.
    """

    def __init__(self, config: PreTrainedConfig, capacity: int, layers: Collection[int] = ()) -> None:
        self.capacity = capacity
        self.states = LayerStates(layers, capacity) if layers else None
        self.length = self.written = 0
        self.source: Source | None = None
        every, self.buffers = cache_layers(config, self._new_layer)
        super().__init__(layers=every)

    def _new_layer(self) -> BufferLayer:
        return BufferLayer(self)

    def prepare(self, most: int) -> None:
        """Makes all ready for forwards of 1 to `most` tokens on what it holds, so that no forward has to."""

    @torch.inference_mode()
    def keep(self, columns: Sequence[int], row: int = 0) -> None:
        """Of the tokens in the last forward keep `columns` (from 0, in order), of batch row `row`."""
        chosen = list(columns)
        if self.states is not None:
            self.states.keep(chosen, row)
        in_place = chosen == list(range(len(chosen)))
        index: Any = slice(len(chosen))
        if not in_place:
            index = torch.tensor(chosen, device=self.buffers[0].buffers[0].device)
        target = slice(self.length, self.length + len(chosen))
        for layer in self.buffers:
            if layer.block is not None:
                for buffer, states in zip(layer.buffers, layer.block, strict=True):
                    buffer[0, :, target] = states[row][:, index]
                layer.block = None
            elif not in_place:
                for buffer in layer.buffers:
                    buffer[:, :, target] = buffer[:, :, self.length + index]
        self.length = self.written = target.stop

    def keep_all(self) -> None:
        """Keeps every token of the last forward, all rows."""
        assert all(layer.block is None for layer in self.buffers), "drafts on a past of one row can't all be kept"
        assert self.states is None, "states are kept of one row, by `keep`"
        self.length = self.written

    @torch.inference_mode()
    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps these rows of the batch, kept positions only."""
        for layer in self.buffers:
            old, layer.buffers = layer.buffers, tuple(b.new_empty(len(rows), *b.shape[1:]) for b in layer.buffers)
            for before, buffer in zip(old, layer.buffers, strict=True):
                buffer[:, :, : self.length] = before[rows, :, : self.length]
        if self.source is not None:
            self.source = self.source.rows(rows)


class RowsLayer(_Buffers):
    """A layer of a `TreeCache`, written at the `columns` of each row."""

    def __init__(self, cache: TreeCache) -> None:
        super().__init__()
        self.cache = cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        states, end, start = (key_states, value_states), self.cache.end, self.cache.start
        self.allocate(states, 0)
        self._grow()
        rows, n = key_states.shape[0], key_states.shape[2]
        every = torch.arange(rows, device=key_states.device)[:, None]
        for buffer, new in zip(self.buffers, states, strict=True):
            if start is not None:  # all rows are equally long: one slice
                buffer[:, :, start : start + n] = new
            else:
                buffer[every, :, self.cache.columns] = new.transpose(1, 2)
        return self.first(end)

    def room(self, rows: int, n: int) -> int | None:
        start = self.cache.start
        if not self.is_initialized or start is None or start + n != self.cache.end:
            return None
        self._grow()
        return start

    def _grow(self) -> None:
        if (more := self.cache.end - self.buffers[0].shape[2]) > 0:  # zeros: what is masked must still be a number
            self.buffers = tuple(torch.nn.functional.pad(b, (0, 0, 0, more + GROWTH)) for b in self.buffers)

    def get_seq_length(self) -> int:
        return self.cache.end


class TreeCache(Cache):
    """Settled tokens and the nodes after them; see the module's text.

    lengths: int64 `[b]`, settled tokens of each row.
    nodes: how many come after them in every row.
    end: columns in use, settled or not.
    columns: int64 `[b, n]`, where the last nodes are written; `start` is the first where that is the same in all rows.
    """

    def __init__(self, config: PreTrainedConfig, rows: int, device: torch.device) -> None:
        self.config, self.device = config, device
        self.lengths = np.zeros(rows, dtype=np.int64)
        self.nodes = self.end = 0
        self.columns = torch.zeros(rows, 0, dtype=torch.int64, device=device)
        self.start: int | None = 0
        self._ancestors = np.zeros((rows, 0, 0), dtype=bool)  # [b, nodes, nodes], each node its own ancestor
        layers, self.buffers = cache_layers(config, lambda: RowsLayer(self))
        super().__init__(layers=layers)

    def place(self, parents: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes room for n nodes a row, parents int64 `[b, n]` (earlier nodes, or -1): call before a forward.

        Returns position ids `[b, n]` and the mask, bool `[b, 1, n, m]`.
        """
        rows, n = parents.shape
        before, self.nodes = self.nodes, self.nodes + n
        ancestors = np.zeros((rows, self.nodes, self.nodes), dtype=bool)
        ancestors[:, :before, :before] = self._ancestors
        every = np.arange(rows)
        for i in range(n):
            parent = parents[:, i]
            line = ancestors[every, np.maximum(parent, 0)]  # a copy
            line[parent < 0] = False
            ancestors[:, before + i] = line
            ancestors[:, before + i, before + i] = True
        self._ancestors = ancestors
        seen = ancestors[:, before:]  # [b, n, nodes]
        positions = self.lengths[:, None] + seen.sum(-1) - 1
        columns = self.lengths[:, None] + np.arange(before, self.nodes)
        self.end = int(self.lengths.max()) + self.nodes
        mask = np.broadcast_to(np.arange(self.end) < self.lengths[:, None, None], (rows, n, self.end)).copy()
        at = self.lengths[:, None] + np.arange(self.nodes)  # [b, nodes], column of each node
        np.put_along_axis(mask, np.broadcast_to(at[:, None], seen.shape), seen, axis=2)
        self._write_at(columns)
        return torch.from_numpy(positions).to(self.device), torch.from_numpy(mask)[:, None].to(self.device)

    def place_text(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `place`, for text: n nodes a row that follow each other after the settled tokens, and are settled next."""
        assert self.nodes == 0, "text comes after settled tokens only"
        self.nodes = n
        columns = self.lengths[:, None] + np.arange(n)
        self.end = int(self.lengths.max()) + n
        mask = np.arange(self.end) <= columns[:, :, None]  # [b, n, m]
        self._write_at(columns)
        return torch.from_numpy(columns).to(self.device), torch.from_numpy(mask)[:, None].to(self.device)

    def _write_at(self, columns: np.ndarray) -> None:
        first = int(columns[0, 0])
        self.start = first if (columns[:, 0] == first).all() else None
        self.columns = torch.from_numpy(columns).to(self.device)

    @torch.inference_mode()
    def settle(self, paths: Sequence[Sequence[int]]) -> None:
        """Adds the nodes of each row's path (from the first one down) to its settled tokens and forgets the others."""
        starts = self.lengths.tolist()
        moved = [
            (row, starts[row] + node, starts[row] + place)
            for row, path in enumerate(paths) for place, node in enumerate(path) if place != node
        ]  # fmt: skip
        if moved:
            rows, source, target = torch.tensor(moved, device=self.device).T
            for layer in self.buffers:
                for buffer in layer.buffers:
                    buffer[rows, :, target] = buffer[rows, :, source]
        self.lengths = self.lengths + np.array([len(path) for path in paths], dtype=np.int64)
        self._forget_nodes()

    @torch.inference_mode()
    def copy(self) -> TreeCache:
        """Another cache with the same settled tokens, and no nodes."""
        assert self.nodes == 0, "only settled tokens are copied"
        other = TreeCache(self.config, len(self.lengths), self.device)
        other.lengths = self.lengths.copy()
        for ours, theirs in zip(self.buffers, other.buffers, strict=True):
            theirs.lazy_initialization(*ours.buffers)
            theirs.buffers = tuple(buffer.clone() for buffer in ours.buffers)
        return other

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values."""
        return sum(buffer.nbytes for layer in self.buffers for buffer in layer.buffers)

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows, in this order, and no nodes."""
        index = torch.tensor(list(rows), device=self.device)
        for layer in self.buffers:
            layer.buffers = tuple(buffer[index] for buffer in layer.buffers)
        self.lengths = self.lengths[list(rows)]
        self._forget_nodes()

    def _forget_nodes(self) -> None:
        self.nodes = 0
        self._ancestors = np.zeros((len(self.lengths), 0, 0), dtype=bool)
