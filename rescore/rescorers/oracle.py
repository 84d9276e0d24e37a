"""`oracle`: the path that the base LM will accept most of; what a perfect rescorer could reach."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lattices.joined.sources import room_for, sources_along
from lattices.lattice import Lattice
from lattices.oracle import oracle_path
from rescore.drafters.base import stacked
from rescore.drafters.proposals import Proposals
from rescore.rescorers.base import Context, JoiningRescorer


class Oracle(JoiningRescorer):
    """The oracle path; it reads the context's future, so one draft (p = 1) says all."""

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        """See `Rescorer.draft`; the contexts must know their future."""
        targets = np.full((len(contexts), lattices.h), -1, dtype=np.int32)
        for row, context in enumerate(contexts):
            assert context.future is not None, "the oracle needs the greedy output"
            done = len(context.output_ids)
            ahead = context.future[done : done + lattices.h]
            targets[row, : len(ahead)] = ahead
        return oracle_path(lattices.token_ids, targets)[:, None]

    def draft_joined(self, proposals: Proposals, contexts: Sequence[Context], p: int) -> np.ndarray:
        """See `JoiningRescorer.draft_joined`; of a joined lattice the path as far as it is proposed, token by token."""
        if len(proposals.drafters) == 1 and proposals.has_lattices:
            (lattice,) = proposals.lattices.values()
            return self.draft(lattice, contexts, p)
        paths = []
        for row, context in enumerate(contexts):
            assert context.future is not None, "the oracle needs the greedy output"
            done = len(context.output_ids)
            ahead = np.array(context.future[done : done + proposals.longest], dtype=np.int32)
            sources = proposals.sources(row, context)
            origins = sources_along(sources, ahead, room_for(sources))
            paths.append(ahead[: len(ahead) if origins.all() else int(origins.argmin())][None])
        return stacked(paths)
