"""Confidence of the heads ([A] 5.2): the entropy of each head, h_max, and h_max against block efficiency over tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lattices.statistics import h_max
from rescore.studies.analysis.positions import Positions
from rescore.studies.analysis.records import Entropies, HeadEntropy, HmaxCorrelation, HmaxPoint

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
BIN = 0.5  # nats, width of the histograms' bins
MIN_POINTS = 3  # two points always correlate perfectly


def entropies_of(positions: Positions, vocab_size: int) -> Entropies:
    """Distribution of every head's entropy over all positions; the bins go up to log(vocab_size)."""
    edges = np.arange(0.0, np.log(max(vocab_size, 2)) + BIN, BIN)
    found = positions.entropies.astype(np.float64)  # [n, h]
    if not len(found):
        empty = [HeadEntropy(head, None, None, (), (0,) * (len(edges) - 1)) for head in range(1, positions.h + 1)]
        return Entropies(0, LEVELS, tuple(edges.tolist()), tuple(empty), None)
    means = found.mean(axis=0)
    quantiles = np.quantile(found, LEVELS, axis=0)  # [levels, h]
    heads = tuple(
        HeadEntropy(
            head=slot + 1,
            mean=float(means[slot]),
            std=float(found[:, slot].std()),
            quantiles=tuple(quantiles[:, slot].tolist()),
            histogram=tuple(np.histogram(np.clip(found[:, slot], 0.0, edges[-1]), edges)[0].tolist()),
        )
        for slot in range(positions.h)
    )
    return Entropies(len(found), LEVELS, tuple(edges.tolist()), heads, h_max(means))


def correlation(points: Sequence[HmaxPoint], h: int | None = None) -> HmaxCorrelation:
    """Pearson's R of h_max and block efficiency over tasks, each of which is one of the points, with h heads."""
    x = np.array([p.h_max for p in points], dtype=np.float64)
    y = np.array([p.block_efficiency for p in points], dtype=np.float64)
    if len(points) < MIN_POINTS or np.ptp(x) == 0 or np.ptp(y) == 0:
        return HmaxCorrelation(h, tuple(points), None)
    return HmaxCorrelation(h, tuple(points), float(np.corrcoef(x, y)[0, 1]))
