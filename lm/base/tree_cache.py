"""The key/value cache of a rescorer: many sequences of different lengths, each with a tree of drafted tokens behind it.

Every row of the batch keeps the tokens that are settled (prompt and output), `lengths[row]` of them, and behind these
the nodes of the trees being scored. A node sees the settled tokens and its own ancestors. When output is accepted,
the nodes on its path join the settled tokens: nothing is ever computed twice. Knows nothing about models or lattices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from lm.base.cache import cache_layers

GROWTH = 64  # positions by which a full buffer grows


class RowsLayer(DynamicLayer):
    """One layer's keys and values `[b, heads, capacity, d_head]`; `update` writes at `columns` of each row."""

    def __init__(self, cache: TreeCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, heads, n, d_head = key_states.shape
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.key_buffer = key_states.new_zeros(rows, heads, 0, d_head)
            self.value_buffer = value_states.new_zeros(rows, heads, 0, value_states.shape[-1])
        end, start = self.cache.end, self.cache.start
        if end > self.key_buffer.shape[2]:  # zeros: what is masked out must still be a number
            more = end + GROWTH - self.key_buffer.shape[2]
            self.key_buffer = torch.nn.functional.pad(self.key_buffer, (0, 0, 0, more))
            self.value_buffer = torch.nn.functional.pad(self.value_buffer, (0, 0, 0, more))
        if start is not None:  # all rows are equally long: one slice
            self.key_buffer[:, :, start : start + n] = key_states
            self.value_buffer[:, :, start : start + n] = value_states
        else:
            every = torch.arange(rows, device=key_states.device)[:, None]
            self.key_buffer[every, :, self.cache.columns] = key_states.transpose(1, 2)
            self.value_buffer[every, :, self.cache.columns] = value_states.transpose(1, 2)
        return self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]

    def get_seq_length(self) -> int:
        return self.cache.end

    def gather(self, rows: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copies the columns `source` to `target` (int64 `[n]` each) of the rows `rows` `[n]`."""
        for buffer in (self.key_buffer, self.value_buffer):
            buffer[rows, :, target] = buffer[rows, :, source]

    @torch.inference_mode()
    def take_from(self, other: RowsLayer) -> None:
        """Becomes a copy of another layer's keys and values."""
        self.lazy_initialization(other.key_buffer, other.value_buffer)
        self.key_buffer, self.value_buffer = other.key_buffer.clone(), other.value_buffer.clone()

    def select(self, rows: torch.Tensor) -> None:
        """Keeps these rows."""
        self.key_buffer, self.value_buffer = self.key_buffer[rows], self.value_buffer[rows]


class TreeCache(Cache):
    """Settled tokens and the nodes behind them; see the module's text.

    `lengths` int64 `[b]`: settled tokens of each row; `nodes`: how many stand behind them in every row; `end`: columns
    in use, settled or not.
    """

    def __init__(self, config: PreTrainedConfig, rows: int, device: torch.device) -> None:
        self.config, self.device = config, device
        self.lengths = np.zeros(rows, dtype=np.int64)
        self.nodes = 0
        self.columns = torch.zeros(rows, 0, dtype=torch.int64, device=device)
        self.start: int | None = 0
        self.end = 0
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
        mask = np.zeros((rows, n, self.end), dtype=bool)
        mask |= np.arange(self.end) < self.lengths[:, None, None]
        at = self.lengths[:, None] + np.arange(self.nodes)  # [b, nodes], column of each node
        np.put_along_axis(mask, np.broadcast_to(at[:, None], seen.shape), seen, axis=2)
        self._write_at(columns)
        return torch.from_numpy(positions).to(self.device), torch.from_numpy(mask)[:, None].to(self.device)

    def place_text(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`place` for n nodes a row that follow each other, the first the last settled token: to be settled next."""
        assert self.nodes == 0, "text stands behind settled tokens only"
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
        rows, source, target = [], [], []
        for row, path in enumerate(paths):
            start = int(self.lengths[row])
            for place, node in enumerate(path):
                if place != node:
                    rows.append(row)
                    source.append(start + node)
                    target.append(start + place)
        if rows:
            moved = [torch.tensor(index, device=self.device) for index in (rows, source, target)]
            for layer in self.buffers:
                layer.gather(moved[0], moved[1], moved[2])
        self.lengths = self.lengths + np.array([len(path) for path in paths], dtype=np.int64)
        self._forget_nodes()

    def copy(self) -> TreeCache:
        """Another cache with the same settled tokens, and no nodes."""
        assert self.nodes == 0, "only settled tokens are copied"
        other = TreeCache(self.config, len(self.lengths), self.device)
        other.lengths = self.lengths.copy()
        for ours, theirs in zip(self.buffers, other.buffers, strict=True):
            theirs.take_from(ours)
        return other

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values."""
        return sum(layer.key_buffer.nbytes + layer.value_buffer.nbytes for layer in self.buffers)

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows, in this order, and no nodes."""
        index = torch.tensor(list(rows), device=self.device)
        for layer in self.buffers:
            layer.select(index)
        self.lengths = self.lengths[list(rows)]
        self._forget_nodes()

    def _forget_nodes(self) -> None:
        self.nodes = 0
        self._ancestors = np.zeros((len(self.lengths), 0, 0), dtype=bool)
