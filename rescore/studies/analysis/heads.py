"""What each head is like, every position read: its entropy, the ranks of the base LM's own choice, its acceptance and
its calibration. Heads are counted from 1; docs/analyses.md defines every number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lattices import statistics
from rescore.accounting import account
from rescore.studies.analysis.positions import Positions, number, share
from rescore.studies.records import Record

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
ENTROPY_BIN = 0.5  # nats, width of the histograms' bins
DEFAULT_BINS = 15  # of the calibration, as in Guo et al. 2017


@dataclass(frozen=True)
class HeadEntropy(Record):
    """Entropy of one head's whole distribution over all positions, nats: `quantiles` at `Entropies.levels`, counts in
    the bins of `Entropies.edges` (`histogram`; what is beyond the last edge is in the last bin)."""

    head: int
    mean: float | None
    std: float | None
    quantiles: tuple[float, ...]
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class Entropies(Record):
    """Confidence of the heads ([A] 5.2); `edges` of the histograms' bins, one more than bins."""

    positions: int
    levels: tuple[float, ...]
    edges: tuple[float, ...]
    heads: tuple[HeadEntropy, ...]
    h_max: int | None


@dataclass(frozen=True)
class HeadRanks(Record):
    """Where one head has the token that the base LM chose: `counts[r]` as entry r of the slot, from 0, `counts[-1]` not
    at all; `recall[i]` among the first `Ranks.ks[i]` entries."""

    head: int
    positions: int
    counts: tuple[int, ...]
    recall: tuple[float | None, ...]
    mean_reciprocal_rank: float | None


@dataclass(frozen=True)
class Ranks(Record):
    """Ranks of the base LM's choice in lattices of `entries` per slot."""

    entries: int
    ks: tuple[int, ...]
    heads: tuple[HeadRanks, ...]


@dataclass(frozen=True)
class HeadAcceptance(Record):
    """The arg-max of one head against the base LM's choice: where it is right, at all `positions` and at those that are
    `reached` by correct heads before it, and how often the unrescored decode accepted it (`marginal`, and over that of
    the head before)."""

    head: int
    positions: int
    unconditional: float | None
    reached: int
    conditional: float | None
    marginal: float | None
    conditional_decode: float | None


@dataclass(frozen=True)
class ReliabilityBin(Record):
    """Positions where the head's probability of its arg-max is in (low, high] (the first bin includes 0)."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class HeadCalibration(Record):
    """Whether one head's probabilities are to be believed, over all positions and in bins; `ece`: expected calibration
    error. Head 1 is right by definition (its arg-max is the output), so its `ece` is what it lacks to 1."""

    head: int
    positions: int
    ece: float | None
    confidence: float | None
    accuracy: float | None
    brier: float | None
    bins: tuple[ReliabilityBin, ...]


def entropies_of(positions: Positions, vocab_size: int) -> Entropies:
    """Distribution of every head's entropy over all positions; the bins go up to log(vocab_size)."""
    edges = np.arange(0.0, np.log(max(vocab_size, 2)) + ENTROPY_BIN, ENTROPY_BIN)
    found = positions.entropies.astype(np.float64)  # [n, h]
    means = found.mean(axis=0) if len(found) else None
    quantiles = np.quantile(found, LEVELS, axis=0) if len(found) else np.zeros((0, positions.h))  # [levels, h]
    heads = tuple(
        HeadEntropy(
            head=slot + 1,
            mean=None if means is None else float(means[slot]),
            std=float(found[:, slot].std()) if len(found) else None,
            quantiles=tuple(quantiles[:, slot].tolist()),
            histogram=tuple(np.histogram(np.clip(found[:, slot], 0.0, edges[-1]), edges)[0].tolist()),
        )
        for slot in range(positions.h)
    )
    h_max = None if means is None else statistics.h_max(means)
    return Entropies(len(found), LEVELS, tuple(edges.tolist()), heads, h_max)


def doubling(limit: int) -> tuple[int, ...]:
    """1, 2, 4, ... below `limit`, and `limit`."""
    return (*(1 << i for i in range(limit.bit_length()) if 1 << i < limit), limit)


def ranks_of(positions: Positions) -> Ranks:
    """Rank histogram and recall@k of every head, k = 1, 2, 4, ... up to the trace's K."""
    entries = positions.lattice.k
    ks = doubling(entries)
    counts = statistics.rank_counts(positions.ranks, positions.known, entries)  # [h, K + 1]
    recalls = [statistics.recall(counts, k) for k in ks]  # [h] each
    reciprocal = counts[:, :-1] @ (1.0 / np.arange(1, entries + 1))  # [h]
    heads = [
        HeadRanks(
            head=slot + 1,
            positions=int(counts[slot].sum()),
            counts=tuple(counts[slot].tolist()),
            recall=tuple(number(recall[slot]) for recall in recalls),
            mean_reciprocal_rank=share(reciprocal[slot], counts[slot].sum()),
        )
        for slot in range(positions.h)
    ]
    return Ranks(entries, ks, tuple(heads))


def acceptance_of(positions: Positions) -> tuple[HeadAcceptance, ...]:
    """Acceptance of every head's arg-max: at all positions, given the heads before it, and in the unrescored decode."""
    h, right = positions.h, positions.ranks == 0
    conditional, reached = statistics.conditional_accuracy(right, positions.known)
    known = positions.known.sum(axis=0)
    marginal: list[float | None] = [None] * h
    in_decode: list[float | None] = [None] * h
    if len(positions):
        decode = account(positions.steps(positions.unrescored), h)
        marginal, in_decode = [*decode.marginal], decode.conditional
    return tuple(
        HeadAcceptance(
            head=slot + 1,
            positions=int(known[slot]),
            unconditional=share(right[:, slot].sum(), known[slot]),
            reached=int(reached[slot]),
            conditional=number(conditional[slot]),
            marginal=marginal[slot],
            conditional_decode=in_decode[slot],
        )
        for slot in range(h)
    )


def calibration_of(positions: Positions, bins: int = DEFAULT_BINS) -> tuple[HeadCalibration, ...]:
    """Reliability of every head's arg-max in `bins` equal bins of probability (Guo et al. 2017, section 2).

    Raises `RescoreError` for no bins.
    """
    confidence = np.exp(positions.lattice.logps[:, :, 0].astype(np.float64))  # [n, h]
    heads = []
    for slot in range(positions.h):
        known = positions.known[:, slot]
        sure, right = confidence[known, slot], positions.ranks[known, slot] == 0
        curve = statistics.reliability(sure, right, bins)
        columns = zip(curve.edges[:-1], curve.edges[1:], curve.count, curve.confidence, curve.accuracy, strict=True)
        heads.append(
            HeadCalibration(
                head=slot + 1,
                positions=len(sure),
                ece=number(curve.error),
                confidence=share(sure.sum(), len(sure)),
                accuracy=share(right.sum(), len(right)),
                brier=share(((sure - right) ** 2).sum(), len(sure)),
                bins=tuple(
                    ReliabilityBin(float(low), float(high), int(count), number(mean), number(accuracy))
                    for low, high, count, mean, accuracy in columns
                ),
            )
        )
    return tuple(heads)
