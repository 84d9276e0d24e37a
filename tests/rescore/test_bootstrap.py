"""The studentised bootstrap: how often it covers the truth, and where there is nothing to draw."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rescore.bootstrap import LEAST_GROUPS, RESAMPLES, interval, ratio, ratio_difference, ratio_gain

WORLDS = 300


def world(groups: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens and steps of groups with 1 to 8 examples each and a lognormal block efficiency above 1, `[groups, 2]`."""
    steps = rng.integers(20, 60, groups) * rng.integers(1, 9, groups)
    efficiency = 1.0 + 0.5 * np.exp(rng.normal(0.0, 0.6, groups))
    return np.stack([np.round(efficiency * steps), steps], axis=1)


def percentile(totals: np.ndarray, seed: int) -> tuple[float, float]:
    """What the percentile bootstrap gives."""
    draws = np.random.default_rng(seed).integers(len(totals), size=(RESAMPLES, len(totals)))
    sums = totals[draws].sum(axis=1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return float(low), float(high)


@pytest.mark.parametrize("groups", [10, 20])
def test_it_covers_the_truth_nearer_to_95_times_of_100_than_percentiles(groups: int):
    many = world(1_000_000, np.random.default_rng(7)).sum(axis=0)
    truth = many[0] / many[1]
    rng = np.random.default_rng(groups)
    hits = {"studentised": 0, "percentile": 0}
    for seed in range(WORLDS):
        totals = world(groups, rng)
        found = interval(totals, ratio, seed=seed)
        assert found is not None
        for name, (low, high) in (("studentised", found), ("percentile", percentile(totals, seed))):
            hits[name] += low <= truth <= high
    covered = {name: count / WORLDS for name, count in hits.items()}
    assert 0.91 < covered["studentised"] < 0.98 and covered["percentile"] < 0.905, covered
    assert abs(covered["studentised"] - 0.95) < abs(covered["percentile"] - 0.95)


@pytest.mark.parametrize("statistic", [ratio_difference, ratio_gain])
def test_paired_statistics_cover_it_too(statistic):
    def pairs(groups: int, rng: np.random.Generator) -> np.ndarray:
        plain = world(groups, rng)
        faster = plain[:, 1] / (1.0 + 0.15 * np.exp(rng.normal(0.0, 0.5, groups)))
        return np.stack([plain[:, 0], plain[:, 1], plain[:, 0], np.round(faster)], axis=1)

    truth = statistic(pairs(1_000_000, np.random.default_rng(8)).sum(axis=0))[0]
    rng, hits = np.random.default_rng(12), 0
    for seed in range(WORLDS):
        low, high = interval(pairs(12, rng), statistic, seed=seed)
        hits += low <= truth <= high
    assert 0.9 < hits / WORLDS < 0.985


def test_many_groups_agree_with_the_normal_interval():
    totals = world(2000, np.random.default_rng(1)).astype(float)
    value = totals[:, 0].sum() / totals[:, 1].sum()
    error = np.sqrt(((totals[:, 0] - value * totals[:, 1]) ** 2).sum()) / totals[:, 1].sum()
    assert interval(totals, ratio) == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=0.2 * error)


def test_few_groups_have_none_and_equal_groups_no_width():
    totals = np.array([[3, 2], [5, 3], [4, 4], [9, 5]])
    assert LEAST_GROUPS == 4 and interval(totals, ratio) is not None and interval(totals[:3], ratio) is None
    assert interval(np.zeros((0, 2)), ratio) is None
    same = np.array([[3, 2], [6, 4], [3, 2], [9, 6]])
    assert interval(same, ratio) == pytest.approx((1.5, 1.5))
    both = np.concatenate([same, same], axis=1)
    assert interval(both, ratio_gain) == pytest.approx((0.0, 0.0))
    assert interval(both, ratio_difference) == pytest.approx((0.0, 0.0))


def test_the_seed_is_all_that_is_random_and_the_range_is_kept():
    totals = world(6, np.random.default_rng(2))
    assert interval(totals, ratio, seed=1) == interval(totals, ratio, seed=1) != interval(totals, ratio, seed=2)
    low, high = interval(totals, ratio)
    assert interval(totals, ratio, within=(low + 0.01, high - 0.01)) == (low + 0.01, high - 0.01)
    rare = np.zeros((30, 2))
    rare[:, 1], rare[4, 0] = 50, 1
    low, high = interval(rare, ratio, within=(0.0, 1.0))
    assert low == 0.0 and 1 / 1500 < high < 0.02


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 9), st.integers(1, 50)), min_size=4, max_size=7))
def test_it_is_finite_and_holds_the_value(rows):
    totals = np.array([(tokens + steps, steps, tokens + steps, others) for tokens, steps, others in rows])
    for statistic in (ratio_difference, ratio_gain):
        found = interval(totals, statistic)
        value = statistic(totals.sum(axis=0).astype(float))[0]
        assert found is not None and np.isfinite(found).all()
        assert found[0] - 1e-9 <= value <= found[1] + 1e-9


def test_gradients_are_those_of_the_values():
    sums = np.array([7.0, 5.0, 9.0, 4.0])
    for statistic, size in ((ratio, 2), (ratio_difference, 4), (ratio_gain, 4)):
        at = sums[:size]
        value, gradient = statistic(at)
        moved = [(statistic(at + step)[0] - value) / 1e-6 for step in 1e-6 * np.eye(size)]
        assert gradient == pytest.approx(moved, abs=1e-5)
        assert gradient @ at == pytest.approx(0.0, abs=1e-12), "twice the sums are the same ratio"
