"""Mixtures of n-gram models: the weighted sum where an n-gram is held, proper distributions everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from lattices.automaton import Automaton
from lattices.errors import RescoreError
from lattices.ngrams import SPECIAL_WORDS, NgramArrays, NgramModel
from lm.ngram.mix import Mixture, mix


def normalised_model(seed: int, words: tuple[str, ...], order: int) -> NgramModel:
    """Random proper back-off model: interpolation of random counts at every order."""
    rng = np.random.default_rng(seed)
    vocabulary = (*SPECIAL_WORDS, *words)
    v = len(vocabulary)
    text = [1, *rng.integers(3, v, 60).tolist(), 2]
    levels, lower = [], {}
    for n in range(1, order + 1):
        grams = sorted({tuple(text[i : i + n]) for i in range(len(text) - n + 1)})
        if n == 1:
            grams = [(i,) for i in range(v)]
            p = {g: (0.0 if g == (1,) else 1 / (v - 1)) for g in grams}
        else:
            p = {}
            for context in sorted({g[:-1] for g in grams}):
                followers = [g for g in grams if g[:-1] == context]
                p |= {g: 0.5 / len(followers) + 0.5 * lower[g[1:]] for g in followers}
        backoff = {}
        for context in {g[:-1] for g in grams} if n > 1 else ():
            followers = [g for g in grams if g[:-1] == context]
            left = 1 - sum(p[g] for g in followers)
            rest = 1 - sum(lower[g[1:]] for g in followers)
            backoff[context] = np.log10(max(left, 1e-9) / max(rest, 1e-9))
        if n > 1:
            words_below = levels[-1].words.tolist()
            levels[-1] = NgramArrays(
                levels[-1].words, levels[-1].log10p,
                np.array([backoff.get(tuple(g), 0.0) for g in words_below], dtype=np.float32),
            )  # fmt: skip
        log10p = np.array([np.log10(p[g]) if p[g] else 0.0 for g in grams], dtype=np.float32)
        levels.append(NgramArrays(np.array(grams, dtype=np.int32), log10p, np.zeros(len(grams), np.float32)))
        lower = p
    return NgramModel(vocabulary, tuple(levels))


def probability(model: NgramModel, context: list[str], word: str) -> float:
    automaton = Automaton.compile(model)
    ids = {w: i for i, w in enumerate(model.vocabulary)}
    if word not in ids:
        return 0.0
    return 10 ** automaton.advance(automaton.state_after([ids.get(w, 0) for w in context]), ids[word])[0]


@pytest.mark.parametrize("orders", [(3, 3), (2, 3), (3, 1)])
def test_contexts_sum_to_one_and_held_ngrams_are_the_weighted_sum(orders):
    first = normalised_model(0, ("a", "b", "c", "d"), orders[0])
    second = normalised_model(1, ("c", "d", "e"), orders[1])
    mixed = mix([first, second], [3.0, 1.0])
    assert mixed.order == max(orders) and set(mixed.vocabulary) == {*SPECIAL_WORDS, *"abcde"}
    for order in mixed.orders:
        for gram in order.words[::5]:
            *context, word = (mixed.vocabulary[i] for i in gram)
            if word != "<s>":
                expected = 0.75 * probability(first, context, word) + 0.25 * probability(second, context, word)
                assert probability(mixed, context, word) == pytest.approx(expected, rel=1e-4)
    for context in ([], ["a"], ["c", "d"], ["e"], ["b", "e"], ["<s>"]):
        total = sum(probability(mixed, context, word) for word in mixed.vocabulary if word != "<s>")
        assert total == pytest.approx(1.0, abs=1e-3)


def test_a_model_mixed_with_itself_is_itself():
    model = normalised_model(2, ("a", "b", "c"), 3)
    mixed = mix([model, model], [1, 2])
    assert mixed.vocabulary == model.vocabulary
    for ours, theirs in zip(mixed.orders, model.orders, strict=True):
        np.testing.assert_array_equal(ours.words, theirs.words)
        np.testing.assert_allclose(ours.log10p, theirs.log10p, atol=1e-5)
        held = theirs.log10_backoff > -5  # a context that leaves nothing has no back-off to compare
        np.testing.assert_allclose(ours.log10_backoff[held], theirs.log10_backoff[held], atol=1e-3)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")]])
def test_weights_that_make_no_sense_are_refused(weights):
    model = normalised_model(2, ("a",), 2)
    with pytest.raises(RescoreError, match="weights"):
        mix([model, model], weights)


def test_one_look_up_serves_all_weights():
    models = [normalised_model(0, ("a", "b", "c"), 3), normalised_model(1, ("b", "d"), 2)]
    mixture = Mixture(models)
    for weights in ((0.1, 0.9), (0.5, 0.5), (8, 2)):
        ours, alone = mixture.at(weights), mix(models, weights)
        assert ours.vocabulary == alone.vocabulary
        for a, b in zip(ours.orders, alone.orders, strict=True):
            np.testing.assert_array_equal(a.log10p, b.log10p)
            np.testing.assert_array_equal(a.log10_backoff, b.log10_backoff)


def test_one_model_is_no_mixture():
    with pytest.raises(RescoreError, match="two n-gram models or more"):
        mix([normalised_model(2, ("a",), 2)], [1.0])
