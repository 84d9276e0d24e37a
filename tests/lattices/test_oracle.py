"""The oracle: ranks and accepted prefixes against brute force, and dominance at every position."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lattices.errors import RescoreError
from lattices.lattice import Lattice
from lattices.oracle import oracle_accepted, oracle_path, target_ranks
from lattices.search import p_best

VOCAB = 6


def draw_case(data: st.DataObject, *, correct_base: bool) -> tuple[Lattice, np.ndarray]:
    """Small lattices with many ties, and targets that often stand in them; a correct base's first one is d_1."""
    n, h, k = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    few_values = st.lists(st.sampled_from([-1.0, 0.0, 0.5]), min_size=n * h * VOCAB, max_size=n * h * VOCAB)
    lattice = Lattice.from_logits(np.array(data.draw(few_values)).reshape(n, h, VOCAB), k)
    tokens = st.lists(st.integers(-1, VOCAB - 1), min_size=n * h, max_size=n * h)
    targets = np.array(data.draw(tokens), dtype=np.int32).reshape(n, h)
    if correct_base:
        targets[:, 0] = lattice.token_ids[:, 0, 0]
    return lattice, targets


def accepted_prefix(draft: np.ndarray, targets: np.ndarray) -> int:
    return sum(1 for _ in itertools.takewhile(bool, (draft == targets).tolist()))


def paths_of(token_ids: np.ndarray) -> list[np.ndarray]:
    """Every path of one lattice [h, k] with slot 1 fixed to its arg-max."""
    return [np.array(path) for path in itertools.product(token_ids[0, :1], *token_ids[1:])]


def test_ranks_are_places_in_the_slot() -> None:
    ids = np.array([[[5, 3], [1, 2], [4, 0], [9, 8]]], dtype=np.int32)
    ranks = target_ranks(ids, np.array([[5, 2, 7, -1]], dtype=np.int32))
    assert ranks.dtype == np.int32
    assert ranks.tolist() == [[0, 1, 2, 2]]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.data())
def test_ranks_are_brute_force(data: st.DataObject) -> None:
    lattice, targets = draw_case(data, correct_base=False)
    ranks = target_ranks(lattice.token_ids, targets)
    for index in np.ndindex(targets.shape):
        slot = lattice.token_ids[index].tolist()
        assert ranks[index] == (slot.index(targets[index]) if targets[index] in slot else lattice.k)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data())
def test_the_oracle_is_the_best_of_all_paths(data: st.DataObject) -> None:
    lattice, targets = draw_case(data, correct_base=data.draw(st.booleans()))
    ranks = target_ranks(lattice.token_ids, targets)
    for k in range(1, lattice.k + 1):
        cut = lattice.top(k)
        accepted, paths = oracle_accepted(ranks, k), oracle_path(cut.token_ids, targets)
        assert accepted.dtype == np.int64
        assert paths.dtype == np.int32
        for i, token_ids in enumerate(cut.token_ids):
            longest = max(accepted_prefix(path, targets[i]) for path in paths_of(token_ids))
            assert accepted[i] == accepted_prefix(paths[i], targets[i]) == longest
            assert any((paths[i] == path).all() for path in paths_of(token_ids))
            np.testing.assert_array_equal(paths[i, longest:], token_ids[longest:, 0])


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data())
def test_at_every_position_oracle_beats_p_best_beats_unrescored(data: st.DataObject) -> None:
    lattice, targets = draw_case(data, correct_base=True)
    ranks = target_ranks(lattice.token_ids, targets)
    oracle = oracle_accepted(ranks, lattice.k)
    assert ((oracle >= 1) & (oracle <= lattice.h)).all()
    before = np.array([accepted_prefix(ids[:, 0], row) for ids, row in zip(lattice.token_ids, targets, strict=True)])
    np.testing.assert_array_equal(before, oracle_accepted(ranks, 1))
    for p in range(1, 12):
        drafts = p_best(lattice, p).drafts
        best = np.array([max(accepted_prefix(d, row) for d in ds) for ds, row in zip(drafts, targets, strict=True)])
        assert (best >= before).all()
        assert (best <= oracle).all()
        before = best


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.data())
def test_the_oracle_never_falls_with_k(data: st.DataObject) -> None:
    lattice, targets = draw_case(data, correct_base=data.draw(st.booleans()))
    ranks = target_ranks(lattice.token_ids, targets)
    by_k = np.array([oracle_accepted(ranks, k) for k in range(1, lattice.k + 1)])
    assert (np.diff(by_k, axis=0) >= 0).all()


def test_with_the_whole_vocabulary_the_oracle_is_h() -> None:
    rng = np.random.default_rng(0)
    lattice = Lattice.from_logits(rng.normal(size=(40, 9, 30)), 30)
    targets = rng.integers(0, 30, size=(40, 9)).astype(np.int32)
    targets[:, 0] = lattice.token_ids[:, 0, 0]
    assert (oracle_accepted(target_ranks(lattice.token_ids, targets), 30) == 9).all()
    np.testing.assert_array_equal(oracle_path(lattice.token_ids, targets), targets)


def test_slot_1_is_fixed_to_its_arg_max() -> None:
    ranks = np.array([[0, 1, 0], [1, 0, 0]], dtype=np.int16)
    assert oracle_accepted(ranks, 2).tolist() == [3, 0]


def test_the_oracle_stops_where_no_token_remains() -> None:
    ids = np.array([[[5, 3], [1, 2], [4, 0]]], dtype=np.int32)
    targets = np.array([[5, 2, -1]], dtype=np.int32)
    assert oracle_accepted(target_ranks(ids, targets), 2).tolist() == [2]
    assert oracle_path(ids, targets).tolist() == [[5, 2, 4]]


def test_views_read_only_arrays_int64_targets_and_no_blocks_will_do() -> None:
    rng = np.random.default_rng(1)
    lattice = Lattice.from_logits(rng.normal(size=(6, 5, 30)), 8)
    targets = rng.integers(-1, 30, size=(6, 5))
    expected = target_ranks(lattice.token_ids[::2, :, :4].copy(), targets[::2].astype(np.int32))
    lattice.token_ids.flags.writeable = False
    np.testing.assert_array_equal(target_ranks(lattice[::2].top(4).token_ids, targets[::2]), expected)
    assert target_ranks(lattice.token_ids[:0], targets[:0]).shape == (0, 5)
    assert oracle_accepted(expected[:0], 2).shape == (0,)


def test_what_cannot_be_answered_is_refused() -> None:
    with pytest.raises(RescoreError, match="k = 0 leaves no lattice"):
        oracle_accepted(np.zeros((1, 3), dtype=np.int16), 0)


def test_a_slot_may_hold_a_whole_vocabulary() -> None:
    lattice = np.stack([np.roll(np.arange(130_000, dtype=np.int32), shift) for shift in (0, 70_000)])[None]
    np.testing.assert_array_equal(target_ranks(lattice, np.array([[0, 5]], dtype=np.int32)), [[0, 70_005]])
    assert oracle_accepted(target_ranks(lattice, np.array([[0, 5]], dtype=np.int32)), 130_000).tolist() == [2]
