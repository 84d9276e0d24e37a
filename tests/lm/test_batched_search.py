"""The batched search gives what the compiled one gives, and knows where it may not."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lattices.automaton import LINEAR, SLOTS, Automaton, advance
from lattices.errors import InvalidDataError, RescoreError
from lattices.lattice import Lattice
from lattices.ngram_search import ARC_SCALE, NgramSearch
from lattices.search import p_best
from lm.batched_search import BatchedNgramSearch, BatchedPBest

sys.path.append(str(Path(__file__).parents[1] / "lattices"))
from ngram_models import random_model


class Case:
    """A random model over fewer words than there are tokens (several are unknown), and lattices with many ties."""

    def __init__(self, seed: int, *, order: int | None = None, ties: bool = True, lattices: int = 3) -> None:
        rng = np.random.default_rng(seed)
        self.order = order or int(rng.integers(1, 7))
        size = int(rng.integers(5, 28 if self.order < 3 else 11))
        density = float(rng.uniform(0.1, 0.9) if self.order < 4 else rng.uniform(0.1, 0.3))
        model = random_model(rng, order=self.order, words=size, density=density, holes=bool(rng.random() < 0.5))
        if ties:
            for level in model.orders:
                level.log10p[:] = -np.round(rng.uniform(0, 2, len(level.log10p)))
                level.log10_backoff[:] = np.round(level.log10_backoff)
        self.automaton = Automaton.compile(model)
        tokens = size + 3
        self.words = np.zeros(tokens, dtype=np.int32)
        self.words[:size] = rng.permutation(size)
        h, k = int(rng.integers(1, 6)), int(rng.integers(1, 7))
        self.ids = np.stack([rng.permutation(tokens)[:k] for _ in range(lattices * h)]).astype(np.int32)
        self.ids = self.ids.reshape(lattices, h, k)
        logps = rng.integers(0, 3, self.ids.shape) if ties else 5 * rng.random(self.ids.shape)
        self.logps = -np.sort(logps, axis=-1).astype(np.float32)
        self.contexts = rng.integers(-1, tokens, (lattices, 4))
        self.contexts[np.cumsum(self.contexts[:, ::-1] < 0, axis=1)[:, ::-1] > 0] = -1
        self.end_token = int(rng.integers(tokens)) if rng.random() < 0.4 else None
        self.p, self.weight = int(rng.integers(1, 20)), float(rng.choice([0.0, 0.5, 1.0, 2.3]))
        self.compiled = NgramSearch(self.automaton, self.words, end_token=self.end_token)
        self.states = np.array([self.compiled.state_after(c[c >= 0]) for c in self.contexts], dtype=np.int32)

    def search(self, **options: int) -> BatchedNgramSearch:
        return BatchedNgramSearch(self.automaton, self.words, end_token=self.end_token, **options)

    def batched(self, **options: int) -> BatchedPBest:
        arrays = map(torch.from_numpy, (self.ids, self.logps, self.states))
        return self.search(**options).p_best(*arrays, self.p, weight=self.weight)

    def agrees(self, found: BatchedPBest) -> np.ndarray:
        """Which lattices have the compiled search's drafts and scores; every bound must hold."""
        expected = self.compiled.p_best(Lattice(self.ids, self.logps), self.states, self.p, weight=self.weight)
        assert (found.bound.numpy() >= expected.scores.max(axis=1)).all()
        same = (found.drafts.numpy() == expected.drafts).all(axis=(1, 2))
        return same & (found.scores.numpy() == expected.scores).all(axis=1)


seeds = st.integers(0, 2**32 - 1)


@given(seed=seeds, ties=st.booleans())
@settings(deadline=None, max_examples=150)
def test_equals_the_compiled_search_up_to_order_4(seed: int, ties: bool) -> None:
    case = Case(seed, order=1 + seed % 4, ties=ties)
    found = case.batched()
    assert found.exact.all()
    assert case.agrees(found).all()


@given(seed=seeds, ties=st.booleans(), beam=st.integers(1, 30), depth=st.integers(2, 3))
@settings(deadline=None, max_examples=150)
def test_what_it_calls_exact_is_exact(seed: int, ties: bool, beam: int, depth: int) -> None:
    case = Case(seed, ties=ties)
    found = case.batched(beam=beam, depth=depth)
    assert case.agrees(found)[found.exact.numpy()].all()
    if case.order <= depth + 1:
        assert found.exact.all()


def test_a_narrow_beam_misses_paths_and_says_so() -> None:
    missed = 0
    for seed in range(40):
        case = Case(seed, order=5, ties=False)
        found = case.batched(beam=1, depth=2)
        missed += int((~case.agrees(found)).sum())
    assert missed > 0  # else the tests of `exact` test nothing


def test_a_beam_with_room_for_all_paths_is_exact() -> None:
    for seed in range(20):
        case = Case(seed, order=6)
        found = case.batched(beam=case.ids.shape[2] ** (case.ids.shape[1] - 1))
        assert found.exact.all()
        assert case.agrees(found).all()


