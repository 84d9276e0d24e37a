"""Block efficiency and what belongs to it, from the accepted lengths of every step (docs/numbers.md).

A step counts the n tokens it accepted, 1 <= n <= h; the token that the same call already chose for the next block is
counted there. Prefill is not a step. So sum(histogram) = steps, sum(i x histogram[i]) = tokens, and the sum of the
marginals is the block efficiency.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rescore.bootstrap import interval, ratio, ratio_difference, ratio_gain


@dataclass(frozen=True)
class Accounting:
    """What one side accepted.

    groups: how many groups the examples are of.
    block_efficiency: tokens / steps over all steps (micro).
    block_efficiency_ci95: its interval by group (`rescore.bootstrap`), None for fewer than four groups.
    block_efficiency_macro: mean over examples.
    accepted_histogram: [i] = steps that accepted exactly i tokens, i = 0..h.
    marginal: [i-1] = share of steps that accepted at least i, i = 1..h.
    conditional: [i-1] = marginal(i) / marginal(i-1), None where no step got that far.
    """

    groups: int
    block_efficiency: float
    block_efficiency_ci95: tuple[float, float] | None
    block_efficiency_macro: float
    steps: int
    tokens: int
    accepted_histogram: list[int]
    marginal: list[float]
    conditional: list[float | None]


@dataclass(frozen=True)
class Difference:
    """One side (B) against the other (A) on the same examples; intervals are paired, by group, as of `Accounting`.

    difference: B's block efficiency less A's, tokens a step.
    gain: B's over A's, less 1 (0.25 = 25 % more tokens a step).
    won, tied, lost: examples that B decodes with more, as many, fewer tokens a step.
    """

    groups: int
    difference: float
    difference_ci95: tuple[float, float] | None
    gain: float
    gain_ci95: tuple[float, float] | None
    won: int
    tied: int
    lost: int


Groups = Sequence[str] | None  # of each example, by any key; None: every example is a group of its own


def block_efficiency(accepted: Sequence[Sequence[int]]) -> float:
    """Tokens a step, pooled over examples, from the accepted lengths of each step of each example."""
    return sum(map(sum, accepted)) / sum(map(len, accepted))


def account(accepted: Sequence[Sequence[int]], h: int, *, groups: Groups = None, seed: int = 0) -> Accounting:
    """Accounts for the accepted lengths of each step of each example; h is the block's length."""
    steps = np.array([len(example) for example in accepted], dtype=np.int64)  # [examples]
    tokens = np.array([sum(example) for example in accepted], dtype=np.int64)
    assert len(accepted) and steps.min() > 0, "an example without steps can't be accounted for"
    lengths = np.concatenate([np.asarray(example, dtype=np.int64) for example in accepted])
    assert lengths.min() >= 1 and lengths.max() <= h, "a step accepts 1 to h tokens"
    histogram = np.bincount(lengths, minlength=h + 1)
    total = int(steps.sum())
    at_least = histogram[::-1].cumsum()[::-1]  # steps that accepted at least i, i = 0..h
    marginal = (at_least[1:] / total).tolist()
    totals = _by_group(np.stack([tokens, steps], axis=1), groups)
    return Accounting(
        groups=len(totals),
        block_efficiency=block_efficiency(accepted),
        block_efficiency_ci95=interval(totals, ratio, seed=seed, within=(1.0, h)),
        block_efficiency_macro=float((tokens / steps).mean()),
        steps=total,
        tokens=int(tokens.sum()),
        accepted_histogram=histogram.tolist(),
        marginal=marginal,
        conditional=[m / b if b else None for m, b in zip(marginal, [1.0, *marginal[:-1]], strict=True)],
    )


def marginal_intervals(
    accepted: Sequence[Sequence[int]], h: int, *, groups: Groups = None, seed: int = 0
) -> list[tuple[float, float]] | None:
    """The 95 % interval of marginal(i), i = 1..h, from the accepted lengths of each step of each example.

    Examples without steps do not count. None for fewer than four groups.
    """
    decoded = [place for place, example in enumerate(accepted) if example]
    if not decoded:
        return None
    counts = [np.bincount(np.asarray(accepted[place], dtype=np.int64), minlength=h + 1) for place in decoded]
    at_least = np.stack(counts)[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1 : h + 1]  # [examples, h]
    totals = _by_group(at_least, None if groups is None else [groups[place] for place in decoded])
    intervals = [interval(totals[:, [i, 0]], ratio, seed=seed, within=(0.0, 1.0)) for i in range(h)]
    return [ci95 for ci95 in intervals if ci95] or None  # every step accepts the first token


def paired_difference(
    a: Sequence[Sequence[int]], b: Sequence[Sequence[int]], *, groups: Groups = None, seed: int = 0
) -> Difference:
    """B against A: `a[i]` and `b[i]` are the accepted lengths of each step of the same example i.

    Every resample of the bootstrap draws the same groups on both sides.
    """
    assert len(a) == len(b) > 0, "a gain is between two decodes of each example"
    counts = np.array([[(sum(e), len(e)) for e in side] for side in (a, b)], dtype=np.int64)
    tokens, steps = counts[..., 0], counts[..., 1]  # [2, examples]
    assert steps.min() > 0, "an example without steps can't be accounted for"
    totals = _by_group(np.stack([tokens[0], steps[0], tokens[1], steps[1]], axis=1), groups)
    before, after = tokens.sum(axis=1) / steps.sum(axis=1)
    ahead = tokens[1] * steps[0] - tokens[0] * steps[1]  # in whole numbers: 2/3 and 4/6 tie
    won, lost = int((ahead > 0).sum()), int((ahead < 0).sum())
    return Difference(
        groups=len(totals),
        difference=float(after - before),
        difference_ci95=interval(totals, ratio_difference, seed=seed),
        gain=float(after / before - 1.0),
        gain_ci95=interval(totals, ratio_gain, seed=seed, within=(-1.0, np.inf)),
        won=won,
        tied=len(a) - won - lost,
        lost=lost,
    )


def speedup_interval(
    own: Sequence[tuple[int, float]], other: Sequence[tuple[int, float]], *, groups: Groups = None, seed: int = 0
) -> tuple[float, float] | None:
    """The 95 % interval, paired by group, of how many times as many tokens a second one side makes as another, from
    the tokens and seconds of each example on both. None for fewer than four groups."""
    totals = _by_group(np.concatenate([np.array(other), np.array(own)], axis=1), groups)
    gain = interval(totals, ratio_gain, seed=seed, within=(-1.0, np.inf))
    return gain and (1.0 + gain[0], 1.0 + gain[1])


def _by_group(values: np.ndarray, groups: Groups) -> np.ndarray:
    """Sums over the examples of each group: `[examples, m]` -> `[groups, m]`, groups in the order of their first."""
    if groups is None:
        return values
    assert len(groups) == len(values), "every example has a group"
    place: dict[str, int] = {}
    rows = [place.setdefault(group, len(place)) for group in groups]
    totals = np.zeros((len(place), values.shape[1]), dtype=values.dtype)
    np.add.at(totals, rows, values)
    return totals
