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
        draws = np.random.default_rng(seed).integers(len(accepted), size=(BOOTSTRAP_RESAMPLES, len(accepted)))
        resampled = tokens[draws].sum(axis=1) / steps[draws].sum(axis=1)
        low, high = np.quantile(resampled, [0.025, 0.975])
        interval = (float(low), float(high))
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
