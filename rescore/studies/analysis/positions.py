"""All positions of a trace in one batch, which every analysis reads, and the decodes that walk them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lattices.lattice import Lattice, concatenated
from lattices.oracle import target_ranks
from lattices.statistics import decode_starts, targets_ahead
from rescore.accounting import account
from rescore.studies.records import Record, record_of
from rescore.tracing import Trace


@dataclass(frozen=True)
class Efficiency(Record):
    """Block efficiency of one decode, as `rescore.accounting.Accounting` has it; None where nothing was decoded."""

    steps: int
    tokens: int
    block_efficiency: float | None
    block_efficiency_ci95: tuple[float, float] | None
    block_efficiency_macro: float | None


@dataclass(frozen=True, eq=False)
class Positions:
    """The n positions of a trace's examples, one after the other.

    lattice: `[n, h, K]`; entropies: `[n, h]`, nats.
    targets: int32 `[n, h]`, -1 after the end of the output.
    lengths: int64 `[examples]`, output tokens of each; groups: of the examples (`rescore.tasks.groups`).
    """

    lattice: Lattice
    entropies: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray
    groups: tuple[str, ...]

    @classmethod
    def of(cls, trace: Trace) -> Positions:
        """The positions of a trace; none if it has no examples."""
        h, k, examples = trace.header.h, trace.header.k, trace.examples
        nothing = Lattice(np.zeros((0, h, k), np.int32), np.zeros((0, h, k), np.float32))
        lattice = concatenated([nothing, *(e.lattice for e in examples)])
        return cls(
            lattice,
            entropies=np.concatenate([np.zeros((0, h), np.float32), *(e.entropies for e in examples)]),
            targets=np.concatenate([np.zeros((0, h), np.int32), *(targets_ahead(e.output_ids, h) for e in examples)]),
            lengths=np.array([len(e.output_ids) for e in examples], dtype=np.int64),
            groups=tuple(e.group for e in examples),
        )

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def h(self) -> int:
        """Heads."""
        return self.lattice.h

    @property
    def best(self) -> np.ndarray:
        """The unrescored draft of every position, int32 `[n, h]`."""
        return self.lattice.token_ids[:, :, 0]

    @cached_property
    def known(self) -> np.ndarray:
        """Where the output is long enough for a slot to have a target, bool `[n, h]`."""
        return self.targets >= 0

    @cached_property
    def ranks(self) -> np.ndarray:
        """Rank of every target in its slot, int32 `[n, h]`, K where it is lacking."""
        return target_ranks(self.lattice.token_ids, self.targets)

    @cached_property
    def unrescored(self) -> np.ndarray:
        """How many tokens of the unrescored draft the base LM would accept at every position, int64 `[n]`, 1..h."""
        return leading(self.ranks == 0)

    def steps(self, accepted: np.ndarray) -> list[list[int]]:
        """The accepted lengths of the steps of every example's decode, from those of all positions `[n]`."""
        starts = decode_starts(accepted, self.lengths)
        bounds = np.cumsum(self.lengths)[:-1]
        every, chosen = np.split(accepted, bounds), np.split(starts, bounds)
        return [a[s].tolist() for a, s in zip(every, chosen, strict=True)] if len(self.lengths) else []

    def efficiency(self, accepted: np.ndarray, *, seed: int = 0) -> Efficiency:
        """The block efficiency of the decode, from the accepted lengths of all positions `[n]`."""
        decoded = [(steps, group) for steps, group in zip(self.steps(accepted), self.groups, strict=True) if steps]
        if not decoded:
            return Efficiency(0, 0, None, None, None)
        steps, groups = zip(*decoded, strict=True)
        return record_of(Efficiency, account(steps, self.h, groups=groups, seed=seed))

    def block_efficiency(self, accepted: np.ndarray) -> float | None:
        """Pooled tokens / steps of the decode; None without positions."""
        return share(len(self), int(decode_starts(accepted, self.lengths).sum()))


def leading(right: np.ndarray) -> np.ndarray:
    """The run of right slots that rows of bool `[n, h]` begin with, int64 `[n]`; slot 1 is fixed, so at least 1."""
    run: np.ndarray = 1 + np.logical_and.accumulate(right[:, 1:], axis=1).sum(axis=1, dtype=np.int64)
    return run


def share(part: float, whole: float) -> float | None:
    """part / whole; None where there is no whole."""
    return float(part / whole) if whole else None


def number(value: float) -> float | None:
    """A float for JSON; None for NaN."""
    return None if np.isnan(value) else float(value)
