"""Replayed decode: walks a trace from position t to t + n as a decoder would, without the base LM.

For exact greedy verification this gives the live decoder's steps and accepted lengths, token for token. Examples walk
side by side, so a rescorer sees batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lattices.lattice import Lattice
from rescore.acceptance import accept
from rescore.calls import NO_CALL, Call, sizes
from rescore.checks import check_held_k, check_p
from rescore.drafters.base import Drafter
from rescore.drafters.drafting import HEADS_ALONE, Drafting
from rescore.drafters.proposals import Proposals
from rescore.rescorers.base import Context, Rescorer
from rescore.tracing import TracedExample, TraceHeader

if TYPE_CHECKING:
    from rescore.acceptance.lossy import OfLikeliest

UNLIMITED = 1 << 30
Drafted = Mapping[str, Mapping[str, Lattice]]  # by drafter, by example: lattices [t, h, K] beside those of the trace


NOT_KNOWN = -1 << 30  # stands for a token, far from any


@dataclass
class Steps:
    """The steps of one decode: tokens `accepted` by each, its winning draft (at the end of the output the tokens after
    it included), and the call that would verify its drafts.

    diverged: tokens that the last step keeps at least by a lossy rule (`OfLikeliest.diverges`), where it is the first
    one to keep one that greedy decoding would not; None: there is no such step, or no such rule.
    """

    accepted: list[int] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    diverged: int | None = None


@dataclass(frozen=True)
class Limits:
    """How a decode comes to its end, which the calls of its last steps depend on.

    max_new_tokens: of an output; None: not known.
    """

    eos_token_ids: tuple[int, ...] = ()
    max_new_tokens: int | None = None

    @classmethod
    def of(cls, header: TraceHeader) -> Limits:
        """As a trace was recorded; one that was made elsewhere need not say its limit."""
        limit = header.settings.get("max_new_tokens")
        return cls(tuple(header.eos_token_ids), limit if isinstance(limit, int) else None)

    def remaining(self, example: TracedExample, position: int) -> int:
        """How many tokens an output may still grow by: where the limit is not known, no more than it has, unless it
        ended by itself."""
        output = example.output_ids
        if self.max_new_tokens is not None:
            return max(self.max_new_tokens, len(output)) - position
        return UNLIMITED if int(output[-1]) in self.eos_token_ids else len(output) - position


def replay(
    examples: Sequence[TracedExample],
    rescorer: Rescorer,
    *,
    k: int,
    p: int = 1,
    drafters: Sequence[Drafter] = HEADS_ALONE,
    drafted: Drafted | None = None,
) -> list[list[int]]:
    """Accepted length of every step of every example; see `replay_steps`."""
    drafting = Drafting(rescorer, drafters, k, p)
    return [steps.accepted for steps in replay_steps(examples, drafting, drafted)]


def replay_steps(
    examples: Sequence[TracedExample],
    drafting: Drafting,
    drafted: Drafted | None = None,
    *,
    verify: str = "tree",
    limits: Limits | None = None,
    rule: OfLikeliest | None = None,
) -> list[Steps]:
    """The steps of every example; `drafted`: what drafters that run a model of their own gave at every position.

    verify: as `rescore.decoding.decode` takes it; it and the limits decide the calls, and what a rule may keep.
    rule: the steps end with the first one in which it keeps a token that greedy decoding would not. All that is
    `accepted` is by greedy acceptance, which up to there is the rule's as well.
    Raises `RescoreError` for k beyond what the trace holds, and for p < 1.
    """
    if examples and drafting.heads:
        check_held_k(examples[0].lattice.k, drafting.k)
    check_p(drafting.p)
    contexts, limits = contexts_of(examples, drafted), limits or Limits()
    steps = [Steps() for _ in examples]
    walking = list(range(len(examples)))
    while walking:
        places = [(examples[i], len(contexts[i].output_ids)) for i in walking]
        firsts = np.array([e.output_ids[position] for e, position in places])
        at = [contexts[i] for i in walking]
        proposals = drafting.propose(at, firsts)
        drafts = drafting.choose(proposals, at)  # [b, p', l]
        length = drafts.shape[-1]
        choices = np.full((len(walking), length), -1, dtype=np.int32)  # -1 after the end: nothing matches there
        for row, (e, position) in enumerate(places):
            ahead = e.output_ids[position + 1 : position + 1 + length]
            choices[row, : len(ahead)] = ahead
        remaining = np.array([len(e.output_ids) - position for e, position in places])
        rows, lengths = accept(drafts, np.broadcast_to(choices[:, None], drafts.shape), remaining, ())
        winning = np.take_along_axis(drafts, rows[:, None, None], axis=1)[:, 0].tolist()
        calls = _calls(drafts, proposals, [limits.remaining(*place) for place in places], verify, limits)
        if rule is not None:
            for i, (e, position), of_step in zip(walking, places, drafts, strict=True):
                said, left = _Along(e, position, length), limits.remaining(e, position)
                steps[i].diverged = rule.diverges(of_step, said, left, limits.eos_token_ids)
        for i, (e, position), n, draft, call in zip(walking, places, lengths.tolist(), winning, calls, strict=True):
            contexts[i].output_ids.extend(e.output_ids[position : position + n].tolist())
            steps[i].accepted.append(n)
            steps[i].drafts.append([token for token in draft if token >= 0])
            steps[i].calls.append(call)
        walking = [
            i
            for i in walking
            if len(contexts[i].output_ids) < len(examples[i].output_ids) and steps[i].diverged is None
        ]
    return steps


@dataclass(frozen=True)
class _Along:
    """What the base says after the tokens of drafts of some length at a position, as long as they are the output's; see
    `rescore.acceptance.rules.Likeliest`."""

    example: TracedExample
    position: int
    length: int

    @property
    def choices(self) -> np.ndarray:
        """`[1, l]`."""
        return self._ahead(self.example.output_ids)[None]

    def best(self, k: int) -> np.ndarray:
        """`[1, l, k]`."""
        return self._ahead(self.example.lattice.token_ids[:, 0, :k])[None]

    def _ahead(self, of_positions: np.ndarray) -> np.ndarray:
        ahead = of_positions[self.position + 1 : self.position + 1 + self.length]
        after_end = np.full((self.length - len(ahead), *ahead.shape[1:]), NOT_KNOWN)
        return np.concatenate([ahead, after_end])


def _calls(
    drafts: np.ndarray, proposals: Proposals, remaining: Sequence[int], verify: str, limits: Limits
) -> list[Call]:
    """The calls of steps with these drafts `[n, p, l]`."""
    left = np.array(remaining)
    known = (left == 1) | np.isin(proposals.firsts, limits.eos_token_ids)  # see `rescore.decoding.decode`
    told = [each.tolist() for each in (*sizes(drafts, left, verify), proposals.heads_asked, known)]
    return [NO_CALL if no_call else Call(*call) for *call, no_call in zip(*told, strict=True)]


def contexts_of(examples: Sequence[TracedExample], drafted: Drafted | None = None) -> list[Context]:
    """What stands before the first position of traced examples; it knows all lattices that are to come."""
    contexts = []
    for example in examples:
        context = Context(example.prompt_ids.tolist(), future=example.output_ids)
        known = {"heads": example.lattice, **{name: of[example.id] for name, of in (drafted or {}).items()}}
        context.lattices = {name: partial(_lattice_at, lattice, context) for name, lattice in known.items()}
        contexts.append(context)
    return contexts


def _lattice_at(lattices: Lattice, context: Context, k: int) -> Lattice:
    position = len(context.output_ids)
    return Lattice(lattices.token_ids[position, :, :k], lattices.logps[position, :, :k])


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
