"""Memory that is not needed for now: pages of weights that are mapped from a file, which come back when they are read,
and what the C library keeps of memory that was freed."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
import torch

_ENTRIES = "/proc/self/pagemap"  # of Linux: 64 bits for every page of the process
_IN_MEMORY, _SWAPPED, _OF_A_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


def release(tensor: torch.Tensor) -> bool:
    """Takes the pages of a tensor, which was read, out of the process's memory if a file holds the same (on Linux).

    The tensor stays what it is: whoever reads it has them mapped again. Returns whether they went.
    """
    address = tensor.data_ptr()
    start, end = -(-address // mmap.PAGESIZE), (address + tensor.nbytes) // mmap.PAGESIZE
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous() or start >= end:
        return False
    try:
        entries = np.fromfile(_ENTRIES, dtype=np.uint64, count=end - start, offset=start * 8)
    except OSError:
        return False
    there = entries & (_IN_MEMORY | _SWAPPED) != 0
    if not there.any() or not (entries[there] & _OF_A_FILE != 0).all():  # what was written to is no longer the file's
        return False
    place, size = ctypes.c_void_p(start * mmap.PAGESIZE), ctypes.c_size_t((end - start) * mmap.PAGESIZE)
    failed: int = ctypes.CDLL(None, use_errno=True).madvise(place, size, mmap.MADV_DONTNEED)
    return not failed


def trim_heap() -> bool:
    """Gives memory that was freed back to the system, where the C library keeps it between what is still in use (glibc
    does, of blocks that are too small for a mapping of their own). Returns whether some went."""
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    return hasattr(library, "malloc_trim") and bool(library.malloc_trim(0))
