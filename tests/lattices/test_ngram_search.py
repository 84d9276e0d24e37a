"""The p-best search over lattice and n-gram automaton against brute force over all k^(h-1) paths."""

from __future__ import annotations

import functools
from pathlib import Path

import kenlm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ngram_models import BackOff, brute_force, random_lattices, random_model

from lattices import ngram_search
from lattices.automaton import LINEAR, LN10, ROOT, SLOTS, Automaton
from lattices.errors import RescoreError
from lattices.lattice import Lattice
from lattices.ngram_search import ARC_SCALE, LAST_RUN, MAX_WEIGHT, NgramSearch
from lattices.ngrams import MAX_ORDER, SENTENCE_END, SENTENCE_START, UNKNOWN
from lattices.search import p_best
from lm.ngram.arpa import read_arpa, write_arpa

REFERENCE = Path(__file__).parents[1] / "lm" / "reference"
WORDS, VOCAB = 9, 10  # token ids from 6 on are no words of the models
MANY_WORDS, LARGE_VOCAB = 24, 26
END = 5
SHAPES = [(h, k) for h in range(1, 7) for k in range(1, 7)]
SMALL_SHAPES = [(h, k) for h, k in SHAPES if k ** (h - 1) <= 1300]


@functools.cache
def model_of(order: int, *, holes: bool = False, coarse: bool = False, seed: int = 0) -> tuple[BackOff, Automaton]:
    rng = np.random.default_rng([order, holes, coarse, seed])
    density = rng.choice([0.1, 0.3, 0.5])
    model = random_model(rng, order=order, words=WORDS, density=density, holes=holes, coarse=coarse)
    return BackOff(model), Automaton.compile(model)


@functools.cache
def model_with_tables(order: int, *, coarse: bool = False) -> tuple[BackOff, Automaton]:
    """Most states have more arcs than `LINEAR`, so they are hash tables."""
    model = random_model(np.random.default_rng(order), order=order, words=MANY_WORDS, density=0.6, coarse=coarse)
    return BackOff(model), Automaton.compile(model)


