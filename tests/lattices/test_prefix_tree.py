"""The prefix tree: one node per distinct prefix, and a mask of ancestors."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lattices.lattice import Lattice
from lattices.prefix_tree import PrefixTree, build_prefix_tree
from lattices.search import p_best


def path_to(tree: PrefixTree, node: int) -> list[int]:
    """A node and its ancestors, the root first."""
    path = []
    while node >= 0:
        path.append(node)
        node = int(tree.parents[node])
    return path[::-1]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.data())
def test_the_tree_holds_every_prefix_once(data: st.DataObject) -> None:
    p, h = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 5))
    tokens = st.lists(st.integers(0, 2), min_size=p * h, max_size=p * h)
    drafts = np.array(data.draw(tokens), dtype=np.int32).reshape(p, h)
    tree = build_prefix_tree(drafts)
    m = len(tree.tokens)

    prefixes = {tuple(draft[: i + 1].tolist()) for draft in drafts for i in range(h)}
    assert m == len(prefixes)
    assert prefixes == {tuple(tree.tokens[path_to(tree, node)].tolist()) for node in range(m)}

    assert (tree.parents < np.arange(m)).all()
    assert tree.nodes[0].tolist() == list(range(h))
    for node in range(m):
        path = path_to(tree, node)
        assert tree.depths[node] == len(path) - 1
        assert np.flatnonzero(tree.mask[node]).tolist() == sorted(path)
    for draft, nodes in zip(drafts, tree.nodes, strict=True):
        assert path_to(tree, int(nodes[-1])) == nodes.tolist()
        assert tree.tokens[nodes].tolist() == draft.tolist()


def test_dtypes_and_shapes() -> None:
    tree = build_prefix_tree(np.array([[1, 2, 3], [1, 4, 3]], dtype=np.int32))
    assert {array.dtype for array in (tree.tokens, tree.parents, tree.depths, tree.nodes)} == {np.dtype(np.int64)}
    assert tree.mask.dtype == np.bool_
    assert tree.tokens.tolist() == [1, 2, 3, 4, 3]
    assert tree.parents.tolist() == [-1, 0, 1, 0, 3]
    assert tree.depths.tolist() == [0, 1, 2, 1, 2]
    assert tree.nodes.tolist() == [[0, 1, 2], [0, 3, 4]]
    assert tree.mask.tolist()[4] == [True, False, False, True, True]


def test_one_draft_is_a_causal_block() -> None:
    tree = build_prefix_tree(np.array([[7, 7, 7, 7]], dtype=np.int32))
    np.testing.assert_array_equal(tree.mask, np.tril(np.ones((4, 4), dtype=bool)))


def test_equal_drafts_share_all_nodes_and_drafts_may_have_different_roots() -> None:
    tree = build_prefix_tree(np.array([[1, 2], [1, 2], [3, 2]], dtype=np.int32))
    assert tree.parents.tolist() == [-1, 0, -1, 2]
    assert tree.nodes.tolist() == [[0, 1], [0, 1], [2, 3]]


def test_no_drafts_make_no_nodes() -> None:
    tree = build_prefix_tree(np.empty((0, 3), dtype=np.int32))
    assert (tree.tokens.shape, tree.mask.shape, tree.nodes.shape) == ((0,), (0, 0), (0, 3))


def test_p_best_drafts_share_slot_1() -> None:
    lattice = Lattice.from_logits(np.random.default_rng(0).normal(size=(20, 9, 30)), 16)
    for drafts in p_best(lattice, 16).drafts:
        tree = build_prefix_tree(drafts)
        assert (tree.parents < 0).sum() == 1
        assert len(tree.tokens) < drafts.size
