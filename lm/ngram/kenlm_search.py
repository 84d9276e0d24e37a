"""Exact p-best search with a KenLM binary, whose n-grams can't be enumerated: one call of KenLM per state and word.

The same scores and order of paths as `lattices.ngram_search`, from a plain dynamic program over the last order - 1
tokens, with a beam's p-th best path as the floor and the heads alone as the bound. This bound needs log-probs of at
most 0, which a proper model has; one whose back-offs make probabilities above 1 may lose paths here.
Some hundred times slower than the automaton: for reference, and for models that come as binaries only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lattices.automaton import LN10, SCORE_SCALE
from lattices.lattice import Lattice
from lattices.ngram_search import ARC_SCALE, LOWEST_HEAD, checked_weight
from lattices.search import PBest, p_best
from lm.ngram.kenlm_model import KenlmModel

BEAM = 64
_Prefix = tuple[int, tuple[int, ...], Any]  # minus the score (so that sorting puts the best first), tokens, state


class KenlmSearch:
    """Searches lattices with a KenLM model whose words are decimal token ids; `eos_token_ids` are its `</s>`, and with
    `end_token` (a token id) a path ends where it takes that token, as in `NgramSearch`."""

    def __init__(self, model: KenlmModel, eos_token_ids: Sequence[int], *, end_token: int | None = None) -> None:
        self.model, self.end_token = model, end_token
        self._word = {token: model.sentence_end for token in eos_token_ids}

    def coverage(self, token_ids: np.ndarray) -> float:
        """Share of these tokens that the model knows."""
        tokens = np.unique(token_ids, return_counts=True)
        known = [count for token, count in zip(*tokens, strict=True) if self._of(int(token)) in self.model]
        return float(sum(known) / max(1, token_ids.size))

    def p_best_after(self, lattice: Lattice, lefts: Sequence[Sequence[int]], p: int, *, weight: float) -> PBest:
        """The p best drafts of every lattice `[n, h, k]` after its left context; see `NgramSearch.p_best`."""
        factor = checked_weight(p, weight)
        if factor == 0:
            return p_best(lattice, p)
        n, h, k = lattice.token_ids.shape
        count = min(p, k ** (h - 1))
        drafts, scores = np.zeros((n, count, h), dtype=np.int32), np.zeros((n, count), dtype=np.int64)
        heads = np.rint(np.maximum(lattice.logps, LOWEST_HEAD).astype(np.float64) * ARC_SCALE).astype(np.int64)
        for i in range(n):
            state = self.model.empty_context()
            for token in lefts[i][max(0, len(lefts[i]) - self.model.order + 1) :]:
                state = self.model.score(state, self._of(token))[1]
            found = self._search(lattice.token_ids[i].tolist(), heads[i].tolist(), state, factor, count)
            found += [found[0]] * (count - len(found))  # end-of-text leaves fewer ways than places
            for place, (minus, tokens, _) in enumerate(found):
                drafts[i, place], scores[i, place] = tokens, -minus
        return PBest(drafts, scores / ARC_SCALE)

    def _of(self, token: int) -> str:
        return self._word.get(token, str(token))

    def _search(self, ids: list[list[int]], heads: list[list[int]], state: Any, factor: int, p: int) -> list[_Prefix]:
        h, kept = len(ids), self.model.order - 1
        remaining = self._remaining(ids, heads)
        known: dict[tuple[int, tuple[int, ...]], list[tuple[int, Any]]] = {}

        def longer(prefix: _Prefix, j: int) -> list[_Prefix]:
            minus, tokens, before = prefix
            if before is None:  # after end-of-text: one way on, which costs nothing
                return [(minus, (*tokens, ids[j][0]), None)]
            key = (j, tokens[max(0, len(tokens) - kept) :])
            if key not in known:  # what KenLM says depends on these tokens only (and what stood before slot 1)
                scored = (self.model.score(before, self._of(token)) for token in ids[j])
                known[key] = [(round(log10p * LN10 * SCORE_SCALE), after) for log10p, after in scored]
            return [
                (minus - heads[j][e] - factor * score, (*tokens, ids[j][e]), None if self._ends(ids[j][e]) else after)
                for e, (score, after) in enumerate(known[key])
            ]

        first = longer((0, (), state), 0)[0]
        beam = [first]
        for j in range(1, h):
            beam = sorted((new for prefix in beam for new in longer(prefix, j)), key=_order)[: max(BEAM, p)]
        floor = beam[p - 1][0] if len(beam) >= p else None  # minus scores: more than this is out

        groups = {(first[2] is None, first[1][-kept:] if kept else ()): [first]}
        for j in range(1, h):
            grown: dict[tuple[bool, tuple[int, ...]], list[_Prefix]] = {}
            for group in groups.values():
                for prefix in group:
                    for new in longer(prefix, j):
                        ended = new[2] is None
                        if floor is None or new[0] - (0 if ended else remaining[j]) <= floor:
                            grown.setdefault((ended, new[1][max(0, len(new[1]) - kept) :]), []).append(new)
            groups = {key: sorted(group, key=_order)[:p] for key, group in grown.items()}
        return sorted((prefix for group in groups.values() for prefix in group), key=_order)[:p]

    def _ends(self, token: int) -> bool:
        return token == self.end_token

    def _remaining(self, ids: list[list[int]], heads: list[list[int]]) -> list[int]:
        """The most that the heads give from the slots behind each: all of them, or up to an end-of-text."""
        remaining = [0]
        for slot, scores in zip(ids[:0:-1], heads[:0:-1], strict=True):
            ends = [score for token, score in zip(slot, scores, strict=True) if self._ends(token)]
            remaining.insert(0, max([scores[0] + remaining[0], *ends]))
        return remaining


def _order(prefix: _Prefix) -> tuple[int, tuple[int, ...]]:
    return prefix[0], prefix[1]
