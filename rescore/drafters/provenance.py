"""Where accepted tokens came from: which drafters had proposed them, and what each drafter alone would have had
accepted at the same positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lattices.joined.sources import room_for, sources_along
from rescore.drafters.asked import continuations_of
from rescore.drafters.base import Drafter, TextDrafter
from rescore.drafters.proposals import Proposals
from rescore.replaying import Drafted, contexts_of
from rescore.rescorers.base import Context
from rescore.tracing import TracedExample


@dataclass(frozen=True)
class Provenance:
    """Of the steps of one decode.

    origins: for each accepted token the bits of the drafters that had proposed it there (`Drafter.kind`); of each
        step's first token, which the base had chosen itself, those of none (0).
    alone: by drafter, what its own best draft would have had accepted where each step began.
    """

    origins: list[list[int]]
    alone: dict[str, list[int]]


def provenance(
    example: TracedExample, accepted: Sequence[int], drafters: Sequence[Drafter], k: int, drafted: Drafted | None
) -> Provenance:
    """The provenance of a decode of a traced example, from the accepted length of every step."""
    (context,) = contexts_of([example], drafted)
    origins: list[list[int]] = []
    alone: dict[str, list[int]] = {drafter.name: [] for drafter in drafters}
    for n in accepted:
        position = len(context.output_ids)
        ahead = example.output_ids[position:]
        proposals = Proposals(drafters, [context], ahead[:1], k)
        sources = proposals.sources(0, context)
        origins.append([0, *sources_along(sources, ahead[:n].astype(np.int32), room_for(sources))[1:].tolist()])
        for drafter, draft in _own_drafts(proposals, drafters, context).items():
            length = min(len(draft), len(ahead) - 1)
            same = draft[:length] == ahead[1 : 1 + length]
            reached = 1 + (length if same.all() else int(same.argmin()))
            alone[drafter.name].append(reached)
            for place in range(1, min(reached, n)):  # of many continuations the joined lattice holds some only
                origins[-1][place] |= drafter.kind
        context.output_ids.extend(ahead[:n].tolist())
    return Provenance(origins, alone)


def _own_drafts(proposals: Proposals, drafters: Sequence[Drafter], context: Context) -> dict[Drafter, np.ndarray]:
    """By drafter, its best draft from slot 2 on."""
    drafts = {drafter: lattice.token_ids[0, 1:, 0] for drafter, lattice in proposals.lattices.items()}
    for drafter in drafters:
        if isinstance(drafter, TextDrafter):
            (found,) = continuations_of(drafter, [context], proposals.firsts, 1)
            drafts[drafter] = found.token_ids[0] if len(found.token_ids) else np.zeros(0, dtype=np.int32)
    return drafts
