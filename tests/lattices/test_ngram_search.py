"""The p-best search over lattice and n-gram automaton against brute force over all k^(h-1) paths."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import kenlm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ngram_models import BackOff, brute_force, random_lattices, random_model

import lattices.ngram_search
from lattices.automaton import LN10, ROOT, Automaton
from lattices.errors import RescoreError
from lattices.lattice import Lattice
from lattices.ngram_search import ARC_SCALE, LAST_RUN, NgramSearch
from lattices.ngrams import SENTENCE_END, SENTENCE_START, UNKNOWN
from lattices.search import p_best
from lm.arpa import write_arpa

VOCAB = 10  # token ids; those from 6 on are no word of the models
WORDS = 9
END = 5


@functools.cache
def model_of(order: int, holes: bool, coarse: bool, seed: int) -> tuple[BackOff, Automaton]:
    rng = np.random.default_rng([order, holes, coarse, seed])
    density = rng.choice([0.1, 0.3, 0.5])
    model = random_model(rng, order=order, words=WORDS, density=density, holes=holes, coarse=coarse)
    return BackOff(model), Automaton.compile(model)


def contexts_of(rng: np.random.Generator, n: int, search: NgramSearch) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Left contexts as words, some behind `<s>`, and the states they lead to."""
    contexts, states = [], []
    for _ in range(n):
        tokens, start = rng.integers(0, VOCAB, rng.integers(0, 6)), bool(rng.random() < 0.3)
        states.append(search.state_after(tokens, from_start=start))
        contexts.append((SENTENCE_START,) * start + tuple(search.words[tokens].tolist()))
    return contexts, np.array(states)


def assert_found(
    paths: list[tuple[int, tuple[int, ...]]], drafts: np.ndarray, scores: np.ndarray, p: int, *, all_paths: int
) -> None:
    """The p best of all paths; where end-of-text leaves fewer than there are places, the best one again."""
    count = min(p, all_paths)
    expected = paths[:count] + paths[:1] * max(0, count - len(paths))
    assert [tuple(draft) for draft in drafts.tolist()] == [path for _, path in expected]
    assert scores.tolist() == [score / ARC_SCALE for score, _ in expected]


@settings(deadline=None, derandomize=True, max_examples=2000)
@given(
    order=st.integers(1, 5),
    holes=st.booleans(),
    coarse=st.booleans(),
    model_seed=st.integers(0, 3),
    seed=st.integers(0, 1 << 30),
    shape=st.sampled_from([(h, k) for h in range(1, 7) for k in range(1, 7) if k ** (h - 1) <= 1300]),
    p=st.integers(1, 40),
    weight=st.sampled_from([0.1, 0.5, 1.0, 2.5, 64.0]),
    end=st.booleans(),
)
def test_p_best_is_brute_force_with_ties_by_lowest_token_ids(
    order: int,
    holes: bool,
    coarse: bool,
    model_seed: int,
    seed: int,
    shape: tuple[int, int],
    p: int,
    weight: float,
    end: bool,
) -> None:
    definition, automaton = model_of(order, holes, coarse, model_seed)
    rng = np.random.default_rng(seed)
    words = automaton.words_of_tokens(VOCAB)
    end_token = END if end else None
    search = NgramSearch(automaton, words, end_token=end_token)
    lattice = random_lattices(rng, 8, *shape, vocab_size=VOCAB, coarse=coarse)
    contexts, states = contexts_of(rng, len(lattice), search)
    found = search.p_best(lattice, states, p, weight=weight)
    for i, context in enumerate(contexts):
        paths = brute_force(definition, lattice[i], words, context, weight=weight, end_token=end_token)
        assert_found(paths, found.drafts[i], found.scores[i], p, all_paths=shape[1] ** (shape[0] - 1))
