"""Measurements that a user makes of their own machine and model; the numbers that decide whether drafts pay."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from lattices.errors import RescoreError
from lm.base.cache import BufferLayer
from lm.base.model import BaseLM
from lm.heads.block_heads import BlockHeads
from rescore.studies.records import Record

VERIFY_SIZES = (1, 2, 4, 9, 16, 32, 64, 144)


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


def median_seconds(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each call; they take turns, so that noise falls on all alike, and the first turn warms up."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if turn:
                times.append(time.perf_counter() - start)
    return [float(np.median(times)) for times in seconds]


def verify_curve(
    base: BaseLM, *, cached: int = 256, repeats: int = 7, sizes: Sequence[int] = VERIFY_SIZES
) -> VerifyCurve:
    """Times one forward of 1 to 144 tokens on a cache, with the weights laid out as decoding has them."""
    if cached < 1 or repeats < 1:
        raise RescoreError("--cached and --repeats must be at least 1")
    if cached + max(sizes) > base.context_length:
        raise RescoreError(f"{cached} cached tokens do not fit into the context of {base.context_length}")
    base.pack()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.vocab_size, (1, cached + max(sizes)), generator=generator).to(base.device)
    cache = base.new_cache(cached + max(sizes))
    base.forward(ids[:, :cached], cache, last=1)
    cache.keep(range(cached))

    def verify(n: int) -> None:
        base.forward(ids[:, :n], cache)
        if base.device.type == "cuda":
            torch.cuda.synchronize()

    medians = median_seconds([partial(verify, n) for n in sizes], repeats)
    weights = sum(p.numel() * p.element_size() for p in base.model.parameters())
    layer = cache.layers[0]
    assert isinstance(layer, BufferLayer)
    read = weights + 2 * len(cache.layers) * layer.buffers[0][:, :, :cached].nbytes  # keys and values
    return VerifyCurve(
        base=base.identity.name,
        dtype=base.identity.dtype,
        device=str(base.device),
        cached=cached,
        tokens=list(sizes),
        milliseconds=[t * 1e3 for t in medians],
        gb_per_second=[read / t / 1e9 for t in medians],
    )


@torch.inference_mode()
def heads_milliseconds(base: BaseLM, heads: BlockHeads, k: int, repeats: int) -> float:
    """Median milliseconds from one state to its lattice, head 1's logits given."""
    state = torch.randn(1, base.hidden_size, generator=torch.Generator().manual_seed(0))
    hidden = state.to(base.device, base.dtype)
    first = base.project(hidden)
    # It ends on the CPU: what was asked of a GPU is done then.
    (seconds,) = median_seconds([lambda: heads.lattice(base, hidden, first, k)], repeats)
    return seconds * 1e3
