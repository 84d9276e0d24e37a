"""`lookup`: what followed the last tokens earlier in the prompt and the output so far (prompt lookup); no weights.

The heads' lattice gives only the token that the base has chosen already. Continuations of the longest match come first,
of equally long ones the most recent. With `first` the earliest one of the longest match is taken, as the prompt lookup
of transformers does it (`lookup:most=2,tokens=10,first=true` are its defaults).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lattices.errors import RescoreError
from lattices.joined.lookup import NONE, Lookup
from lattices.lattice import Lattice
from rescore.rescorers.base import Context, Rescorer

TOKENS = 16
MATCHED = 32


class PromptLookup(Rescorer):
    """See `rescore.rescorers.base.Rescorer`.

    tokens: of a draft after the base's own, at most; least, most: tokens of a match.
    first: take the earliest occurrence instead of the most recent one.
    """

    def __init__(self, *, tokens: int = TOKENS, least: int = 1, most: int = MATCHED, first: bool = False) -> None:
        if tokens < 1 or not 1 <= least <= most:
            raise RescoreError("lookup: give tokens of 1 or more, and matches of least to most tokens, 1 or more")
        self.tokens, self.least, self.most, self.first = tokens, least, most, first
        self.longest = tokens + 1
        self.identity = f"lookup {tokens} {least} {most} {first}"

    def prefill(self, contexts: Sequence[Context]) -> None:
        """See `Rescorer.prefill`."""
        for context in contexts:
            lookup_of(context)

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        """See `Rescorer.draft`."""
        firsts = lattices.token_ids[:, 0, 0]
        each = [self._draft(lookup_of(context), int(first), p) for context, first in zip(contexts, firsts, strict=True)]
        return stacked(each)

    def _draft(self, lookup: Lookup, first: int, p: int) -> np.ndarray:
        how = {"length": self.tokens, "least": self.least, "most": self.most}
        runs, matches = lookup.continuations([first], count=p, **how)
        if self.first and len(runs):
            # Of the longest match all occurrences, the earliest last.
            every, lengths = lookup.continuations([first], count=len(lookup), **how)
            runs = every[lengths == matches[0]][::-1][:p]
        drafts = np.full((max(1, len(runs)), 1 + self.tokens), NONE, dtype=np.int32)
        drafts[:, 0] = first
        drafts[: len(runs), 1:] = runs
        return drafts


def lookup_of(context: Context) -> Lookup:
    """The suffix automaton of prompt and output so far, grown on from where it was at the step before."""
    lookup: Lookup = context.state.setdefault("lookup", Lookup())
    if not len(lookup):
        lookup.extend(context.prompt_ids)
    lookup.extend(context.output_ids[len(lookup) - len(context.prompt_ids) :])
    return lookup


def stacked(drafts: Sequence[np.ndarray]) -> np.ndarray:
    """Drafts `[p_i, l_i]` of n examples as one array `[n, p, l]`: `NONE` after the ends, the first draft again where an
    example has fewer."""
    p, length = max(len(each) for each in drafts), max(each.shape[1] for each in drafts)
    whole = np.full((len(drafts), p, length), NONE, dtype=np.int32)
    for rows, each in zip(whole, drafts, strict=True):
        rows[:, : each.shape[1]] = each[0]
        rows[: len(each), : each.shape[1]] = each
    return whole
