"""Accounting identities, for any accepted lengths, and one example by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rescore.acceptance import accept
from rescore.accounting import account, marginal_intervals, paired_difference


def test_one_example_by_hand():
    accounting = account([[1, 3, 2], [4, 4]], h=5)
    assert accounting.steps == 5
    assert accounting.tokens == 14
    assert accounting.block_efficiency == pytest.approx(14 / 5)
    assert accounting.block_efficiency_macro == pytest.approx((2 + 4) / 2)
    assert accounting.accepted_histogram == [0, 1, 1, 1, 2, 0]
    assert accounting.marginal == pytest.approx([1, 0.8, 0.6, 0.4, 0])
    assert accounting.conditional == pytest.approx([1, 0.8, 0.75, 2 / 3, 0])
    assert account([[1], [2]], h=4).conditional == [1, 0.5, 0, None], "no step came so far that it could go on"


def test_a_paired_gain_by_hand():
    """Examples gain 2 / 1 - 1 = 100 % and 3 / 2 - 1 = 50 %; pooled, 10 tokens in 4 steps are 2.5 and in 7 steps 10 / 7.
    Both sides draw the same groups: where every group gains 75 %, so does every resample, however they differ."""
    assert paired_difference([[1, 1, 1, 1], [2, 2, 2]], [[2, 2], [3, 3]]).gain == pytest.approx(0.75)
    plain = [[1] * 7 * n for n in (1, 2, 3, 4, 5)]
    found = paired_difference(plain, [[7] * n for n in (1, 2, 3, 4, 5)])
    assert found.gain == pytest.approx(6.0) and found.gain_ci95 == pytest.approx((6.0, 6.0))


def test_equal_decodes_gain_nothing_and_few_examples_have_no_interval():
    lengths = [[1, 3], [2], [4, 4, 1], [1]]
    gains = [
        paired_difference(lengths, lengths),
        paired_difference([[1, 1, 1]], [[3]]),
        paired_difference(lengths, lengths, groups=["a", "b", "c", "a"]),
    ]
    assert [(g.gain, g.gain_ci95) for g in gains] == [(0.0, (0.0, 0.0)), (2.0, None), (0.0, None)], "three groups"


def test_examples_of_one_group_count_as_one():
    """Copies of an example say nothing new: the interval is that of one of each; by example it would be narrow."""
    rng = np.random.default_rng(3)
    each = [rng.integers(1, 6, size=30).tolist() for _ in range(8)]
    copies, groups = each * 10, [str(i) for i in range(8)] * 10
    alone, grouped = account(each, 5), account(copies, 5, groups=groups)
    assert (alone.groups, grouped.groups) == (8, 8)
    assert grouped.block_efficiency_ci95 == pytest.approx(alone.block_efficiency_ci95)
    assert marginal_intervals(copies, 5, groups=groups)[2] == pytest.approx(marginal_intervals(each, 5)[2])
    low, high = grouped.block_efficiency_ci95
    narrow = account(copies, 5).block_efficiency_ci95
    assert high - low > 2.5 * (narrow[1] - narrow[0])
    plain = [[1] * sum(example) for example in each]
    gains = [paired_difference(plain, each), paired_difference(plain * 10, copies, groups=groups)]
    assert gains[1].gain_ci95 == pytest.approx(gains[0].gain_ci95)
    found = paired_difference(plain * 10, copies, groups=groups)
    assert found.groups == 8 and found.difference_ci95 == pytest.approx(paired_difference(plain, each).difference_ci95)
    assert found.won == 80


def test_the_order_of_groups_does_not_matter_to_what_they_hold():
    accepted, groups = [[1], [2, 2], [3], [4], [1, 1], [2]], ["a", "b", "a", "c", "d", "b"]
    assert account(accepted, 4, groups=groups).groups == 4
    by_hand = [[1, 3], [2, 2, 2], [4], [1, 1]]
    assert account(accepted, 4, groups=groups).block_efficiency_ci95 == account(by_hand, 4).block_efficiency_ci95


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=4, max_size=8), st.integers(0, 3))
def test_a_gain_is_that_of_the_pooled_block_efficiencies(pairs, seed):
    accepted, plain = [[a, 1] for a, _ in pairs], [[b] for _, b in pairs]
    found = paired_difference(plain, accepted, seed=seed)
    of = [account(side, 9, seed=seed).block_efficiency for side in (accepted, plain)]
    assert found.gain == pytest.approx(of[0] / of[1] - 1)
    low, high = found.gain_ci95
    assert low <= high


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 9).flatmap(
    lambda h: st.tuples(
        st.just(h),
        st.lists(st.lists(st.integers(1, h), min_size=1, max_size=12), min_size=1, max_size=8),
    )
))  # fmt: skip
def test_identities(case):
    h, accepted = case
    a = account(accepted, h)
    assert len(a.accepted_histogram) == h + 1 and a.accepted_histogram[0] == 0
    assert sum(a.accepted_histogram) == a.steps
    assert sum(i * count for i, count in enumerate(a.accepted_histogram)) == a.tokens
    assert sum(a.marginal) == pytest.approx(a.block_efficiency)
    assert np.cumprod([c or 0.0 for c in a.conditional]) == pytest.approx(a.marginal)
    assert all(x >= y for x, y in zip(a.marginal, a.marginal[1:], strict=False))
    assert 1 <= a.block_efficiency <= h
    assert a.groups == len(accepted)
    if len(accepted) < 4:
        assert a.block_efficiency_ci95 is None
    else:
        low, high = a.block_efficiency_ci95
        assert 1 <= low <= high <= h


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
def test_accept_agrees_with_its_definition(seed, b, p, h, remaining):
    rng = np.random.default_rng(seed)
    drafts, choices = rng.integers(0, 3, (b, p, h)), rng.integers(0, 3, (b, p, h))
    rows, lengths = accept(drafts, choices, np.full(b, remaining), {2})
    for i in range(b):
        best = []
        for r in range(p):
            n = 1
            while n < h and n < remaining and drafts[i, r, n - 1] != 2 and drafts[i, r, n] == choices[i, r, n - 1]:
                n += 1
            best.append(n)
        assert lengths[i] == max(best)
        assert rows[i] == best.index(max(best))


def test_a_difference_is_between_the_same_examples():
    found = paired_difference([[2, 1], [3], [1, 1]], [[3], [3], [1, 1]])
    assert found.difference == pytest.approx(8 / 4 - 8 / 5) and found.gain == pytest.approx(1 / 4)
    assert (found.won, found.tied, found.lost) == (1, 2, 0)
    assert found.difference_ci95 is None, "three examples have no interval"
    single = paired_difference([[2]], [[1, 1]])
    assert single.difference_ci95 is None and single.gain_ci95 is None and single.lost == 1
    assert paired_difference([[1, 1, 1], [2]], [[1, 1, 1], [2]]).tied == 2


def test_the_middle_of_intervals_of_acceptance():
    rng = np.random.default_rng(1)
    accepted = [rng.integers(1, 5, size=20).tolist() for _ in range(50)]
    found = marginal_intervals(accepted, 4)
    assert found is not None and found[0] == (1.0, 1.0)
    assert all(low <= m <= high for (low, high), m in zip(found, account(accepted, 4).marginal, strict=True))
    assert all(high - low > 0.01 for low, high in found[1:])
    assert marginal_intervals(accepted, 4, seed=1) != found
    few = [[1, 2], [3], [1]]
    assert marginal_intervals(few, 4) is None and marginal_intervals([*few, []], 4) is None
    assert marginal_intervals([], 4) is None
