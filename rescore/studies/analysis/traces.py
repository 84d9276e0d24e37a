"""All analyses of a trace, and h_max against block efficiency over the traces of several tasks ([A] 5.2)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from lattices.errors import UnknownNameError
from rescore.checks import check_held_k
from rescore.runs.run import DEFAULT_K
from rescore.studies.analysis.curves import OracleCurves, PCurve, oracle_curves, unrescored_by_p
from rescore.studies.analysis.drafts import TraceRepetition, trace_repetition
from rescore.studies.analysis.heads import (
    DEFAULT_BINS,
    Entropies,
    HeadAcceptance,
    HeadCalibration,
    Ranks,
    acceptance_of,
    calibration_of,
    entropies_of,
    ranks_of,
)
from rescore.studies.analysis.positions import Positions
from rescore.studies.records import Record
from rescore.tracing import Trace

ANALYSES = ("repetition", "entropy", "oracle", "p_curve", "ranks", "acceptance", "calibration")
MIN_POINTS = 3  # two points always correlate perfectly


@dataclass(frozen=True)
class TraceAnalysis(Record):
    """All analyses of one trace (`examples` of so many `groups`); an analysis that was not asked for is None.

    k: entries per slot of `p_curve`; entries: all that the trace holds, of which the rest is, or what it says.
    """

    name: str
    examples: int
    groups: int
    positions: int
    h: int
    k: int
    entries: int
    repetition: TraceRepetition | None
    entropy: Entropies | None
    oracle: OracleCurves | None
    p_curve: PCurve | None
    ranks: Ranks | None
    acceptance: tuple[HeadAcceptance, ...] | None
    calibration: tuple[HeadCalibration, ...] | None


@dataclass(frozen=True)
class HmaxPoint(Record):
    """One task (or trace): its `h_max` and the block efficiency of its unrescored decode."""

    name: str
    h_max: int
    block_efficiency: float


@dataclass(frozen=True)
class HmaxCorrelation(Record):
    """Pearson's R of h_max and block efficiency over `points`, one for each task, all of blocks of `h` tokens (None: no
    points); None for fewer than three, or where one never varies."""

    h: int | None
    points: tuple[HmaxPoint, ...]
    pearson: float | None


def analyse_trace(
    trace: Trace,
    *,
    name: str | None = None,
    only: Collection[str] = ANALYSES,
    k: int | None = None,
    bins: int = DEFAULT_BINS,
    seed: int = 0,
) -> TraceAnalysis:
    """The analyses `only` of a trace.

    `name`: what it is called in records (default: its task). `k`: entries per slot of the decodes with several drafts
    (default: 16, or all where there are fewer); `bins`: of the calibration; `seed`: of the bootstrap. Raises
    `UnknownNameError` for an analysis that there is not, `RescoreError` for a k beyond the trace's or no bins.
    """
    for asked in only:
        if asked not in ANALYSES:
            raise UnknownNameError("analysis", asked, ANALYSES)
    header = trace.header
    k = min(DEFAULT_K, header.k) if k is None else k
    check_held_k(header.k, k)
    positions = Positions.of(trace)
    return TraceAnalysis(
        name=name or str(header.settings.get("task", "trace")),
        examples=len(trace.examples),
        groups=len(set(positions.groups)),
        positions=len(positions),
        h=header.h,
        k=k,
        entries=header.k,
        repetition=trace_repetition(positions) if "repetition" in only else None,
        entropy=entropies_of(positions, header.vocab_size) if "entropy" in only else None,
        oracle=oracle_curves(positions, seed=seed) if "oracle" in only else None,
        p_curve=unrescored_by_p(positions, k, seed=seed) if "p_curve" in only else None,
        ranks=ranks_of(positions) if "ranks" in only else None,
        acceptance=acceptance_of(positions) if "acceptance" in only else None,
        calibration=calibration_of(positions, bins) if "calibration" in only else None,
    )


def correlate_h_max(traces: Sequence[TraceAnalysis]) -> HmaxCorrelation:
    """h_max against the unrescored block efficiency over traces of several tasks (those with both).

    A task is one point, whatever number of traces it has, and all points have one h: of the h that the most tasks have,
    the largest. Of several traces of a task with this h, that of most positions counts (of equals the first).
    """
    by_h: dict[int, dict[str, tuple[int, HmaxPoint]]] = {}  # h -> task -> positions and point
    for trace in traces:
        if trace.entropy is None or trace.entropy.h_max is None or trace.oracle is None:
            continue
        if (efficiency := trace.oracle.unrescored.block_efficiency) is not None:
            tasks = by_h.setdefault(trace.h, {})
            if trace.name not in tasks or trace.positions > tasks[trace.name][0]:
                tasks[trace.name] = trace.positions, HmaxPoint(trace.name, trace.entropy.h_max, efficiency)
    if not by_h:
        return correlation(())
    h = max(by_h, key=lambda h: (len(by_h[h]), h))
    return correlation([point for _, point in by_h[h].values()], h)


def correlation(points: Sequence[HmaxPoint], h: int | None = None) -> HmaxCorrelation:
    """Pearson's R of h_max and block efficiency over tasks, each of which is one of the points, with h heads."""
    x = np.array([p.h_max for p in points], dtype=np.float64)
    y = np.array([p.block_efficiency for p in points], dtype=np.float64)
    varied = len(points) >= MIN_POINTS and np.ptp(x) > 0 and np.ptp(y) > 0
    return HmaxCorrelation(h, tuple(points), float(np.corrcoef(x, y)[0, 1]) if varied else None)
