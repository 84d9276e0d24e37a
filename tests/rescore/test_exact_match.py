"""Exact match: normalisation and maximum over references, as the official SQuAD v1.1 script has them."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rescore.tasks.metrics import EXACT_MATCH, exact_match, normalise_answer

WORDS = st.text(st.characters(codec="utf-8"), max_size=20)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Eiffel Tower", "eiffel tower"),
        ("an apple, a day", "apple day"),
        ("  two \n\t words ", "two words"),
        ("U.S.A.", "usa"),
        ("rock-'n'-roll", "rocknroll"),
        ("theatre banana", "theatre banana"),  # articles go as whole words only
        ("a.n.", ""),  # punctuation goes first and can leave an article
        ("Café “the” end", "café “ ” end"),  # only ASCII punctuation counts
        ("The", ""),
        ("", ""),
    ],
)
def test_normalisation(text: str, normalised: str) -> None:
    assert normalise_answer(text) == normalised


@given(WORDS)
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    assert normalise_answer(normalise_answer(text)) == normalise_answer(text)


@given(WORDS)
def test_case_articles_spaces_and_punctuation_do_not_matter(text: str) -> None:
    assert exact_match(f"  The {text}!? ", (text,)) == 1.0


@given(WORDS, st.lists(WORDS, max_size=4))
def test_the_best_reference_counts(output: str, others: list[str]) -> None:
    assert exact_match(output, (*others, output)) == 1.0
    assert exact_match(output, tuple(others)) == max((exact_match(output, (other,)) for other in others), default=0.0)


@given(st.text(string.ascii_lowercase, min_size=4, max_size=8))
def test_a_longer_output_is_no_match(word: str) -> None:
    assert exact_match(f"{word} and more", (word,)) == 0.0
    assert exact_match(word, (f"{word} and more",)) == 0.0


def test_without_references_nothing_matches() -> None:
    assert exact_match("", ()) == 0.0


def test_the_metric_says_its_name() -> None:
    assert EXACT_MATCH.name == "exact match"
    assert EXACT_MATCH.score("Paris.", ("paris",)) == 1.0
