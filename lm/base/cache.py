"""The key/value cache of a decoder that proposes more tokens than it keeps.

transformers' own dynamic cache copies everything it holds at every step and can only be cut at the end. Verification
needs two more things: to write a block of proposals behind the kept tokens without copying these, and to keep an
arbitrary path of the block (a path through a prefix tree, or one row of a batch of drafts). Knows nothing about heads,
drafts or acceptance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from lattices.errors import IncompatibleError

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
    """The layers of a cache for a model, of those that hold keys and values one from `make`; and the latter alone.

    Raises `IncompatibleError` if a layer keeps more than keys and values, so that it can't forget a rejected token.
    """
    config = config.get_text_config(decoder=True)
    other = {name for name in getattr(config, "layer_types", None) or () if name not in ATTENTION}
    found = DynamicCache(config=config).layers if not other else []
    kept = [layer for layer in found if type(layer).__name__ != EMPTY_LAYER]
    other |= {type(layer).__name__ for layer in kept} - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
    if other:
        raise IncompatibleError(f"has {', '.join(sorted(other))} layers, whose state can't forget rejected tokens")
    if not kept:
        raise IncompatibleError("keeps no keys and values")
    buffers: list[Layer] = [make() for _ in kept]
    filled = iter(buffers)
    return [layer if type(layer).__name__ == EMPTY_LAYER else next(filled) for layer in found], buffers


class BufferLayer(DynamicLayer):
    """One layer's keys and values in a buffer `[b, heads, capacity, d_head]`, of which `length` positions are kept.

    `update` with the buffer's own batch size writes behind the kept positions and returns a view, no copy. `update`
    with a batch of p on a buffer of one row (p drafts on the same past) leaves the buffer as it is, and returns copies.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.length = 0
        self.written = 0  # length plus the block of the last forward
        self.block: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, d_head = key_states.shape
            self.key_buffer = key_states.new_empty(rows, heads, self.capacity, d_head)
            self.value_buffer = value_states.new_empty(rows, heads, self.capacity, value_states.shape[-1])
        rows, end = key_states.shape[0], self.length + key_states.shape[2]
        if rows != self.key_buffer.shape[0]:
            self.block = (key_states, value_states)
            past_keys = self.key_buffer[:, :, : self.length].expand(rows, -1, -1, -1)
            past_values = self.value_buffer[:, :, : self.length].expand(rows, -1, -1, -1)
            self.written = end
            return torch.cat([past_keys, key_states], dim=2), torch.cat([past_values, value_states], dim=2)
        self.block = None  # of an earlier forward, of which nothing was kept
        assert end <= self.capacity, f"cache of {self.capacity} positions asked to hold {end}"
        self.key_buffer[:, :, self.length : end] = key_states
        self.value_buffer[:, :, self.length : end] = value_states
        self.written = end
        return self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def keep(self, count: int, columns: torch.Tensor | None, row: int) -> None:
        """Keeps `count` positions of the block written last, of this row, and forgets the rest.

        `columns` int64 `[count]` counts from the block's start; None stands for its first `count`.
        """
        start = self.length
        target = slice(start, start + count)
        if self.block is not None:
            chosen = slice(count) if columns is None else columns
            keys, values = self.block
            self.key_buffer[0, :, target] = keys[row][:, chosen]
            self.value_buffer[0, :, target] = values[row][:, chosen]
            self.block = None
        elif columns is not None:
            self.key_buffer[:, :, target] = self.key_buffer[:, :, start + columns]
            self.value_buffer[:, :, target] = self.value_buffer[:, :, start + columns]
        self.length = self.written = start + count

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps these rows of the batch, kept positions only."""
        for name in ("key_buffer", "value_buffer"):
            old = getattr(self, name)
            new = old.new_empty(len(rows), *old.shape[1:])
            new[:, :, : self.length] = old[rows, :, : self.length]
            setattr(self, name, new)


class KVCache(Cache):
    """Keys and values of every layer; `keep` after each forward says which of its positions stay."""

    def __init__(self, config: PreTrainedConfig, capacity: int) -> None:
        layers, self.buffers = cache_layers(config, lambda: BufferLayer(capacity))
        super().__init__(layers=layers)
        self.capacity = capacity

    @property
    def length(self) -> int:
        """Positions kept."""
        return self.buffers[0].length

    @torch.inference_mode()
    def keep(self, columns: Sequence[int], row: int = 0) -> None:
        """Of the tokens in the last forward keep `columns` (from 0, in order), of batch row `row`."""
        chosen = list(columns)
        in_place = chosen == list(range(len(chosen)))
        index = None if in_place else torch.tensor(chosen, device=self.buffers[0].key_buffer.device)
        for layer in self.buffers:
            layer.keep(len(chosen), index, row)

    def keep_all(self) -> None:
        """Keeps every token of the last forward, all rows."""
        for layer in self.buffers:
            assert layer.block is None, "drafts on a past of one row can't all be kept"
            layer.length = layer.written

    @torch.inference_mode()
    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps these rows of the batch."""
        for layer in self.buffers:
            layer.select_rows(rows)
