"""ARPA files: what is written reads back the same and is what KenLM reads; every way to break a file has its line."""

from __future__ import annotations

import gzip
import itertools
import re
from pathlib import Path

import kenlm
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lattices.errors import InvalidDataError, OutputError, RescoreError
from lattices.ngrams import SPECIAL_WORDS, NgramArrays, NgramModel
from lm.ngram import arpa
from lm.ngram.arpa import formatted_lines, read_arpa, write_arpa
from tests.conftest import files_of_at_most

TINY = Path(__file__).parent / "reference" / "kenlm" / "tiny.arpa"
TEXT = TINY.read_text(encoding="utf-8")
random_models = settings(
    deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
words = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters=" \t\r\n\0"), min_size=1, max_size=4
).filter(lambda word: word not in (*SPECIAL_WORDS, "<UNK>"))
log10p = st.floats(-99, 0, width=32)


@st.composite
def models(draw, *, min_order: int = 1) -> NgramModel:
    """Random models whose every n-gram has its first and its last n - 1 words as n-grams."""
    vocabulary = (*SPECIAL_WORDS, *draw(st.lists(words, max_size=5, unique=True)))
    order = draw(st.integers(min_order, 4))
    texts = draw(st.lists(st.lists(st.integers(3, max(3, len(vocabulary) - 1)), max_size=5), min_size=1, max_size=4))
    texts = [[1, *(word for word in text if word < len(vocabulary)), 2] for text in texts]
    orders = []
    for n in range(1, order + 1):
        found = {tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)}
        if n == 1:
            found = {(i,) for i in range(len(vocabulary))}
        rows = np.array(sorted(found), dtype=np.int32).reshape(-1, n)
        highest = n == order
        backoff = np.zeros(len(rows), np.float32)
        if not highest:
            backoff = draw(arrays(np.float32, len(rows), elements=st.floats(-9, 2, width=32)))
        orders.append(NgramArrays(rows, draw(arrays(np.float32, len(rows), elements=log10p)), backoff))
    return NgramModel(vocabulary, tuple(orders))


def assert_equal(a: NgramModel, b: NgramModel) -> None:
    assert a.vocabulary == b.vocabulary
    assert a.order == b.order
    for left, right in zip(a.orders, b.orders, strict=True):
        assert (left.words.dtype, left.log10p.dtype, left.log10_backoff.dtype) == (np.int32, np.float32, np.float32)
        np.testing.assert_array_equal(left.words, right.words)
        np.testing.assert_array_equal(left.log10p, right.log10p)
        np.testing.assert_array_equal(left.log10_backoff, right.log10_backoff)


def explicit_log10p(model: NgramModel, context: tuple[int, ...], word: int) -> float:
    """The definition: the longest n-gram's probability, plus the back-offs of the contexts that were too long."""
    context = context[len(context) - min(len(context), model.order - 1) :]
    ngrams = model.orders[len(context)]
    for row in np.flatnonzero((ngrams.words == (*context, word)).all(axis=1)):
        return float(ngrams.log10p[row])
    lower = model.orders[len(context) - 1]
    backoff = sum(float(b) for b in lower.log10_backoff[(lower.words == context).all(axis=1)])
    return backoff + explicit_log10p(model, context[1:], word)


def broken(tmp_path: Path, *replacements: tuple[str, str]) -> Path:
    """The tiny model with parts replaced."""
    text = TEXT
    for old, new in replacements:
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = tmp_path / "x.arpa"
    path.write_text(text, encoding="utf-8", newline="")
    return path


