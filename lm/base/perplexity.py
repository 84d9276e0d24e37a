"""Perplexity of texts under a base LM: a window of the context length that moves by a stride.

Every token but a text's first is scored once. A text that fits into the window is scored in one forward. A longer one
is read in windows that begin `stride` tokens apart; each scores what the one before did not, so that every token has
at least `window - stride + 1` tokens before it, or all there are. A short stride is nearer to the true value and costs
`window / stride` forwards a token. Knows nothing about tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from lattices.errors import IncompatibleError, RescoreError
from lm.base.model import BaseLM

BATCH_TOKENS = 4096  # positions of one forward, padding included
ROWS = 512  # positions whose full-vocabulary logits are alive at a time


@dataclass(frozen=True)
class Perplexity:
    """`tokens` of `texts` scored, their summed negative log-likelihood `nll` (nats), and how they were read."""

    texts: int
    tokens: int
    nll: float
    window: int
    stride: int

    @property
    def perplexity(self) -> float:
        """exp(nll / tokens): every token counts the same, long texts more than short ones."""
        return math.exp(min(self.nll / self.tokens, 709.0))  # beyond, a float has no number


@dataclass(frozen=True)
class Window:
    """One forward of a text: inputs are tokens `start` to `end - 1`, scored are tokens `first` to `end`."""

    text: int
    start: int
    first: int
    end: int


def perplexity(
    base: BaseLM,
    texts: Sequence[str],
    *,
    stride: int | None = None,
    window: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of plain texts, tokenized as prompts without chat template are.

    `window`: input tokens of one forward (default: the base's context length), `stride` (default: half a window).
    `progress(done, total)` counts windows. Raises `RescoreError` for a window or stride out of range, and if no text
    has two tokens.
    """
    if base.has_encoder:
        raise IncompatibleError(f"{base.identity.name} has an encoder; a text alone has no perplexity by it")
    window = base.context_length if window is None else window
    if not 1 <= window <= base.context_length:
        raise RescoreError(f"--window {window}; this base LM reads 1 to {base.context_length} tokens at a time")
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise RescoreError(f"--stride {stride}; a window of {window} tokens moves by 1 to {window} of them")
    ids: list[list[int]] = [base.tokenizer(text)["input_ids"] if text else [] for text in texts]
    windows = [part for text, tokens in enumerate(ids) for part in windows_of(len(tokens), window, stride, text=text)]
    if not windows:
        raise RescoreError("no text has two tokens or more, so there is nothing to score; give other texts")
    nll, done = 0.0, 0
    for batch in _batches(windows):
        nll, done = nll + _nll(base, ids, batch), done + len(batch)
        if progress:
            progress(done, len(windows))
    return Perplexity(len(texts), sum(w.end - w.first + 1 for w in windows), nll, window, stride)


def windows_of(length: int, window: int, stride: int, *, text: int = 0) -> Iterator[Window]:
    """The windows of a text of `length` tokens, none for fewer than two; together they score tokens 1 to length - 1."""
    first = 1
    for start in range(0, length, stride):
        if first >= length:
            return
        end = min(start + window, length - 1)
        yield Window(text, start, first, end)
        first = end + 1


def _batches(windows: Sequence[Window]) -> Iterator[list[Window]]:
    """Windows of like lengths together, the longest first: a machine too small for them fails at once."""
    batch: list[Window] = []
    for part in sorted(windows, key=lambda w: w.start - w.end):
        longest = batch[0].end - batch[0].start if batch else 0
        if batch and (len(batch) + 1) * longest > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


@torch.inference_mode()
def _nll(base: BaseLM, ids: Sequence[Sequence[int]], batch: Sequence[Window]) -> float:
    """Summed negative log-likelihood of what the windows score. Padding comes last, where no token looks at it."""
    tokens = pad_sequence([torch.tensor(ids[w.text][w.start : w.end + 1]) for w in batch], batch_first=True)
    scored = torch.zeros(len(batch), tokens.shape[1] - 1, dtype=torch.bool)  # [b, longest]
    for row, w in enumerate(batch):
        scored[row, w.first - 1 - w.start : w.end - w.start] = True
    tokens, scored = tokens.to(base.device), scored.to(base.device)
    _, hidden = base.forward(tokens[:, :-1], projects=False)
    states, targets = hidden[scored], tokens[:, 1:][scored]  # [n, d], [n]
    total = 0.0
    for part, following in zip(states.split(ROWS), targets.split(ROWS), strict=True):
        logits = base.project(part).to(base.heads_dtype)
        total += float(functional.cross_entropy(logits, following, reduction="sum"))
    return total
