"""p-best with pair scores against all k^(h-1) paths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lattices.errors import RescoreError
from lattices.lattice import Lattice
from lattices.pair_search import pair_p_best
from lattices.search import p_best


def drawn(seed: int, n: int, h: int, k: int, *, coarse: bool) -> tuple[Lattice, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((n, h, k + 5)), axis=-1)[..., :k].astype(np.int32)
    logps = -np.sort(rng.integers(0, 4, (n, h, k)) / 4 if coarse else rng.random((n, h, k)) * 3, axis=-1)
    pairs = rng.integers(-3, 3, (n, h - 1, k, k)) / 4 if coarse else rng.standard_normal((n, h - 1, k, k))
    return Lattice(ids, logps.astype(np.float32)), pairs.astype(np.float64)


@settings(deadline=None, derandomize=True, max_examples=400)
@given(
    seed=st.integers(0, 2**32 - 1),
    h=st.integers(1, 5),
    k=st.integers(1, 4),
    p=st.sampled_from([1, 2, 3, 16, 64, 300]),
    coarse=st.booleans(),
)
def test_the_best_of_all_paths_ties_by_lowest_ids(seed, h, k, p, coarse):
    lattice, pairs = drawn(seed, 2, h, k, coarse=coarse)
    found = pair_p_best(lattice, pairs, p, weight=0.5)
    for i in range(2):
        every = []
        for path in itertools.product(range(k), repeat=h - 1):
            places = (0, *path)
            score = sum(float(lattice.logps[i, j, a]) for j, a in enumerate(places))
            score += 0.5 * sum(pairs[i, j, a, b] for j, (a, b) in enumerate(itertools.pairwise(places)))
            every.append(
                (
                    -round(score, 9) if coarse else -score,
                    [int(lattice.token_ids[i, j, a]) for j, a in enumerate(places)],
                )
            )
        every.sort()
        assert found.drafts[i].tolist() == [ids for _, ids in every[:p]]
        assert found.scores[i] == pytest.approx([-score for score, _ in every[:p]], abs=1e-5)


def test_weight_0_is_the_unrescored_lattice():
    lattice, pairs = drawn(1, 6, 5, 4, coarse=True)
    for p in (1, 16):
        assert (pair_p_best(lattice, pairs, p, weight=0.0).drafts == p_best(lattice, p).drafts).all()


def test_no_drafts():
    lattice, pairs = drawn(1, 1, 3, 2, coarse=False)
    with pytest.raises(RescoreError, match="p = 0"):
        pair_p_best(lattice, pairs, 0, weight=1.0)
