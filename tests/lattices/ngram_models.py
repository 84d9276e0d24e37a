"""Random n-gram models and the definitions that automaton and search are compared with, by plain recursion."""

from __future__ import annotations

import itertools

import numpy as np

from lattices.ngrams import SPECIAL_WORDS, NgramArrays, NgramModel


def random_model(rng: np.random.Generator, *, order: int, words: int, density: float = 0.3, holes: bool = False):
    """A back-off model over `words` words (special ones included). `holes`: without some suffixes, as pruning leaves."""
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
        backoff[rng.random(len(array)) < 0.3] = 0
        if n == order:
            backoff[:] = 0
        orders.append(NgramArrays(array, log10p, backoff))
    vocabulary = (*SPECIAL_WORDS, *(str(i) for i in range(words - 3)))
    return NgramModel(vocabulary, tuple(orders))


class BackOff:
    """log10 probability of a word after any context, straight from the definition."""

    def __init__(self, model: NgramModel) -> None:
        self.order = model.order
        self.log10p, self.backoff = {}, {}
        for order in model.orders:
            for gram, p, b in zip(order.words.tolist(), order.log10p, order.log10_backoff, strict=True):
                self.log10p[tuple(gram)], self.backoff[tuple(gram)] = float(p), float(b)

    def score(self, context: tuple[int, ...], word: int) -> float:
        """log10 p(word | context), the context cut to order - 1 words."""
        context = context[max(0, len(context) - self.order + 1) :]
        gram = (*context, word)
        if gram in self.log10p:
            return self.log10p[gram]
        if not context:
            return self.log10p[(0,)]
        return self.backoff.get(context, 0.0) + self.score(context[1:], word)


def all_paths(h: int, k: int) -> list[tuple[int, ...]]:
    """Every choice of entries, slot 1 fixed."""
    return [(0, *rest) for rest in itertools.product(range(k), repeat=h - 1)]