def message_of(path: Path) -> str:
    """What reading says: one line that names the file."""
    with pytest.raises(InvalidDataError) as caught:
        read_arpa(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message[len(str(path)) + 1 :]


class TestReading:
    def test_ids_follow_the_file_with_the_special_words_first(self):
        model = read_arpa(TINY)
        assert model.vocabulary == ("<unk>", "<s>", "</s>", "the", "cat", "sat", "7", "é")
        assert [len(ngrams) for ngrams in model.orders] == [8, 7, 4]
        bigrams = model.orders[1]
        assert bigrams.words.tolist() == [[1, 3], [3, 4], [3, 6], [4, 5], [5, 2], [5, 3], [6, 2]]
        np.testing.assert_array_equal(bigrams.log10p, np.float32([-0.3, -0.5, -0.8, -0.6, -0.4, -0.9, -0.7]))
        np.testing.assert_array_equal(bigrams.log10_backoff, np.float32([-0.15, -0.12, -0.2, -0.11, 0, 0, 0]))

    @pytest.mark.parametrize(
        "change",
        [
            lambda text: text.replace("\n", "\r\n"),
            lambda text: "\ufeff" + text,
            lambda text: "made by hand\n# " + text.replace("\n", " \n\n", 3),
            lambda text: text.replace("\n", "\n\n"),
            lambda text: text.rstrip("\n"),
            lambda text: text.replace("<s> the cat", "<s> the cat\t0").replace(" cat sat", "\tcat\tsat"),
            lambda text: text.replace("<unk>", "<UNK>"),
        ],
        ids=["crlf", "bom", "preamble", "blank lines", "no final newline", "columns", "upper-case unknown"],
    )
    def test_what_other_tools_write_reads_the_same(self, tmp_path: Path, change):
        path = tmp_path / "x.arpa"
        text = change(TEXT).replace("# \\data\\", "\\data\\")
        path.write_text(text, encoding="utf-8", newline="")
        assert_equal(read_arpa(path), read_arpa(TINY))

    def test_gzip_is_known_by_its_content(self, tmp_path: Path):
        for name in ("x.arpa.gz", "x.arpa"):
            (tmp_path / name).write_bytes(gzip.compress(TINY.read_bytes()))
            assert_equal(read_arpa(tmp_path / name), read_arpa(TINY))

    @pytest.mark.parametrize("size", [1, 2, 7, 64])
    def test_blocks_may_end_anywhere(self, monkeypatch: pytest.MonkeyPatch, size: int):
        whole = read_arpa(TINY)
        monkeypatch.setattr(arpa, "BLOCK_LINES", size)
        monkeypatch.setattr(arpa, "PREAMBLE_BYTES", len("\\data\\"))
        assert_equal(read_arpa(TINY), whole)

    def test_lines_in_any_order(self, tmp_path: Path):
        path = broken(
            tmp_path, ("-0.3\t<s> the\t-0.15\n", ""), ("-0.9\tsat the\n", "-0.9\tsat the\n-0.3\t<s> the\t-0.15\n")
        )
        assert_equal(read_arpa(path), read_arpa(TINY))

    @random_models
    @given(model=models(), seed=st.integers(0, 1000))
    def test_lines_of_every_section_in_any_order(self, tmp_path: Path, model: NgramModel, seed: int):
        path, random = tmp_path / "x.arpa", np.random.default_rng(seed)
        write_arpa(model, path)
        groups = [list(group) for _, group in itertools.groupby(path.open("rb"), lambda line: b"\t" in line)]
        for group in groups[3::2]:  # not the 1-grams, whose order gives the words their ids
            group[:] = random.permutation(np.array(group, dtype=object)).tolist()
        path.write_bytes(b"".join(itertools.chain.from_iterable(groups)))
        assert_equal(read_arpa(path), model)

    def test_a_missing_unknown_word_gets_kenlms_default(self, tmp_path: Path):
        model = read_arpa(broken(tmp_path, ("ngram 1=8", "ngram 1=7"), ("-1.6\t<unk>\t0\n", "")))
        assert model.vocabulary[:4] == ("<unk>", "<s>", "</s>", "the")
        assert (model.orders[0].log10p[0], model.orders[0].log10_backoff[0]) == (-100, 0)
        theirs = kenlm.Model(str(tmp_path / "x.arpa"))
        assert theirs.score("zebra", bos=False, eos=False) == -100

    def test_missing_sentence_marks_score_as_unknown_words(self, tmp_path: Path):
        """KenLM refuses such a file unless asked not to (`build_binary -s`); then it does this."""
        text = "\\data\\\nngram 1=2\n\n\\1-grams:\n-1.5\t<unk>\n-0.5\ta\n\n\\end\\\n"
        (tmp_path / "x.arpa").write_text(text)
        model = read_arpa(tmp_path / "x.arpa")
        assert model.vocabulary == ("<unk>", "<s>", "</s>", "a")
        assert model.orders[0].log10p.tolist() == [-1.5, -1.5, -1.5, -0.5]

    def test_both_spellings_of_the_unknown_word_are_two_words(self, tmp_path: Path):
        """`lmplz` writes such a file for a text that holds <UNK>."""
        model = read_arpa(broken(tmp_path, ("\té\t", "\t<UNK>\t")))
        assert model.vocabulary[0] == "<unk>"
        assert model.vocabulary[7] == "<UNK>"

    def test_an_order_may_be_empty(self, tmp_path: Path):
        start = TEXT.index("\\3-grams:")
        path = tmp_path / "x.arpa"
        path.write_text(TEXT[:start].replace("ngram 3=4", "ngram 3=0") + "\\3-grams:\n\n\\end\\\n", encoding="utf-8")
        assert read_arpa(path).orders[2].words.shape == (0, 3)

    def test_other_white_space_is_part_of_a_word(self, tmp_path: Path):
        odd = "a\x0b\x0c\x85\u2028\xa0b"
        model = read_arpa(broken(tmp_path, ("\té\t", f"\t{odd}\t")))
        assert model.vocabulary[7] == odd


class TestBadFiles:
    @pytest.mark.parametrize(
        ("replacements", "message"),
        [
            ([("\n\\end\\", "")], "ends after line 30 without \\end\\"),
            ([("\\end\\", "\\4-grams:")], "line 31 should be \\end\\, not '\\\\4-grams:'"),
            ([("\\end\\", "\\end\\\nmore")], "line 32 follows \\end\\: 'more'"),
            ([("ngram 2=7", "ngram 2=8")], "line 16 starts a section of 7 2-grams, but the header says 8"),
            ([("ngram 2=7", "ngram 2=999999999999")], "the header says 999999999999"),
            ([("ngram 2=7", "ngram 2=6")], "line 16 starts a section of 7 2-grams, but the header says 6"),
            ([("ngram 2=7", "ngram 2=")], "line 3 should be 'ngram 2=COUNT', not 'ngram 2='"),
            ([("ngram 2=7", "ngram 4=7")], "line 3 should be 'ngram 2=COUNT'"),
            ([("ngram 3=4\n", "")], "line 16 has a back-off, but no 3-grams follow"),
            ([("\\2-grams:", "\\3-grams:")], "line 16 should be \\2-grams:"),
            ([("\\2-grams:", "2-grams:")], "line 16 has 1 fields"),
            ([("ngram 1=8\nngram 2=7\nngram 3=4\n", "")], "ends a header without any 1-grams"),
            ([("ngram 3=4", "\n".join(f"ngram {n}=4" for n in range(3, 8)))], "line 8 announces 7-grams"),
            ([("-0.9\tsat the\n", "-0.9\tsat the\n" * 2), ("2=7", "2=8")], "line 24 has the 2-gram 'sat the' for"),
            ([("-1.1\tcat\t-0.25\n", "-1.1\tcat\t-0.25\n" * 2), ("1=8", "1=9")], "line 12 has the 1-gram 'cat' for"),
            ([("-0.5\tthe cat", "0.5\tthe cat")], "line 18 has the positive log10 probability '0.5'"),
            ([("-0.5\tthe cat", "1e-9\tthe cat")], "line 18 has the positive log10 probability '1e-9'"),
            ([("-0.5\tthe cat", "NaN\tthe cat")], "line 18 has 'NaN' for a log10 probability"),
            ([("-0.5\tthe cat", "-inf\tthe cat")], "line 18 has '-inf' for a log10 probability"),
            ([("-0.5\tthe cat", "-1e99\tthe cat")], "line 18 has '-1e99' for a log10 probability"),
            ([("-0.5\tthe cat", "-1_0\tthe cat")], "line 18 has '-1_0' for a log10 probability"),
            ([("-0.5\tthe cat", "the\tthe cat")], "line 18 has 'the' for a log10 probability"),
            ([("-0.12", "nan")], "line 18 has 'nan' for a log10 back-off"),
            ([("the cat\t-0.12", "the cat\tsat -0.12")], "line 18 has 5 fields; a 2-gram has 3 or 4"),
            ([("the cat\t-0.12", "the")], "line 18 has 2 fields"),
            ([("the cat\t", "the dog\t")], "line 18 has the word 'dog', which no 1-gram of the file has"),
            ([("<s> the cat", "<s> the cat\t-0.5")], "line 26 has a back-off, but no 4-grams follow"),
            ([("-0.3\t<s> the\t-0.15\n", ""), ("2=7", "2=6")], "line 25 has a 3-gram that starts with '<s> the'"),
        ],
    )  # fmt: skip
    def test_the_line_is_named(self, tmp_path: Path, replacements, message: str):
        assert message in message_of(broken(tmp_path, *replacements))

    def test_every_truncation_is_refused(self, tmp_path: Path):
        path, data = tmp_path / "x.arpa", TINY.read_bytes()
        for size in range(len(data.rstrip())):
            path.write_bytes(data[:size])
            message_of(path)

    def test_truncated_or_damaged_gzip(self, tmp_path: Path):
        path, data = tmp_path / "x.arpa.gz", gzip.compress(TINY.read_bytes())
        for bad in (data[:-9], data[:40], data[:2], data[:30] + b"????" + data[34:]):
            path.write_bytes(bad)
            assert "gzip" in message_of(path)

    def test_invalid_utf8_is_named(self, tmp_path: Path):
        path = tmp_path / "x.arpa"
        path.write_bytes(TINY.read_bytes().replace("é".encode(), b"\xe9"))
        assert message_of(path) == "line 14 is not UTF-8: '\\\\xe9'"

    @pytest.mark.parametrize(
        "data", [b"", b"\n\n", b"hello\nworld", b"\\data", bytes(range(256)), TEXT.encode("utf-16")]
    )
    def test_what_is_no_arpa_file(self, tmp_path: Path, data: bytes):
        path = tmp_path / "x.arpa"
        path.write_bytes(data)
        assert "is not an ARPA file" in message_of(path)

    def test_a_kenlm_binary_is_recognised(self):
        assert "is a KenLM binary" in message_of(TINY.with_name("trie.bin"))

    def test_a_million_blank_lines(self, tmp_path: Path):
        path = tmp_path / "x.arpa"
        path.write_text("\n" * 500_000 + TEXT + "\n" * 500_000 + "more", encoding="utf-8")
        assert message_of(path) == "line 1000032 follows \\end\\: 'more'"

    def test_only_a_header(self, tmp_path: Path):
        path = tmp_path / "x.arpa"
        path.write_text("\\data\\\n")
        assert "without the section \\1-grams:" in message_of(path)

    def test_a_file_that_is_not_there(self, tmp_path: Path):
        for path in (tmp_path / "none", tmp_path):
            with pytest.raises(RescoreError, match="can't read"):
                read_arpa(path)

    @random_models
    @given(at=st.integers(0, len(TINY.read_bytes()) - 1), new=st.binary(max_size=3), cut=st.integers(0, 3))
    def test_any_damage_is_read_or_refused_in_one_line(self, tmp_path: Path, at: int, new: bytes, cut: int):
        path, data = tmp_path / "x.arpa", TINY.read_bytes()
        path.write_bytes(data[:at] + new + data[at + cut :])
        try:
            read_arpa(path)
        except InvalidDataError as error:
            assert "\n" not in str(error)


class TestWriting:
    def test_the_layout_is_lmplzs(self, tmp_path: Path):
        words = np.arange(4, dtype=np.int32)[:, None]
        unigrams = NgramArrays(words, np.float32([-1.25, 0, -0.1, -2]), np.float32([0, -0.3, 0, -1e-5]))
        bigrams = NgramArrays(np.array([[1, 3], [3, 2]], np.int32), np.float32([-0.5, -1 / 3]), np.zeros(2, np.float32))
        write_arpa(NgramModel((*SPECIAL_WORDS, "a"), (unigrams, bigrams)), tmp_path / "x.arpa")
        assert (tmp_path / "x.arpa").read_text() == (
            "\\data\\\nngram 1=4\nngram 2=2\n\n"
            "\\1-grams:\n-1.25\t<unk>\t0\n0\t<s>\t-0.3\n-0.1\t</s>\t0\n-2\ta\t-0.00001\n\n"
            "\\2-grams:\n-0.5\t<s> a\n-0.33333334\ta </s>\n\n"
            "\\end\\\n"
        )

    @random_models
    @given(model=models())
    def test_a_read_gives_the_model_back(self, tmp_path: Path, model: NgramModel):
        write_arpa(model, tmp_path / "x.arpa")
        assert_equal(read_arpa(tmp_path / "x.arpa"), model)

    @random_models
    @given(model=models(min_order=2))
    def test_kenlm_reads_it_and_scores_as_the_definition_does(self, tmp_path: Path, model: NgramModel):
        write_arpa(model, tmp_path / "x.arpa")
        config = kenlm.Config()
        config.show_progress, config.arpa_complain = False, kenlm.ARPALoadComplain.NONE
        theirs = kenlm.Model(str(tmp_path / "x.arpa"), config)
        assert theirs.order == model.order
        for text in itertools.islice(itertools.product(range(len(model.vocabulary)), repeat=3), 100):
            state, context = kenlm.State(), (1,)
            theirs.BeginSentenceWrite(state)
            for word in text:
                after = kenlm.State()
                found = theirs.BaseScore(state, model.vocabulary[word], after)
                assert found == pytest.approx(explicit_log10p(model, context, word), abs=2e-4, rel=1e-5)
                state, context = after, (*context, word)

    def test_blocks_do_not_show(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        write_arpa(read_arpa(TINY), tmp_path / "a.arpa")
        monkeypatch.setattr(arpa, "BLOCK_ROWS", 1)
        write_arpa(read_arpa(TINY), tmp_path / "b.arpa")
        assert (tmp_path / "a.arpa").read_bytes() == (tmp_path / "b.arpa").read_bytes()

    @pytest.mark.parametrize("word", ["", "a b", "a\n", "\t", "\ud800", "the"])
    def test_words_that_no_file_can_hold(self, tmp_path: Path, word: str):
        model = read_arpa(TINY)
        with pytest.raises(InvalidDataError, match="can't write"):
            write_arpa(NgramModel((*model.vocabulary[:-1], word), model.orders), tmp_path / "x.arpa")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(("value", "message"), [(np.nan, "finite"), (-np.inf, "finite"), (0.1, "positive")])
    def test_numbers_that_no_reader_takes(self, tmp_path: Path, value: float, message: str):
        model = read_arpa(TINY)
        model.orders[1].log10p[2] = value
        with pytest.raises(InvalidDataError, match=f"2-grams with .*{message}"):
            write_arpa(model, tmp_path / "x.arpa")

    def test_a_full_disk_leaves_nothing(self, tmp_path: Path):
        with pytest.raises(OutputError, match="can't write") as caught, files_of_at_most(100):
            write_arpa(read_arpa(TINY), tmp_path / "x.arpa")
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("name", sorted(path.name for path in TINY.parents[1].glob("*.arpa.gz")))
    def test_lmplzs_own_files_come_out_as_they_went_in(self, tmp_path: Path, name: str):
        """Line by line but for their order: the words are sorted here."""
        theirs = TINY.parents[1] / name
        write_arpa(read_arpa(theirs), tmp_path / "x.arpa")
        ours, expected = (tmp_path / "x.arpa").read_bytes(), gzip.decompress(theirs.read_bytes())
        assert sorted(ours.splitlines()) == sorted(expected.splitlines())


def written_numbers(values: np.ndarray) -> list[str]:
    """What stands in the lines of 1-grams with these numbers as log-probs and as back-offs; both must be the same."""
    ngrams = NgramArrays(np.zeros((len(values), 1), np.int32), values, values)
    lines = b"".join(bytes(block) for block in formatted_lines(ngrams, ["w"], with_backoff=True)).decode()
    fields = [line.split("\t") for line in lines.splitlines()]
    assert [field[0] for field in fields] == [field[2] for field in fields]
    return [field[0] for field in fields]


def assert_reads_back(values: np.ndarray) -> None:
    texts = written_numbers(values)
    back = np.array([float(text) for text in texts]).astype(np.float32)
    np.testing.assert_array_equal(back, values)
    for text, value in zip(texts, values.tolist(), strict=True):
        assert re.fullmatch(r"-?(0|[1-9]\d*)(\.\d*[1-9])?|-?[1-9](\.\d*[1-9])?e-?[1-9]\d?", text), text
        digits = text.partition("e")[0].replace("-", "").replace(".", "").strip("0")
        fewest = next(n for n in (7, 8, 9) if np.float32(f"{value:.{n - 1}e}") == np.float32(value))
        assert len(digits) <= fewest
        assert ("e" in text) == (value != 0 and not 1e-6 <= abs(float(text)) < 1e21), text


class TestNumbers:
    @random_models
    @given(values=arrays(np.float32, 300, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
    def test_any_float_reads_back_bit_for_bit(self, values: np.ndarray):
        assert_reads_back(values)

    @random_models
    @given(bits=arrays(np.uint32, 2000))
    def test_any_bit_pattern_does(self, bits: np.ndarray):
        values = bits.view(np.float32)
        assert_reads_back(values[np.isfinite(values)])

    def test_log_probs_do(self):
        random = np.random.default_rng(0)
        values = np.concatenate([-random.exponential(2, 20_000), -(10 ** random.uniform(-7, 2, 20_000))])
        assert_reads_back(values.astype(np.float32))

    def test_powers_of_two_and_ten_and_their_neighbours_do(self):
        middle = np.concatenate([np.float32(2) ** np.arange(-149, 128), np.float32(10) ** np.arange(-45, 39)])
        middle = middle.astype(np.float32)
        below, above = np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(3e38))
        assert_reads_back(np.concatenate([middle, below, above, -middle, -below, -above]))

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (-0.0, "0"),
            (-99, "-99"),
            (-100, "-100"),
            (-1, "-1"),
            (-0.30103, "-0.30103"),
            (-9.9999999, "-10"),
            (-1e-6, "-0.000001"),
            (-1e-7, "-1e-7"),
            (123456789, "123456790"),
            (1e20, "100000000000000000000"),
            (-1e21, "-1e21"),
            (np.finfo(np.float32).max, "3.4028235e38"),
        ],
    )
    def test_as_lmplz_writes_them(self, value: float, text: str):
        assert written_numbers(np.float32([value])) == [text]

    def test_a_word_longer_than_a_block(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(arpa, "BLOCK_ROWS", 1)
        ngrams = NgramArrays(np.array([[0, 1], [1, 0]], np.int32), np.float32([-1, -2]), np.float32([0, 0]))
        blocks = [bytes(block) for block in formatted_lines(ngrams, ["é" * 500, "b"], with_backoff=False)]
        assert b"".join(blocks).decode() == f"-1\t{'é' * 500} b\n-2\tb {'é' * 500}\n"

    def test_no_ngrams_no_lines(self):
        none = NgramArrays(np.zeros((0, 3), np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32))
        assert list(formatted_lines(none, ["a"], with_backoff=False)) == []
