"""Acceptance for sampled output: whatever is drafted, tokens have the law of drawing them from the base LM one by one.

At a node the candidates for the next token, its children in the drafts, are tried in order. A *given* one (chosen
without drawing: a rescorer's, a lookup's) is accepted with the probability p that is left to it; if not, it keeps none
and the rest is scaled to 1. A *drawn* one, of the distribution q, is accepted with probability p / q; if not, p becomes
what it has more than q, scaled to 1, and q goes on without the token. Where none is accepted the next token is drawn
from what p has become; where all of a draft is accepted, from the base's distribution after it.
Sources: the rule for given candidates as in EAGLE's verification, that for drawn ones in Sequoia (Chen et al. 2024).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch

from lattices.errors import RescoreError
from rescore.acceptance.rules import Drawn, RandomSource, Rule, Said, Verdict

# input_ids (which nothing here looks at) and scores [1, vocab] -> what is drawn from, as logits [1, vocab]
Warper = Callable[[Any, torch.Tensor], torch.Tensor]


class Sampling(Rule):
    """Keeps the law of what is sampled from the base LM.

    temperature: above 0. top_k: only so many of the likeliest tokens (0: all); top_p: only the likeliest that together
    have so much. All as transformers' `generate` has them, in its order.
    seed: of all draws.
    """

    random = True
    random_source: RandomSource

    def __init__(self, temperature: float = 1.0, *, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> None:
        if not 0 < temperature < float("inf"):
            raise RescoreError(
                f"--temperature {temperature:g}; sampling needs one above 0 (without it, or with 0: greedy)"
            )
        if top_k < 0:
            raise RescoreError(f"--top-k {top_k}; give 1 or more (0: all tokens)")
        if not 0 < top_p <= 1:
            raise RescoreError(f"--top-p {top_p:g}; give a share above 0, up to 1 (all tokens)")
        if seed < 0:
            raise RescoreError(f"--sampling-seed {seed}; a seed is 0 or more")
        self.seed = seed
        given = {"temperature": temperature, "top-k": top_k or None, "top-p": top_p if top_p < 1 else None}
        # With all digits: a folder goes on with the results of this name.
        named = (f"{name} {str(value).removesuffix('.0')}" for name, value in given.items() if value is not None)
        self.name = ", ".join(named)
        self.warpers = tuple(_warpers(temperature, top_k, top_p))
        self.random_source = RandomSource(seed)

    @classmethod
    def by(cls, warpers: Sequence[Warper], *, seed: int) -> Self:
        """Draws from what transformers' warpers make of the base's logits, one after the other."""
        rule = cls(seed=seed)
        rule.warpers = tuple(warpers)
        rule.name = "transformers' sampling"
        return rule

    def started(self, *key: object) -> Self:
        fresh = copy.copy(self)
        words = np.frombuffer(hashlib.sha256(repr(key).encode()).digest(), dtype=np.uint32)
        fresh.random_source = RandomSource(self.seed, *words.tolist())
        return fresh

    def law(self, logits: torch.Tensor) -> np.ndarray:
        """What a token after logits `[vocab]` is drawn from: float64 `[vocab]`, sum 1."""
        scores = logits[None].float()
        for warper in self.warpers:
            scores = warper(None, scores)
        probs = torch.softmax(scores[0].double(), dim=-1).cpu().numpy()
        return np.asarray(probs / probs.sum())

    def first(self, logits: torch.Tensor) -> int:
        return self.random_source.draw(self.law(logits))

    def judge(
        self,
        drafts: np.ndarray,
        said: Said,
        remaining: int,
        eos_token_ids: Collection[int],
        drawn: Drawn | None = None,
    ) -> Verdict:
        alive = np.arange(len(drafts))  # the drafts that begin with what was accepted
        n = 1
        while True:
            row = int(alive[0])
            if n == remaining or drafts[row, n - 1] in eos_token_ids:
                return Verdict(row, n, -1)  # the output ends here: nothing comes after
            law = self.law(said.logits[int(said.rows[row, n - 1]), int(said.columns[row, n - 1])])
            tokens = drafts[alive, n] if n < drafts.shape[1] else np.zeros(0, dtype=np.int64)
            candidates = list(dict.fromkeys(tokens[tokens >= 0].tolist()))
            slot = (drawn.token_ids[n], drawn.probs[n]) if drawn is not None and candidates else None
            token, law = try_candidates(law, candidates, self.random_source, slot)
            if token is None:
                return Verdict(row, n, self.random_source.draw(law))
            alive = alive[tokens == token]
            n += 1


def try_candidates(
    law: np.ndarray,
    candidates: Sequence[int],
    random_source: RandomSource,
    drawn: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[int | None, np.ndarray]:
    """The accepted one of the candidates (None: none of them), and what p has become then.

    law: float64 `[vocab]`. drawn: token ids `[k]` and probabilities `[k]` that the candidates were drawn from without
    replacement, in this order; None: they are given.
    """
    q = None
    if drawn is not None:
        q = np.zeros(len(law))
        q[drawn[0]] = drawn[1]
    for token in candidates:
        if random_source.accepts(law[token], 1.0 if q is None else q[token]):
            return token, law
        if q is None:
            left = law.copy()
            left[token] = 0.0
        else:
            left = np.maximum(law - q, 0.0)
            q[token] = 0.0
            q /= q.sum() or 1.0
        # Nothing is left where it was rejected in spite of a probability of 1, but for rounding.
        law = left / left.sum() if left.any() else law
    return None, law


def _warpers(temperature: float, top_k: int, top_p: float) -> Iterator[Warper]:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if temperature != 1:
        yield TemperatureLogitsWarper(temperature)
    if top_k:
        yield TopKLogitsWarper(top_k)
    if top_p < 1:
        yield TopPLogitsWarper(top_p)
