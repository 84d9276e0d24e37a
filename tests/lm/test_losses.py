"""Losses against a frozen projection are those of autograd; the vocabulary subset holds what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lattices.errors import IncompatibleError, UnknownNameError
from lm.training import losses
from lm.training.losses import (
    VocabularySubset,
    choose_precision,
    frozen_projection,
    soft_cross_entropy,
    teacher_probabilities,
)
from lm.training.rescorer import _open_cross_entropy

SIZES = {
    "n": st.integers(0, 9),
    "v": st.integers(1, 12),
    "d": st.integers(1, 5),
    "soft": st.sampled_from([0.0, 0.5, 1.0]),
    "unknown": st.booleans(),
    "seed": st.integers(0, 1000),
}


def drawn(n: int, v: int, d: int, unknown: bool, seed: int) -> tuple[torch.Tensor, ...]:
    """States, projection, targets (some not in the vocabulary) and the teacher's probabilities."""
    torch.manual_seed(seed)
    targets = torch.randint(-1 if unknown else 0, v, (n,))
    return torch.randn(n, d), torch.randn(v, d), targets, torch.softmax(torch.randn(n, v), -1)


def plain(
    states: torch.Tensor, projection: torch.Tensor, targets: torch.Tensor, teacher: torch.Tensor, soft: float
) -> torch.Tensor:
    """The loss by its definition, in float64: the sum over the rows whose token is known."""
    v = len(projection)
    logps = torch.log_softmax(states @ projection.T, -1)
    mixed = (1 - soft) * functional.one_hot(targets.clamp(min=0), v) + soft * teacher.double()
    return -(mixed * logps).sum(-1)[targets >= 0].sum()


class TestSoftCrossEntropy:
    @settings(deadline=None, derandomize=True, max_examples=60)
    @given(**SIZES, chunk=st.integers(1, 10))
    def test_value_and_gradient_are_those_of_autograd(self, n, v, d, soft, chunk, unknown, seed):
        states, projection, targets, teacher = drawn(n, v, d, unknown, seed)
        ours = states.clone().requires_grad_()
        theirs = states.double().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(losses, "CHUNK_ROWS", chunk)
            loss = soft_cross_entropy(ours, projection, targets, teacher, soft)
        expected = plain(theirs, projection.double(), targets, teacher, soft)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        (3 * loss).backward()
        (3 * expected).backward()
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
        if soft == 0:
            torch.testing.assert_close(soft_cross_entropy(states, projection, targets, None, 0.0), loss.detach())

    @settings(deadline=None, derandomize=True, max_examples=40)
    @given(**SIZES)
    def test_a_projection_that_learns_has_the_same_loss_and_its_own_gradient(self, n, v, d, soft, unknown, seed):
        states, projection, targets, teacher = drawn(n, v, d, unknown, seed)
        ours = [states.double().requires_grad_(), projection.double().requires_grad_()]
        theirs = [states.double().requires_grad_(), projection.double().requires_grad_()]
        loss = _open_cross_entropy(*ours, targets, teacher.double(), soft)
        expected = plain(*theirs, targets, teacher, soft)
        torch.testing.assert_close(loss, expected)
        closed = soft_cross_entropy(states, projection, targets, teacher, soft)
        torch.testing.assert_close(closed.double(), loss, rtol=1e-5, atol=1e-5)
        loss.backward()
        expected.backward()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.grad, other.grad)

    def test_half_precision_of_the_products_costs_little(self):
        states, projection, targets, teacher = drawn(40, 30, 16, False, 0)
        whole = soft_cross_entropy(states, projection, targets, teacher, 0.5)
        half = soft_cross_entropy(states, projection.bfloat16(), targets, teacher.bfloat16(), 0.5)
        assert half.dtype == torch.float32 and float(half) == pytest.approx(float(whole), rel=0.02)


