"""Running out of memory is one line that says where and what to do."""

from __future__ import annotations

import pytest
import torch

from lattices.errors import RescoreError
from lm.memory import enough_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_each_kind(error: BaseException):
    with (
        pytest.raises(RescoreError, match=r"^out of memory at step 3; take less$"),
        enough_memory("take less", at="step 3"),
    ):
        raise error


def test_real_cpu_memory():
    with pytest.raises(RescoreError, match="out of memory"), enough_memory("take less", at="here"):
        torch.empty(1 << 60)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), RescoreError("no"), ValueError("x")])
def test_other_errors_stay(error: Exception):
    with pytest.raises(type(error), match=str(error)), enough_memory("take less", at="here"):
        raise error
