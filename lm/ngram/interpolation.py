"""Interpolates n-gram models into one: p(w | h) = sum of weight x p of each, for every n-gram that any of them holds.

Back-off weights are set so that every context sums to one again (as SRILM's static interpolation does), so the mixture
is an ordinary back-off model: one ARPA file, one automaton, the same exact search.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from lattices.automaton import LN10, ROOT, SCORE_SCALE, Automaton
from lattices.errors import RescoreError
from lattices.ngrams import SENTENCE_START, SPECIAL_WORDS, UNKNOWN, NgramArrays, NgramModel

LEAST = 1e-99  # of a probability, as ARPA files have it


def mix(models: Sequence[NgramModel], weights: Sequence[float]) -> NgramModel:
    """The mixture of models with these weights (each above 0; they are scaled to sum to one).

    A word that a model does not know has probability 0 there. Raises `RescoreError` for weights that make no sense.
    """
    check_weights(weights, len(models))
    return Mixture(models).at(weights)


def check_weights(weights: Sequence[float], models: int) -> None:
    """Raises `RescoreError` unless there is a weight above 0 for each of so many models, two or more."""
    if models < 2:
        raise RescoreError("a mixture is made of two n-gram models or more")
    if models != len(weights):
        raise RescoreError(f"{len(weights)} weights for {models} n-gram models; give one for each")
    if min(weights) <= 0 or not np.isfinite(sum(weights)):
        raise RescoreError("the weights of a mixture must be numbers above 0")


class Mixture:
    """The probabilities that models give to every n-gram of any of them: looked up once, mixed by any weights."""

    def __init__(self, models: Sequence[NgramModel]) -> None:
        place = {word: i for i, word in enumerate(SPECIAL_WORDS)}
        for model in models:
            for word in model.vocabulary:
                place.setdefault(word, len(place))
        self._vocabulary = tuple(place)
        ids = [np.array([place[w] for w in m.vocabulary], dtype=np.int32) for m in models]
        self._levels = _all_ngrams(models, ids)  # by order, int32 [n-grams, order]
        self._probabilities = [self._look_up(model) for model in models]  # of each model, by order, [n-grams]
        self._below = [
            (_places(words, longer[:, :-1]), _places(words, longer[:, 1:]))  # context and suffix of the longer ones
            for words, longer in pairwise(self._levels)
        ]

    def _look_up(self, model: NgramModel) -> list[np.ndarray]:
        own = {word: i for i, word in enumerate(model.vocabulary)}
        word_of = np.array([own.get(word, UNKNOWN) for word in self._vocabulary], dtype=np.int32)
        known = np.array([word in own for word in self._vocabulary])
        automaton = Automaton.compile(model)
        found = []
        for words in self._levels:
            states = np.full(len(words), ROOT, dtype=np.int32)
            for column in words[:, :-1].T:
                states = automaton.advance_many(states, word_of[column])[1]
            scores, _ = automaton.advance_many(states, word_of[words[:, -1]])
            found.append(np.where(known[words[:, -1]], np.exp(scores / SCORE_SCALE), 0.0))
        return found

    def at(self, weights: Sequence[float]) -> NgramModel:
        """The mixture with these weights; see `mix`."""
        check_weights(weights, len(self._probabilities))
        shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        mixed = [
            sum((share * p for share, p in zip(shares, of_models, strict=True)), np.zeros(1))
            for of_models in zip(*self._probabilities, strict=True)
        ]
        orders = []
        for n, (words, p) in enumerate(zip(self._levels, mixed, strict=True)):
            backoff = np.zeros(len(words))
            if n < len(self._below):
                context, suffix = self._below[n]
                left = 1.0 - np.bincount(context, mixed[n + 1], minlength=len(words))
                lower = 1.0 - np.bincount(context, p[suffix], minlength=len(words))
                extended = np.bincount(context, minlength=len(words)) > 0
                ratio = np.clip(left, LEAST, None) / np.clip(lower, LEAST, None)
                backoff = np.where(extended, np.log(np.clip(ratio, LEAST, 1 / LEAST)) / LN10, 0.0)
            log10p = np.log(np.clip(p, LEAST, 1.0)) / LN10
            if n == 0:
                log10p[words[:, 0] == SENTENCE_START] = 0.0  # never predicted; lmplz writes 0
            orders.append(NgramArrays(words, log10p.astype(np.float32), backoff.astype(np.float32)))
        return NgramModel(self._vocabulary, tuple(orders))


def _all_ngrams(models: Sequence[NgramModel], ids: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The n-grams of all models by order, sorted, with the prefixes and suffixes of the longer ones among them."""
    order = max(model.order for model in models)
    levels = [np.zeros((0, n + 1), dtype=np.int32) for n in range(order)]
    for n in range(order - 1, -1, -1):
        parts = [i[m.orders[n].words] for m, i in zip(models, ids, strict=True) if n < m.order]
        if n + 1 < order:
            parts += [levels[n + 1][:, :-1], levels[n + 1][:, 1:]]
        levels[n] = np.unique(np.concatenate(parts), axis=0).astype(np.int32)
    return levels


def _places(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The place of each wanted row in sorted rows that hold it."""
    both, inverse = np.unique(np.concatenate([rows, wanted]), axis=0, return_inverse=True)
    assert len(both) == len(rows), "every prefix and suffix is there"
    return np.asarray(inverse.ravel()[len(rows) :])
