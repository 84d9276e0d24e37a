"""Statistics of lattices and drafts, by hand and against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lattices.errors import RescoreError
from lattices.statistics import (
    conditional_accuracy,
    decode_starts,
    equal_neighbours,
    h_max,
    longest_runs,
    rank_counts,
    recall,
    reliability,
    targets_ahead,
)

drafts_of_few_tokens = arrays(np.int32, st.tuples(st.integers(0, 6), st.integers(1, 6)), elements=st.integers(0, 2))


def test_targets_are_the_next_tokens_and_end_with_the_output():
    assert targets_ahead(np.array([5, 6, 7], np.int32), 2).tolist() == [[5, 6], [6, 7], [7, -1]]
    assert targets_ahead(np.array([5], np.int32), 3).tolist() == [[5, -1, -1]]


class TestRepetition:
    # a a a b: two equal pairs, run of 3; a b a b: none; a b b: one pair, then the draft ends.
    drafts = np.array([[1, 1, 1, 2], [1, 2, 1, 2], [1, 2, 2, -1], [1, 2, -1, -1]], np.int32)

    def test_by_hand(self):
        assert equal_neighbours(self.drafts).astype(int).tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]]
        assert longest_runs(self.drafts).tolist() == [3, 1, 2, 1]

    def test_one_head_and_no_drafts(self):
        assert equal_neighbours(np.array([[4]], np.int32)).shape == (1, 0)
        assert longest_runs(np.array([[4]], np.int32)).tolist() == [1]
        assert longest_runs(np.zeros((0, 3), np.int32)).tolist() == []

    @given(drafts_of_few_tokens)
    def test_runs_as_a_loop_counts_them(self, drafts):
        for draft, longest in zip(drafts.tolist(), longest_runs(drafts).tolist(), strict=True):
            text = "".join(map(str, draft))
            assert longest == max(n for n in range(1, len(text) + 1) if any(c * n in text for c in "012"))


@pytest.mark.parametrize(
    ("means", "expected"),
    [([1.0, 2.0, 3.0], 3), ([1.0, 2.0, 1.5, 9.0], 2), ([2.0, 1.0], 1), ([1.0, 1.0, 0.5], 2), ([1.0], 1)],
)
def test_h_max_is_the_last_head_before_the_first_fall(means, expected):
    assert h_max(np.array(means)) == expected


class TestRanks:
    # K = 2. Slot 1: ranks 0, 0, 0. Slot 2: 0, 1, absent. Slot 3: absent, 1, and one position without a target.
    ranks = np.array([[0, 0, 2], [0, 1, 1], [0, 2, 2]], np.int16)
    known = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0]], bool)

    def test_counts_and_recall_by_hand(self):
        counts = rank_counts(self.ranks, self.known, 2)
        assert counts.tolist() == [[3, 0, 0], [1, 1, 1], [0, 1, 1]]
        assert recall(counts, 1) == pytest.approx([1, 1 / 3, 0])
        assert recall(counts, 2) == pytest.approx([1, 2 / 3, 1 / 2])

    def test_a_slot_without_targets_has_no_recall(self):
        counts = rank_counts(self.ranks, np.zeros((3, 3), bool), 2)
        assert counts.sum() == 0 and np.isnan(recall(counts, 1)).all()

    @pytest.mark.parametrize("k", [0, 3])
    def test_k_outside_the_lattice(self, k):
        with pytest.raises(RescoreError, match="outside 1 to the lattice's 2"):
            recall(rank_counts(self.ranks, self.known, 2), k)

    def test_conditional_accuracy_by_hand(self):
        # Right: 1 1 0 / 1 0 0 / 1 0 -. All 3 positions reach slots 1 and 2 (1 of 3 right); one reaches slot 3: wrong.
        accuracy, reached = conditional_accuracy(self.ranks == 0, self.known)
        assert reached.tolist() == [3, 3, 1] and accuracy == pytest.approx([1, 1 / 3, 0])

    @given(arrays(np.bool_, (5, 4)))
    def test_the_product_of_conditionals_is_the_share_of_right_prefixes(self, right):
        accuracy, reached = conditional_accuracy(right, np.ones((5, 4), bool))
        for slot in range(4):
            if reached[slot]:
                assert np.prod(accuracy[: slot + 1]) == pytest.approx(right[:, : slot + 1].all(axis=1).mean())


class TestReliability:
    def test_by_hand(self):
        # Two bins, (0, 0.5] and (0.5, 1]. First: 0, 0.5, one right: confidence 0.25, accuracy 0.5.
        # Second: 0.6, 0.8, 1.0, two right: confidence 0.8, accuracy 2/3.
        # Error: 2/5 x 0.25 + 3/5 x (0.8 - 2/3) = 0.1 + 0.08 = 0.18.
        found = reliability(np.array([0.0, 0.5, 0.6, 0.8, 1.0]), np.array([0, 1, 1, 0, 1], bool), 2)
        assert found.count.tolist() == [2, 3]
        assert found.confidence == pytest.approx([0.25, 0.8])
        assert found.accuracy == pytest.approx([0.5, 2 / 3])
        assert found.error == pytest.approx(0.18)

    def test_empty_bins_and_nothing_at_all(self):
        found = reliability(np.array([0.9]), np.array([True]), 4)
        assert found.count.tolist() == [0, 0, 0, 1] and np.isnan(found.accuracy[:3]).all()
        assert np.isnan(reliability(np.zeros(0), np.zeros(0, bool), 3).error)
        with pytest.raises(RescoreError, match="at least 1"):
            reliability(np.zeros(0), np.zeros(0, bool), 0)

    @given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30), st.integers(1, 12))
    def test_the_bins_hold_everything_once(self, pairs, bins):
        sure, right = np.array([p for p, _ in pairs]), np.array([r for _, r in pairs])
        found = reliability(sure, right, bins)
        full = found.count > 0
        assert found.count.sum() == len(pairs)
        assert (found.count * found.accuracy)[full].sum() == pytest.approx(right.sum())
        assert (found.count * found.confidence)[full].sum() == pytest.approx(sure.sum())
        # One bin compares the means; more bins can only find more.
        assert found.error >= abs(right.mean() - sure.mean()) - 1e-9


class TestDecodeStarts:
    def test_by_hand(self):
        # First example of 4 tokens: 0 -> 2 -> 3; second of 3: 0 -> 3 (the end).
        starts = decode_starts(np.array([2, 1, 1, 1, 3, 1, 1]), np.array([4, 3]))
        assert starts.astype(int).tolist() == [1, 0, 1, 1, 1, 0, 0]

    def test_nothing(self):
        assert decode_starts(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []

    @settings(max_examples=50)
    @given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=8), min_size=1, max_size=4))
    def test_steps_never_cross_into_the_next_example(self, lengths):
        # What is accepted never reaches behind the end.
        accepted = [min(n, len(e) - i) for e in lengths for i, n in enumerate(e)]
        starts = decode_starts(np.array(accepted), np.array([len(e) for e in lengths]))
        assert sum(n for n, start in zip(accepted, starts, strict=True) if start) == len(accepted)
