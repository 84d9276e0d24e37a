"""Perplexity with a stride, in float64 against one forward for each token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lattices.errors import RescoreError
from lm.base import perplexity as perplexity_module
from lm.base.model import BaseLM
from lm.base.perplexity import perplexity, windows_of

TEXTS = ["In my palm is a clear stone.", "", "x", "ab", "שלום 🙂 \x07", "In my palm " * 4, "a b c d e f g"]


def brute_force(base: BaseLM, texts: list[str], window: int, stride: int) -> tuple[int, float]:
    """Tokens and their summed negative log-likelihood: each from a forward of just what its window shows before it."""
    tokens, nll = 0, 0.0
    for text in texts:
        ids = base.tokenizer(text)["input_ids"]
        start = 0
        for place in range(1, len(ids)):
            while place > start + window:  # the window moves on when the token lies beyond what it scores
                start += stride
            logits, _ = base.forward(torch.tensor([ids[start:place]], device=base.device))
            nll -= float(torch.log_softmax(logits[0, -1].double(), dim=-1)[ids[place]])
            tokens += 1
    return tokens, nll


@pytest.mark.parametrize(("window", "stride"), [(512, 256), (8, 8), (8, 3), (8, 1), (1, 1), (5, 4)])
@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_it_is_what_single_forwards_give(tiny_base: BaseLM, window, stride, batch_tokens, monkeypatch) -> None:
    monkeypatch.setattr(perplexity_module, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(perplexity_module, "ROWS", 7)
    tokens, nll = brute_force(tiny_base, TEXTS, window, stride)
    found = perplexity(tiny_base, TEXTS, window=window, stride=stride)
    assert (found.texts, found.tokens, found.window, found.stride) == (7, tokens, window, stride)
    assert found.nll == pytest.approx(nll, rel=1e-10)
    assert found.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-10)


def test_every_token_counts_the_same(tiny_base: BaseLM) -> None:
    one, other = (perplexity(tiny_base, [text]) for text in (TEXTS[0], TEXTS[5]))
    both = perplexity(tiny_base, [TEXTS[0], TEXTS[5]])
    assert (both.tokens, both.nll) == (one.tokens + other.tokens, pytest.approx(one.nll + other.nll, rel=1e-12))


def test_the_context_length_and_half_of_it_by_default(tiny_base: BaseLM) -> None:
    found = perplexity(tiny_base, TEXTS)
    assert (found.window, found.stride) == (512, 256)


@given(length=st.integers(0, 60), window=st.integers(1, 20), data=st.data())
def test_windows_score_every_token_but_the_first_once(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    found = list(windows_of(length, window, stride))
    assert [place for w in found for place in range(w.first, w.end + 1)] == list(range(1, length))
    for w in found:
        assert 0 <= w.start < w.first <= w.end and w.end - w.start <= window
        assert w.first - w.start >= min(w.first, window - stride + 1), "so much is known of every token's left"


def test_progress_counts_windows(tiny_base: BaseLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity_module, "BATCH_TOKENS", 1)
    seen: list[tuple[int, int]] = []
    perplexity(tiny_base, ["x" * 10, "y" * 3], window=4, stride=4, progress=lambda *what: seen.append(what))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "--window 0; this base LM reads 1 to 512 tokens"),
        ({"window": 513}, "--window 513; this base LM reads 1 to 512 tokens"),
        ({"window": 8, "stride": 9}, "--stride 9; a window of 8 tokens moves by 1 to 8"),
        ({"stride": 0}, "--stride 0; a window of 512 tokens"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(tiny_base: BaseLM, options: dict[str, int], message: str) -> None:
    with pytest.raises(RescoreError, match=message):
        perplexity(tiny_base, TEXTS, **options)


@pytest.mark.parametrize("texts", [[], ["", "x"]])
def test_nothing_to_score_is_told(tiny_base: BaseLM, texts: list[str]) -> None:
    with pytest.raises(RescoreError, match="no text has two tokens or more"):
        perplexity(tiny_base, texts)
