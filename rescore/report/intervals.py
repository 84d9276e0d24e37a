"""Intervals of the share of steps that accepted at least i tokens: the bootstrap of `rescore.accounting`, by
example."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rescore.accounting import BOOTSTRAP_RESAMPLES


def marginal_ci95(accepted: Sequence[Sequence[int]], h: int, *, seed: int = 0) -> list[tuple[float, float]] | None:
    """The 95 % interval of marginal(i), i = 1..h, from the accepted lengths of each step of each example.

    Every resample draws whole examples. None for fewer than two examples with steps.
    """
    counts = [np.bincount(np.asarray(example, dtype=np.int64), minlength=h + 1) for example in accepted if example]
    if len(counts) < 2:
        return None
    at_least = np.stack(counts)[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1 : h + 1]  # [examples, h]
    steps = at_least[:, 0]
    draws = np.random.default_rng(seed).integers(len(counts), size=(BOOTSTRAP_RESAMPLES, len(counts)))
    weights = np.stack([np.bincount(draw, minlength=len(counts)) for draw in draws])  # [resamples, examples]
    shares = (weights @ at_least) / (weights @ steps)[:, None]  # [resamples, h]
    low, high = np.quantile(shares, [0.025, 0.975], axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
