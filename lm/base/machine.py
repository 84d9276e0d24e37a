"""How near work comes to what the machine could do: FLOPs and bytes counted, against measured limits; and what to say
when its memory runs out.

Counted are products with weights (2 FLOPs per weight and token) and reads of weights and cache, as in the cost model;
attention's own FLOPs, writes and padding are not, so a share is what was of use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lattices.errors import RescoreError
from lm.base.model import BaseLM

REPEATS = 5
CPU_MESSAGE = "can't allocate memory"  # of torch's allocator, which raises a plain RuntimeError


@contextmanager
def enough_memory(advice: str, *, at: str) -> Iterator[None]:
    """Turns running out of memory, of a GPU or the CPU, into a `RescoreError` that says where, and ends with the
    advice."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and CPU_MESSAGE not in str(error):
            raise
        raise RescoreError(f"out of memory at {at}; {advice}") from error


class Work:
    """What a base LM asked of a machine: `flops`, and `bytes_read` of weights and cache; not what an encoder did."""

    def __init__(self, base: BaseLM) -> None:
        self.flops = self.bytes_read = 0.0
        embeddings, projection = base.model.get_input_embeddings().weight, base.output_embeddings.weight
        apart = {id(weight): weight.numel() for weight in (embeddings, projection)}  # they may be one
        self._projection = projection.numel()
        body = {id(weight): weight.numel() for weight in base.decoder.parameters()}
        self._body = sum(size for weight, size in body.items() if weight not in apart)
        self._size = projection.element_size()
        self._position = base.position_size

    def add(self, *, tokens: int, projected: int, cached: int) -> None:
        """One call of the base LM: tokens read, those of them that the vocabulary projection read, and positions of
        the cache that were read, over all rows."""
        self.flops += 2.0 * (self._body * tokens + self._projection * projected)
        self.bytes_read += float(self._size) * (self._body + self._projection + self._position * cached)


def measure_limits(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """What a device gives at best, measured in under a second: FLOPs a second, of a large matrix product, and bytes a
    second from memory, of a pass over more than a CPU's caches hold."""
    large = device.type == "cuda"
    n = 8192 if large else 1536
    a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
    many = torch.ones((4 if large else 1) << 27, device=device, dtype=torch.uint8).view(torch.int64)
    return 2.0 * n**3 / _fastest(lambda: a @ b, device), many.nbytes / _fastest(many.max, device)


def share_of_limits(base: BaseLM, work: Work, seconds: float) -> str:
    """How much of what this machine reaches at best some work made use of, in words."""
    flops, bytes_read = measure_limits(base.device, base.dtype)
    return (
        f"{work.flops / seconds / flops:.0%} of the {str(base.dtype).removeprefix('torch.')} FLOPs and "
        f"{work.bytes_read / seconds / bytes_read:.0%} of the memory bandwidth that this machine reaches at best"
    )


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest call of several, after one to warm up."""
    call()
    seconds = []
    for _ in range(REPEATS):
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
