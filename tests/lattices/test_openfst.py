"""OpenFst text read back: numbers of lattice and automaton; where OpenFst is installed, its shortest paths are ours."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from ngram_models import BackOff, brute_force, random_lattices, random_model

from lattices.automaton import LN10, ROOT, Automaton
from lattices.errors import RescoreError
from lattices.lattice import Lattice
from lattices.ngram_search import ARC_SCALE, NgramSearch
from lattices.ngrams import MAX_ORDER, SPECIAL_WORDS, NgramArrays, NgramModel
from rescore.exports.openfst import (
    automaton_text,
    composition_text,
    dense_states,
    lattice_text,
    phi_label,
    token_symbols,
    word_symbols,
)

WORDS, VOCAB = 9, 10
Arc = tuple[int, int, int, float]  # target, input label, output label, cost


def parsed(text: str) -> tuple[int, dict[int, list[Arc]], dict[int, float]]:
    """Start state, arcs by source, final states of AT&T text."""
    arcs: dict[int, list[Arc]] = defaultdict(list)
    final: dict[int, float] = {}
    start = -1
    assert text.endswith("\n")
    for line in text.splitlines():
        fields = line.split("\t")
        start = int(fields[0]) if start < 0 else start
        if len(fields) == 1:
            final[int(fields[0])] = 0.0
        else:
            source, target, into, out, cost = fields
            arcs[int(source)].append((int(target), int(into), int(out), float(cost)))
    return start, arcs, final


def paths_of(text: str) -> list[tuple[float, tuple[int, ...]]]:
    """(cost, token ids by input label) of all paths, best first."""
    start, arcs, final = parsed(text)
    paths = []
    upcoming = [(start, 0.0, ())]
    while upcoming:
        state, cost, tokens = upcoming.pop()
        if state in final:
            paths.append((cost, tokens))
        upcoming += [(target, cost + c, (*tokens, into - 1)) for target, into, _, c in arcs[state]]
    return sorted(paths)


def model_of(order: int, seed: int = 0, *, holes: bool = False, words: int = WORDS) -> NgramModel:
    return random_model(np.random.default_rng([order, seed]), order=order, words=words, holes=holes)


def faithful_model(order: int, seed: int) -> NgramModel:
    """N-grams score so much above back-off that free back-off never pays: 0.7 each, more than all weights together."""
    rng = np.random.default_rng([order, seed])
    model = random_model(rng, order=order, words=WORDS)
    definition, arrays = BackOff(model), []
    for n, grams in enumerate(model.orders, start=1):
        backoff = np.zeros(len(grams)) if n == order else -rng.uniform(0, 0.2 / order, len(grams))
        log10p = -rng.uniform(3, 4, len(grams))
        if n > 1:
            for i, gram in enumerate(map(tuple, grams.words.tolist())):
                log10p[i] = definition.backoff[gram[:-1]] + definition.score(gram[1:-1], gram[-1]) + 0.7
        for i, gram in enumerate(map(tuple, grams.words.tolist())):
            definition.log10p[gram], definition.backoff[gram] = log10p[i], backoff[i]
        arrays.append(NgramArrays(grams.words, log10p.astype(np.float32), backoff.astype(np.float32)))
    return NgramModel(model.vocabulary, tuple(arrays))


def test_a_lattice_is_a_line_of_slots_from_tokens_to_words() -> None:
    words = np.array([0, 0, 5, 4], dtype=np.int32)
    ids = np.array([[2, 3], [1, 0], [3, 2]], dtype=np.int32)
    logps = np.array([[0.0, -1.0], [-0.25, -0.5], [-1e-8, -123.5]], dtype=np.float32)
    assert lattice_text(Lattice(ids, logps), words) == (
        "0\t1\t3\t6\t0\n"  # slot 1: the arg-max only
        "1\t2\t2\t1\t0.25\n1\t2\t1\t1\t0.5\n"  # two tokens, one word
        "2\t3\t4\t5\t9.99999994e-09\n2\t3\t3\t6\t123.5\n"
        "3\n"
    )


def test_log_probs_come_back_bit_for_bit() -> None:
    lattice = random_lattices(np.random.default_rng(0), 1, 5, 6, vocab_size=VOCAB)[0]
    start, arcs, final = parsed(lattice_text(lattice, np.zeros(VOCAB, dtype=np.int32)))
    assert (start, final) == (0, {5: 0.0})
    for j in range(1, 5):
        assert [np.float32(-cost) for *_, cost in arcs[j]] == lattice.logps[j].tolist()
        assert [into - 1 for _, into, _, _ in arcs[j]] == lattice.token_ids[j].tolist()


def test_a_batch_is_refused() -> None:
    lattice = random_lattices(np.random.default_rng(0), 2, 5, 6, vocab_size=VOCAB)
    with pytest.raises(RescoreError, match=r"a lattice \[heads, entries\] is written, not \[2, 5, 6\]"):
        lattice_text(lattice, np.zeros(VOCAB, dtype=np.int32))


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize(
    ("order", "words"),
    [*((order, WORDS) for order in range(1, MAX_ORDER + 1)), (2, 30), (3, 30)],  # states are rows, or hash tables
)
def test_the_automaton_s_text_scores_words_as_the_automaton(order: int, words: int, weight: float) -> None:
    automaton = Automaton.compile(model_of(order, holes=True, words=words))
    phi = phi_label(automaton)
    states = dense_states(automaton)
    begin = states[len(states) // 2]
    start, arcs, final = parsed("".join(automaton_text(automaton, weight=weight, start=int(begin), phi=True)))
    assert start == len(states) // 2
    assert sorted(final) == list(range(len(states)))
    assert len(arcs[0]) == words  # the root: every word, no back-off
    number = {int(state): i for i, state in enumerate(states)}
    for i, state in enumerate(states.tolist()):
        assert sum(into == phi for _, into, _, _ in arcs[i]) == (i > 0)
        assert all(into == out for _, into, out, _ in arcs[i])
        for word in range(words):
            at, cost = i, 0.0
            while not (found := [arc for arc in arcs[at] if arc[1] == word + 1]):
                target, _, _, passed = next(arc for arc in arcs[at] if arc[1] == phi)
                at, cost = target, cost + passed
            (arc,) = found
            log10p, after = automaton.advance(state, word)
            assert cost + arc[3] == pytest.approx(-weight * LN10 * log10p, abs=1e-6)
            assert arc[0] == number[after]


def test_back_off_is_epsilon_unless_a_label_is_given() -> None:
    automaton = Automaton.compile(model_of(3))
    phi = phi_label(automaton)
    with_epsilon, with_phi = "".join(automaton_text(automaton)), "".join(automaton_text(automaton, phi=True))
    assert with_phi.replace(f"\t{phi}\t{phi}\t", "\t0\t0\t") == with_epsilon
    assert with_epsilon.count("\t0\t0\t") == len(dense_states(automaton)) - 1


@pytest.mark.parametrize("order", range(1, MAX_ORDER + 1))
def test_the_composition_has_the_lattice_s_paths_with_the_search_s_scores(order: int) -> None:
    model = model_of(order, holes=True)
    automaton, definition = Automaton.compile(model), BackOff(model)
    words = automaton.words_of_tokens(VOCAB)
    rng = np.random.default_rng(order)
    lattice = random_lattices(rng, 5, 4, 4, vocab_size=VOCAB)
    for i in range(len(lattice)):
        context = tuple(rng.integers(0, WORDS, 4).tolist())
        state = automaton.state_after(context)
        found = paths_of(composition_text(lattice[i], words, automaton, state, weight=0.7))
        expected = brute_force(definition, lattice[i], words, context, weight=0.7)
        assert [tokens for _, tokens in found] == [tokens for _, tokens in expected]
        scores = [-score / ARC_SCALE for score, _ in expected]
        # The search rounds the weight to 1 / 65536.
        np.testing.assert_allclose([cost for cost, _ in found], scores, rtol=1e-4, atol=1e-4)


def test_symbol_tables_name_every_label_once() -> None:
    vocabulary = (*SPECIAL_WORDS, "naïve", "<eps>", "<phi>", "two words", "two\\u0020words", "\u2028", "")
    unigrams = np.arange(len(vocabulary), dtype=np.int32)[:, None]
    zeros = np.zeros(len(vocabulary), dtype=np.float32)
    automaton = Automaton.compile(NgramModel(vocabulary, (NgramArrays(unigrams, zeros, zeros),)))
    phi = phi_label(automaton)
    rows = [line.rstrip("\n").split("\t") for line in word_symbols(automaton, phi=True)]
    assert rows[:5] == [["<eps>", "0"], ["<unk>", "1"], ["<s>", "2"], ["</s>", "3"], ["naïve", "4"]]
    assert rows[-1] == ["<phi>", str(phi)]
    assert [int(label) for _, label in rows] == list(range(phi + 1))
    assert len({symbol for symbol, _ in rows}) == len(rows)
    assert all(symbol and symbol.isprintable() and " " not in symbol for symbol, _ in rows)
    assert list(token_symbols(3)) == ["<eps>\t0\n", "0\t1\n", "1\t2\n", "2\t3\n"]
    assert list(word_symbols(automaton))[-1].endswith(f"\t{len(vocabulary)}\n")


# From here on: OpenFst itself, where pynini is installed.


def compiled(text: str) -> Any:
    fst = pytest.importorskip("pywrapfst")
    compiler = fst.Compiler()
    compiler.write(text)
    return compiler.compile()


def best_paths(machine: Any, p: int) -> list[tuple[float, tuple[int, ...]]]:
    """(cost, token ids) of OpenFst's p shortest paths, best first."""
    fst = pytest.importorskip("pywrapfst")
    shortest = fst.shortestpath(machine, nshortest=p)
    paths = []
    upcoming = [(shortest.start(), 0.0, ())]
    while upcoming:
        state, cost, tokens = upcoming.pop()
        if (end := float(shortest.final(state))) < float("inf"):
            paths.append((cost + end, tokens))
        for arc in shortest.arcs(state):
            longer = (*tokens, arc.ilabel - 1) if arc.ilabel else tokens
            upcoming.append((arc.nextstate, cost + float(arc.weight), longer))
    return sorted(paths)


