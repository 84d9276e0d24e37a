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
    those after it included)."""

    accepted: list[int] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)


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
    contexts = [Context(e.prompt_ids.tolist(), future=e.output_ids) for e in examples]
    steps = [Steps() for _ in examples]
    walking = list(range(len(examples)))
    while walking:
        places = [(examples[i], len(contexts[i].output_ids)) for i in walking]
        lattices = Lattice(
            np.stack([e.lattice.token_ids[position, :, :k] for e, position in places]),
            np.stack([e.lattice.logps[position, :, :k] for e, position in places]),
        )
        drafts = rescorer.draft(lattices, [contexts[i] for i in walking], p)  # [b, p', h]
        check_drafts(drafts, lattices, p, rescorer.longest)
        h = drafts.shape[-1]
        choices = np.full((len(walking), h), -1, dtype=np.int32)  # -1 after the end: nothing matches there
        for row, (e, position) in enumerate(places):
            ahead = e.output_ids[position + 1 : position + 1 + h]
            choices[row, : len(ahead)] = ahead
        remaining = np.array([len(e.output_ids) - position for e, position in places])
        rows, lengths = accept(drafts, np.broadcast_to(choices[:, None], drafts.shape), remaining, ())
        winning = np.take_along_axis(drafts, rows[:, None, None], axis=1)[:, 0].tolist()
        for i, (e, position), n, draft in zip(walking, places, lengths.tolist(), winning, strict=True):
            contexts[i].output_ids.extend(e.output_ids[position : position + n].tolist())
            steps[i].accepted.append(n)
            steps[i].drafts.append([token for token in draft if token >= 0])
        walking = [i for i in walking if len(contexts[i].output_ids) < len(examples[i].output_ids)]
    return steps


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
