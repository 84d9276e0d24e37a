"""One example as its decodes walked it: where each step began, what it drafted, and the lattice that stood there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from rescore.runs.records import ExampleRecord, sources_of
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
    """`tokens`: the winning draft of a step that began after `start` output tokens, of which so many were accepted.

    sources: of each accepted token which drafters had proposed it (empty: one drafter, or not known).
    """

    start: int
    tokens: list[int]
    accepted: int
    sources: list[tuple[str, ...]]


@dataclass(frozen=True)
class Walk:
    """One decode of an example beside the example's output.

    drafters: specs of those that it had, where they were several (empty: one, or not known).
    shared: the tokens that the decode's own output begins with like it; differs: whether they are not all.
    steps: those that began where the decode had not left the output, nor come to its end.
    """

    drafters: tuple[str, ...]
    shared: int
    differs: bool
    steps: list[Step]


def walk_of(record: ExampleRecord, output: Sequence[int]) -> Walk:
    """The walk of a decode."""
    own = record.output_ids
    pairs = enumerate(zip(own, output, strict=False))
    shared = next((place for place, (a, b) in pairs if a != b), min(len(own), len(output)))
    starts = [0, *accumulate(record.accepted)][:-1]
    known = record.origins is not None and len(record.origins) == len(starts)
    origins = record.origins if record.origins and known else [[]] * len(starts)
    steps = [
        Step(start, tokens, accepted, [sources_of(bits) for bits in of_step])
        for start, tokens, accepted, of_step in zip(starts, record.drafts, record.accepted, origins, strict=True)
        if start <= shared and start < len(output)
    ]
    return Walk(tuple(record.alone_accepted or ()), shared, shared < max(len(own), len(output)), steps)


def slots_at(
    output: Sequence[int], position: int, *, h: int, k: int, top: int, traced: TracedExample | None
) -> list[Slot]:
    """The h slots before output token `position`, with the `top` best of their k tokens; those beyond the heads have
    none."""
    ahead = [*output[position : position + h], *[None] * h][:h]
    if traced is None:
        return [Slot(token, None, []) for token in ahead]
    ids = traced.lattice.token_ids[position, :, :k].tolist()  # [heads, k]
    probabilities = np.exp(traced.lattice.logps[position, :, : min(top, k)].astype(np.float64)).tolist()
    slots = [
        Slot(token, slot.index(token) + 1 if token in slot else None, list(zip(slot, best, strict=False)))
        for token, slot, best in zip(ahead, ids, probabilities, strict=False)
    ]
    return [*slots, *(Slot(token, None, []) for token in ahead[len(slots) :])]


@dataclass(frozen=True)
class Candidate:
    """A token that drafters proposed after some others; sources: which (`rescore.runs.records.SOURCES`).

    probability: of the head of its slot (None: the head is not among the sources).
    """

    token: int
    sources: tuple[str, ...]
    probability: float | None
