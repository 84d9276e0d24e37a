"""The joined lattice: its candidates and their probabilities, the likeliest tree and branches, against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ngram_models import random_model

from lattices.automaton import Automaton
from lattices.joined import candidates as joined
from lattices.joined import outcomes
from lattices.joined.candidates import WEIGHTS, candidates, score
from lattices.joined.likeliest import best_branches, branches, likeliest_nodes
from lattices.joined.lookup import NONE, ROOT, Lookup, advance
from lattices.joined.sources import (
    CORPUS,
    HEADS,
    LOOKUP,
    MODEL,
    TRACED,
    Chains,
    Sources,
    first_match,
    room_for,
    sources_along,
)

VOCABULARY = 7


def sources_of(seed: int, *, text: list[int] | None = None, h: int = 3, k: int = 2, chains: int = 0) -> Sources:
    random = np.random.default_rng(seed)
    ids = np.stack([random.permutation(VOCABULARY)[:k] for _ in range(h)]).astype(np.int32)
    logps = -np.sort(random.exponential(size=(h, k)), axis=1).astype(np.float32)
    lookup = Lookup(random.integers(0, VOCABULARY, 30) if text is None else text)
    automaton = Automaton.compile(random_model(random, order=3, words=VOCABULARY + 3))
    words = np.arange(3, VOCABULARY + 3, dtype=np.int32)  # after the special ones
    q = 1 + seed % 2
    continued = np.stack(
        [[random.permutation(VOCABULARY)[:q] for _ in range(4)] for _ in range(chains)] or [np.zeros((4, q))]
    ).astype(np.int32)[:chains]
    for chain in continued:
        chain[4 - int(random.integers(0, 3)) :] = NONE
    kinds = random.choice([MODEL, CORPUS, TRACED], chains).astype(np.int32)
    given_logps = -np.sort(random.exponential(size=(chains, 4, q)), axis=2).astype(np.float32)
    return Sources(
        ids, logps, lookup.tables, automaton.cells, automaton.roots, words, automaton.start,
        *random.normal(size=(2, VOCABULARY, 4)).astype(np.float32), Chains(continued, given_logps, kinds),
    )  # fmt: skip


def chained_after(sources: Sources, path: list[int]) -> dict[int, set[int]]:
    """By kind, what the chains propose after a path: those that it has followed, else of several entries each."""
    proposed: dict[int, set[int]] = {}
    for kind in {int(kind) for kind in sources.chains.kinds}:
        of_kind = [c for c, its in zip(sources.chains.token_ids, sources.chains.kinds, strict=True) if its == kind]
        here = [c for c in of_kind if len(path) <= len(c) and c[len(path) - 1, 0] != NONE]
        followed = [c for c in here if c[: len(path) - 1, 0].tolist() == path[1:]]
        left = here if sources.chains.token_ids.shape[2] > 1 else []
        proposed[kind] = {int(t) for chain in followed or left for t in chain[len(path) - 1]}
    return proposed


def after(sources: Sources, path: list[int]) -> tuple[dict[int, float], dict[int, int], float]:
    """Log-probability and origins of each candidate after a path, and the log-probability that it is none of them."""
    weights = weights_of(3)
    room = room_for(sources)
    state, length = first_match(sources.lookup, path[0])
    ngram = joined.advance_ngram(sources.cells, sources.roots, sources.ngram_state, sources.words[path[0]])[1]
    following = (1 << len(sources.chains.kinds)) - 1
    for depth, token in enumerate(path[1:], start=1):
        state, length = advance(sources.lookup, state, length, token)
        ngram = joined.advance_ngram(sources.cells, sources.roots, ngram, sources.words[token])[1]
        for chain, run in enumerate(sources.chains.token_ids):
            if depth > len(run) or run[depth - 1, 0] != token:
                following &= ~(1 << chain)
    found = candidates(sources, len(path), path[-1], state, length, ngram, following, room)
    score(weights, found, room)
    tokens = room.token_ids[:found].tolist()
    return (
        dict(zip(tokens, room.logps[:found].tolist(), strict=True)),
        dict(zip(tokens, room.origins[:found].tolist(), strict=True)),
        float(room.logps[found]),
    )


def weights_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.4, WEIGHTS)


@pytest.mark.parametrize("seed", range(20))
def test_candidates_are_those_of_all_sources_and_their_probabilities_sum_to_one(seed: int):
    sources = sources_of(seed, chains=seed % 4)
    text = sources.lookup.tokens[:30].tolist()
    for path in ([1], [2, 3], [4, 0, 5], [1, 2, 3, 4]):
        logps, origins, other = after(sources, path)
        assert np.exp([*logps.values(), other]).sum() == pytest.approx(1.0)
        heads = set(sources.token_ids[len(path)].tolist()) if len(path) < 3 else set()
        assert {t for t, o in origins.items() if o & HEADS} == heads
        followed = {
            text[i + m] for m in range(1, len(path) + 1) for i in range(30 - m) if text[i : i + m] == path[-m:]
        }  # after any suffix of the path; there may be text before it as well
        assert {t for t, o in origins.items() if o & LOOKUP} >= followed
        for kind, chained in chained_after(sources, path).items():
            assert {t for t, o in origins.items() if o & kind} == chained


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(0, VOCABULARY - 1), st.integers(1, 40), st.integers(1, 4), st.integers(0, 2))
def test_the_likeliest_nodes_are_those_of_all_paths(seed: int, first: int, count: int, deepest: int, chains: int):
    sources = sources_of(seed, chains=chains)
    ends = np.array([seed % VOCABULARY], dtype=np.int32)
    every = {(first,): 0.0}
    layer = dict(every)
    for _ in range(deepest - 1):
        layer = {
            (*path, token): logp + more
            for path, logp in layer.items()
            if path[-1] not in ends
            for token, more in after(sources, list(path))[0].items()
        }
        every |= layer
    expected = sorted(every.values(), reverse=True)[:count]
    room = room_for(sources)
    tokens, parents, depths, logps, _ = likeliest_nodes(sources, weights_of(3), first, count, deepest, ends, room)
    assert logps.tolist() == pytest.approx(expected)
    for node in range(len(tokens)):
        path, at = [], node
        while at != NONE:
            path.append(int(tokens[at]))
            assert parents[at] < at
            at = parents[at]
        assert depths[node] == len(path) and every[tuple(reversed(path))] == pytest.approx(logps[node])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 4))
def test_the_best_branches_have_the_highest_expected_length(seed: int, n: int, p: int):
    random = np.random.default_rng(seed)
    parents = np.array([NONE, *(random.integers(0, i) for i in range(1, n))], dtype=np.int32)
    logps = np.zeros(n)
    depths = np.ones(n, dtype=np.int32)
    for node in range(1, n):
        logps[node] = logps[parents[node]] - random.exponential()
        depths[node] = depths[parents[node]] + 1

    def worth(leaves: tuple[int, ...]) -> float:
        stays = set()
        for node in leaves:
            while node != NONE:
                stays.add(node)
                node = int(parents[node])
        return sum(np.exp(logps[node]) for node in stays)

    best = max(worth(leaves) for m in range(1, p + 1) for leaves in itertools.combinations(range(n), min(m, n)))
    stays = best_branches(parents, logps, p)
    assert np.exp(logps[stays]).sum() == pytest.approx(best)
    drafts = branches(np.arange(n, dtype=np.int32), parents, depths, stays)
    assert len(drafts) <= p and {t for t in drafts.ravel().tolist() if t != NONE} == set(np.flatnonzero(stays).tolist())


def test_the_gradient_is_that_of_the_loss():
    sources = sources_of(5, chains=3)
    room = room_for(sources)
    data = outcomes.outcomes_for(6, room)
    prefixes, used = outcomes.features_along(sources, np.array([1, 2, 3, 0, 4, 6], dtype=np.int32), room, data)
    data = outcomes.Outcomes(*(a[:size] for a, size in zip(data, (prefixes, prefixes, used, used, used), strict=True)))
    gradient, _ = np.zeros(WEIGHTS), np.zeros(WEIGHTS)
    weights = weights_of(1)
    loss = outcomes.loss_and_gradient(weights, data, gradient)
    for place in range(WEIGHTS):
        moved = weights.copy()
        moved[place] += 1e-6
        assert (outcomes.loss_and_gradient(moved, data, np.zeros(WEIGHTS)) - loss) / 1e-6 == pytest.approx(
            gradient[place], abs=1e-4
        )


def test_a_text_without_repetition_and_an_empty_one_propose_nothing():
    for text in ([], [1, 2, 3]):
        sources = sources_of(0, text=text)
        _, origins, _ = after(sources, [5])
        assert not any(origin & LOOKUP for origin in origins.values())
        assert first_match(sources.lookup, 5) == (ROOT, 0)


@pytest.mark.parametrize("seed", range(20))
def test_who_proposes_a_path_is_told_token_by_token(seed: int):
    sources = sources_of(seed, chains=seed % 4)
    path = np.random.default_rng(seed).integers(0, VOCABULARY, 6)
    told = sources_along(sources, path.astype(np.int32), room_for(sources))
    assert told[0] == HEADS
    for depth in range(1, 6):
        _, origins, _ = after(sources, path[:depth].tolist())
        assert told[depth] == origins.get(int(path[depth]), 0)
