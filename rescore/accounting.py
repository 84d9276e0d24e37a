"""Block efficiency and what belongs to it, from the accepted lengths of every step (docs/numbers.md).

A step counts the n tokens it accepted, 1 <= n <= h; the token that the same call already chose for the next block is
counted there. Prefill is not a step. So sum(histogram) = steps, sum(i x histogram[i]) = tokens, and the sum of the
marginals is the block efficiency.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BOOTSTRAP_RESAMPLES = 2000


@dataclass(frozen=True)
class Accounting:
    """`block_efficiency` = tokens / steps over all steps (micro), `block_efficiency_macro` = mean over examples;
    `block_efficiency_ci95`: bootstrap interval of the micro value by example, None for fewer than two examples;
    `accepted_histogram[i]` = steps that accepted exactly i tokens, i = 0..h; `marginal[i-1]` = share of steps that
    accepted at least i, `conditional[i-1]` = marginal(i) / marginal(i-1), None where no step got that far, i = 1..h."""

    block_efficiency: float
    block_efficiency_ci95: tuple[float, float] | None
    block_efficiency_macro: float
    steps: int
    tokens: int
    accepted_histogram: list[int]
    marginal: list[float]
    conditional: list[float | None]


@dataclass(frozen=True)
class Gain:
    """`gain`: one block efficiency over another, less 1 (0.25 = 25 % more tokens a step); `gain_ci95`: its paired
    bootstrap interval by example, None for fewer than two examples."""

    gain: float
    gain_ci95: tuple[float, float] | None


@dataclass(frozen=True)
class Difference:
    """One side's block efficiency against the other's on the same examples: `difference` (B less A, tokens a step) and
    `gain` (B over A, less 1) with their paired bootstrap intervals by example (None for fewer than two examples);
    `won`, `tied`, `lost`: examples that B decodes with more, as many, fewer tokens a step."""

    difference: float
    difference_ci95: tuple[float, float] | None
    gain: float
    gain_ci95: tuple[float, float] | None
    won: int
    tied: int
    lost: int


def account(accepted: Sequence[Sequence[int]], h: int, *, seed: int = 0) -> Accounting:
    """Accounts for the accepted lengths of each step of each example; h is the block's length."""
    steps = np.array([len(example) for example in accepted], dtype=np.int64)  # [examples]
    tokens = np.array([sum(example) for example in accepted], dtype=np.int64)
    assert len(accepted) and steps.min() > 0, "an example without steps can't be accounted for"
    lengths = np.concatenate([np.asarray(example, dtype=np.int64) for example in accepted])
    assert lengths.min() >= 1 and lengths.max() <= h, "a step accepts 1 to h tokens"
    histogram = np.bincount(lengths, minlength=h + 1)
    total = int(steps.sum())
    at_least = histogram[::-1].cumsum()[::-1]  # steps that accepted at least i, i = 0..h
    marginal = at_least[1:] / total
    before = [1.0, *marginal[:-1].tolist()]
    interval = None
    if len(accepted) > 1:
        draws = _draws(len(accepted), seed)
        interval = _middle(tokens[draws].sum(axis=1) / steps[draws].sum(axis=1))
    return Accounting(
        block_efficiency=float(tokens.sum() / total),
        block_efficiency_ci95=interval,
        block_efficiency_macro=float((tokens / steps).mean()),
        steps=total,
        tokens=int(tokens.sum()),
        accepted_histogram=histogram.tolist(),
        marginal=marginal.tolist(),
        conditional=[m / b if b else None for m, b in zip(marginal.tolist(), before, strict=True)],
    )


def marginal_intervals(accepted: Sequence[Sequence[int]], h: int, *, seed: int = 0) -> list[tuple[float, float]] | None:
    """The 95 % bootstrap interval of marginal(i), i = 1..h, from the accepted lengths of each step of each example.

    Every resample draws whole examples. None for fewer than two examples with steps.
    """
    counts = [np.bincount(np.asarray(example, dtype=np.int64), minlength=h + 1) for example in accepted if example]
    if len(counts) < 2:
        return None
    at_least = np.stack(counts)[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1 : h + 1]  # [examples, h]
    drawn = [np.bincount(draw, minlength=len(counts)) for draw in _draws(len(counts), seed)]
    tokens = np.stack(drawn) @ at_least  # [resamples, h]; every step accepts the first token
    return [_middle(shares) for shares in (tokens / tokens[:, :1]).T]


def paired_gain(accepted: Sequence[Sequence[int]], plain: Sequence[Sequence[int]], *, seed: int = 0) -> Gain:
    """What rescored decodes gain over unrescored ones: `accepted[i]` and `plain[i]` are the accepted lengths of each
    step of the same example i. Every resample of the bootstrap draws the same examples on both sides."""
    found = paired_difference(plain, accepted, seed=seed)
    return Gain(found.gain, found.gain_ci95)


def paired_difference(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]], *, seed: int = 0) -> Difference:
    """B against A: `a[i]` and `b[i]` are the accepted lengths of each step of the same example i, as `paired_gain`."""
    assert len(a) == len(b) > 0, "a gain is between two decodes of each example"
    counts = np.array([[(sum(e), len(e)) for e in side] for side in (a, b)], dtype=np.int64)
    tokens, steps = counts[..., 0], counts[..., 1]  # [2, examples]
    assert steps.min() > 0, "an example without steps can't be accounted for"
    differences = gains = None
    if len(a) > 1:
        draws = _draws(len(a), seed)
        pooled = tokens[:, draws].sum(axis=2) / steps[:, draws].sum(axis=2)  # [2, resamples]
        differences, gains = _middle(pooled[1] - pooled[0]), _middle(pooled[1] / pooled[0] - 1.0)
    before, after = tokens.sum(axis=1) / steps.sum(axis=1)
    ahead = tokens[1] * steps[0] - tokens[0] * steps[1]  # in whole numbers: 2/3 and 4/6 tie
    won, lost = int((ahead > 0).sum()), int((ahead < 0).sum())
    return Difference(
        difference=float(after - before),
        difference_ci95=differences,
        gain=float(after / before - 1.0),
        gain_ci95=gains,
        won=won,
        tied=len(a) - won - lost,
        lost=lost,
    )


def _draws(examples: int, seed: int) -> np.ndarray:
    """Indices of resampled examples, `[BOOTSTRAP_RESAMPLES, examples]`."""
    return np.random.default_rng(seed).integers(examples, size=(BOOTSTRAP_RESAMPLES, examples))


def _middle(values: np.ndarray) -> tuple[float, float]:
    """The interval that the middle 95 % of the values are in."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
