"""The n-grams of a context and the beam search with them, against plain definitions."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ngram_models import random_model

from lattices.automaton import ROOT, Automaton
from lattices.context_search import CONTEXT_ORDER, ContextCounts, context_p_best
from lattices.errors import RescoreError
from lattices.lattice import Lattice
from lattices.ngram_search import NgramSearch
from lattices.search import p_best

WORDS = 7


def witten_bell(tokens: list[int], history: list[int], token: int) -> float:
    """P(token | history) from the tokens, straight from the definition."""
    likely = Counter(tokens)[token] / len(tokens)
    for n in range(1, min(CONTEXT_ORDER - 1, len(history)) + 1):
        behind = [tokens[i + n] for i in range(len(tokens) - n) if tokens[i : i + n] == history[len(history) - n :]]
        if not behind:
            break
        types = len(set(behind))
        likely = (behind.count(token) + types * likely) / (len(behind) + types)
    return likely


def random_lattice(rng: np.random.Generator, h: int, k: int) -> Lattice:
    ids = np.stack([rng.permutation(WORDS)[:k] for _ in range(h)]).astype(np.int32)[None]
    return Lattice(ids, -np.sort(rng.uniform(0, 4, (1, h, k)), axis=-1).astype(np.float32))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(seed=st.integers(0, 10**6), general=st.booleans(), steps=st.integers(1, 4))
def test_the_best_paths_of_a_small_lattice_are_found(seed: int, general: bool, steps: int):
    """With no more paths than the beam is wide, the beam is exact."""
    rng = np.random.default_rng(seed)
    h, k = int(rng.integers(2, 4)), int(rng.integers(1, 5))
    tokens = rng.integers(0, WORDS, int(rng.integers(1, 30))).tolist()
    counts = ContextCounts()
    for part in np.array_split(tokens, steps):  # counting on gives what counting at once gives
        counts.extend(part.tolist())
    automaton = Automaton.compile(random_model(rng, order=3, words=WORDS)) if general else None
    search = NgramSearch(automaton, np.arange(WORDS, dtype=np.int32)) if automaton else None
    state = search.state_after(tokens) if search else ROOT
    lattice = random_lattice(rng, h, k)
    weight, share, p = 0.7, float(rng.choice([0.0, 0.4, 1.0])), int(rng.integers(1, 9))
    found = context_p_best(lattice, search, [tokens], [counts], p, weight=weight, share=share)

    paths = []
    for entries in itertools.product(range(k), repeat=h - 1):
        path = [int(lattice.token_ids[0, j, e]) for j, e in enumerate((0, *entries))]
        total = float(lattice.logps[0, 0, 0])
        now = automaton.advance(state, path[0])[1] if automaton else ROOT
        for j in range(1, h):
            likely = 1 / 50_000
            if automaton:
                log10p, now = automaton.advance(now, path[j])
                likely = 10**log10p
            mixed = (1 - share) * likely + share * witten_bell(tokens, tokens + path[:j], path[j])
            total += float(lattice.logps[0, j, entries[j - 1]]) + weight * math.log(max(mixed, 1e-30))
        paths.append((total, path))
    paths.sort(key=lambda pair: -pair[0])
    assert found.drafts.shape == (1, min(p, k ** (h - 1)), h)
    for place, draft in enumerate(found.drafts[0].tolist()):
        assert found.scores[0, place] == pytest.approx(paths[place][0], abs=1e-4)
        assert any(path == draft and total == pytest.approx(paths[place][0], abs=1e-4) for total, path in paths)


def test_a_long_context_grows_the_table():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 500, 5000).tolist()
    counts = ContextCounts()
    for start in range(0, len(tokens), 37):
        counts.extend(tokens[start : start + 37])
    whole = ContextCounts()
    whole.extend(tokens)
    rows = [sorted(map(tuple, c.table[c.table[:, 0] != 0].tolist())) for c in (counts, whole)]
    assert rows[0] == rows[1] and counts.used == len(rows[0]) < len(counts.table) / 2


def test_weight_zero_gives_the_unrescored_drafts():
    lattice = random_lattice(np.random.default_rng(1), 4, 4)
    found = context_p_best(lattice, None, [[]], [ContextCounts()], 16, weight=0.0, share=0.5)
    assert found.drafts.tolist() == p_best(lattice, 16).drafts.tolist()


def test_a_context_that_says_nothing_changes_nothing():
    lattice = random_lattice(np.random.default_rng(2), 4, 4)
    found = context_p_best(lattice, None, [[]], [ContextCounts()], 4, weight=1.0, share=0.5)
    assert found.drafts.tolist() == p_best(lattice, 4).drafts.tolist()


def test_what_makes_no_sense_is_refused():
    lattice = random_lattice(np.random.default_rng(3), 2, 2)
    for changed in ({"share": 1.5}, {"share": -0.1}, {"p": 0}):
        request = {"p": 1, "share": 0.5, **changed}
        with pytest.raises(RescoreError):
            context_p_best(lattice, None, [[]], [ContextCounts()], request["p"], weight=1.0, share=request["share"])
