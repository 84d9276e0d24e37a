"""KenLM behind one door: the same scores from every kind of file, and no damaged file that ends the process.

`reference/kenlm` holds a small model as ARPA and the binaries that KenLM's own `build_binary` made of it.
"""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import kenlm
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lattices.errors import InvalidDataError, RescoreError
from lm.ngram import kenlm_model
from lm.ngram.arpa import read_arpa
from lm.ngram.kenlm_model import FIXED, SANITY, BinaryHeader, KenlmModel, read_header

REFERENCE = Path(__file__).parent / "reference" / "kenlm"
TINY, PROBING, TRIE = (REFERENCE / name for name in ("tiny.arpa", "probing.bin", "trie.bin"))
PACKED = REFERENCE / "quantized_array_trie.bin"  # the type whose size the counts give as a lower bound only
BINARIES = (PROBING, TRIE)
FILES = (TINY, *BINARIES, PACKED)
COUNTS = len(SANITY) + FIXED.size  # where the counts stand
damage = settings(
    deadline=None, derandomize=True, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is found before any child process runs."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the header alone must be enough to refuse this file")

    monkeypatch.setattr(kenlm_model.subprocess, "run", refuse)


def message_of(path: Path, **options: float) -> str:
    """What loading says: one line that names the file."""
    with pytest.raises(InvalidDataError) as caught:
        KenlmModel.load(path, **options)  # type: ignore[arg-type]
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
        assert (model.order, model.path) == (3, path)
        state = model.begin_sentence()
        scores = []
        for word in ("the", "cat", "zebra", "cat", "sat", model.sentence_end):
            log10p, state = model.score(state, word)
            scores.append(log10p)
        # <s> the; <s> the cat; <unk> behind "the cat"; cat alone; cat sat; cat sat </s>
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

    def test_ids_are_decimal_words(self):
        model = KenlmModel.load(TRIE)
        assert model.score(model.begin_sentence(), 7) == model.score(model.begin_sentence(), "7")
        assert 7 in model
        assert "é" in model
        assert not model.is_unknown(np.int64(7))
        assert all(model.is_unknown(word) for word in (8, "zebra", "<unk>"))

    def test_ids_are_looked_up_where_words_are_given(self):
        model = KenlmModel.load(TINY, words=["cat", "é", "the"])
        assert model.score(model.begin_sentence(), 2)[0] == pytest.approx(-0.3)
        (scores,) = model.score_ids([[2, 0]], end=True)
        assert scores == pytest.approx([-0.3, -0.2, -0.12 - 0.25 - 0.9], abs=1e-6)

    @pytest.mark.parametrize("begin", [True, False])
    @pytest.mark.parametrize("end", [True, False])
    @pytest.mark.parametrize("words", [None, [str(i) for i in range(10)]])
    def test_a_batch_is_one_by_one(self, begin: bool, end: bool, words: list[str] | None):
        model = KenlmModel.load(PROBING, words=words)
        sequences = [[7, 7, 1], [], [3]]
        found = model.score_ids(sequences, begin=begin, end=end)
        reference = kenlm.Model(str(PROBING))
        for scores, sequence in zip(found, sequences, strict=True):
            text = " ".join(map(str, sequence))
            expected = [score[0] for score in reference.full_scores(text, bos=begin, eos=end)]
            assert scores.dtype == np.float32
            np.testing.assert_array_equal(scores, np.float32(expected))

    def test_gzip(self, tmp_path: Path):
        (tmp_path / "x.arpa.gz").write_bytes(gzip.compress(TINY.read_bytes()))
        model = KenlmModel.load(tmp_path / "x.arpa.gz")
        assert model.score(model.begin_sentence(), "the")[0] == pytest.approx(-0.3)

    def test_loading_is_silent(self, capfd: pytest.CaptureFixture[str]):
        for path in FILES:
            KenlmModel.load(path)
        assert capfd.readouterr() == ("", "")


