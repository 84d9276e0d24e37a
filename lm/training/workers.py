"""The processes of one training: alone, or as many as `torchrun` or `accelerate launch` started.

Every process draws the same random numbers and works on its share of a step's micro-batches; gradients are summed, so
that so many processes do what one would have done. Only the first one writes files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed

from lattices.errors import RescoreError


@contextmanager
def _together() -> Iterator[None]:
    """One line where torch says at length that another process no longer answers."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # torch.distributed.DistBackendError is one
        raise RescoreError(
            "another process of this training has died or no longer answers; see its own message, then start all of "
            "them again: the training goes on from its last checkpoint"
        ) from error


@dataclass(frozen=True)
class Workers:
    """This process, `rank`, of `count`."""

    rank: int
    count: int

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @_together()
    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Every gradient becomes the sum over all processes (a process without a share adds nothing)."""
        if self.count > 1:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)

    @_together()
    def sum(self, value: float, device: torch.device) -> float:
        """The sum of a number over all processes."""
        if self.count == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(total)
        return float(total)

    @_together()
    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            torch.distributed.barrier()


def start_workers(device: torch.device) -> Workers:
    """Joins the other processes that the launcher started, if it started any."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Workers(0, 1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        # The first process may run the base over text for hours while the others wait.
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(days=7))
    return Workers(torch.distributed.get_rank(), count)
