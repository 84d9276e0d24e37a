"""Block efficiency and what belongs to it, from the accepted lengths of every step (METHOD: accounting).

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
    accepted at least i, `conditional[i-1]` = marginal(i) / marginal(i-1), i = 1..h."""

    block_efficiency: float
    block_efficiency_ci95: tuple[float, float] | None
    block_efficiency_macro: float
    steps: int
    tokens: int
    accepted_histogram: list[int]
    marginal: list[float]
    conditional: list[float]


@dataclass(frozen=True)
class Gain:
    """`gain`: one block efficiency over another, less 1 (0.25 = 25 % more tokens a step); `gain_ci95`: its paired
    bootstrap interval by example, None for fewer than two examples."""

    gain: float
    gain_ci95: tuple[float, float] | None


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
    before = np.concatenate([[1.0], marginal[:-1]])
    conditional = np.divide(marginal, before, out=np.zeros(h), where=before > 0)
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
        conditional=conditional.tolist(),
    )


def paired_gain(accepted: Sequence[Sequence[int]], plain: Sequence[Sequence[int]], *, seed: int = 0) -> Gain:
    """What rescored decodes gain over unrescored ones: `accepted[i]` and `plain[i]` are the accepted lengths of each
    step of the same example i. Every resample of the bootstrap draws the same examples on both sides."""
    assert len(accepted) == len(plain) > 0, "a gain is between two decodes of each example"
    counts = np.array([[(sum(e), len(e)) for e in side] for side in (accepted, plain)], dtype=np.int64)
    tokens, steps = counts[..., 0], counts[..., 1]  # [2, examples]
    interval = None
    if len(accepted) > 1:
        draws = _draws(len(accepted), seed)
        pooled = tokens[:, draws].sum(axis=2) / steps[:, draws].sum(axis=2)  # [2, resamples]
        interval = _middle(pooled[0] / pooled[1] - 1.0)
    rescored, unrescored = tokens.sum(axis=1) / steps.sum(axis=1)
    return Gain(float(rescored / unrescored - 1.0), interval)


def _draws(examples: int, seed: int) -> np.ndarray:
    """Indices of resampled examples, `[BOOTSTRAP_RESAMPLES, examples]`."""
    return np.random.default_rng(seed).integers(examples, size=(BOOTSTRAP_RESAMPLES, examples))


def _middle(values: np.ndarray) -> tuple[float, float]:
    """The interval that the middle 95 % of the values are in."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
