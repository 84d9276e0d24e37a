"""From n-gram counts to a back-off model: modified Kneser-Ney as `lmplz` computes it, Katz, entropy pruning.

Knows nothing about text or files. Word ids: 0 `<unk>`, 1 `<s>`, 2 `</s>`, then the words in the order in which they
first appear. That order matters once: see `count_statistics`.

**Modified Kneser-Ney** (Chen and Goodman 1998, equations 26 and 27; Heafield et al. 2013), interpolated at every order:
`p(w | c) = (a(cw) - D(a(cw))) / sum_v a(cv) + gamma(c) p(w | c')` with adjusted counts a, three discounts an order,
c' = c without its first word, and below the unigrams the uniform distribution over the vocabulary with `<unk>`, without
`<s>`. `<unk>` has count 0 and gets the interpolation mass only; `<s>` is printed with probability 1.

**Pruning by counts.** An n-gram of order n goes if it *occurs* at most `prune[n - 1]` times (raw counts, whatever
its adjusted count). The discounts come from all n-grams; the adjusted counts of those that go are handed to gamma.

**Katz** (Katz 1987): `p(w | c) = d_r r / sum_v r(cv)` on raw counts r with Good-Turing discounts for r <= 5, and
back-offs that make every context sum to one.

**Entropy pruning** (Stolcke 1998): n-grams whose removal changes the model's relative entropy least go first.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit

from lattices.errors import InvalidDataError, RescoreError
from lattices.ngrams import SENTENCE_START, SPECIAL_WORDS, NgramArrays, NgramModel
from lm.ngram.counting import Workspace
from lm.ngram.tables import NgramTable

GOOD_TURING_LIMIT = 5  # counts above are taken as they are (Katz's k)
KATZ_CUTOFFS = (0, 0, 1, 3)  # trigrams seen twice, longer ones four times: [A]
SPECIALS = len(SPECIAL_WORDS)
LEAST_LOG10 = -99.0  # the ARPA format's zero
LEAST_MASS = 1e-9  # what has less left for backing off has nothing left


class Estimate(NamedTuple):
    """A model with what it was made by, by order."""

    model: NgramModel
    discounts: tuple[tuple[float, ...], ...]  # Kneser-Ney's D1, D2, D3+ (subtracted), or Katz's d1 ... d5 (factors)
    fallback_orders: tuple[int, ...]  # whose discounts could not be estimated


def estimate(
    table: NgramTable,
    vocabulary: Sequence[str],
    *,
    smoothing: str,
    prune: Sequence[int],
    discount_fallback: Sequence[float] | None,
    max_ngrams: int | None,
    workspace: Workspace,
) -> Estimate:
    """The back-off model of the counts in `table`; `vocabulary[i]` is the word with id i.

    `prune` gives the counts up to which n-grams are dropped, order by order (of `check_thresholds`).
    `discount_fallback` (of `check_fallback`) is used where Kneser-Ney's discounts can't be estimated. `max_ngrams`
    prunes by entropy down to so many n-grams in all. `workspace` gives the large arrays, so that they can lie on disk.
    Raises `InvalidDataError` where the corpus is too small or too regular to estimate discounts, `RescoreError` where
    `max_ngrams` leaves no room for the words.
    """
    kept = workspace.empty(len(table.raw), np.bool_)
    for n in range(1, table.order + 1):
        kept[table.span(n)] = table.raw[table.span(n)] > prune[n - 1]
    kept[:SPECIALS] = True
    p, backoff = (workspace.empty(len(kept), np.float64) for _ in range(2))
    backoff[:] = 1.0
    if smoothing == "katz":
        discounts, fallback_orders = _katz(table, kept, p, backoff)
    else:
        discounts, fallback_orders = _kneser_ney(table, kept, discount_fallback, p, backoff)
    if max_ngrams is not None and int(kept.sum()) > max_ngrams:
        kept = _entropy_pruned(table, kept, p, max_ngrams)
        _normalise(table, kept, p, backoff)
    model = _to_model(table, kept, p, backoff, vocabulary, workspace)
    return Estimate(model, tuple(discounts), tuple(fallback_orders))


def check_thresholds(prune: Sequence[int], order: int, smoothing: str) -> tuple[int, ...]:
    """One threshold an order, never falling; the last given one holds for the rest, and without any Katz has
    `KATZ_CUTOFFS`. Raises `RescoreError`."""
    values = [int(v) for v in prune] or list(KATZ_CUTOFFS[:order] if smoothing == "katz" else (0,))
    if len(values) > order:
        raise RescoreError(f"{len(values)} pruning thresholds for a model of order {order}; give at most {order}")
    if values[0] < 0 or any(a > b for a, b in itertools.pairwise(values)):
        text = " ".join(map(str, values))
        raise RescoreError(f"pruning thresholds {text} must not be negative, nor fall from one order to the next")
    return tuple(values + values[-1:] * (order - len(values)))


def check_fallback(discounts: Sequence[float] | None) -> tuple[float, float, float] | None:
    """Discounts for the counts 1, 2 and 3+; the last given one holds for the rest. Raises `RescoreError`."""
    if discounts is None:
        return None
    values = [float(d) for d in discounts]
    if not 1 <= len(values) <= 3:
        raise RescoreError(f"{len(values)} fallback discounts; give one to three, e.g. 0.5 1 1.5")
    values += values[-1:] * (3 - len(values))
    for i, value in enumerate(values, start=1):
        if not 0 <= value <= i:
            raise RescoreError(f"the fallback discount {value:g} for count {i} is not between 0 and {i}")
    return values[0], values[1], values[2]


def count_statistics(table: NgramTable, n: int) -> np.ndarray:
    """How many n-grams of order n have adjusted count 0, 1, 2, 3, 4: int64 `[5]`.

    One thing is peculiar, and is `lmplz`'s: the lower-order n-grams that end the last n-gram of all (the greatest in
    suffix order, so the one with the latest words) count here with their occurrences, not their adjusted counts.
    """
    adjusted = table.adjusted[table.span(n)]
    numbers = np.bincount(adjusted[adjusted < 5], minlength=5)
    if n <= len(table.closing):
        at = table.closing[n - 1]
        for value, change in ((table.adjusted[at], -1), (table.raw[at], 1)):
            if value < 5:
                numbers[value] += change
    return numbers


def kneser_ney_discounts(numbers: np.ndarray, n: int) -> tuple[float, float, float]:
    """D1, D2, D3+ from counts-of-counts `[5]` (Chen and Goodman, equation 26), in the single precision of `lmplz`.

    Raises `InvalidDataError` where they can't be had.
    """
    advice = "is the text small or artificial? give it more text, or fallback discounts (--discount-fallback)"
    if missing := [j for j in (1, 2, 3) if not numbers[j]]:
        raise InvalidDataError(
            f"can't estimate Kneser-Ney discounts of the {n}-grams: none has adjusted count {missing[0]}; {advice}"
        )
    single = np.float32
    y = single(numbers[1]) / single(numbers[1] + 2.0 * numbers[2])
    discounts = [single(j) - single(j + 1) * y * single(numbers[j + 1]) / single(numbers[j]) for j in (1, 2, 3)]
    for j, discount in enumerate(discounts, start=1):
        if not 0 <= discount <= j:
            raise InvalidDataError(
                f"the Kneser-Ney discount of {n}-grams with adjusted count {j} is {discount:.3f}, outside 0 to {j}; "
                f"{advice}"
            )
    return float(discounts[0]), float(discounts[1]), float(discounts[2])


# Discounts by order; the orders whose discounts stand in for an estimate. Probabilities per n-gram and back-offs per
# context are written to arrays, by the table's indices.
_Discounts = tuple[list[tuple[float, ...]], list[int]]


def _kneser_ney(
    table: NgramTable, kept: np.ndarray, fallback: Sequence[float] | None, p: np.ndarray, backoff: np.ndarray
) -> _Discounts:
    by_order: list[tuple[float, ...]] = []
    fallback_orders = []
    for n in range(1, table.order + 1):
        span = table.span(n)
        try:
            discounts: tuple[float, ...] = kneser_ney_discounts(count_statistics(table, n), n)
        except InvalidDataError:
            if fallback is None:
                raise
            discounts = tuple(fallback)
            fallback_orders.append(n)
        by_order.append(discounts)
        subtracted = np.array((0.0, *discounts))
        if n == 1:
            counts, here = table.adjusted[span], kept[span]
            total = counts.sum()
            off = subtracted[np.minimum(counts, 3)]
            gamma = np.where(here, off, counts).sum() / total
            size = int(here.sum()) - 1  # all words that can come next: not <s>
            p[span] = (counts - off) / total + gamma / size
            p[SENTENCE_START] = 1.0
        else:
            contexts = table.span(n - 1)
            denominator = np.zeros(contexts.stop - contexts.start)
            backoff[contexts] = 0.0
            _context_sums(table, n, kept, subtracted, denominator, backoff)
            used = denominator > 0
            backoff[contexts] = np.divide(backoff[contexts], denominator, out=np.ones(len(used)), where=used)
            _interpolate(table, n, subtracted, denominator, backoff, p)
    return by_order, fallback_orders


@njit(cache=True, nogil=True)
def _context_sums(
    table: NgramTable, n: int, kept: np.ndarray, subtracted: np.ndarray, denominator: np.ndarray, left: np.ndarray
) -> None:
    """Per context: the sum of counts, and what discounts and pruned n-grams leave of it."""
    context, counts, base = table.context, table.adjusted, table.offsets[n - 2]
    for i in range(table.offsets[n - 1], table.offsets[n]):
        denominator[context[i] - base] += counts[i]
        left[context[i]] += subtracted[min(counts[i], 3)] if kept[i] else counts[i]


@njit(cache=True, nogil=True)
def _interpolate(
    table: NgramTable, n: int, subtracted: np.ndarray, denominator: np.ndarray, gamma: np.ndarray, p: np.ndarray
) -> None:
    context, suffix, counts, base = table.context, table.suffix, table.adjusted, table.offsets[n - 2]
    for i in range(table.offsets[n - 1], table.offsets[n]):
        c = context[i]
        p[i] = (counts[i] - subtracted[min(counts[i], 3)]) / denominator[c - base] + gamma[c] * p[suffix[i]]


def good_turing_factors(raw: np.ndarray) -> tuple[np.ndarray, bool]:
    """(d_1 ... d_5 float64 `[5]`, whether they stand in for an estimate) for the raw counts of one order.

    d_r = (r*/r - m) / (1 - m) with r* = (r + 1) n_(r+1) / n_r and m = (k + 1) n_(k+1) / n_1, k = 5 (Katz 1987). Where a
    count-of-counts is 0 or a factor leaves (0, 1], counts of that r stay as they are.
    """
    k = GOOD_TURING_LIMIT
    numbers = np.bincount(raw[raw <= k + 1], minlength=k + 2).astype(np.float64)
    factors = np.ones(k)
    if not numbers[1]:
        return factors, True
    common = (k + 1) * numbers[k + 1] / numbers[1]
    stood_in = False
    for r in range(1, k + 1):
        value = np.nan
        if numbers[r] and common < 1:
            value = ((r + 1) * numbers[r + 1] / numbers[r] / r - common) / (1 - common)
        if 0 < value <= 1:
            factors[r - 1] = value
        else:
            stood_in = True
    return factors, stood_in


def _katz(table: NgramTable, kept: np.ndarray, p: np.ndarray, backoff: np.ndarray) -> _Discounts:
    by_order: list[tuple[float, ...]] = []
    fallback_orders = []
    for n in range(1, table.order + 1):
        span = table.span(n)
        raw = table.raw[span]
        factors, stood_in = good_turing_factors(raw[SPECIALS - 1 :] if n == 1 else raw)
        by_order.append(tuple(map(float, factors)))
        if stood_in:
            fallback_orders.append(n)
        scale = np.ones(GOOD_TURING_LIMIT + 2)
        scale[1:-1] = factors
        discounted = raw * scale[np.minimum(raw, GOOD_TURING_LIMIT + 1)]
        if n == 1:
            occurrences = raw.copy()
            occurrences[: SENTENCE_START + 1] = 0  # neither <unk> nor <s> is ever counted as the next word
            discounted = np.where(kept[span], discounted, 0.0)
            discounted[: SENTENCE_START + 1] = 0
            p[span] = discounted / max(occurrences.sum(), 1)
            # All that is left is the unknown words'; one occurrence is lent where nothing is.
            if 1 - p[span].sum() < LEAST_MASS:
                p[span] = discounted / (occurrences.sum() + 1)
            p[0] = 1 - p[span].sum()
            p[SENTENCE_START] = 1.0
            continue
        contexts = table.context[span]
        base, size = table.span(n - 1).start, table.span(n - 1).stop - table.span(n - 1).start
        local = contexts - base
        denominator = np.bincount(local, weights=raw, minlength=size)
        seen = np.bincount(local, weights=np.where(kept[span], discounted, 0.0), minlength=size)
        denominator[(denominator > 0) & (denominator - seen < LEAST_MASS * denominator)] += 1
        p[span] = discounted / denominator[local]
    _normalise(table, kept, p, backoff)
    return by_order, fallback_orders


def _normalise(table: NgramTable, kept: np.ndarray, p: np.ndarray, backoff: np.ndarray) -> None:
    """Back-offs that make each context of the kept n-grams sum to one; 1 where a context has no n-grams left."""
    for n in range(2, table.order + 1):
        contexts = table.span(n - 1)
        seen, lower = _seen_mass(table, n, kept, p)
        backoff[contexts] = np.maximum(1 - seen, LEAST_MASS) / np.maximum(1 - lower, LEAST_MASS)
        backoff[contexts][seen == 0] = 1.0


def _seen_mass(table: NgramTable, n: int, kept: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per context: the probability of its kept n-grams, and what the next lower order gives to the same words."""
    span, contexts = table.span(n), table.span(n - 1)
    here = np.flatnonzero(kept[span]) + span.start
    context, size = table.context[here] - contexts.start, contexts.stop - contexts.start
    return np.bincount(context, p[here], size), np.bincount(context, p[table.suffix[here]], size)


