"""What more choice would reach, in replayed decodes: a perfect choice by k, by number of refined heads and by length of
the block, read from the ranks of the base LM's own tokens alone; and the p best drafts of one lattice ([A])."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lattices.search import p_best
from rescore.studies.analysis.heads import doubling
from rescore.studies.analysis.positions import Efficiency, Positions, leading
from rescore.studies.records import Record

PS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class OracleCurves(Record):
    """What a perfect choice from `ks[i]` entries would reach (docs/analyses.md); numbers are None without positions.

    by_k[i]: in all slots; by_refined[i][m]: in slots 2..m+1 only, m = 0..h-1, and its gain over `unrescored`.
    by_heads_unrescored[j-1], by_heads_oracle[i][j-1]: with blocks of j tokens, heads 1..j only, j = 1..h.
    """

    ks: tuple[int, ...]
    unrescored: Efficiency
    by_k: tuple[Efficiency, ...]
    by_refined: tuple[tuple[float | None, ...], ...]
    gain_by_refined: tuple[tuple[float | None, ...], ...]
    by_heads_unrescored: tuple[float | None, ...]
    by_heads_oracle: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class PCurve(Record):
    """Block efficiency by number of drafts: `points[i]` verifies the `ps[i]` best drafts of `rescorer` at `k`
    entries per slot; `alphas[i]` is the rescorer's weight (None: it has none). `none` is the "0-gram"."""

    rescorer: str
    k: int
    ps: tuple[int, ...]
    alphas: tuple[float | None, ...]
    points: tuple[Efficiency, ...]


def oracle_curves(positions: Positions, *, seed: int = 0) -> OracleCurves:
    """Oracle block efficiency for k = 1, 2, 4, ... up to the trace's K and number of refined heads."""
    h, ranks, efficiency = positions.h, positions.ranks, positions.block_efficiency
    ks = doubling(positions.lattice.k)
    plain = efficiency(positions.unrescored)
    by_k, by_refined, by_heads = [], [], []
    for k in ks:
        row = []
        for refined in range(h):
            right = ranks == 0
            right[:, 1 : refined + 1] = ranks[:, 1 : refined + 1] < k
            row.append(efficiency(leading(right)))
        reached = leading(ranks < k)
        by_k.append(positions.efficiency(reached, seed=seed))
        by_refined.append(tuple(row))
        by_heads.append(_by_heads(positions, reached))
    return OracleCurves(
        ks=ks,
        unrescored=positions.efficiency(positions.unrescored, seed=seed),
        by_k=tuple(by_k),
        by_refined=tuple(by_refined),
        gain_by_refined=tuple(tuple(v / plain - 1.0 if v and plain else None for v in row) for row in by_refined),
        by_heads_unrescored=_by_heads(positions, positions.unrescored),
        by_heads_oracle=tuple(by_heads),
    )


def _by_heads(positions: Positions, accepted: np.ndarray) -> tuple[float | None, ...]:
    """Block efficiency with blocks of 1..h tokens, from the accepted lengths of all positions `[n]`."""
    return tuple(positions.block_efficiency(accepted.clip(max=heads)) for heads in range(1, positions.h + 1))


def unrescored_by_p(positions: Positions, k: int, *, seed: int = 0) -> PCurve:
    """The p best drafts of the heads alone ("0-gram") for each of `PS`, by replay.

    Raises `RescoreError` for a k outside 1 to the trace's K.
    """
    drafts = p_best(positions.lattice.top(k), max(PS)).drafts  # [n, p', h]; the first q of the p best are the q best
    right = drafts == positions.targets[:, None]  # [n, p', h]
    lengths = np.stack([leading(right[:, i]) for i in range(right.shape[1])], axis=1)  # [n, p']
    points = [positions.efficiency(lengths[:, :p].max(axis=1, initial=1), seed=seed) for p in PS]
    return PCurve("none", k, tuple(PS), (None,) * len(PS), tuple(points))
