"""Metrics of texts and short answers: known values, ranges, best of several references, names read liberally."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lattices.errors import RescoreError
from rescore.tasks.metrics import METRICS, bleu, chrf, f1, find_metric, last_word, rouge

WORDS = st.lists(st.sampled_from(["the", "cat", "sat", "mats", "a", "is", "7", "شجرة", "🙂", "e\u0301"]), max_size=8)


@pytest.mark.parametrize(
    ("output", "references", "score"),
    [
        ("the cat sat", ("The cat sat.",), 1.0),
        ("a cat", ("the cat sat",), 2 / 3),  # 1 of 1, 1 of 2 words: articles do not count
        ("cat cat", ("cat sat",), 0.5),  # the second cat is not in the reference
        ("cat", ("dog", "cat food", "cat"), 1.0),
        ("dog", ("cat",), 0.0),
        ("the", ("a",), 0.0),  # as the v1.1 script: nothing in common
        ("", ("cat",), 0.0),
    ],
)
def test_f1_is_that_of_the_squad_script(output: str, references: tuple[str, ...], score: float) -> None:
    assert f1(output, references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("output", "right"),
    [
        (" dock", True), ("dock.", True), ("\n dock's side", True), (' dock," she said', True), (" docks", False),
        (" Dock", False), (" the dock", False), ("", False), (" doc", False), (" dock7", False),
        ("dock\u0301", False),  # an accent goes on
    ],
)  # fmt: skip
def test_the_last_word_is_what_the_output_begins_with(output: str, right: bool) -> None:
    assert last_word(output, ("dock",)) == float(right)


def test_rouge_has_the_librarys_values() -> None:
    """By hand: 3 words against 4, of which 2 are a common subsequence; `cats` and `cat` have one stem."""
    assert rouge("rougeL", "cats on mats", ("the cat sat on",)) == pytest.approx(2 * 2 / (3 + 4))
    assert rouge("rouge1", "cats on mats", ("the cat sat on",)) == pytest.approx(2 * 2 / (3 + 4))
    assert rouge("rouge2", "the cat sat", ("the cat ran", "a dog")) == pytest.approx(0.5)
    assert rouge("rougeL", "x", ("y", "x")) == 1.0


def test_chrf_and_bleu_have_the_librarys_values_in_0_to_1() -> None:
    import sacrebleu

    output, reference = "the cat sat on a mat", "the cat sat on the mat"
    assert chrf(output, (reference,)) == pytest.approx(sacrebleu.sentence_chrf(output, [reference]).score / 100)
    assert bleu(output, (reference,)) == pytest.approx(sacrebleu.sentence_bleu(output, [reference]).score / 100)
    assert 0 < bleu(output, (reference,)) < chrf(output, (reference,)) < 1


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
class TestEvery:
    @given(output=WORDS, references=st.lists(WORDS, min_size=1, max_size=3))
    @settings(max_examples=30, deadline=None)
    def test_it_is_in_0_to_1_and_no_worse_with_more_references(self, metric, output, references) -> None:
        texts = tuple(" ".join(words) for words in references)
        one, all_of_them = metric.score(" ".join(output), texts[:1]), metric.score(" ".join(output), texts)
        assert 0.0 <= one <= 1.0 and 0.0 <= all_of_them <= 1.0
        if metric.name != "BLEU":  # whose closest reference length may change with another one
            assert all_of_them >= one - 1e-12

    def test_the_reference_itself_is_the_best(self, metric) -> None:
        text = "In all she sold 24 clips in 1920."
        text = {"last word": "dock", "closeness": "0 17 255 3"}.get(metric.name, text)
        assert metric.score(text, ("something else", text)) == pytest.approx(1.0)

    @pytest.mark.parametrize(
        "text", ["\x00\x07\x1b[31m", "🙂🇫🇷👩‍👩‍👧", "\u202e\u0645\u0631\u062d\u0628\u0627\u202c", "", " \n\t", "." * 50]
    )
    def test_text_of_any_kind_is_taken(self, metric, text: str) -> None:
        assert 0.0 <= metric.score(text, ("the cat", text)) <= 1.0
        assert 0.0 <= metric.score("the cat", (text,)) <= 1.0

    def test_a_long_reference_is_no_trouble(self, metric) -> None:
        assert 0.0 <= metric.score("the cat sat on the mat", ("the cat sat. " * 8000,)) <= 1.0  # 100k characters


class TestNames:
    @pytest.mark.parametrize("typed", ["ROUGE-L", "rouge_l", "rougeL", " Rouge L "])
    def test_case_and_hyphens_do_not_matter(self, typed: str) -> None:
        assert find_metric(typed).name == "ROUGE-L"

    @pytest.mark.parametrize(("typed", "near"), [("ruge_l", "ROUGE-L"), ("exactmatsch", "exact match"), ("f-2", "F1")])
    def test_an_unknown_one_gets_the_nearest(self, typed: str, near: str) -> None:
        with pytest.raises(RescoreError, match=f"unknown metric '{typed}'; did you mean '{near}'"):
            find_metric(typed)

    def test_a_strange_one_gets_all(self) -> None:
        with pytest.raises(RescoreError, match=r"known: exact match, F1, ROUGE-1, .*last word"):
            find_metric("🙂")
