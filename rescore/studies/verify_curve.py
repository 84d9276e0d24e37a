"""Measurements that a user makes of their own machine and model; the numbers that decide whether drafts pay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from lm.base.catalog import load_base
from lm.base.machine import Work
from lm.base.model import BaseLM
from rescore.checks import check_timing
from rescore.costs.measuring import StandingDecode, times_of
from rescore.runs.inputs import Inputs
from rescore.studies.records import Record

VERIFY_SIZES = (1, 2, 4, 5, 9, 16, 32, 64, 144)


@dataclass(frozen=True)
class VerifyCurve(Record):
    """Median `milliseconds` of a forward of `tokens[i]` tokens on `cached` cached ones, and the bytes of weights and
    cache read over that time."""

    base: str
    dtype: str
    device: str
    cached: int
    tokens: list[int]
    milliseconds: list[float]
    gb_per_second: list[float]


def verify_curve_of(inputs: Inputs, *, cached: int = 256, repeats: int = 7) -> VerifyCurve:
    """`verify_curve` of a base LM by its name. Raises `RescoreError` as that and `load_base`."""
    check_timing([cached], repeats)
    base = load_base(inputs.base, dtype=inputs.dtype, device=inputs.device, compile=inputs.compile)
    return verify_curve(base, cached=cached, repeats=repeats)


def verify_curve(
    base: BaseLM, *, cached: int = 256, repeats: int = 7, sizes: Sequence[int] = VERIFY_SIZES
) -> VerifyCurve:
    """Times one forward of 1 to 144 tokens on a cache, with the weights laid out as decoding has them.

    Raises `RescoreError` for a cache that does not fit.
    """
    check_timing([cached], repeats)
    decode = StandingDecode(base, cached, max(sizes))
    ids = torch.randint(base.vocab_size, (1, max(sizes)), generator=torch.Generator().manual_seed(0)).to(base.device)

    def verify(n: int) -> None:
        base.forward(ids[:, :n], decode.cache)
        if base.device.type == "cuda":
            torch.cuda.synchronize()

    (times,) = times_of([[partial(verify, n) for n in sizes]], repeats)
    medians = np.median(times, axis=0).tolist()
    work = Work(base)
    work.add(tokens=0, projected=0, cached=cached)
    return VerifyCurve(
        base=base.identity.name,
        dtype=base.identity.dtype,
        device=str(base.device),
        cached=cached,
        tokens=list(sizes),
        milliseconds=medians,
        gb_per_second=[work.bytes_read / ms / 1e6 for ms in medians],
    )
