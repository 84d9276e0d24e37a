"""Replayed decode: walks a trace from position t to t + n as a decoder would, without the base LM.

For exact greedy verification this gives the live decoder's steps and accepted lengths, token for token. Examples walk
side by side, so a rescorer sees batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lattices.lattice import Lattice
from rescore.acceptance import accept
from rescore.checks import check_held_k, check_p
from rescore.rescorers.base import Context, Rescorer, check_drafts
from rescore.tracing import TracedExample


@dataclass(frozen=True)
class Steps:
    """The steps of one decode: tokens `accepted` by each, and its winning draft (h token ids, at the end of the output
    those behind it included)."""

    accepted: list[int] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)


@dataclass
class _Walk:
    example: TracedExample
    context: Context
    steps: Steps

    @property
    def position(self) -> int:
        return len(self.context.output_ids)


def replay(examples: Sequence[TracedExample], rescorer: Rescorer, *, k: int, p: int = 1) -> list[list[int]]:
    """Accepted length of every step of every example; see `replay_steps`."""
    return [steps.accepted for steps in replay_steps(examples, rescorer, k=k, p=p)]


def replay_steps(examples: Sequence[TracedExample], rescorer: Rescorer, *, k: int, p: int = 1) -> list[Steps]:
    """The steps of every example, with top-k lattices and p drafts a step.

    Raises `RescoreError` for k beyond what the trace holds, and for p < 1.
    """
    if examples:
        check_held_k(examples[0].lattice.k, k)
    check_p(p)
    walks = [_Walk(e, Context(e.prompt_ids.tolist(), future=e.output_ids), Steps()) for e in examples]
    walking = walks
    while walking:
        lattices = Lattice(
            np.stack([w.example.lattice.token_ids[w.position, :, :k] for w in walking]),
            np.stack([w.example.lattice.logps[w.position, :, :k] for w in walking]),
        )
        drafts = rescorer.draft(lattices, [w.context for w in walking], p)  # [b, p', h]
        check_drafts(drafts, lattices, p)
        choices = np.full((len(walking), drafts.shape[-1]), -1, dtype=np.int32)
        for row, walk in enumerate(walking):
            ahead = walk.example.output_ids[walk.position + 1 : walk.position + 1 + drafts.shape[-1]]
            choices[row, : len(ahead)] = ahead  # -1 behind the end: nothing matches there
        remaining = np.array([len(w.example.output_ids) - w.position for w in walking])
        rows, lengths = accept(drafts, np.broadcast_to(choices[:, None], drafts.shape), remaining, ())
        winning = np.take_along_axis(drafts, rows[:, None, None], axis=1)[:, 0].tolist()
        for walk, n, draft in zip(walking, lengths.tolist(), winning, strict=True):
            walk.context.output_ids.extend(walk.example.output_ids[walk.position : walk.position + n].tolist())
            walk.steps.accepted.append(n)
            walk.steps.drafts.append(draft)
        walking = [w for w in walking if w.position < len(w.example.output_ids)]
    return [w.steps for w in walks]


def unrescored_at(example: TracedExample, accepted: Sequence[int]) -> list[int]:
    """What the unrescored draft would have accepted at each of the positions where these steps began."""
    output, best = example.output_ids, example.lattice.token_ids[:, :, 0]  # [t], [t, h]
    lengths = []
    position = 0
    for n in accepted:
        ahead = output[position : position + best.shape[1]]
        same = best[position, : len(ahead)] == ahead
        lengths.append(len(ahead) if same.all() else max(1, int(same.argmin())))
        position += n
    return lengths