def _entropy_pruned(table: NgramTable, kept: np.ndarray, p: np.ndarray, max_ngrams: int) -> np.ndarray:
    """Which n-grams stay when all but `max_ngrams` go (fewer where equals would be cut through); unigrams all stay.

    The change of relative entropy is Stolcke's equation 5, of each n-gram alone against the whole model. The
    probability of a history is its relative frequency: Kneser-Ney's lower orders are no estimate of it (Chelba et
    al. 2010). What a kept n-gram needs (context and suffix) is as good as the n-gram, so that it stays as well.
    """
    unigrams = int(kept[table.span(1)].sum())
    if max_ngrams < unigrams:
        raise RescoreError(f"max_ngrams = {max_ngrams} is less than the vocabulary of {unigrams:,} words; allow more")
    change = np.zeros(len(kept))
    total = float(table.raw[SPECIALS - 1 : table.offsets[1]].sum())
    sentences = float(table.raw[SPECIALS - 1])
    for n in range(2, table.order + 1):
        left = _seen_mass(table, n, kept, p)
        occurrences = table.raw[table.span(n - 1)].astype(np.float64)
        if n == 2:
            occurrences[SENTENCE_START] = sentences
        _entropy_changes(table, n, kept, p, left, occurrences / total, change)
    for n in range(table.order, 2, -1):
        span = table.span(n)
        here = np.flatnonzero(kept[span]) + span.start
        np.maximum.at(change, table.context[here], change[here])
        np.maximum.at(change, table.suffix[here], change[here])
    candidates = kept.copy()
    candidates[table.span(1)] = False
    scores = change[candidates]
    room = max_ngrams - unigrams
    result = kept.copy()
    if room < len(scores):
        border = np.partition(scores, len(scores) - room - 1)[len(scores) - room - 1]  # the best of those that go
        result[candidates] = scores > border
    return result


