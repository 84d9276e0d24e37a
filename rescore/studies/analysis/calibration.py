"""Calibration of the heads: is the arg-max right as often as its probability says? (Guo et al. 2017, section 2.)"""

from __future__ import annotations

import numpy as np

from lattices.statistics import reliability
from rescore.studies.analysis.positions import Positions, number
from rescore.studies.analysis.records import HeadCalibration, ReliabilityBin

DEFAULT_BINS = 15  # as in Guo et al.


def calibration_of(positions: Positions, bins: int = DEFAULT_BINS) -> tuple[HeadCalibration, ...]:
    """Reliability of every head's arg-max in `bins` equal bins of probability. Raises `RescoreError` for no bins."""
    confidence = np.exp(positions.lattice.logps[:, :, 0].astype(np.float64))  # [n, h]
    right = positions.ranks == 0
    heads = []
    for slot in range(positions.h):
        known = positions.known[:, slot]
        sure, true = confidence[known, slot], right[known, slot]
        found = reliability(sure, true, bins)
        some = len(sure) > 0
        heads.append(
            HeadCalibration(
                head=slot + 1,
                positions=len(sure),
                ece=number(found.error),
                confidence=float(sure.mean()) if some else None,
                accuracy=float(true.mean()) if some else None,
                brier=float(((sure - true) ** 2).mean()) if some else None,
                bins=tuple(
                    ReliabilityBin(float(low), float(high), int(count), number(mean), number(accuracy))
                    for low, high, count, mean, accuracy in zip(
                        found.edges[:-1], found.edges[1:], found.count, found.confidence, found.accuracy, strict=True
                    )
                ),
            )
        )
    return tuple(heads)