class TestHeader:
    def test_of_the_references(self):
        assert read_header(PROBING) == BinaryHeader(3, 1.5, kenlm_model.PROBING, True, (8, 7, 4))
        assert read_header(PACKED).model_type == kenlm_model.QUANTIZED_ARRAY_TRIE
        assert read_header(TRIE) == BinaryHeader(3, 1.5, kenlm_model.TRIE, True, (8, 7, 4))

    def test_sizes_are_kenlms(self):
        """Header, vocabulary and search take what is in front of the words, byte for byte."""
        for path in BINARIES:
            header, data = read_header(path), path.read_bytes()
            body = kenlm_model._vocabulary_size(header) + kenlm_model._search_size(header, 0, 0)
            assert header.size + body == data.index(b"<unk>\0")

    @pytest.mark.usefixtures("no_child")
    @pytest.mark.parametrize("path", BINARIES, ids=lambda path: path.name)
    @pytest.mark.parametrize(
        ("offset", "new", "message"),
        [
            (len(SANITY), b"\0", "says its order is 0"),
            (len(SANITY), b"\1", "says its order is 1"),
            (len(SANITY), b"\7", "says its order is 7"),
            (len(SANITY) + 4, struct.pack("<f", 0.5), "multiplier is 0.5"),
            (len(SANITY) + 4, struct.pack("<f", math.nan), "multiplier is nan"),
            (len(SANITY) + 8, b"\6", "model type is 6"),
            (COUNTS, bytes(24), "says it has 0 1-grams"),
            (COUNTS + 8, bytes(8), "says it has 0 2-grams"),
            (COUNTS + 16, bytes(8), "does not end with its 8 words"),
            (COUNTS, b"\7", "does not end with its 7 words"),
            (COUNTS + 16, b"\xff" * 8, "bytes, but a model of its counts needs"),
            (50, b"4", "another version or machine"),
            (56, b"\1", "another version or machine"),
            (33, b" incomplete\n", "never finished"),
            (0, b"x", "can't load"),
        ],
    )
    def test_what_it_may_not_say(self, tmp_path: Path, path: Path, offset: int, new: bytes, message: str):
        assert message in message_of(changed(tmp_path, path, offset, new))

    @pytest.mark.usefixtures("no_child")
    @pytest.mark.parametrize("multiplier", [2.0, 3e38])
    def test_a_multiplier_that_asks_for_more_than_there_is(self, tmp_path: Path, multiplier: float):
        path = changed(tmp_path, PROBING, len(SANITY) + 4, struct.pack("<f", multiplier))
        assert "bytes, but a model of its counts needs" in message_of(path)

    def test_no_binary(self, tmp_path: Path):
        with pytest.raises(InvalidDataError, match="is not a KenLM binary"):
            read_header(TINY)
        with pytest.raises(RescoreError, match="can't read"):
            read_header(tmp_path / "none")