@given(seed=seeds)
@settings(deadline=None, max_examples=60)
def test_equals_brute_force(seed: int) -> None:
    case = Case(seed, order=1 + seed % 4, lattices=1)
    case.ids, case.logps = case.ids[:, :4, :4], case.logps[:, :4, :4]
    case.weight, case.end_token = case.weight or 1.0, None
    h, k = case.ids.shape[1:]
    paths = []
    for path in itertools.product([0], *[range(k)] * (h - 1)):
        state, total = int(case.states[0]), 0
        for j, e in enumerate(path):
            score, state = advance(case.automaton.cells, case.automaton.roots, state, case.words[case.ids[0, j, e]])
            total += round(float(case.logps[0, j, e]) * ARC_SCALE) + round(case.weight * (1 << 16)) * int(score)
        paths.append((-total, [int(case.ids[0, j, e]) for j, e in enumerate(path)]))
    best = sorted(paths)[: case.p]
    found = case.batched()
    assert found.drafts[0].tolist() == [ids for _, ids in best]
    assert found.scores[0].tolist() == [-total / ARC_SCALE for total, _ in best]
    assert found.bound.item() == -best[0][0] / ARC_SCALE


def test_chunks_change_nothing() -> None:
    for seed in range(10):
        case = Case(seed, lattices=7)
        whole, single, some = (case.batched(memory=m) for m in (1 << 40, 1, 1 << 17))
        for name in ("drafts", "scores", "bound", "exact"):
            assert torch.equal(getattr(whole, name), getattr(single, name))
            assert torch.equal(getattr(whole, name), getattr(some, name))


def test_large_hash_tables_are_searched() -> None:
    rng = np.random.default_rng(0)
    model = random_model(rng, order=2, words=120, density=0.6)
    automaton = Automaton.compile(model)
    assert automaton.cells[automaton.level_starts[1] :, SLOTS].max() > 8 * LINEAR
    words = np.arange(120, dtype=np.int32)
    ids = np.stack([rng.permutation(120)[:4] for _ in range(40)]).reshape(10, 4, 4).astype(np.int32)
    logps = -np.sort(rng.random(ids.shape), axis=-1).astype(np.float32)
    states = np.zeros(10, dtype=np.int32)
    expected = NgramSearch(automaton, words).p_best(Lattice(ids, logps), states, 9, weight=1.0)
    found = BatchedNgramSearch(automaton, words).p_best(*map(torch.from_numpy, (ids, logps, states)), 9, weight=1.0)
    assert (found.drafts.numpy() == expected.drafts).all()
    assert (found.scores.numpy() == expected.scores).all()


def test_states_after_contexts_are_those_of_the_compiled_search() -> None:
    for seed in range(30):
        case = Case(seed)
        assert case.search().states_after(torch.from_numpy(case.contexts)).tolist() == case.states.tolist()


def test_a_weight_of_zero_gives_the_drafts_without_a_model() -> None:
    for seed in range(10):
        case = Case(seed)
        case.weight = 0.0
        found, expected = case.batched(), p_best(Lattice(case.ids, case.logps), case.p)
        assert (found.drafts.numpy() == expected.drafts).all()
        assert (found.scores.numpy() == expected.scores).all()
        assert found.exact.all()


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_shapes_and_types(weight: float) -> None:
    case = Case(3, order=3, lattices=5)
    case.weight, case.p = weight, 10**6
    n, h, k = case.ids.shape
    for ids in (torch.from_numpy(case.ids), torch.from_numpy(case.ids).long()):
        found = case.search().p_best(
            ids, torch.from_numpy(case.logps), torch.from_numpy(case.states), case.p, weight=weight
        )
        assert found.drafts.shape == (n, k ** (h - 1), h)
        assert found.drafts.dtype == torch.int32
        assert found.scores.shape == (n, k ** (h - 1))
        assert found.scores.dtype == found.bound.dtype == torch.float64
        assert found.bound.shape == found.exact.shape == (n,)
        assert found.exact.dtype == torch.bool
    none = case.search().p_best(
        torch.empty((0, h, k), dtype=torch.int32), torch.empty((0, h, k)), torch.empty(0, dtype=torch.int64), 2,
        weight=weight,
    )  # fmt: skip
    assert none.drafts.shape == (0, 2, h)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same() -> None:
    for seed in range(10):
        case = Case(seed)
        here = case.batched()
        search = BatchedNgramSearch(case.automaton, case.words, device="cuda", end_token=case.end_token)
        arrays = (torch.from_numpy(x).cuda() for x in (case.ids, case.logps, case.states))
        there = search.p_best(*arrays, case.p, weight=case.weight)
        for name in ("drafts", "scores", "bound", "exact"):
            assert getattr(there, name).is_cuda
            assert torch.equal(getattr(here, name), getattr(there, name).cpu())


def test_what_can_not_be_searched_is_refused() -> None:
    case = Case(1)
    ids, logps, states = map(torch.from_numpy, (case.ids, case.logps, case.states))
    search = case.search()
    with pytest.raises(RescoreError, match="asks for no drafts"):
        search.p_best(ids, logps, states, 0, weight=1.0)
    for weight in (-0.1, 65.0, float("nan")):
        with pytest.raises(RescoreError, match="n-gram weight"):
            search.p_best(ids, logps, states, 1, weight=weight)
    for wrong in ((ids[0], logps[0], states), (ids, logps[:1], states), (ids, logps, states[:1])):
        with pytest.raises(InvalidDataError, match="do not belong together"):
            search.p_best(*wrong, 1, weight=1.0)
    for wrong in ((ids + len(case.words), logps, states), (ids, logps, states - 1 - states.max())):
        with pytest.raises(InvalidDataError, match="is outside 0 to"):
            search.p_best(*wrong, 1, weight=1.0)
    for options in ({"beam": 0}, {"depth": 4}):
        with pytest.raises(RescoreError, match="choose"):
            case.search(**options)