def composed(lattice: Lattice, words: np.ndarray, automaton: Automaton, state: int, weight: float) -> Any:
    fst = pytest.importorskip("pywrapfst")
    machine = compiled("".join(automaton_text(automaton, weight=weight, start=state)))
    return fst.compose(compiled(lattice_text(lattice, words)), machine.arcsort("ilabel"))


@pytest.mark.parametrize("order", range(1, 5))
def test_openfst_s_shortest_path_is_the_search_s_where_back_off_never_pays(order: int) -> None:
    rng = np.random.default_rng(order)
    for seed in range(3):
        automaton = Automaton.compile(faithful_model(order, seed))
        search = NgramSearch(automaton, automaton.words_of_tokens(VOCAB))
        lattice = random_lattices(rng, 8, 6, 6, vocab_size=VOCAB)
        for i in range(len(lattice)):
            state = search.state_after(rng.integers(0, VOCAB, 5))
            found = search.p_best(lattice[i : i + 1], np.array([state]), 1, weight=0.5)
            ((cost, tokens),) = best_paths(composed(lattice[i], search.words, automaton, state, 0.5), 1)
            assert tokens == tuple(found.drafts[0, 0].tolist())
            assert -cost == pytest.approx(found.scores[0, 0], abs=1e-4)


@pytest.mark.parametrize("order", range(2, MAX_ORDER + 1))
def test_openfst_s_p_shortest_paths_of_the_exact_composition_are_the_search_s(order: int) -> None:
    rng = np.random.default_rng(order)
    better = 0
    for seed in range(3):
        automaton = Automaton.compile(model_of(order, seed, holes=True))
        search = NgramSearch(automaton, automaton.words_of_tokens(VOCAB))
        lattice = random_lattices(rng, 8, 6, 6, vocab_size=VOCAB)
        for i in range(len(lattice)):
            state = search.state_after(rng.integers(0, VOCAB, 5))
            found = search.p_best(lattice[i : i + 1], np.array([state]), 16, weight=1.0)
            text = composition_text(lattice[i], search.words, automaton, state, weight=1.0)
            paths = best_paths(compiled(text), 16)
            assert [tokens for _, tokens in paths] == [tuple(draft) for draft in found.drafts[0].tolist()]
            np.testing.assert_allclose([-cost for cost, _ in paths], found.scores[0], atol=1e-4)
            # Free back-off never loses, and on such models often wins what it should not.
            cost = best_paths(composed(lattice[i], search.words, automaton, state, 1.0), 1)[0][0]
            assert -cost >= found.scores[0, 0] - 1e-4
            better += -cost > found.scores[0, 0] + 1e-3
    assert better > 0


def test_free_back_off_scores_a_word_better_than_its_ngram() -> None:
    # p(b | a) is 1e-3, but a's back-off weight x p(b) is 1e-1.
    unigrams = NgramArrays(np.arange(5, dtype=np.int32)[:, None], np.full(5, -1.0, np.float32), np.zeros(5, np.float32))
    bigrams = NgramArrays(np.array([[3, 4]], dtype=np.int32), np.array([-3.0], np.float32), np.zeros(1, np.float32))
    automaton = Automaton.compile(NgramModel((*SPECIAL_WORDS, "0", "1"), (unigrams, bigrams)))
    words = automaton.words_of_tokens(2)
    lattice = Lattice(np.array([[1]], dtype=np.int32), np.array([[0.0]], dtype=np.float32))
    state = automaton.state_after([3])
    assert state != ROOT
    free = best_paths(composed(lattice, words, automaton, state, 1.0), 1)
    exact = best_paths(compiled(composition_text(lattice, words, automaton, state, weight=1.0)), 1)
    assert free[0][0] == pytest.approx(1 * LN10, abs=1e-5)
    assert exact[0][0] == pytest.approx(3 * LN10, abs=1e-5)