@njit(cache=True, nogil=True)
def _entropy_changes(
    table: NgramTable,
    n: int,
    kept: np.ndarray,
    p: np.ndarray,
    mass: tuple[np.ndarray, np.ndarray],  # of `_seen_mass`
    history: np.ndarray,
    change: np.ndarray,
) -> None:
    context, suffix, base = table.context, table.suffix, table.offsets[n - 2]
    seen, lower = mass
    for i in range(table.offsets[n - 1], table.offsets[n]):
        if not kept[i]:
            continue
        c = context[i]
        left = max(1 - seen[c - base], 1e-9)
        left_lower = max(1 - lower[c - base], 1e-9)
        alpha = (left + p[i]) / (left_lower + p[suffix[i]])  # the back-off once this n-gram is gone
        gained = np.log(alpha) - np.log(left / left_lower)
        change[i] = -history[c - base] * (p[i] * (np.log(p[suffix[i]] * alpha) - np.log(p[i])) + gained * left)


def _to_model(
    table: NgramTable,
    kept: np.ndarray,
    p: np.ndarray,
    backoff: np.ndarray,
    vocabulary: Sequence[str],
    workspace: Workspace,
) -> NgramModel:
    """The kept n-grams with ids without gaps, every order sorted by first word first."""
    unigrams = kept[table.span(1)]
    new_id = np.cumsum(unigrams, dtype=np.int32) - 1
    rank = workspace.empty(len(kept), np.int32)  # place of a kept n-gram within its order of the model
    rank[table.span(1)] = new_id
    at = np.flatnonzero(unigrams)
    words = at[:, None].astype(np.int32)
    orders = []
    for n in range(1, table.order + 1):
        if n > 1:
            span, before = table.span(n), len(at)
            candidates = np.flatnonzero(kept[span]) + span.start
            places = rank[table.context[candidates]]
            # Suffix order is order of last words, so placing by context, stably, gives order of first words.
            moved = _stable_order(places, before)
            at = candidates[moved]
            rank[at] = np.arange(len(at), dtype=np.int32)
            below, words = words, workspace.empty(len(at) * n, np.int32).reshape(-1, n)
            words[:, :-1] = below[places[moved]]
            words[:, -1] = new_id[table.last[at]]
        else:
            words = new_id[at][:, None]
        log10p, log10_backoff = workspace.empty(len(at), np.float32), workspace.empty(len(at), np.float32)
        _log10_of(p, at, log10p)
        np.minimum(log10p, 0, out=log10p)
        log10_backoff[:] = 0
        if n < table.order:
            _log10_of(backoff, at, log10_backoff)
        orders.append(NgramArrays(words, log10p, log10_backoff))
    names = tuple(vocabulary) if unigrams.all() else tuple(vocabulary[i] for i in np.flatnonzero(unigrams).tolist())
    return NgramModel(names, tuple(orders))


@njit(cache=True, nogil=True)
def _stable_order(places: np.ndarray, size: int) -> np.ndarray:
    """The permutation that sorts numbers below `size`, equals in their order (one pass of counting sort)."""
    begin = np.zeros(size + 1, np.int64)
    for place in places:
        begin[place + 1] += 1
    for i in range(size):
        begin[i + 1] += begin[i]
    order = np.empty(len(places), np.int64)
    for i in range(len(places)):
        order[begin[places[i]]] = i
        begin[places[i]] += 1
    return order


@njit(cache=True, nogil=True)
def _log10_of(values: np.ndarray, at: np.ndarray, logs: np.ndarray) -> None:
    """log10 of `values[at]`, of zero the format's zero; no copies in between."""
    for i in range(len(at)):
        value = values[at[i]]
        logs[i] = np.log10(value) if value > 0 else LEAST_LOG10