class TestVocabularySubset:
    TARGETS = (np.array([5, 5, 5, 2, 2, 9]), np.array([9, 9, 9, 2, 0]))

    def test_it_holds_the_frequent_tokens_and_some_others(self):
        subset = VocabularySubset(self.TARGETS, 20, 3, 4)
        assert subset.frequent.tolist() == [2, 5, 9]
        first, again, other = (subset.draw(np.random.default_rng(seed)) for seed in (0, 0, 1))
        for tokens in (first, other):
            assert tokens[:3].tolist() == [2, 5, 9] and len(set(tokens.tolist())) == 7
            assert tokens.min() >= 0 and tokens.max() < 20
        assert first.tolist() == again.tolist() != other.tolist()

    @settings(deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 1000),
        vocabulary=st.integers(1, 12),
        limit=st.none() | st.integers(1, 20),
        extra=st.integers(0, 20),
    )
    def test_the_most_frequent_ones_and_each_at_its_place(self, seed, vocabulary, limit, extra):
        rng = np.random.default_rng(seed)
        targets = rng.integers(0, vocabulary, 30)
        subset = VocabularySubset([targets[:10], targets[10:]], vocabulary, limit, extra)
        counts = np.bincount(targets, minlength=vocabulary)
        assert len(subset.frequent) == min(limit or vocabulary, vocabulary)
        left_out = np.delete(counts, subset.frequent)
        assert not len(left_out) or counts[subset.frequent].min() >= left_out.max()
        tokens = subset.draw(rng)
        assert len(set(tokens.tolist())) == len(tokens) == min(len(subset.frequent) + extra, vocabulary)
        for place, target in zip(subset.places(tokens, targets), targets, strict=True):
            assert tokens[place] == target if place >= 0 else target not in tokens

    def test_equal_counts_stand_by_lowest_id(self):
        assert VocabularySubset([np.array([7, 3, 5])], 9, 2, 0).frequent.tolist() == [3, 5]


class TestTeacher:
    @pytest.mark.parametrize("chunk", [1, 3, 512])
    def test_probabilities_over_the_rows_of_the_projection(self, monkeypatch, chunk):
        monkeypatch.setattr(losses, "CHUNK_ROWS", chunk)
        states, projection, _, _ = drawn(7, 9, 4, False, 1)
        found = teacher_probabilities(states, projection)
        torch.testing.assert_close(found, torch.softmax(states @ projection.T, -1))
        assert teacher_probabilities(states, projection.bfloat16()).dtype == torch.bfloat16

    def test_the_projection_is_the_bases_own(self, tiny_base):
        projection = frozen_projection(tiny_base, torch.float32)
        assert projection.dtype == torch.float32 and not projection.requires_grad
        torch.testing.assert_close(projection, tiny_base.output_embeddings.weight.float())

    @pytest.mark.parametrize(
        "change", [lambda x: x / 2, lambda x: 30 * torch.tanh(x / 30), lambda x: x + 1], ids=["scaled", "capped", "+"]
    )
    def test_logits_that_are_more_than_a_projection_are_refused(self, tiny_base, monkeypatch, change):
        project = tiny_base.project
        monkeypatch.setattr(tiny_base, "project", lambda hidden: change(project(hidden)))
        with pytest.raises(IncompatibleError, match="scales, caps or shifts its logits"):
            frozen_projection(tiny_base, torch.float32)


class TestPrecision:
    @pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
    def test_auto_is_what_the_machine_multiplies_natively(self, monkeypatch, native, expected):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
        assert choose_precision("auto", torch.device("cpu")) == expected
        assert choose_precision("auto", torch.device("cuda")) == torch.bfloat16
        assert choose_precision("float32", torch.device("cuda")) == torch.float32
        assert choose_precision("bfloat16", torch.device("cpu")) == torch.bfloat16

    def test_others_are_refused(self):
        with pytest.raises(UnknownNameError, match="unknown precision 'float16'; did you mean"):
            choose_precision("float16", torch.device("cpu"))
