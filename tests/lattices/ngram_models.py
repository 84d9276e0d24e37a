"""Random n-gram models and the definitions that automaton and search are compared with, by plain recursion."""

from __future__ import annotations

import itertools

import numpy as np

from lattices.automaton import LN10, SCORE_SCALE
from lattices.lattice import Lattice
from lattices.ngram_search import ARC_SCALE, WEIGHT_SCALE
from lattices.ngrams import SPECIAL_WORDS, UNKNOWN, NgramArrays, NgramModel


def random_model(
    rng: np.random.Generator,
    *,
    order: int,
    words: int,
    density: float = 0.3,
    holes: bool = False,
    coarse: bool = False,
) -> NgramModel:
    """A back-off model over `words` words (special ones included). `holes`: without some suffixes, as pruning leaves.

    `coarse`: scores are few different numbers, so that many paths are equal.
    """
    kept: list[list[tuple[int, ...]]] = [[(w,) for w in range(words)]]
    for n in range(2, order + 1):
        before = {g for g in kept[-1] if g[-1] != 2}
        shorter = set(kept[-1])
        possible = [(*g, w) for g in sorted(before) for w in range(words) if w != 1]
        if not holes:
            possible = [g for g in possible if g[1:] in shorter]
        share = density if n == 2 else min(1.0, density * 1.5)
        kept.append([g for g in possible if rng.random() < share])
    orders = []
    for n, grams in enumerate(kept, start=1):
        array = np.array(grams, dtype=np.int32).reshape(-1, n)
        log10p = -rng.uniform(0, 3, len(array)).astype(np.float32)
        backoff = rng.uniform(-1, 0.2, len(array)).astype(np.float32)
        if coarse:
            log10p, backoff = np.round(log10p), np.round(backoff)
        backoff[rng.random(len(array)) < 0.3] = 0
        if n == order:
            backoff[:] = 0
        orders.append(NgramArrays(array, log10p, backoff))
    vocabulary = (*SPECIAL_WORDS, *(str(i) for i in range(words - 3)))
    return NgramModel(vocabulary, tuple(orders))


def with_holes(model: NgramModel, rng: np.random.Generator, *, share: float) -> NgramModel:
    """The model without a share of the n-grams (2 words or more) that none of the longer ones begins with."""
    orders = list(model.orders)
    for n in range(2, model.order):
        first = {tuple(gram[:n]) for gram in orders[n].words.tolist()}
        grams = orders[n - 1]
        gone = np.array([tuple(gram) not in first for gram in grams.words.tolist()], dtype=bool)
        kept = ~(gone & (rng.random(len(grams)) < share))
        orders[n - 1] = NgramArrays(grams.words[kept], grams.log10p[kept], grams.log10_backoff[kept])
    return NgramModel(model.vocabulary, tuple(orders))


class BackOff:
    """Probability of a word after any context, straight from the definition: the ARPA file's float32 as log10
    probabilities (`score`), or rounded to the automaton's whole numbers (`units`)."""

    def __init__(self, model: NgramModel) -> None:
        self.order = model.order
        self.log10p, self.backoff = {}, {}
        for order in model.orders:
            for gram, p, b in zip(order.words.tolist(), order.log10p, order.log10_backoff, strict=True):
                self.log10p[tuple(gram)], self.backoff[tuple(gram)] = float(p), float(b)
        self._units = {gram: round(p * LN10 * SCORE_SCALE) for gram, p in self.log10p.items()}
        self._backoff_units = {gram: round(b * LN10 * SCORE_SCALE) for gram, b in self.backoff.items()}
        self._known: dict[tuple[int, ...], int] = {}

    def score(self, context: tuple[int, ...], word: int) -> float:
        """log10 p(word | context), the context cut to order - 1 words."""
        return self._score(self._cut(context), word, self.log10p, self.backoff)

    def units(self, context: tuple[int, ...], word: int) -> int:
        """The same in units of 1 / SCORE_SCALE nat."""
        context = self._cut(context)
        if (found := self._known.get((*context, word))) is None:
            found = self._known[(*context, word)] = int(self._score(context, word, self._units, self._backoff_units))
        return found

    def contexts(self, words: int) -> list[tuple[int, ...]]:
        """Every context of order - 1 words or fewer."""
        return [c for n in range(self.order) for c in itertools.product(range(words), repeat=n)]

    def tells_apart(self, context: tuple[int, ...]) -> bool:
        """Whether the first word of a context matters: an n-gram (or a back-off weight) begins with all of it."""
        grams = (gram for gram in self.log10p if len(gram) >= len(context))
        return any(
            gram[: len(context)] == context and (len(gram) > len(context) or self.backoff[gram]) for gram in grams
        )

    def _cut(self, context: tuple[int, ...]) -> tuple[int, ...]:
        return context[max(0, len(context) - self.order + 1) :]

    def _score(self, context, word, probability, backoff):
        gram = (*context, word)
        if gram in probability:
            return probability[gram]
        if not context:
            return probability[(UNKNOWN,)]
        return backoff.get(context, 0) + self._score(context[1:], word, probability, backoff)


def random_lattices(
    rng: np.random.Generator, n: int, h: int, k: int, *, vocab_size: int, coarse: bool = False
) -> Lattice:
    """A batch of lattices `[n, h, k]`; `coarse`: few different log-probs, so that many paths are equal."""
    ids = np.argsort(rng.random((n, h, vocab_size)), axis=-1)[..., :k]
    logps = -rng.choice([0.0, 0.5, 1.0, 2.0], (n, h, k)) if coarse else -rng.exponential(2.0, (n, h, k))
    order = np.lexsort((ids, -logps), axis=-1)
    ids, logps = np.take_along_axis(ids, order, axis=-1), np.take_along_axis(logps, order, axis=-1)
    return Lattice(ids.astype(np.int32), logps.astype(np.float32))


def brute_force(
    model: BackOff,
    lattice: Lattice,
    words: np.ndarray,
    context: tuple[int, ...],
    *,
    weight: float,
    end_token: int | None = None,
) -> list[tuple[int, tuple[int, ...]]]:
    """All paths of one lattice `[h, k]`, slot 1 fixed: (score in units of 1 / ARC_SCALE nat, token ids), best first,
    equals by lowest ids. A path that takes `end_token` goes on with each slot's arg-max and is scored no further."""
    factor = round(weight * WEIGHT_SCALE)
    ids = lattice.token_ids.tolist()
    heads = np.rint(lattice.logps.astype(np.float64) * ARC_SCALE).astype(np.int64).tolist()
    word_of = words.tolist()
    paths: list[tuple[int, tuple[int, ...]]] = []

    def go_on(j: int, context: tuple[int, ...], score: int, path: tuple[int, ...]) -> None:
        if j == lattice.h:
            paths.append((-score, path))
            return
        if path and path[-1] == end_token:
            paths.append((-score, path + tuple(slot[0] for slot in ids[j:])))
            return
        for e in range(lattice.k if j else 1):
            word = word_of[ids[j][e]]
            gained = heads[j][e] + factor * model.units(context, word)
            go_on(j + 1, (*context, word)[-model.order :], score + gained, (*path, ids[j][e]))

    go_on(0, context, 0, ())
    return [(-score, path) for score, path in sorted(paths)]
