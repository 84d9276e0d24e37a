"""KenLM behind one door: the same scores from every kind of file, no damaged file that ends the process, and a search
that gives what the automaton's gives.

`reference/kenlm` holds a small model as ARPA and the binaries that KenLM's own `build_binary` made of it.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import kenlm
import numpy as np
import pytest

from lattices.automaton import Automaton
from lattices.errors import InvalidDataError
from lattices.lattice import Lattice
from lattices.ngram_search import NgramSearch
from lattices.ngrams import SENTENCE_END, SPECIAL_WORDS, NgramArrays, NgramModel
from lattices.search import p_best
from lm.ngram import kenlm as module
from lm.ngram.arpa import read_arpa, write_arpa
from lm.ngram.kenlm import HEADER_AT, KenlmModel, KenlmSearch

REFERENCE = Path(__file__).parent / "reference" / "kenlm"
TINY, PROBING, TRIE = (REFERENCE / name for name in ("tiny.arpa", "probing.bin", "trie.bin"))
PACKED = REFERENCE / "quantized_array_trie.bin"  # the type whose size the counts give as a lower bound only
BINARIES = (PROBING, TRIE)
FILES = (*BINARIES, PACKED)
COUNTS = HEADER_AT + 20  # where the counts stand
HEADER_END, VOCABULARY_END = 136, {"probing.bin": 288, "trie.bin": 208, "quantized_array_trie.bin": 208}


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is found before any child process runs."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the header alone must be enough to refuse this file")

    monkeypatch.setattr(module.subprocess, "run", refuse)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBE_TIMEOUT_S", 2.0)


def message_of(path: Path) -> str:
    """What loading says: one line that names the file."""
    with pytest.raises(InvalidDataError) as caught:
        KenlmModel.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def changed(tmp_path: Path, source: Path, offset: int, new: bytes) -> Path:
    """A copy with some bytes replaced."""
    path, data = tmp_path / "x.bin", source.read_bytes()
    path.write_bytes(data[:offset] + new + data[offset + len(new) :])
    return path


class TestScores:
    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
    def test_word_by_word_with_states(self, path: Path):
        model = KenlmModel.load(path)
        assert model.order == 3
        state = model.begin_sentence()
        scores = []
        for word in ("the", "cat", "zebra", "cat", "sat", "</s>"):
            log10p, state = model.score(state, word)
            scores.append(log10p)
        # <s> the; <s> the cat; <unk> after "the cat"; cat alone; cat sat; cat sat </s>
        expected = [-0.3, -0.2, -0.12 - 0.25 - 1.6, -1.1, -0.6, -0.15]
        assert scores == pytest.approx(expected, abs=1e-6)
        assert model.score(model.begin_sentence(), "the")[0] == pytest.approx(-0.3)  # states do not change
        assert model.score(model.empty_context(), "the")[0] == pytest.approx(-0.8)

    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
    def test_the_length_of_the_ngram(self, path: Path):
        model = KenlmModel.load(path)
        log10p, length, state = model.full_score(model.begin_sentence(), "the")
        assert (round(log10p, 4), length) == (-0.3, 2)
        assert model.full_score(state, "cat")[1] == 3
        assert model.full_score(state, "zebra")[1] == 1

    def test_what_is_unknown(self):
        model = KenlmModel.load(TRIE)
        assert not any(model.is_unknown(word) for word in ("7", "é", "</s>"))
        assert all(model.is_unknown(word) for word in ("8", "zebra", "<unk>"))

    def test_loading_is_silent(self, capfd: pytest.CaptureFixture[str]):
        for path in FILES:
            KenlmModel.load(path)
        assert capfd.readouterr() == ("", "")


class TestHeader:
    @pytest.mark.parametrize(
        ("source", "offset", "new", "message"),
        [
            (TRIE, HEADER_AT, b"\0", "signal"),
            (PROBING, HEADER_AT, b"\1", "KenLM"),
            (TRIE, HEADER_AT, b"\7", "order 7"),
            (PROBING, HEADER_AT + 4, struct.pack("<f", 0.5), "multiplier of 0.5"),
            (PROBING, HEADER_AT + 4, struct.pack("<f", math.nan), "KenLM"),
            (PROBING, HEADER_AT + 4, struct.pack("<f", 2.0), "size"),
            (PROBING, HEADER_AT + 4, struct.pack("<f", 3e38), "KenLM"),
            (TRIE, HEADER_AT + 8, b"\6", "KenLM"),
            (PROBING, COUNTS, bytes(24), "does not end with its 0 words"),
            (TRIE, COUNTS, b"\7", "KenLM"),
            (TRIE, COUNTS, b"\5", "does not end with its 5 words"),
            (TRIE, COUNTS + 8, bytes(8), "KenLM"),
            (TRIE, COUNTS + 16, b"\xff" * 8, "KenLM"),
            (TRIE, 50, b"4", "KenLM"),
            (PROBING, 56, b"\1", "KenLM"),
            (TRIE, 33, b" incomplete\n", "KenLM"),
        ],
    )
    def test_what_it_may_not_say(self, tmp_path: Path, source: Path, offset: int, new: bytes, message: str, hasty):
        assert message in message_of(changed(tmp_path, source, offset, new))


class TestGuard:
    @pytest.mark.usefixtures("no_child")
    @pytest.mark.parametrize("source", [*BINARIES, PACKED], ids=lambda path: path.name)
    def test_every_truncation_is_refused_before_it_is_tried(self, tmp_path: Path, source: Path):
        path, data = tmp_path / "x.bin", source.read_bytes()
        for size in range(1, len(data)):
            path.write_bytes(data[:size])
            message_of(path)

    @pytest.mark.parametrize("source", BINARIES, ids=lambda path: path.name)
    @pytest.mark.parametrize("fill", ["random", "zeros", "ones"])
    def test_garbage_for_a_body(self, tmp_path: Path, source: Path, fill: str, hasty):
        start = HEADER_END
        size = source.read_bytes().index(b"<unk>\0") - start
        new = {"random": np.random.default_rng(0).bytes(size), "zeros": bytes(size), "ones": b"\xff" * size}[fill]
        message_of(changed(tmp_path, source, start, new))

    @pytest.mark.parametrize("source", BINARIES, ids=lambda path: path.name)
    def test_garbage_after_a_good_vocabulary(self, tmp_path: Path, source: Path, hasty):
        """A trie ends the process here, a hash table without free places is searched for ever."""
        start, end = VOCABULARY_END[source.name], source.read_bytes().index(b"<unk>\0")
        path = changed(tmp_path, source, start, np.random.default_rng(1).bytes(end - start))
        message = message_of(path)
        assert any(sign in message for sign in ("signal", "no answer within 2 s", "for a log10 probability"))

    def test_garbage_for_the_bits_of_quantized_numbers(self, tmp_path: Path):
        assert "KenLM" in message_of(changed(tmp_path, PACKED, VOCABULARY_END[PACKED.name] + 1, b"\xff"))

    def test_scores_that_are_all_zero(self, tmp_path: Path):
        """1-grams of log10 probability and back-off 0, and nothing found above them."""
        start, data = VOCABULARY_END[PROBING.name], PROBING.read_bytes()
        path = changed(tmp_path, PROBING, start, bytes(data.index(b"<unk>\0") - start))
        assert "gives every word the probability 1" in message_of(path)

    def test_a_probability_above_1(self, tmp_path: Path):
        start = VOCABULARY_END[PROBING.name]
        path = changed(tmp_path, PROBING, start, struct.pack("<f", math.nan))
        assert "gives nan for a log10 probability" in message_of(path)


def test_our_reader_and_kenlm_agree_on_the_reference():
    ours, theirs = read_arpa(TINY), KenlmModel(kenlm.Model(str(TINY)))
    for ngrams in ours.orders:
        for words, log10p in zip(ngrams.words, ngrams.log10p, strict=True):
            context = theirs.empty_context()
            if words[0] == 1:  # KenLM takes <s> as a context only
                context, words = theirs.begin_sentence(), words[1:]
            for word in words:
                found, context = theirs.score(context, ours.vocabulary[word])
            if len(words):
                assert found == pytest.approx(float(log10p), abs=1e-6)


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
    of_kenlm = KenlmSearch(KenlmModel(kenlm.Model(str(tmp_path / "model.arpa"))), [END], end_token=end_token)
    ours = NgramSearch(automaton, words, end_token=end_token).p_best_after(lattices, lefts, p, weight=0.8)
    theirs = of_kenlm.p_best_after(lattices, lefts, p, weight=0.8)
    np.testing.assert_allclose(theirs.scores, ours.scores, atol=1e-4)
    apart = np.abs(np.diff(ours.scores, axis=1, prepend=np.inf, append=-np.inf)) > 1e-3
    clear = apart[:, 1:] & apart[:, :-1]  # no rounding turns these around
    np.testing.assert_array_equal(theirs.drafts[clear], ours.drafts[clear])
    assert clear.any()


def test_weight_zero_and_coverage(tmp_path: Path):
    write_arpa(trigrams(0), tmp_path / "model.arpa")
    search = KenlmSearch(KenlmModel(kenlm.Model(str(tmp_path / "model.arpa"))), [END])
    lattice = Lattice(np.array([[[0, 9], [11, 3]]], dtype=np.int32), -np.array([[[1, 2], [1, 2]]], dtype=np.float32))
    assert search.p_best_after(lattice, [[]], 2, weight=0.0).drafts.tolist() == p_best(lattice, 2).drafts.tolist()
    assert search.coverage(lattice.token_ids) == 0.75


def test_what_follows_end_of_text_is_the_arg_max_and_is_not_scored(tmp_path: Path):
    write_arpa(trigrams(0), tmp_path / "model.arpa")
    search = KenlmSearch(KenlmModel(kenlm.Model(str(tmp_path / "model.arpa"))), [END], end_token=END)
    ids = np.array([[[0, 1], [END, 2], [3, 1], [4, 1]]], dtype=np.int32)
    logps = np.array([[[-0.1, -5], [-0.1, -5], [-40, -50], [-40, -50]]], dtype=np.float32)
    found = search.p_best_after(Lattice(ids, logps), [[]], 8, weight=0.5)
    assert found.drafts[0, 0].tolist() == [0, END, 3, 4]
    # One way ends at once, four go on: the best draft stands in the places that are left.
    assert len(np.unique(found.drafts[0], axis=0)) == 5
    assert (found.drafts[0, 5:] == found.drafts[0, 0]).all()
    at_once = Lattice(np.array([[[END, 1], [2, 3]]], dtype=np.int32), np.full((1, 2, 2), -1, np.float32))
    assert search.p_best_after(at_once, [[]], 2, weight=0.5).drafts.tolist() == [[[END, 2]] * 2]
