"""What workers do in tests; imports nothing heavy, as every worker does it."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

from lattices.errors import InvalidDataError


def square(number: int) -> int:
    return number**2


def refuse(number: int) -> int:
    if number == 3:
        raise InvalidDataError("number 3 is broken; give another")
    return number


def die_once(folder: Path, number: int) -> int:
    """Takes its worker along, the first time that it is asked for 5."""
    died = folder / "died"
    if number == 5 and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def where(_: int) -> tuple[str, int]:
    """The working folder and the niceness of a worker."""
    return os.getcwd(), os.nice(0)


def threads(asked: int) -> int:
    """Those that torch counts in; it is told to count in other ones after that."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(asked)
    return before


def without_room(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/file")


def without_module(_: int) -> None:
    import not_installed_anywhere  # type: ignore[import-not-found]  # noqa: F401
