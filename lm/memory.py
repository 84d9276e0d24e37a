"""What to say when memory runs out, on a GPU or a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lattices.errors import RescoreError

CPU_MESSAGE = "can't allocate memory"  # of torch's allocator, which raises a plain RuntimeError


@contextmanager
def enough_memory(advice: str, *, at: str) -> Iterator[None]:
    """Turns running out of memory into a `RescoreError` that says where, and ends with the advice."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and CPU_MESSAGE not in str(error):
            raise
        raise RescoreError(f"out of memory at {at}; {advice}") from error
