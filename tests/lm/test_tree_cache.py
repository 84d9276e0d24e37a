"""The cache of settled tokens and trees gives, node for node, what a plain forward of the node's whole text gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from conftest import save_tiny_base
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.base.cache import GROWTH, TreeCache
from lm.base.catalog import load_base
from lm.base.model import BaseLM
from lm.neural.model import NeuralLM


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> NeuralLM:
    folder = save_tiny_base(tmp_path_factory.mktemp("models") / "small", seed=5, hidden_size=16)
    return NeuralLM(load_base(str(folder), dtype="float64", device="cpu"))


def plain(model: BaseLM, tokens: list[int]) -> torch.Tensor:
    """The final state after tokens, from one forward without cache."""
    _, hidden = model.forward(torch.tensor([tokens]), projects=False)
    return hidden[0, -1]


def line(tokens: np.ndarray) -> np.ndarray:
    """The parents of nodes that follow one another."""
    return np.broadcast_to(np.arange(tokens.shape[1]) - 1, tokens.shape)


class Rows:
    """A cache beside what it should hold: the settled tokens of each row, and its nodes with their parents."""

    def __init__(self, small: NeuralLM, rows: int) -> None:
        self.small, self.cache = small, small.new_cache(rows)
        self.settled: list[list[int]] = [[] for _ in range(rows)]
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.parents: list[list[int]] = [[] for _ in range(rows)]

    def path(self, row: int, node: int) -> list[int]:
        """Nodes from the first one down to `node`."""
        nodes: list[int] = []
        while node >= 0:
            nodes.insert(0, node)
            node = self.parents[row][node]
        return nodes

    def text(self, row: int, node: int) -> list[int]:
        return self.settled[row] + [self.tokens[row][i] for i in self.path(row, node)]

    def read(self, tokens: np.ndarray, parents: np.ndarray) -> None:
        """Reads n nodes a row and checks their states."""
        before = len(self.tokens[0])
        hidden = self.small.read(self.cache, tokens, parents)
        for row in range(len(tokens)):
            self.tokens[row] += tokens[row].tolist()
            self.parents[row] += parents[row].tolist()
            for i in range(tokens.shape[1]):
                expected = plain(self.small.model, self.text(row, before + i))
                torch.testing.assert_close(hidden[row, i], expected, rtol=1e-9, atol=1e-9)

    def settle(self, paths: list[list[int]]) -> None:
        self.cache.settle(paths)
        self.settled = [s + [t[i] for i in p] for s, t, p in zip(self.settled, self.tokens, paths, strict=True)]
        self._forget()

    def select(self, rows: list[int]) -> None:
        self.cache.select(rows)
        self.settled = [list(self.settled[row]) for row in rows]
        self._forget()

    def _forget(self) -> None:
        self.tokens, self.parents = [[] for _ in self.settled], [[] for _ in self.settled]
        assert self.cache.lengths.tolist() == list(map(len, self.settled))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), b=st.integers(1, 3), rounds=st.integers(1, 4))
def test_every_node_has_the_state_of_its_whole_text(small, seed, b, rounds):
    """Trees of any shape, read in parts, on rows of different lengths; paths are settled, rows dropped, doubled."""
    rng = np.random.default_rng(seed)
    rows = Rows(small, b)
    prompt = rng.integers(0, 256, (b, int(rng.integers(1, 6))))
    rows.read(prompt, line(prompt))
    rows.settle([list(range(int(rng.integers(1, prompt.shape[1] + 1)))) for _ in range(b)])
    for _ in range(rounds):
        for _ in range(int(rng.integers(0, 4))):
            count, there = len(rows.settled), len(rows.tokens[0])
            n = int(rng.integers(1, 4))
            parents = np.array([[rng.integers(-1, there + i) for i in range(n)] for _ in range(count)])
            rows.read(rng.integers(0, 256, (count, n)), parents)
        if rng.random() < 0.8:
            nodes = [int(rng.integers(-1, len(tokens))) for tokens in rows.tokens]
            rows.settle([rows.path(row, node) for row, node in enumerate(nodes)])
        if rng.random() < 0.4:
            rows.select(rng.integers(0, len(rows.settled), int(rng.integers(1, 4))).tolist())
    last = rng.integers(0, 256, (len(rows.settled), 1))
    rows.read(last, line(last))


def test_ragged_rows_from_prompts_of_different_lengths(small):
    """Prompts are padded to be read together; only their own tokens are settled."""
    rows = Rows(small, 3)
    prompts = np.random.default_rng(0).integers(0, 256, (3, 9))
    rows.read(prompts, line(prompts))
    rows.settle([list(range(length)) for length in (9, 1, 4)])
    assert rows.cache.start is not None
    rows.read(np.array([[1, 2], [3, 4], [5, 6]]), np.array([[-1, 0], [-1, -1], [-1, 0]]))
    assert rows.cache.start is None  # rows of different lengths


def test_a_path_that_leaves_nodes_out_moves_together(small):
    """Nodes 1 and 4 of a tree become the next two settled tokens."""
    rows = Rows(small, 2)
    rows.read(np.array([[7], [8]]), np.array([[-1], [-1]]))
    rows.settle([[0], [0]])
    parents = np.array([[-1, -1, 0, 0, 1, 4]] * 2)
    rows.read(np.arange(12).reshape(2, 6) + 20, parents)
    rows.settle([[1, 4], []])
    rows.read(np.array([[9, 10], [11, 12]]), np.array([[-1, 0], [-1, 0]]))


def test_the_buffer_grows_beyond_its_first_size(small):
    rows = Rows(small, 2)
    tokens = np.random.default_rng(1).integers(0, 256, (2, GROWTH - 1))
    small.read(rows.cache, tokens, line(tokens))
    rows.tokens = tokens.tolist()
    rows.settle([list(range(GROWTH - 1)), list(range(3))])
    for _ in range(3):
        more = np.random.default_rng(2).integers(0, 256, (2, 2))
        rows.read(more, line(more))
        rows.settle([[0, 1], [0]])


def test_nothing_is_computed_twice(small, monkeypatch):
    """A forward reads the new nodes only, whatever is settled."""
    forward, read = small.model.forward, []
    monkeypatch.setattr(small.model, "forward", lambda ids, *a, **k: (read.append(ids.shape), forward(ids, *a, **k))[1])
    cache = small.new_cache(2)
    tokens = np.ones((2, 30), dtype=np.int64)
    small.read(cache, tokens, line(tokens))
    cache.settle([list(range(30))] * 2)
    small.read(cache, tokens[:, :1], line(tokens[:, :1]))
    assert [tuple(shape) for shape in read] == [(2, 30), (2, 1)]


def test_positions_and_mask():
    """As the module says: settled tokens and the node's own ancestors."""
    cache = TreeCache(transformers.LlamaConfig(num_hidden_layers=1), 2, torch.device("cpu"))
    cache.place(np.array([[-1, 0], [-1, 0]]))
    cache.settle([[0, 1], [0]])
    positions, mask = cache.place(np.array([[-1, -1], [-1, 0]]))
    assert positions.tolist() == [[2, 2], [1, 2]]
    assert mask.int().tolist() == [[[[1, 1, 1, 0], [1, 1, 0, 1]]], [[[1, 1, 0, 0], [1, 1, 1, 0]]]]
    positions, mask = cache.place(np.array([[1], [-1]]))
    assert positions.tolist() == [[3], [1]]
    assert mask.int().tolist() == [[[[1, 1, 0, 1, 1]]], [[[1, 0, 0, 1, 0]]]]
