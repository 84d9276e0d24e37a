"""GSM8K's final answer: the last number of the output against the one behind the reference's `####`."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rescore.tasks.metrics import final_answer, last_number

REFERENCE = "She sold 48/2 = <<48/2=24>>24 clips in May.\n#### 1,272"


@pytest.mark.parametrize(
    ("output", "score"),
    [
        ("1272", 1.0),
        ("48 + 1224 = $1,272.00.", 1.0),
        ("The answer is \\boxed{1272}.", 1.0),
        ("The answer is 1272, not 1224", 0.0),
        ("She sold 24 clips", 0.0),
        ("-1272", 0.0),
        ("no number at all", 0.0),
        ("", 0.0),
        ("٣", 0.0),  # digits that are not ASCII
    ],
)
def test_the_last_number_counts(output: str, score: float):
    assert final_answer(output, (REFERENCE,)) == score


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 42", "42"),
        ("total: 9-4", "4"),  # a minus behind a digit takes away
        ("9 - 4", "4"),
        ("(9)-4", "4"),
        ("x-4", "4"),
        ("50%-4", "4"),
        ("pages 3\u20135", "5"),
        ("it is -4", "-4"),
        ("= -4", "-4"),
        ("=-4", "-4"),
        ("(-4)", "-4"),
        ("\\boxed{-4}", "-4"),
        ("**-4**", "-4"),
        ("_-4_", "-4"),
        ("\u22124 degrees", "-4"),  # U+2212, the minus sign
        ("9\u22124", "4"),
        ("-$4", "-4"),
        ("$-4", "-4"),
        ("-\\$4", "-4"),
        ("$.50", "0.5"),
        ("-.5", "-0.5"),
        (".5", "0.5"),
        ("3.", "3"),
        ("3.0", "3"),
        ("The end.5 are left", "5"),
        ("wait ...5", "5"),
        ("7.00", "7"),
        ("1,234", "1234"),
        ("1,234.50", "1234.5"),
        ("$1,234,567.", "1234567"),
        ("1,2,3", "3"),
        ("1, 2, 3", "3"),
        ("12,34", "34"),
        ("1,2345", "2345"),
        ("5%", "5"),
        ("5kg", "5"),
        ("1e3", "1000"),
        ("2.5E-1", "0.25"),
        ("2 eggs", "2"),
        ("2e", "2"),
        ("1/2", "2"),
        ("007", "7"),
        ("1" * 400, "1" * 400),
    ],
)
def test_how_a_number_is_read(text: str, number: str):
    assert last_number(text) == Decimal(number)
    assert final_answer(text, (f"so many.\n#### {number}",)) == 1.0


@pytest.mark.parametrize("text", ["", "none", "-", "$", ".", ",", "\u0663", "\uff15", "\u00bd", "e3".replace("3", "")])
def test_no_number(text: str):
    assert last_number(text) is None
    assert final_answer(text, ("#### 0",)) == 0.0


def test_large_numbers_are_not_all_one():
    assert final_answer("1" * 400, ("2" * 400,)) == 0.0


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**9), max_value=10**9))
def test_any_number_is_found_however_it_is_written(number: Decimal):
    for written in (f"{number}", f"{number:,}", f"{number}.", f"${number:,}", f"{number}".replace("-", "\u2212")):
        assert last_number(f"3 and 4 make {written}") == number
        assert final_answer(f"3 and 4 make {written}", (f"#### {number:,}",)) == 1.0


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from("-\u2212"))
def test_a_minus_between_numbers_is_no_sign(a: int, b: int, minus: str):
    assert last_number(f"{a}{minus}{b}") == b
    assert last_number(f"{a} = {minus}{b}") == -b


def test_any_reference_will_do():
    assert final_answer("7", ("#### 8", "#### 7")) == 1.0


@given(st.text(), st.text())
def test_any_text_is_scored(output: str, reference: str):
    assert final_answer(output, (reference,)) in (0.0, 1.0)


@given(st.text(st.sampled_from("0123456789.,-+eE$%()\u2212 ax"), max_size=30))
def test_any_text_of_the_characters_of_numbers_is_read(text: str):
    number = last_number(text)
    assert (number is None) == (not any(c.isdigit() for c in text))
