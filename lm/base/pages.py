"""Memory of weights that are mapped from a file: what is not needed for now can go, and comes back when it is read."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
import torch

_ENTRIES = "/proc/self/pagemap"  # of Linux: 64 bits for every page of the process
_IN_MEMORY, _SWAPPED, _OF_A_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


def release(tensor: torch.Tensor) -> None:
    """Takes the pages of a tensor out of the process's memory where a file holds the same, on Linux; else nothing.

    The tensor stays what it is: whoever reads it has them mapped again.
    """
    address = tensor.data_ptr()
    start, end = -(-address // mmap.PAGESIZE), (address + tensor.nbytes) // mmap.PAGESIZE
    if sys.platform != "linux" or not tensor.is_contiguous() or start >= end:
        return
    try:
        entries = np.fromfile(_ENTRIES, dtype=np.uint64, count=end - start, offset=start * 8)
    except OSError:
        return
    there = entries & (_IN_MEMORY | _SWAPPED) != 0
    if there.any() and (entries[there] & _OF_A_FILE != 0).all():  # a page that was written to is no longer the file's
        size = (end - start) * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start * mmap.PAGESIZE), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
