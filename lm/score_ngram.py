"""Perplexity of a text under an n-gram model, with the counts that say what it is worth: unknown words, n-gram lengths.

Knows nothing about files. A model is anything with `begin_sentence` and `score(state, word)`, the protocol that
pyctcdecode has for its language models: `lm.kenlm_model.KenlmModel` with words as strings or ids, an automaton through
`AutomatonScorer` with its word ids. The numbers are those of KenLM's `query`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from lattices.errors import RescoreError
from lattices.ngrams import SENTENCE_END, UNKNOWN

WordT = TypeVar("WordT")
WordC = TypeVar("WordC", contravariant=True)


class NgramScorer(Protocol[WordC]):
    """A model that reads a sentence word by word; states are its own and never change."""

    @property
    def sentence_end(self) -> Any:
        """The word `</s>`."""

    def begin_sentence(self) -> Any:
        """The state behind `<s>`."""

    def score(self, state: Any, word: WordC, /) -> tuple[float, Any]:
        """log10 probability of `word` behind `state`, and the state behind `word`."""

    def is_unknown(self, word: WordC, /) -> bool:
        """Whether `word` is scored as `<unk>`."""


@runtime_checkable
class LengthScorer(Protocol):
    """A model that also tells how long the n-gram was that gave the probability (1 to `order`)."""

    order: int

    def full_score(self, state: Any, word: Any, /) -> tuple[float, int, Any]:
        """log10 probability, length of the n-gram, next state."""


class Automaton(Protocol):
    """What `AutomatonScorer` needs of `lattices.automaton`."""

    def start(self) -> int:
        """The state behind `<s>`."""

    def advance(self, state: int, word: int, /) -> tuple[float, int]:
        """log10 probability of a word id behind a state, and the next state."""


@dataclass(frozen=True)
class AutomatonScorer:
    """An automaton as an `NgramScorer` of word ids; 0 is unknown, and what `is_unknown_id` says besides."""

    automaton: Automaton
    is_unknown_id: Callable[[int], bool] | None = None

    @property
    def sentence_end(self) -> int:
        return SENTENCE_END

    def begin_sentence(self) -> int:
        return self.automaton.start()

    def score(self, state: int, word: int, /) -> tuple[float, int]:
        return self.automaton.advance(state, word)

    def is_unknown(self, word: int, /) -> bool:
        return word == UNKNOWN or (self.is_unknown_id is not None and self.is_unknown_id(word))


@dataclass(frozen=True)
class NgramScore:
    """What a text scores. Tokens are its words and, if they were scored, one `</s>` a sentence.

    `log10p` is the sum over all `tokens`, `log10p_unknown` the part of the `unknown` ones. `hits[n - 1]` tokens had
    their probability from an n-gram (None: the model does not tell).
    """

    sentences: int
    tokens: int
    unknown: int
    log10p: float
    log10p_unknown: float
    hits: tuple[int, ...] | None

    @property
    def perplexity(self) -> float:
        """10 ** (-log10p / tokens): unknown words count with the probability of `<unk>`; nan without tokens."""
        return _perplexity(self.log10p, self.tokens)

    @property
    def perplexity_known(self) -> float:
        """The perplexity without the unknown words' part (they stay in the contexts); nan if all are unknown."""
        return _perplexity(self.log10p - self.log10p_unknown, self.tokens - self.unknown)

    @property
    def unknown_share(self) -> float:
        """Unknown tokens / tokens; nan without tokens."""
        return self.unknown / self.tokens if self.tokens else math.nan


def score_text(model: NgramScorer[WordT], sequences: Iterable[Sequence[WordT]], *, end: bool = True) -> NgramScore:
    """Scores every sequence as a sentence behind `<s>`, followed by `</s>` unless `end` is False.

    Words are what the model takes (strings or ids). An empty sequence is a sentence of `</s>` alone, as in KenLM's
    `query`. Raises `RescoreError` if there is no sequence at all.
    """
    with_lengths = model if isinstance(model, LengthScorer) else None
    hits = [0] * (with_lengths.order if with_lengths is not None else 0)
    sentences = tokens = unknown = 0
    log10p = log10p_unknown = 0.0
    for sequence in sequences:
        sentences += 1
        state = model.begin_sentence()
        for position, word in enumerate([*sequence, model.sentence_end] if end else sequence):
            if with_lengths is not None:
                token_log10p, length, state = with_lengths.full_score(state, word)
                hits[length - 1] += 1
            else:
                token_log10p, state = model.score(state, word)
            tokens += 1
            log10p += token_log10p
            if position < len(sequence) and model.is_unknown(word):  # the final </s> is never counted as unknown
                unknown += 1
                log10p_unknown += token_log10p
    if not sentences:
        raise RescoreError("there is no text to score; give at least one line")
    return NgramScore(sentences, tokens, unknown, log10p, log10p_unknown, tuple(hits) or None)


def _perplexity(log10p: float, tokens: int) -> float:
    if not tokens:
        return math.nan
    exponent = -log10p / tokens
    return math.inf if exponent > 300.0 else 10.0**exponent
