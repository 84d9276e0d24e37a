"""What the base LM reads in the verify call of a step (`rescore.decoding` makes it), alike in live decoding and replay.

That decides what a step costs (`rescore.costs`). Knows arrays only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Call(NamedTuple):
    """The call of one step.

    tokens: that the base reads in it; 0: there was none, because the step's outcome was known before it.
    drafts: different ones in it.
    heads: whether block heads were asked before it.
    """

    tokens: int
    drafts: int
    heads: bool


NO_CALL = Call(0, 0, False)


def usable_verify(verify: str, p: int, *, trees: bool) -> str:
    """`verify`, but `batch` where p drafts as a tree would need a mask that the base does not take (`trees`)."""
    return verify if p == 1 or trees else "batch"


def as_read(drafts: np.ndarray, remaining: int) -> np.ndarray:
    """Drafts `[p, l]`, -1 after the end of a shorter one, as they are verified `[p', l']`: cut to the `remaining`
    tokens of the output, each once."""
    drafts = drafts[:, : min(remaining, int((drafts >= 0).sum(axis=1).max()))]
    if len(drafts) == 1:
        return drafts
    _, firsts = np.unique(drafts, axis=0, return_index=True)
    return drafts[np.sort(firsts)]


def sizes(drafts: np.ndarray, remaining: np.ndarray, verify: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and different drafts in the call of each of n steps, int `[n]` each, without making the call.

    drafts `[n, p, l]` and remaining `[n]`: of each step as for `as_read`. A tree has a token for each different prefix
    of a draft (`lattices.prefix_tree`); in a batch every draft is as long as the longest.
    """
    drafts = np.where(np.arange(drafts.shape[2]) < remaining[:, None, None], drafts, -1)
    order = np.lexsort(np.moveaxis(drafts, 2, 0)[::-1], axis=-1)  # [n, p]: prefixes that are the same come together
    drafts = np.take_along_axis(drafts, order[:, :, None], axis=1)
    new = np.ones(drafts.shape, dtype=bool)  # a prefix that the draft before does not have
    np.logical_or.accumulate(drafts[:, 1:] != drafts[:, :-1], axis=2, out=new[:, 1:])
    different = new[:, :, -1].sum(axis=1)
    is_token = drafts >= 0
    if verify == "batch":
        return different * is_token.sum(axis=2).max(axis=1), different
    return (new & is_token).sum(axis=(1, 2)), different
