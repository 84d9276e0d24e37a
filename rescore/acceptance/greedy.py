"""The greedy rule, for live decoding and for replay.

The first token of a draft is the base LM's own choice from the call before, so it is always accepted ([B] section 4).
A later token is accepted while it equals what the base chooses after the tokens before it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import zip_longest

import numpy as np

from rescore.acceptance.rules import Drawn, Rule, Said, Verdict


def accept(
    drafts: np.ndarray, choices: np.ndarray, remaining: np.ndarray, eos_token_ids: Iterable[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The winning draft and its accepted length n, 1 <= n <= h, for each of b blocks.

    drafts int `[b, p, h]`, -1 after the end of a shorter one; choices int `[b, p, h]`: the base's greedy token after
    draft token j and all before it (anything where the tokens before are wrong); remaining int `[b]`: tokens that the
    output may still grow by. Nothing follows end-of-text. Returns `[b]` and `[b]`; of equal lengths the first wins.
    """
    ended = np.isin(drafts[..., :-1], list(eos_token_ids))
    match = (drafts[..., 1:] == choices[..., :-1]) & (drafts[..., 1:] >= 0) & ~ended
    lengths = 1 + np.cumprod(match, axis=-1).sum(axis=-1)  # [b, p]
    lengths = np.minimum(lengths, remaining[:, None])
    rows = lengths.argmax(axis=-1)
    return rows, np.take_along_axis(lengths, rows[:, None], axis=-1)[:, 0]


class Greedy(Rule):
    """See `rescore.acceptance.rules.Rule`: the output is greedy decoding's."""

    name = "greedy"

    def judge(
        self,
        drafts: np.ndarray,
        said: Said,
        remaining: int,
        eos_token_ids: Collection[int],
        drawn: Drawn | None = None,
    ) -> Verdict:
        """See `Rule.judge`."""
        rows, lengths = accept(drafts[None], said.choices[None], np.array([remaining]), eos_token_ids)
        row, n = int(rows[0]), int(lengths[0])
        return Verdict(row, n, int(said.choices[row, n - 1]))


def first_difference(output_ids: Iterable[int], reference_ids: Iterable[int]) -> int | None:
    """Position of the first token that differs (or is missing on one side); None if both are the same."""
    pairs = enumerate(zip_longest(output_ids, reference_ids))
    return next((place for place, (a, b) in pairs if a != b), None)
