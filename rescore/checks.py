"""Limits of a request: a run checks them before any work, and so do the functions that may be called without one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lattices.errors import RescoreError

if TYPE_CHECKING:
    from lm.base.model import BaseLM

MAX_ALPHA = 64.0
NEAR_TIE = {"float64": 1e-6, "float32": 1e-2, "float16": 0.1, "bfloat16": 0.5}  # of logits, in this precision
VERIFY_MODES = ("tree", "batch")  # how several drafts are verified in one call


def check_p(p: int) -> None:
    """Raises `RescoreError` unless a step verifies at least one draft."""
    if p < 1:
        raise RescoreError(f"p = {p}; at least one draft must be verified (--p 1)")


def check_k(k: int, vocab_size: int | None = None) -> None:
    """Raises `RescoreError` unless 1 <= k <= `vocab_size` (None: not known yet)."""
    if k < 1:
        raise RescoreError(f"k = {k}; a lattice needs at least one token per head (--k 1)")
    if vocab_size is not None and k > vocab_size:
        raise RescoreError(f"k = {k} is outside 1 to the vocabulary's {vocab_size}; choose another --k")


def check_held_k(held: int, k: int) -> None:
    """Raises `RescoreError` unless k is within the K = `held` entries per slot of a trace."""
    if not 1 <= k <= held:
        raise RescoreError(f"k = {k}, but the trace holds the top {held} of each head; choose --k from 1 to {held}")


def check_alpha(alpha: float) -> None:
    """Raises `RescoreError` for what is no weight of a rescorer."""
    if not 0 <= alpha <= MAX_ALPHA:
        raise RescoreError(f"alpha = {alpha:g}; a rescorer's weight is from 0 to {MAX_ALPHA:g}")


def check_new_tokens(max_new_tokens: int) -> None:
    """Raises `RescoreError` unless an output may have at least one token."""
    if max_new_tokens < 1:
        raise RescoreError(f"--max-new-tokens {max_new_tokens}; at least one token must be decoded")


def check_timing(cached: Iterable[int], repeats: int) -> None:
    """Raises `RescoreError` unless calls are timed at least once, on at least one token in the cache."""
    if repeats < 1:
        raise RescoreError(f"--repeats {repeats}; it must be at least 1")
    if (least := min(cached, default=0)) < 1:
        raise RescoreError(f"--cached {least}; it must be at least 1")


def check_fits(
    base: BaseLM,
    prompt_tokens: int,
    max_new_tokens: int,
    *,
    what: str = "a prompt",
    shorter: str = "cut prompts with --max-prompt-tokens",
) -> None:
    """Raises `RescoreError` unless a prompt and its output fit into the base LM's context; `shorter`: how a prompt gets
    so."""
    if base.has_encoder and prompt_tokens > base.prompt_length:
        raise RescoreError(
            f"{what} of {prompt_tokens} tokens is longer than the {base.prompt_length} that the encoder reads; "
            f"{shorter}"
        )
    before = len(base.prefix(range(prompt_tokens)))
    if before + max_new_tokens > base.context_length:
        if base.has_encoder:  # the prompt takes no place there
            raise RescoreError(
                f"an output of {max_new_tokens} tokens does not fit into the decoder's context of "
                f"{base.context_length}; lower --max-new-tokens to {base.context_length - before}"
            )
        advice = "lower --max-new-tokens" if max_new_tokens >= base.context_length else shorter
        raise RescoreError(
            f"{what} of {prompt_tokens} tokens and {max_new_tokens} new ones do not fit into the context of "
            f"{base.context_length}; {advice}"
        )
