"""Where the base LM's own choice stands in the heads' lattices, and how often the arg-max is it."""

from __future__ import annotations

import numpy as np

from lattices.statistics import conditional_accuracy, rank_counts, recall
from rescore.accounting import account
from rescore.studies.analysis.oracle_curves import doubling
from rescore.studies.analysis.positions import Positions, number, share
from rescore.studies.analysis.records import HeadAcceptance, HeadRanks, Ranks


def ranks_of(positions: Positions) -> Ranks:
    """Rank histogram and recall@k of every head, k = 1, 2, 4, ... up to the trace's K."""
    entries = positions.lattice.k
    ks = doubling(entries)
    counts = rank_counts(positions.ranks, positions.known, entries)  # [h, K + 1]
    shares = [recall(counts, k) for k in ks]  # [h] each
    reciprocal = counts[:, :-1] @ (1.0 / np.arange(1, entries + 1))  # [h]
    heads = tuple(
        HeadRanks(
            head=slot + 1,
            positions=int(counts[slot].sum()),
            counts=tuple(counts[slot].tolist()),
            recall=tuple(number(found[slot]) for found in shares),
            mean_reciprocal_rank=share(reciprocal[slot], counts[slot].sum()),
        )
        for slot in range(positions.h)
    )
    return Ranks(entries, ks, heads)


def acceptance_of(positions: Positions) -> tuple[HeadAcceptance, ...]:
    """Acceptance of every head's arg-max: at all positions, given the heads before it, and in the unrescored decode."""
    right = positions.ranks == 0
    conditional, reached = conditional_accuracy(right, positions.known)
    known = positions.known.sum(axis=0)
    steps = positions.steps(positions.accepted(positions.best))
    decode = account(steps, positions.h) if len(positions) else None
    return tuple(
        HeadAcceptance(
            head=slot + 1,
            positions=int(known[slot]),
            unconditional=share(right[:, slot].sum(), known[slot]),
            reached=int(reached[slot]),
            conditional=number(conditional[slot]),
            marginal=decode.marginal[slot] if decode else None,
            conditional_decode=decode.conditional[slot]
            if decode and (slot == 0 or decode.marginal[slot - 1])
            else None,
        )
        for slot in range(positions.h)
    )
