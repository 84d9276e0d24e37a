"""Statistics of lattices and drafts: repetition, h_max, ranks and recall, reliability, and the walk of a decode.

Arrays in, arrays out, over a batch of positions or drafts; what is undefined (0 of 0) is NaN. Definitions follow [A]
(sections 5.1, 5.2) where it has them; docs/analyses.md says the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lattices.errors import RescoreError


def targets_ahead(output_ids: np.ndarray, h: int) -> np.ndarray:
    """What every slot proposes, in truth: output `[t]` -> int32 `[t, h]`.

    Entry [i, j] is output token i + j (slots from 0), -1 after the end of the output.
    """
    padded = np.full(len(output_ids) + h, -1, dtype=np.int32)
    padded[: len(output_ids)] = output_ids
    ahead: np.ndarray = np.lib.stride_tricks.sliding_window_view(padded, h)[: len(output_ids)]
    return np.ascontiguousarray(ahead)


def equal_neighbours(drafts: np.ndarray) -> np.ndarray:
    """Whether tokens i and i + 1 of every draft are the same token: int `[n, h]` -> bool `[n, h-1]`.

    Drafts shorter than h end with -1, which equals nothing.
    """
    same: np.ndarray = (drafts[:, 1:] == drafts[:, :-1]) & (drafts[:, 1:] >= 0)
    return same


def longest_runs(drafts: np.ndarray) -> np.ndarray:
    """The longest run of one token in every draft (1: no repetition): int `[n, h]` -> int64 `[n]`."""
    longest = np.ones(len(drafts), dtype=np.int64)
    current = np.ones(len(drafts), dtype=np.int64)
    for same in equal_neighbours(drafts).T:  # [n]
        current = np.where(same, current + 1, 1)
        np.maximum(longest, current, out=longest)
    return longest


def h_max(mean_entropies: np.ndarray) -> int:
    """The most heads k such that the mean entropy does not fall over heads 1..k ([A] 5.2): `[h]` -> 1..h."""
    falls = np.flatnonzero(np.diff(mean_entropies) < 0)
    return int(falls[0]) + 1 if len(falls) else len(mean_entropies)


def rank_counts(ranks: np.ndarray, known: np.ndarray, entries: int) -> np.ndarray:
    """Positions by rank of the target, per slot: ranks `[n, h]` of `lattices.oracle.target_ranks`, bool `[n, h]` where
    there is a target -> int64 `[h, entries + 1]`; the last column counts targets that the slot lacks."""
    h = ranks.shape[1]
    counts = [np.bincount(ranks[known[:, slot], slot], minlength=entries + 1) for slot in range(h)]
    return np.stack(counts).astype(np.int64)


def recall(counts: np.ndarray, k: int) -> np.ndarray:
    """Share of targets among the first k entries: `rank_counts` `[h, entries + 1]` -> float64 `[h]`, NaN without any.

    Raises `RescoreError` unless 1 <= k <= entries.
    """
    entries = counts.shape[1] - 1
    if not 1 <= k <= entries:
        raise RescoreError(f"k = {k} is outside 1 to the lattice's {entries}; choose a k in that range")
    return _shares(counts[:, :k].sum(axis=1), counts.sum(axis=1))


def conditional_accuracy(right: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy of every slot where all slots before it are right.

    `right` bool `[n, h]`, `known` bool `[n, h]`: where there is a target -> accuracies float64 `[h]` (NaN where none
    was reached) and the number of positions reached, int64 `[h]`.
    """
    before = np.ones_like(right)
    before[:, 1:] = np.logical_and.accumulate(right, axis=1)[:, :-1]
    reached = (before & known).sum(axis=0)
    return _shares((before & known & right).sum(axis=0), reached), reached


@dataclass(frozen=True, eq=False)
class Reliability:
    """Probabilities in equal bins of (0, 1]: `edges` `[bins + 1]`, and for each bin the `count`, the mean `confidence`
    and the share that was right, `accuracy` (NaN where empty); `error`: expected calibration error (NaN: nothing)."""

    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int) -> Reliability:
    """Reliability of probabilities `[n]` in 0..1 against what came true, bool `[n]` (Guo et al. 2017, section 2).

    Bin b holds probabilities in (b / bins, (b + 1) / bins], the first one 0 as well. Raises `RescoreError` if bins < 1.
    """
    if bins < 1:
        raise RescoreError(f"{bins} bins leave no place for a probability; choose at least 1")
    edges = np.linspace(0.0, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    means = _shares(np.bincount(place, weights=confidence, minlength=bins), count)
    accuracy = _shares(np.bincount(place, weights=right.astype(np.float64), minlength=bins), count)
    error = float(np.nansum(count * np.abs(accuracy - means)) / len(confidence)) if len(confidence) else float("nan")
    return Reliability(edges, count, means, accuracy, error)


def decode_starts(accepted: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The positions where the steps of a decode begin, in a batch of outputs that lie one after the other.

    `accepted` int `[n]`, at least 1: what a step at each position accepts; `lengths` int `[examples]`: output tokens of
    each example, n in all -> bool `[n]`. The decode of every example begins at its first position and goes from
    position i to i + accepted[i].
    """
    assert accepted.shape == (int(lengths.sum()),), "an accepted length for every position"
    starts = np.zeros(len(accepted), dtype=np.bool_)
    steps, position, end = np.maximum(accepted, 1).tolist(), 0, 0
    for length in lengths.tolist():
        position, end = end, end + length
        while position < end:
            starts[position] = True
            position += steps[position]
    return starts


def _shares(parts: np.ndarray, of: np.ndarray) -> np.ndarray:
    """parts / of as float64, NaN where `of` is 0."""
    whole = np.asarray(of, dtype=np.float64)
    shares: np.ndarray = np.divide(parts, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
    return shares
