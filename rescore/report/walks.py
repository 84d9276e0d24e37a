"""One example as its decodes walked it: where each step began, what it drafted, and the lattice that stood there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rescore.runs.records import ExampleRecord
from rescore.tracing import TracedExample


@dataclass(frozen=True)
class Slot:
    """One slot of a block.

    wanted: the token that the base LM chose there (None after the end of the output).
    rank: its place in the slot of the lattice, from 1 (None: not among the k).
    best: the lattice's best tokens and their probabilities (empty: the trace is gone).
    """

    wanted: int | None
    rank: int | None
    best: list[tuple[int, float]]


@dataclass(frozen=True)
class Step:
    """`tokens`: the winning draft of a step that began after `start` output tokens, of which so many were accepted."""

    start: int
    tokens: list[int]
    accepted: int


@dataclass(frozen=True)
class Walk:
    """One decode of an example whose output is `output`.

    shared: the tokens that the decode's own output begins with like it.
    """

    record: ExampleRecord
    output: Sequence[int]
    shared: int

    @property
    def differs(self) -> bool:
        """Whether the decode has another output."""
        return self.shared < max(len(self.output), len(self.record.output_ids))

    @property
    def steps(self) -> Iterator[Step]:
        """All steps in order."""
        start = 0
        for tokens, accepted in zip(self.record.drafts, self.record.accepted, strict=True):
            yield Step(start, tokens, accepted)
            start += accepted

    @property
    def shared_steps(self) -> Iterator[Step]:
        """The steps that began where the example's output has a token and the decode had not left it."""
        return (step for step in self.steps if step.start <= self.shared and step.start < len(self.output))


def walk_of(record: ExampleRecord, output: Sequence[int]) -> Walk:
    """The walk of a decode beside the output of its example."""
    pairs = zip(record.output_ids, output, strict=False)
    shortest = min(len(record.output_ids), len(output))
    return Walk(record, output, next((place for place, (own, other) in enumerate(pairs) if own != other), shortest))


def slots_at(
    output: Sequence[int], position: int, *, h: int, k: int, top: int, traced: TracedExample | None
) -> list[Slot]:
    """The h slots before output token `position`, with the `top` best of their k tokens."""
    ahead = [*output[position : position + h], *[None] * h][:h]
    if traced is None:
        return [Slot(token, None, []) for token in ahead]
    ids = traced.lattice.token_ids[position, :, :k].tolist()  # [h, k]
    probabilities = np.exp(traced.lattice.logps[position, :, : min(top, k)].astype(np.float64)).tolist()  # [h, top]
    return [
        Slot(token, slot.index(token) + 1 if token in slot else None, list(zip(slot, best, strict=False)))
        for token, slot, best in zip(ahead, ids, probabilities, strict=True)
    ]
