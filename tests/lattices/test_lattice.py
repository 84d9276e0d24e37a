"""The lattice: its cuts, how it is made from logits, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lattices.errors import InvalidDataError, RescoreError
from lattices.lattice import Lattice

VOCAB = 20


@pytest.fixture
def batch() -> Lattice:
    return Lattice.from_logits(np.random.default_rng(0).normal(size=(4, 3, VOCAB)), 5)


def test_shape_and_dtypes(batch: Lattice) -> None:
    assert (len(batch), batch.h, batch.k) == (4, 3, 5)
    assert batch.token_ids.dtype == np.int32
    assert batch.logps.dtype == np.float32
    assert batch.token_ids.shape == batch.logps.shape == (4, 3, 5)


def test_top_keeps_the_best_entries_of_every_slot(batch: Lattice) -> None:
    cut = batch.top(2)
    assert (len(cut), cut.h, cut.k) == (4, 3, 2)
    np.testing.assert_array_equal(cut.token_ids, batch.token_ids[:, :, :2])
    np.testing.assert_array_equal(cut.logps, batch.logps[:, :, :2])


def test_first_heads_keeps_the_first_slots(batch: Lattice) -> None:
    cut = batch.first_heads(2)
    assert (len(cut), cut.h, cut.k) == (4, 2, 5)
    np.testing.assert_array_equal(cut.token_ids, batch.token_ids[:, :2])


@pytest.mark.parametrize("size", [0, -1, 6])
def test_cuts_outside_the_lattice_are_refused_on_one_line(batch: Lattice, size: int) -> None:
    for cut, name in ((batch.top, "k"), (batch.first_heads, "h")):
        with pytest.raises(RescoreError, match=f"{name} = {size} is outside 1 to") as caught:
            cut(size)
        assert "\n" not in str(caught.value)


def test_a_number_gives_one_lattice_and_the_rest_a_batch(batch: Lattice) -> None:
    assert batch[1].token_ids.shape == (3, 5)
    assert len(batch[1:3]) == 2
    assert len(batch[np.array([3, 0, 0])]) == 3
    np.testing.assert_array_equal(batch[np.array([False, True, False, True])].logps, batch.logps[[1, 3]])


def test_a_single_lattice_has_no_positions(batch: Lattice) -> None:
    assert (batch[0].h, batch[0].top(2).k, batch[0].first_heads(1).h) == (3, 2, 1)
    with pytest.raises(TypeError):
        len(batch[0])
    with pytest.raises(TypeError):
        batch[0][0]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.data())
def test_from_logits_is_the_sorted_log_softmax_with_ties_by_lowest_id(data: st.DataObject) -> None:
    n, h, vocab = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    k = data.draw(st.integers(1, vocab))
    few_values = st.lists(st.sampled_from([-2.0, 0.0, 1.5]), min_size=n * h * vocab, max_size=n * h * vocab)
    logits = np.array(data.draw(few_values)).reshape(n, h, vocab)
    lattice = Lattice.from_logits(logits, k)
    lattice.validate(vocab)
    for i in range(n):
        for slot in range(h):
            row = logits[i, slot]
            expected = [token for _, token in sorted(zip(-row, range(vocab), strict=True))[:k]]
            assert lattice.token_ids[i, slot].tolist() == expected
            exact = row[expected] - np.log(np.exp(row).sum())
            np.testing.assert_allclose(lattice.logps[i, slot], exact, rtol=1e-6, atol=1e-7)


def test_from_logits_takes_one_lattice_and_masked_tokens() -> None:
    lattice = Lattice.from_logits(np.array([[-np.inf, 0.0, 0.0, 1000.0]], dtype=np.float32), 3)
    assert lattice.token_ids.tolist() == [[3, 1, 2]]
    assert lattice.logps.tolist() == [[0.0, -1000.0, -1000.0]]


def test_from_logits_keeps_the_arg_max_first_where_rounding_makes_log_probs_equal() -> None:
    logits = np.zeros((1, 60_000))
    logits[0, 500] = 1e-9  # lost in a float32 log-prob of -11
    lattice = Lattice.from_logits(logits, 2)
    assert lattice.logps[0, 0] == lattice.logps[0, 1]
    assert lattice.token_ids.tolist() == [[500, 0]]
    lattice.validate(60_000)


@pytest.mark.parametrize("k", [0, VOCAB + 1])
def test_from_logits_refuses_k_outside_the_vocabulary(k: int) -> None:
    with pytest.raises(RescoreError, match=f"k = {k} is outside 1 to the vocabulary's {VOCAB}"):
        Lattice.from_logits(np.zeros((2, VOCAB)), k)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_from_logits_refuses_what_has_no_softmax(value: float) -> None:
    logits = np.zeros((2, VOCAB))
    logits[1, 3] = value
    with pytest.raises(InvalidDataError, match="check the model's output"):
        Lattice.from_logits(logits, 2)


def test_validate_accepts_a_good_lattice(batch: Lattice) -> None:
    batch.validate(VOCAB)
    batch[0].validate(VOCAB)
    batch[:0].validate(VOCAB)


@pytest.mark.parametrize(
    ("field", "entry", "value", "reason"),
    [
        ("logps", 1, np.nan, "NaN or infinite"),
        ("logps", 4, -np.inf, "NaN or infinite"),
        ("logps", 0, 0.5, "positive"),
        ("logps", 4, 0.0, "log-probs rise"),
        ("token_ids", 2, VOCAB, "outside the vocabulary's 0 to 19"),
        ("token_ids", 2, -1, "outside the vocabulary's 0 to 19"),
        ("token_ids", 2, None, "twice in one slot"),
    ],
)
def test_validate_names_the_first_bad_position_and_slot(
    batch: Lattice, field: str, entry: int, value: float | None, reason: str
) -> None:
    array = getattr(batch, field).copy()
    for position, slot in ((2, 1), (2, 2), (3, 0)):
        array[position, slot, entry] = array[position, slot, 0] if value is None else value
    with pytest.raises(InvalidDataError) as caught:
        replace(batch, **{field: array}).validate(VOCAB)
    assert "[2, 1] (position, slot)" in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_validate_refuses_wrong_dtypes_and_shapes(batch: Lattice) -> None:
    with pytest.raises(InvalidDataError, match="token_ids are int64; make them int32"):
        replace(batch, token_ids=batch.token_ids.astype(np.int64)).validate(VOCAB)
    with pytest.raises(InvalidDataError, match="logps are float64; make them float32"):
        replace(batch, logps=batch.logps.astype(np.float64)).validate(VOCAB)
    for ids, logps in (
        (batch.token_ids, batch.logps[:, :2]),
        (batch.token_ids[0, 0], batch.logps[0, 0]),
        (batch.token_ids[:, :, :0], batch.logps[:, :, :0]),
    ):
        with pytest.raises(InvalidDataError, match=r"must be \[positions, heads, k\]"):
            Lattice(ids, logps).validate(VOCAB)
