"""GSM8K's final answer: the last number of the output against the one behind the reference's `####`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rescore.tasks.metrics.answers import final_answer

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


def test_any_reference_will_do():
    assert final_answer("7", ("#### 8", "#### 7")) == 1.0


@given(st.text(), st.text())
def test_any_text_is_scored(output: str, reference: str):
    assert final_answer(output, (reference,)) in (0.0, 1.0)
