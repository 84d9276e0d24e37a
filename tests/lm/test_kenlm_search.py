"""The search through KenLM gives what the automaton's gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lattices.automaton import Automaton
from lattices.lattice import Lattice
from lattices.ngram_search import NgramSearch
from lattices.ngrams import SENTENCE_END, SPECIAL_WORDS, NgramArrays, NgramModel
from lattices.search import p_best
from lm.ngram.arpa import write_arpa
from lm.ngram.kenlm import KenlmModel, KenlmSearch

TOKENS = 12
END = 11  # the base's end-of-text


def trigrams(seed: int) -> NgramModel:
    """Random trigrams over eight of the tokens."""
    rng = np.random.default_rng(seed)
    vocabulary = (*SPECIAL_WORDS, *map(str, range(8)))
    orders = []
    grams = [(w,) for w in range(len(vocabulary))]
    for n in range(1, 4):
        if n > 1:
            below = set(grams)
            grams = [
                (*g, w) for g in grams if g[-1] != SENTENCE_END for w in range(2, 11)
                if (*g, w)[1:] in below and rng.random() < 0.6
            ]  # fmt: skip
        backoff = -rng.uniform(0, 1, len(grams)) if n < 3 else np.zeros(len(grams))
        orders.append(
            NgramArrays(
                np.array(grams, dtype=np.int32).reshape(-1, n), -rng.uniform(0.1, 2, len(grams)).astype(np.float32),
                backoff.astype(np.float32),
            )
        )  # fmt: skip
    return NgramModel(vocabulary, tuple(orders))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("p", [1, 5, 200])
@pytest.mark.parametrize("end_token", [None, END])
def test_paths_and_scores_are_the_automatons(tmp_path: Path, seed: int, p: int, end_token: int | None):
    model = trigrams(seed)
    write_arpa(model, tmp_path / "model.arpa")
    rng = np.random.default_rng(seed)
    token_ids = np.stack([[rng.permutation(TOKENS)[:5] for _ in range(4)] for _ in range(3)]).astype(np.int32)
    lattices = Lattice(token_ids, -np.sort(rng.uniform(0, 3, (3, 4, 5)), axis=-1).astype(np.float32))
    lefts = [[], [3], [1, 2, 3, 4]]
    automaton = Automaton.compile(model)
    words = automaton.words_of_tokens(TOKENS)
    words[END] = SENTENCE_END
    kenlm = KenlmSearch(KenlmModel.load(tmp_path / "model.arpa"), [END], end_token=end_token)
    ours = NgramSearch(automaton, words, end_token=end_token).p_best_after(lattices, lefts, p, weight=0.8)
    theirs = kenlm.p_best_after(lattices, lefts, p, weight=0.8)
    np.testing.assert_allclose(theirs.scores, ours.scores, atol=1e-4)
    apart = np.abs(np.diff(ours.scores, axis=1, prepend=np.inf, append=-np.inf)) > 1e-3
    clear = apart[:, 1:] & apart[:, :-1]  # no rounding turns these around
    np.testing.assert_array_equal(theirs.drafts[clear], ours.drafts[clear])
    assert clear.any()


def test_weight_zero_and_coverage(tmp_path: Path):
    write_arpa(trigrams(0), tmp_path / "model.arpa")
    search = KenlmSearch(KenlmModel.load(tmp_path / "model.arpa"), [END])
    lattice = Lattice(np.array([[[0, 9], [11, 3]]], dtype=np.int32), -np.array([[[1, 2], [1, 2]]], dtype=np.float32))
    assert search.p_best_after(lattice, [[]], 2, weight=0.0).drafts.tolist() == p_best(lattice, 2).drafts.tolist()
    assert search.coverage(lattice.token_ids) == 0.75


def test_what_follows_end_of_text_is_the_arg_max_and_is_not_scored(tmp_path: Path):
    write_arpa(trigrams(0), tmp_path / "model.arpa")
    search = KenlmSearch(KenlmModel.load(tmp_path / "model.arpa"), [END], end_token=END)
    ids = np.array([[[0, 1], [END, 2], [3, 1], [4, 1]]], dtype=np.int32)
    logps = np.array([[[-0.1, -5], [-0.1, -5], [-40, -50], [-40, -50]]], dtype=np.float32)
    found = search.p_best_after(Lattice(ids, logps), [[]], 8, weight=0.5)
    assert found.drafts[0, 0].tolist() == [0, END, 3, 4]
    # One way ends at once, four go on: the best draft stands in the places that are left.
    assert len(np.unique(found.drafts[0], axis=0)) == 5
    assert (found.drafts[0, 5:] == found.drafts[0, 0]).all()
    at_once = Lattice(np.array([[[END, 1], [2, 3]]], dtype=np.int32), np.full((1, 2, 2), -1, np.float32))
    assert search.p_best_after(at_once, [[]], 2, weight=0.5).drafts.tolist() == [[[END, 2]] * 2]
