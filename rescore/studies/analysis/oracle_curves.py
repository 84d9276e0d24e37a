"""What a perfect choice would reach (docs/analyses.md): by k, by number of refined heads, by length of the block.

All numbers are replayed decodes, read from the ranks of the base LM's own tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from rescore.checks import check_held_k
from rescore.studies.analysis.positions import Positions, leading
from rescore.studies.analysis.records import OracleCurves


def doubling(limit: int) -> tuple[int, ...]:
    """1, 2, 4, ... below `limit`, and `limit`."""
    below = [1 << i for i in range(limit.bit_length()) if 1 << i < limit]
    return (*below, limit)


def oracle_curves(positions: Positions, ks: Sequence[int] | None = None, *, seed: int = 0) -> OracleCurves:
    """Oracle block efficiency for each of `ks` (default: 1, 2, 4, ... up to the trace's K) and number of refined heads.

    Raises `RescoreError` for a k outside 1 to K.
    """
    h, ranks = positions.h, positions.ranks
    ks = tuple(ks) if ks is not None else doubling(positions.lattice.k)
    for k in ks:
        check_held_k(positions.lattice.k, k)
    unrescored = leading(ranks == 0)  # [n]
    plain = positions.block_efficiency(unrescored)
    by_k, by_refined, by_heads = [], [], []
    for k in ks:
        row = []
        for refined in range(h):
            right = ranks == 0
            right[:, 1 : refined + 1] = ranks[:, 1 : refined + 1] < k
            row.append(positions.block_efficiency(leading(right)))
        reached = leading(ranks < k)
        by_k.append(positions.efficiency(reached, seed=seed))
        by_refined.append(tuple(row))
        by_heads.append(tuple(positions.block_efficiency(reached.clip(max=heads)) for heads in range(1, h + 1)))
    return OracleCurves(
        ks=ks,
        unrescored=positions.efficiency(unrescored, seed=seed),
        by_k=tuple(by_k),
        by_refined=tuple(by_refined),
        gain_by_refined=tuple(tuple(_gain(value, plain) for value in row) for row in by_refined),
        by_heads_unrescored=tuple(positions.block_efficiency(unrescored.clip(max=n)) for n in range(1, h + 1)),
        by_heads_oracle=tuple(by_heads),
    )


def _gain(value: float | None, plain: float | None) -> float | None:
    return None if value is None or plain is None else value / plain - 1.0
