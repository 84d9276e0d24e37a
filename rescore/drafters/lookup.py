"""`lookup`: what followed the last tokens earlier in the prompt and the output so far (prompt lookup); no weights.

Continuations of the longest match come first, of equally long ones the most recent. With `first` the earliest one of
the longest match is taken, as the prompt lookup of transformers does it (`lookup:most=2,tokens=10,first=true` are its
defaults).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lattices.joined.lookup import Lookup
from lattices.joined.sources import LOOKUP
from rescore.drafters.base import Continuations, TextDrafter, check_lengths
from rescore.rescorers.base import Context

TOKENS = 16
MATCHED = 32


class PromptLookup(TextDrafter):
    """Proposes what followed the last tokens where they stood before, in the prompt or the output.

    tokens: of a draft after the base's own, at most; least, most: tokens of a match.
    first: take the earliest occurrence instead of the most recent one.
    """

    kind = LOOKUP
    in_context = True

    def __init__(self, *, tokens: int = TOKENS, least: int = 1, most: int = MATCHED, first: bool = False) -> None:
        check_lengths("lookup", tokens, least, most)
        self.tokens, self.least, self.most, self.first = tokens, least, most, first
        self.longest = tokens + 1
        self.identity = f"lookup {tokens} {least} {most} {first}"

    def prefill(self, contexts: Sequence[Context]) -> None:
        for context in contexts:
            lookup_of(context)

    def continuations(self, contexts: Sequence[Context], firsts: np.ndarray, count: int) -> list[Continuations]:
        return [self._after(lookup_of(c), int(first), count) for c, first in zip(contexts, firsts, strict=True)]

    def _after(self, lookup: Lookup, first: int, count: int) -> Continuations:
        how = {"length": self.tokens, "least": self.least, "most": self.most}
        runs, matches = lookup.continuations([first], count=count, earliest=self.first, **how)
        return Continuations(runs, np.zeros(runs.shape, dtype=np.float32), int(matches[0]) if len(matches) else 0)


def lookup_of(context: Context) -> Lookup:
    """The suffix automaton of prompt and output so far, grown on from where it was at the step before."""
    lookup: Lookup = context.state.setdefault("lookup", Lookup())
    lookup.extend(context.since(len(lookup)))
    return lookup
