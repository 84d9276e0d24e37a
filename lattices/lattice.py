"""The lattice: the top-k (token, log-probability) pairs of every block head, for a batch of positions.

A sausage of h slots x k tokens with k^h paths. A batch `[n, h, k]` is the normal case; one lattice is `[h, k]`. Inside
a slot log-probabilities (natural) fall, and ties stand by lowest token id. Nothing is checked when a lattice is made,
because decoding makes one per step; `validate` checks what comes from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lattices.errors import InvalidDataError, RescoreError


@dataclass(frozen=True, eq=False)
class Lattice:
    """Slots of tokens with their log-probabilities, slot 1 (the base LM's own head) first.

    `token_ids` int32 `[*, h, k]`; `logps` float32 `[*, h, k]`, natural log. Entry 0 of a slot is the head's arg-max.
    The order of entries is the order of the logits: two tokens of one slot whose log-probs only became equal when they
    were rounded to float32 keep it, whatever their ids, so that entry 0 stays the arg-max.
    """

    token_ids: np.ndarray
    logps: np.ndarray

    @property
    def h(self) -> int:
        """Slots (block heads)."""
        return int(self.token_ids.shape[-2])

    @property
    def k(self) -> int:
        """Entries per slot."""
        return int(self.token_ids.shape[-1])

    def __len__(self) -> int:
        """Positions in a batch `[n, h, k]`."""
        return len(self._batch_of(self.token_ids))

    def __getitem__(self, index: Any) -> Lattice:
        """Positions of a batch, chosen as numpy does: a number gives one lattice `[h, k]`, the rest a batch."""
        return Lattice(self._batch_of(self.token_ids)[index], self._batch_of(self.logps)[index])

    @staticmethod
    def _batch_of(array: np.ndarray) -> np.ndarray:
        if array.ndim < 3:
            raise TypeError("a single lattice [h, k] has no positions to count or choose; a batch [n, h, k] has")
        return array

    def top(self, k: int) -> Lattice:
        """The best k entries of every slot, as a view. Raises `RescoreError` unless 1 <= k <= `self.k`."""
        if not 1 <= k <= self.k:
            raise RescoreError(f"k = {k} is outside 1 to the lattice's {self.k}; choose a k in that range")
        return Lattice(self.token_ids[..., :k], self.logps[..., :k])

    def first_heads(self, h: int) -> Lattice:
        """The slots of heads 1..h, as a view. Raises `RescoreError` unless 1 <= h <= `self.h`."""
        if not 1 <= h <= self.h:
            raise RescoreError(f"h = {h} is outside 1 to the lattice's {self.h} heads; choose an h in that range")
        return Lattice(self.token_ids[..., :h, :], self.logps[..., :h, :])

    @classmethod
    def from_logits(cls, logits: np.ndarray, k: int) -> Lattice:
        """Logits `[*, h, vocab]` -> the k likeliest tokens of every slot, `[*, h, k]`.

        The log-softmax is taken in float64 and rounded to float32. Equal logits: the lowest id comes first, and gets
        in first where the k-th place cuts through them. Raises `RescoreError` unless 1 <= k <= vocab, and
        `InvalidDataError` for logits without a softmax (NaN, +inf, or a slot of nothing but -inf).
        """
        vocab_size = logits.shape[-1]
        if not 1 <= k <= vocab_size:
            raise RescoreError(f"k = {k} is outside 1 to the vocabulary's {vocab_size}; choose a smaller k")
        exact = np.asarray(logits, dtype=np.float64)  # [*, h, vocab]
        highest = exact.max(axis=-1, keepdims=True)  # [*, h, 1]
        if not np.isfinite(highest).all():
            raise InvalidDataError("the logits hold NaN, +inf or a slot of nothing but -inf; check the model's output")
        log_normaliser = highest + np.log(np.exp(exact - highest).sum(axis=-1, keepdims=True))  # [*, h, 1]
        # All below the k-th value is made equal, which sorts in no time; equals stay in the order of their ids.
        kth = np.partition(exact, vocab_size - k, axis=-1)[..., vocab_size - k, None]  # [*, h, 1]
        token_ids = np.argsort(np.where(exact < kth, np.inf, -exact), axis=-1, kind="stable")[..., :k]  # [*, h, k]
        logps = np.take_along_axis(exact, token_ids, axis=-1) - log_normaliser
        return cls(token_ids.astype(np.int32), logps.astype(np.float32))

    def validate(self, vocab_size: int) -> None:
        """Raises `InvalidDataError` for the first thing that breaks the format.

        Checked, in this order: dtypes, shapes, finite and non-positive log-probs, ids in `[0, vocab_size)`, no id
        twice in a slot, log-probs that never rise inside a slot. The order of ids under equal log-probs is not
        checked: rounding to float32 can have made them equal. The message names the first bad `[position, slot]`,
        counted from 0; a single lattice is position 0.
        """
        for name, array, dtype in (("token_ids", self.token_ids, np.int32), ("logps", self.logps, np.float32)):
            if array.dtype != dtype:
                raise InvalidDataError(f"lattice {name} are {array.dtype}; make them {np.dtype(dtype)}")
        shape = self.token_ids.shape
        if shape != self.logps.shape or len(shape) < 2 or 0 in shape[-2:]:
            raise InvalidDataError(
                f"lattice token_ids have shape {list(shape)} and logps {list(self.logps.shape)}; "
                "both must be [positions, heads, k] with at least one head and one entry"
            )
        ids, logps = self.token_ids.reshape(-1, *shape[-2:]), self.logps.reshape(-1, *shape[-2:])  # [n, h, k]
        _refuse(~np.isfinite(logps), "a log-prob is NaN or infinite", logps)
        _refuse(logps > 0, "a log-prob is positive; log-softmax the scores first", logps)
        _refuse((ids < 0) | (ids >= vocab_size), f"a token id is outside the vocabulary's 0 to {vocab_size - 1}", ids)
        in_order = np.sort(ids, axis=-1)
        _refuse(in_order[..., 1:] == in_order[..., :-1], "a token id stands twice in one slot", in_order)
        _refuse(logps[..., 1:] > logps[..., :-1], "log-probs rise; sort every slot by falling log-prob", logps[..., 1:])


def put_first(token_ids: np.ndarray, logps: np.ndarray, chosen: np.ndarray) -> None:
    """Makes the tokens `chosen` `[n]` the first of slots `[n, k]`, in place; those before move back.

    A token that was not there takes the last one's place. Log-probs must not rise inside a slot, so that of a token
    that moves to the front becomes the highest one.
    """
    for position in np.flatnonzero(token_ids[:, 0] != chosen):
        place = np.flatnonzero(token_ids[position] == chosen[position])
        end = int(place[0]) if len(place) else token_ids.shape[1] - 1
        token_ids[position, 1 : end + 1] = token_ids[position, :end].copy()
        logps[position, 1 : end + 1] = logps[position, :end].copy()
        token_ids[position, 0] = chosen[position]


def stacked_lattices(parts: Sequence[Lattice]) -> Lattice:
    """Lattices of one position, `[h, k]` each, as one `[n, h, k]`."""
    return Lattice(np.stack([p.token_ids for p in parts]), np.stack([p.logps for p in parts]))


def concatenated(parts: Sequence[Lattice]) -> Lattice:
    """Positions that follow each other, `[n_i, h, k]` each, as one lattice `[sum of n_i, h, k]`."""
    return Lattice(np.concatenate([p.token_ids for p in parts]), np.concatenate([p.logps for p in parts]))


def side_by_side(parts: Sequence[Lattice]) -> Lattice:
    """Slots that follow each other, `[n, h_i, k]` each, as one lattice `[n, sum of h_i, k]`."""
    if len(parts) == 1:
        return parts[0]
    return Lattice(np.concatenate([p.token_ids for p in parts], 1), np.concatenate([p.logps for p in parts], 1))


def _refuse(bad: np.ndarray, reason: str, values: np.ndarray) -> None:
    """Raises `InvalidDataError` naming the first true place of `bad` `[n, h, *]` and the value there."""
    if bad.any():
        position, slot, entry = np.argwhere(bad)[0]
        found = values[position, slot, entry]
        raise InvalidDataError(f"invalid lattice at [{position}, {slot}] (position, slot): {reason} (found {found})")
