"""The p-best search against brute force over all k^(h-1) paths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lattices.errors import RescoreError
from lattices.lattice import Lattice
from lattices.search import p_best

VOCAB = 8
EXACT_LOGPS = [0.0, -0.25, -0.5, -1.0]  # sums without rounding: many exact ties
ROUNDED_LOGPS = [-1e-30, -1e-17, -2e-17, -3e-16, -0.1, -0.7, -1.3, -50.0]  # sums that rounding makes equal


def draw_lattice(data: st.DataObject, logps: list[float], *, normal_ties: bool) -> Lattice:
    """A batch of small lattices; `normal_ties` puts equal log-probs by lowest id, else ids stand anyhow."""
    n, h, k = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    ids = np.empty((n, h, k), dtype=np.int32)
    values = np.empty((n, h, k), dtype=np.float32)
    for i, slot in itertools.product(range(n), range(h)):
        tokens = data.draw(st.permutations(range(VOCAB)))[:k]
        drawn = data.draw(st.lists(st.sampled_from(logps), min_size=k, max_size=k))
        entries = list(zip(drawn, tokens, strict=True))
        entries.sort(key=lambda e: (-e[0], e[1]) if normal_ties else -e[0])
        values[i, slot], ids[i, slot] = zip(*entries, strict=True)
    return Lattice(ids, values)


def all_paths(lattice: Lattice) -> list[tuple[float, tuple[int, ...]]]:
    """Every path of one lattice [h, k] with slot 1 fixed: (score added in order, token ids)."""
    h, k = lattice.h, lattice.k
    paths = []
    for entries in itertools.product([0], *[range(k)] * (h - 1)):
        score = 0.0
        for slot, entry in enumerate(entries):
            score += float(lattice.logps[slot, entry])
        paths.append((score, tuple(int(lattice.token_ids[slot, entry]) for slot, entry in enumerate(entries))))
    return paths


def found(lattice: Lattice, p: int, i: int) -> list[tuple[float, tuple[int, ...]]]:
    result = p_best(lattice, p)
    return [(float(s), tuple(d.tolist())) for s, d in zip(result.scores[i], result.drafts[i], strict=True)]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.data())
def test_p_best_is_brute_force_with_ties_by_lowest_token_ids(data: st.DataObject) -> None:
    lattice = draw_lattice(data, EXACT_LOGPS, normal_ties=True)
    p = data.draw(st.integers(1, 70))
    for i in range(len(lattice)):
        expected = sorted(all_paths(lattice[i]), key=lambda path: (-path[0], path[1]))
        assert found(lattice, p, i) == expected[:p]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.data())
def test_the_unrescored_draft_comes_first_even_among_sums_that_rounding_made_equal(data: st.DataObject) -> None:
    lattice = draw_lattice(data, ROUNDED_LOGPS, normal_ties=False)
    p = data.draw(st.integers(1, 70))
    for i in range(len(lattice)):
        unrescored = tuple(lattice.token_ids[i, :, 0].tolist())
        expected = sorted(all_paths(lattice[i]), key=lambda path: (-path[0], path[1] != unrescored, path[1]))
        assert found(lattice, p, i) == expected[:p]


def test_rounding_does_not_drop_a_path_with_lower_ids() -> None:
    # After two slots the prefix with token 9 is ahead by 1e-17. The third slot rounds that away, and 5 < 9.
    ids = np.array([[[0, 1], [9, 5], [1, 2]]], dtype=np.int32)
    logps = np.array([[[0.0, -1.0], [-1e-17, -2e-17], [-1.0, -50.0]]], dtype=np.float32)
    result = p_best(Lattice(ids, logps), 3)
    assert result.scores.tolist() == [[-1.0, -1.0, -50.0]]
    assert result.drafts.tolist() == [[[0, 9, 1], [0, 5, 1], [0, 5, 2]]]


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.data())
def test_the_first_q_of_the_p_best_are_the_q_best(data: st.DataObject) -> None:
    lattice = draw_lattice(data, EXACT_LOGPS + ROUNDED_LOGPS, normal_ties=False)
    most = p_best(lattice, 16)
    for q in range(1, 16):
        fewer = p_best(lattice, q)
        np.testing.assert_array_equal(fewer.drafts, most.drafts[:, :q])
        np.testing.assert_array_equal(fewer.scores, most.scores[:, :q])


def test_p_of_1_is_the_arg_max_of_every_slot() -> None:
    lattice = Lattice.from_logits(np.random.default_rng(1).normal(size=(50, 9, 30)), 16)
    result = p_best(lattice, 1)
    np.testing.assert_array_equal(result.drafts, lattice.token_ids[:, None, :, 0])
    expected = [sum(map(float, row)) for row in lattice.logps[:, :, 0]]
    assert result.scores[:, 0].tolist() == expected


def test_16_best_of_a_full_lattice_are_distinct_and_fall() -> None:
    lattice = Lattice.from_logits(np.random.default_rng(2).normal(size=(50, 9, 30)), 16)
    result = p_best(lattice, 16)
    assert result.drafts.shape == (50, 16, 9)
    assert result.drafts.dtype == np.int32
    assert result.scores.dtype == np.float64
    assert (np.diff(result.scores, axis=1) <= 0).all()
    assert all(len(np.unique(drafts, axis=0)) == 16 for drafts in result.drafts)
    assert (result.drafts[:, :, 0] == lattice.token_ids[:, :1, 0]).all()


def test_a_lattice_has_no_more_drafts_than_paths() -> None:
    lattice = Lattice.from_logits(np.zeros((2, 3, 4)), 2)
    assert p_best(lattice, 100).drafts.shape == (2, 4, 3)
    assert p_best(lattice.first_heads(1), 100).drafts.shape == (2, 1, 1)
    assert p_best(lattice.top(1), 100).drafts.shape == (2, 1, 3)


def test_where_all_paths_are_equal_the_lowest_ids_come_first() -> None:
    lattice = Lattice.from_logits(np.zeros((1, 9, 16)), 16)
    drafts = p_best(lattice, 18).drafts[0]
    assert drafts[:, :7].max() == 0
    assert drafts[:, 7:].tolist() == [[i // 16, i % 16] for i in range(18)]


def test_views_read_only_arrays_one_lattice_and_no_lattice_will_do() -> None:
    whole = Lattice.from_logits(np.random.default_rng(3).normal(size=(6, 5, 30)), 8)
    expected = p_best(Lattice(whole.token_ids[::2, :4, :3].copy(), whole.logps[::2, :4, :3].copy()), 5)
    for array in (whole.token_ids, whole.logps):
        array.flags.writeable = False
    view = whole[::2].first_heads(4).top(3)
    np.testing.assert_array_equal(p_best(view, 5).drafts, expected.drafts)
    np.testing.assert_array_equal(p_best(view[0], 5).drafts, expected.drafts[:1])
    assert p_best(view[:0], 5).drafts.shape == (0, 5, 4)
    assert p_best(view[:0], 1).drafts.shape == (0, 1, 4)


@pytest.mark.parametrize("p", [0, -3])
def test_p_below_1_is_refused(p: int) -> None:
    with pytest.raises(RescoreError, match=f"p = {p} asks for no drafts"):
        p_best(Lattice.from_logits(np.zeros((1, 2, 3)), 2), p)