def random_contexts(
    rng: np.random.Generator, n: int, search: NgramSearch, vocab_size: int = VOCAB
) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Left contexts as words, some behind `<s>`, and the states they lead to."""
    contexts, states = [], []
    for _ in range(n):
        tokens, start = rng.integers(0, vocab_size, rng.integers(0, 6)), bool(rng.random() < 0.3)
        states.append(search.state_after(tokens, from_start=start))
        contexts.append((SENTENCE_START,) * start + tuple(search.words[tokens].tolist()))
    return contexts, np.array(states)


def assert_best(paths: list[tuple[int, tuple[int, ...]]], drafts: np.ndarray, scores: np.ndarray) -> None:
    """The best of all paths; where end-of-text leaves fewer than there are places, the best one again."""
    expected = paths[: len(scores)] + paths[:1] * max(0, len(scores) - len(paths))
    assert [tuple(draft) for draft in drafts.tolist()] == [path for _, path in expected]
    assert scores.tolist() == [score / ARC_SCALE for score, _ in expected]


def assert_is_brute_force(
    definition: BackOff,
    search: NgramSearch,
    lattice: Lattice,
    p: int,
    *,
    weight: float,
    rng: np.random.Generator,
    vocab_size: int = VOCAB,
) -> None:
    contexts, states = random_contexts(rng, len(lattice), search, vocab_size)
    found = search.p_best(lattice, states, p, weight=weight)
    assert found.drafts.shape == (len(lattice), min(p, lattice.k ** (lattice.h - 1)), lattice.h)
    assert found.drafts.dtype == np.int32
    assert found.scores.dtype == np.float64
    for i, context in enumerate(contexts):
        end_token = search.end_token
        paths = brute_force(definition, lattice[i], search.words, context, weight=weight, end_token=end_token)
        assert_best(paths, found.drafts[i], found.scores[i])


@settings(deadline=None, derandomize=True, max_examples=700)
@given(
    order=st.integers(1, MAX_ORDER),
    holes=st.booleans(),
    coarse=st.booleans(),
    model_seed=st.integers(0, 3),
    seed=st.integers(0, 1 << 30),
    shape=st.sampled_from(SMALL_SHAPES),
    p=st.integers(1, 40),
    weight=st.sampled_from([0.1, 0.5, 1.0, 2.5, MAX_WEIGHT]),
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
    definition, automaton = model_of(order, holes=holes, coarse=coarse, seed=model_seed)
    rng = np.random.default_rng(seed)
    search = NgramSearch(automaton, automaton.words_of_tokens(VOCAB), end_token=END if end else None)
    lattice = random_lattices(rng, 5, *shape, vocab_size=VOCAB, coarse=coarse)
    assert_is_brute_force(definition, search, lattice, p, weight=weight, rng=rng)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    order=st.integers(2, 3),
    coarse=st.booleans(),
    seed=st.integers(0, 1 << 30),
    shape=st.sampled_from([(2, 2), (3, 2), (6, 2), (4, 5), (3, 16), (4, 10)]),
    p=st.integers(1, 40),
)
def test_p_best_is_brute_force_where_states_are_hash_tables(
    order: int, coarse: bool, seed: int, shape: tuple[int, int], p: int
) -> None:
    definition, automaton = model_with_tables(order, coarse=coarse)
    assert automaton.cells[automaton.roots[5, 0], SLOTS] > LINEAR
    rng = np.random.default_rng(seed)
    search = NgramSearch(automaton, automaton.words_of_tokens(LARGE_VOCAB))
    lattice = random_lattices(rng, 5, *shape, vocab_size=LARGE_VOCAB, coarse=coarse)
    assert_is_brute_force(definition, search, lattice, p, weight=1.0, rng=rng, vocab_size=LARGE_VOCAB)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in SMALL_SHAPES])
@pytest.mark.parametrize("end_token", [None, END])
def test_p_best_is_brute_force_over_thousands_of_paths(shape: tuple[int, int], end_token: int | None) -> None:
    rng = np.random.default_rng(shape)
    for order in (2, 4, MAX_ORDER):
        definition, automaton = model_of(order, holes=True, coarse=True)
        search = NgramSearch(automaton, automaton.words_of_tokens(VOCAB), end_token=end_token)
        lattice = random_lattices(rng, 2, *shape, vocab_size=VOCAB, coarse=True)
        assert_is_brute_force(definition, search, lattice, 40, weight=0.5, rng=rng)


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_may_be_one_word(seed: int) -> None:
    # Several tokens of a slot are <unk>, others are <s> or </s>, or the same word.
    definition, automaton = model_of(3, coarse=True, seed=seed % 4)
    rng = np.random.default_rng(seed)
    words = rng.choice([UNKNOWN, SENTENCE_START, SENTENCE_END, 3, 4], VOCAB).astype(np.int32)
    search = NgramSearch(automaton, words, end_token=END if seed % 2 else None)
    lattice = random_lattices(rng, 20, 4, 5, vocab_size=VOCAB, coarse=True)
    assert_is_brute_force(definition, search, lattice, 20, weight=1.0, rng=rng)


def test_where_all_paths_are_equal_the_lowest_ids_come_first() -> None:
    automaton = Automaton.compile(random_model(np.random.default_rng(0), order=1, words=3))
    search = NgramSearch(automaton, np.zeros(16, dtype=np.int32))  # every token is <unk>
    lattice = Lattice.from_logits(np.zeros((1, 9, 16)), 16)
    drafts = search.p_best(lattice, np.array([ROOT]), 18, weight=1.0).drafts[0]
    assert drafts.tolist() == [[0] * 7 + [i // 16, i % 16] for i in range(18)]


def test_what_follows_end_of_text_is_the_arg_max_and_is_not_scored() -> None:
    automaton = Automaton.compile(random_model(np.random.default_rng(0), order=2, words=WORDS))
    search = NgramSearch(automaton, automaton.words_of_tokens(VOCAB), end_token=END)
    ids = np.array([[[0, 1], [END, 2], [3, 1], [4, 1]]], dtype=np.int32)
    logps = np.array([[[-0.1, -5], [-0.1, -5], [-40, -50], [-40, -50]]], dtype=np.float32)
    state = search.state_after([])
    found = search.p_best(Lattice(ids, logps), np.array([state]), 8, weight=0.5)
    assert found.drafts[0, 0].tolist() == [0, END, 3, 4]
    words = search.words[[0, END]].tolist()
    log10p, after = automaton.advance(ROOT, words[0])
    total = log10p + automaton.advance(after, words[1])[0]
    assert found.scores[0, 0] == pytest.approx(-0.2 + 0.5 * LN10 * total)
    # One way ends at once, four go on: the best draft stands in the places that are left.
    assert len(np.unique(found.drafts[0], axis=0)) == 5
    assert (found.drafts[0, 5:] == found.drafts[0, 0]).all()
    assert (found.scores[0, 5:] == found.scores[0, 0]).all()


def test_a_block_that_begins_with_end_of_text_is_one_draft() -> None:
    automaton = model_of(3)[1]
    search = NgramSearch(automaton, automaton.words_of_tokens(VOCAB), end_token=END)
    ids = np.array([[[END, 1], [2, 3], [4, 1]]], dtype=np.int32)
    found = search.p_best(Lattice(ids, np.full((1, 3, 2), -1, np.float32)), np.array([ROOT]), 3, weight=1.0)
    assert found.drafts.tolist() == [[[END, 2, 4]] * 3]
    expected = -1 + LN10 * automaton.advance(ROOT, int(search.words[END]))[0]
    assert found.scores[0] == pytest.approx([expected] * 3)


@pytest.mark.parametrize("p", [1, 16])
@pytest.mark.parametrize("end_token", [None, END])
def test_a_weight_of_0_gives_the_drafts_of_the_heads_bit_for_bit(p: int, end_token: int | None) -> None:
    automaton = model_of(4)[1]
    search = NgramSearch(automaton, automaton.words_of_tokens(VOCAB), end_token=end_token)
    rng = np.random.default_rng(p)
    for coarse in (False, True):
        lattice = random_lattices(rng, 50, 6, 6, vocab_size=VOCAB, coarse=coarse)
        found = search.p_best(lattice, random_contexts(rng, 50, search)[1], p, weight=0.0)
        expected = p_best(lattice, p)
        np.testing.assert_array_equal(found.drafts, expected.drafts)
        np.testing.assert_array_equal(found.scores, expected.scores)


@pytest.mark.parametrize("p", [1, 16, 256])
def test_a_room_that_is_too_small_grows(p: int, monkeypatch: pytest.MonkeyPatch) -> None:
    automaton = model_of(5)[1]
    words = automaton.words_of_tokens(VOCAB)
    rng = np.random.default_rng(p)
    lattice = random_lattices(rng, 20, 6, 6, vocab_size=VOCAB)
    large = NgramSearch(automaton, words, end_token=END)
    states = random_contexts(rng, 20, large)[1]
    expected = large.p_best(lattice, states, p, weight=1.0)
    for rows in (1, 2, 4, 32, 64, 256):
        monkeypatch.setattr(ngram_search, "FIRST_ROWS", rows)
        small = NgramSearch(automaton, words, end_token=END)
        found = small.p_best(lattice, states, p, weight=1.0)
        np.testing.assert_array_equal(found.drafts, expected.drafts)
        np.testing.assert_array_equal(found.scores, expected.scores)
        assert small._room is not None
        assert len(small._room.row64) >= 64


def test_one_search_serves_many_shapes_one_after_the_other() -> None:
    definition, automaton = model_of(3, coarse=True)
    search = NgramSearch(automaton, automaton.words_of_tokens(VOCAB))
    rng = np.random.default_rng(0)
    for _ in range(300):
        h, k = SMALL_SHAPES[rng.integers(len(SMALL_SHAPES))]
        lattice = random_lattices(rng, int(rng.integers(0, 3)), h, k, vocab_size=VOCAB, coarse=True)
        assert_is_brute_force(definition, search, lattice, int(rng.integers(1, 41)), weight=1.0, rng=rng)


@pytest.mark.parametrize("end_token", [None, END])
def test_a_batch_is_its_lattices_one_by_one(end_token: int | None) -> None:
    automaton = model_of(4)[1]
    words = automaton.words_of_tokens(VOCAB)
    search = NgramSearch(automaton, words, end_token=end_token)
    rng = np.random.default_rng(0)
    lattice = random_lattices(rng, 60, 9, 8, vocab_size=VOCAB)
    states = random_contexts(rng, 60, search)[1]
    batch = search.p_best(lattice, states, 16, weight=0.7)
    for i in range(60):
        alone = NgramSearch(automaton, words, end_token=end_token) if i % 20 == 0 else search
        one = alone.p_best(lattice[i : i + 1], states[i : i + 1], 16, weight=0.7)
        np.testing.assert_array_equal(one.drafts[0], batch.drafts[i])
        np.testing.assert_array_equal(one.scores[0], batch.scores[i])


def test_the_table_of_rows_is_cleared_when_the_runs_have_been_counted_through() -> None:
    definition, automaton = model_of(3, coarse=True)
    search = NgramSearch(automaton, automaton.words_of_tokens(VOCAB))
    rng = np.random.default_rng(0)
    lattice = random_lattices(rng, 12, 4, 4, vocab_size=VOCAB, coarse=True)
    assert_is_brute_force(definition, search, lattice, 8, weight=1.0, rng=rng)  # runs 1 to 12
    assert search._room is not None
    search._room.counters[1] = LAST_RUN - 4
    assert_is_brute_force(definition, search, lattice, 8, weight=1.0, rng=rng)
    assert search._room.counters[1] == 9
    assert_is_brute_force(definition, search, lattice, 8, weight=1.0, rng=rng)


@pytest.mark.parametrize("order", [2, 3])
def test_wide_lattices_and_many_drafts(order: int) -> None:
    rng = np.random.default_rng(order)
    automaton = Automaton.compile(random_model(rng, order=order, words=70, density=0.1))
    search = NgramSearch(automaton, automaton.words_of_tokens(80))
    lattice = random_lattices(rng, 3, 9, 64, vocab_size=80)
    states = random_contexts(rng, 3, search, 80)[1]
    most = search.p_best(lattice, states, 256, weight=1.0)
    assert most.drafts.shape == (3, 256, 9)
    assert (np.diff(most.scores, axis=1) <= 0).all()
    assert all(len(np.unique(drafts, axis=0)) == 256 for drafts in most.drafts)
    for q in (1, 16, 100):
        fewer = search.p_best(lattice, states, q, weight=1.0)
        np.testing.assert_array_equal(fewer.drafts, most.drafts[:, :q])
        np.testing.assert_array_equal(fewer.scores, most.scores[:, :q])


def test_wide_short_lattices_are_brute_force() -> None:
    definition, automaton = model_with_tables(3)
    search = NgramSearch(automaton, (np.arange(70) % MANY_WORDS).astype(np.int32))
    rng = np.random.default_rng(0)
    for coarse in (False, True):
        lattice = random_lattices(rng, 3, 3, 64, vocab_size=70, coarse=coarse)
        assert_is_brute_force(definition, search, lattice, 256, weight=1.0, rng=rng, vocab_size=70)


@pytest.mark.parametrize("name", ["fable-2", "fable-3", "fable-4-prune-0-1-1-2", "fable-4", "fable-5-prune-0-0-1"])
def test_the_best_paths_are_those_that_kenlm_scores_best(name: str, tmp_path: Path) -> None:
    # A model that lmplz made; tokens are its words, one after the last is unknown.
    model = read_arpa(REFERENCE / f"{name}.arpa.gz")
    write_arpa(model, tmp_path / "model.arpa")
    scorer = kenlm.Model(str(tmp_path / "model.arpa"))
    vocab_size = len(model.vocabulary) + 1
    words = np.append(np.arange(len(model.vocabulary)), UNKNOWN).astype(np.int32)
    search = NgramSearch(Automaton.compile(model), words)
    rng = np.random.default_rng(0)
    lattice = random_lattices(rng, 12, 4, 6, vocab_size=vocab_size)
    for i in range(len(lattice)):
        one, context = lattice[i], rng.integers(3, vocab_size, rng.integers(0, 4))
        state = search.state_after(context, from_start=True)
        found = search.p_best(lattice[i : i + 1], np.array([state]), 16, weight=0.8)
        scored = []
        for path in np.ndindex(1, *[one.k] * (one.h - 1)):
            tokens = one.token_ids[range(one.h), path]
            spoken = [model.vocabulary[words[token]] for token in (*context, *tokens)]
            steps = list(scorer.full_scores(" ".join(spoken), bos=True, eos=False))[len(context) :]
            log10p = sum(step[0] for step in steps)
            scored.append((float(one.logps[range(one.h), path].sum() + 0.8 * LN10 * log10p), tuple(tokens.tolist())))
        by_draft = {draft: score for score, draft in scored}
        best = sorted((score for score, _ in scored), reverse=True)[:16]
        np.testing.assert_allclose(found.scores[0], best, atol=1e-4, rtol=0)
        of_drafts = [by_draft[tuple(draft)] for draft in found.drafts[0].tolist()]
        np.testing.assert_allclose(found.scores[0], of_drafts, atol=1e-4, rtol=0)


def test_the_state_after_tokens_is_that_of_the_last_ones() -> None:
    for order in range(1, MAX_ORDER + 1):
        automaton = model_of(order)[1]
        search = NgramSearch(automaton, automaton.words_of_tokens(VOCAB))
        assert search.state_after([]) == ROOT
        assert search.state_after([], from_start=True) == automaton.start
        rng = np.random.default_rng(order)
        for _ in range(100):
            tokens = rng.integers(0, VOCAB, rng.integers(0, 12))
            words = search.words[tokens].tolist()
            for start in (False, True):
                expected = automaton.state_after(words, state=automaton.start if start else ROOT)
                assert search.state_after(tokens, from_start=start) == expected
                assert search.state_after(tokens.tolist(), from_start=start) == expected


@pytest.mark.parametrize("p", [0, -3])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_p_below_1_is_refused(p: int, weight: float) -> None:
    search = NgramSearch(model_of(2)[1], np.zeros(VOCAB, dtype=np.int32))
    with pytest.raises(RescoreError, match=f"p = {p} asks for no drafts"):
        search.p_best(Lattice.from_logits(np.zeros((1, 2, 3)), 2), np.array([ROOT]), p, weight=weight)


@pytest.mark.parametrize("weight", [-0.1, 64.5, float("nan"), float("inf"), float("-inf")])
def test_weights_outside_0_to_64_are_refused(weight: float) -> None:
    search = NgramSearch(model_of(2)[1], np.zeros(VOCAB, dtype=np.int32))
    with pytest.raises(RescoreError, match=r"an n-gram weight of .*; choose one from 0 to 64"):
        search.p_best(Lattice.from_logits(np.zeros((1, 2, 3)), 2), np.array([ROOT]), 1, weight=weight)


def test_log_probs_of_minus_1e30_and_impossible_words_do_not_overflow() -> None:
    # KenLM gives an <unk> that the file lacks -100 (log10); a head's log-prob may be anything below 0.
    model = random_model(np.random.default_rng(0), order=2, words=WORDS)
    model.orders[0].log10p[UNKNOWN] = -100
    automaton, definition = Automaton.compile(model), BackOff(model)
    search = NgramSearch(automaton, automaton.words_of_tokens(VOCAB))
    lattice = random_lattices(np.random.default_rng(0), 10, 5, 4, vocab_size=VOCAB)
    lattice.logps[:, 2:, 2:] = -1e30
    capped = Lattice(lattice.token_ids, np.maximum(lattice.logps, -1024))
    found = search.p_best(lattice, np.zeros(10, dtype=np.int32), 40, weight=MAX_WEIGHT)
    for i in range(10):
        paths = brute_force(definition, capped[i], search.words, (), weight=MAX_WEIGHT)
        assert_best(paths, found.drafts[i], found.scores[i])