class TestGuard:
    @pytest.mark.usefixtures("no_child")
    @pytest.mark.parametrize("source", [*BINARIES, PACKED], ids=lambda path: path.name)
    def test_every_truncation_is_refused_by_size(self, tmp_path: Path, source: Path):
        path, data = tmp_path / "x.bin", source.read_bytes()
        for size in range(len(data)):
            path.write_bytes(data[:size])
            message_of(path)

    @pytest.mark.parametrize("source", BINARIES, ids=lambda path: path.name)
    @pytest.mark.parametrize("fill", ["random", "zeros", "ones"])
    def test_garbage_for_a_body(self, tmp_path: Path, source: Path, fill: str):
        start, end = read_header(source).size, source.read_bytes().index(b"<unk>\0")
        size = end - start
        new = {"random": np.random.default_rng(0).bytes(size), "zeros": bytes(size), "ones": b"\xff" * size}[fill]
        message_of(changed(tmp_path, source, start, new), probe_timeout_s=2.0)

    @pytest.mark.parametrize("source", BINARIES, ids=lambda path: path.name)
    def test_garbage_behind_a_good_vocabulary(self, tmp_path: Path, source: Path):
        """A trie ends the process here, a hash table without free places is searched for ever."""
        header, end = read_header(source), source.read_bytes().index(b"<unk>\0")
        start = header.size + kenlm_model._vocabulary_size(header)
        path = changed(tmp_path, source, start, np.random.default_rng(1).bytes(end - start))
        message = message_of(path, probe_timeout_s=2.0)
        assert any(sign in message for sign in ("signal", "no answer within 2 s", "for a log10 probability"))

    def test_garbage_for_the_bits_of_quantized_numbers(self, tmp_path: Path):
        header = read_header(PACKED)
        start = header.size + kenlm_model._vocabulary_size(header)
        assert "255 and 4 bits" in message_of(changed(tmp_path, PACKED, start + 1, b"\xff"))

    def test_scores_that_are_all_zero(self, tmp_path: Path):
        """1-grams of log10 probability and back-off 0, and nothing found above them."""
        header, data = read_header(PROBING), PROBING.read_bytes()
        start = header.size + kenlm_model._vocabulary_size(header)
        path = changed(tmp_path, PROBING, start, bytes(data.index(b"<unk>\0") - start))
        assert "gives every word the probability 1" in message_of(path)

    def test_a_probability_above_1(self, tmp_path: Path):
        header = read_header(PROBING)
        start = header.size + kenlm_model._vocabulary_size(header)
        path = changed(tmp_path, PROBING, start, struct.pack("<f", math.nan))
        assert "gives nan for a log10 probability" in message_of(path)

    def test_trusted_files_need_no_child(self, no_child: None):
        assert KenlmModel.load(TRIE, trusted=True).order == 3

    @damage
    @given(source=st.sampled_from(BINARIES), at=st.integers(0, COUNTS + 24), new=st.binary(min_size=1, max_size=4))
    def test_any_header_is_refused_in_one_line_or_its_own(self, tmp_path: Path, source: Path, at: int, new: bytes):
        path = changed(tmp_path, source, at, new)
        try:
            kenlm_model._check_binary(path, path.stat().st_size)
        except InvalidDataError as error:
            assert "\n" not in str(error)
        else:
            same = read_header(source)
            found = read_header(path)
            # What passes differs in nothing that the size depends on.
            assert (found.order, found.counts[2:]) == (same.order, same.counts[2:])

    def test_files_that_are_no_binaries(self, tmp_path: Path):
        path = tmp_path / "x.bin"
        for data, message in ((b"", "is empty"), (b"hello\n" * 50, "can't load"), (b"\0" * 500, "can't load")):
            path.write_bytes(data)
            assert message in message_of(path)
        path.write_bytes(TINY.read_bytes())  # the content counts, not the name
        assert KenlmModel.load(path).order == 3

    def test_broken_arpa_is_kenlms_message_on_one_line(self, tmp_path: Path):
        path = tmp_path / "x.arpa"
        path.write_text(TINY.read_text(encoding="utf-8").replace("-0.5\t", "0.5\t"), encoding="utf-8")
        message = message_of(path)
        assert "Positive log probability 0.5" in message
        assert ".cc" not in message

    def test_a_file_that_is_not_there(self, tmp_path: Path):
        for path in (tmp_path / "none", tmp_path):
            with pytest.raises(RescoreError, match="can't read"):
                KenlmModel.load(path)


def test_our_reader_and_kenlm_agree_on_the_reference():
    ours, theirs = read_arpa(TINY), KenlmModel.load(TINY)
    for ngrams in ours.orders:
        for words, log10p in zip(ngrams.words, ngrams.log10p, strict=True):
            context = theirs.empty_context()
            if words[0] == 1:  # KenLM takes <s> as a context only
                context, words = theirs.begin_sentence(), words[1:]
            for word in words:
                found, context = theirs.score(context, ours.vocabulary[word])
            if len(words):
                assert found == pytest.approx(float(log10p), abs=1e-6)
