"""One process at a time makes what several may want, and whoever waits or is refused is told in one line.

The locks are the operating system's (`filelock`): a killed process leaves none behind, at worst an empty hidden file,
which the next one takes over and removes. What is only read is never locked, so that it may lie on a read-only disk.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lattices.errors import OutputError
from lm.files import cache_directory, writing

LOCK_FILE = ".rescore.lock"  # in a folder that is being written to
POLL_SECONDS = 0.1
# What file systems without locks answer, and those whose lock server is gone.
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EIO}
_log = logging.getLogger("rescore")
_locked_here: set[tuple[int, str]] = set()  # (thread, lock file)


def warn(line: str) -> None:
    """A line for the user about something that mends itself: of the logger `rescore`, which the commands print."""
    _log.warning("%s", line)


@contextmanager
def writing_to(folder: Path, *, beside: bool = False) -> Iterator[None]:
    """While this process writes to a folder that the user gave: a second one is refused (`OutputError`).

    `beside`: the lock lies beside the folder, which is replaced as a whole. The folder is made if need be, and goes
    again if nothing comes into it. A thread that holds the lock already goes on.
    """
    with writing(folder):
        folder = folder.resolve()
        place = folder.parent if beside else folder
        new = [parent for parent in (place, *place.parents) if not parent.exists()]
        place.mkdir(parents=True, exist_ok=True)
    lock = place / (f".{folder.name[:200]}{LOCK_FILE}" if beside else LOCK_FILE)
    refusal = f"another rescore process is writing to {folder}; wait for it, or use another --out"
    try:
        with _locked(lock, folder, refusal=refusal):
            yield
    finally:
        for parent in new:
            with suppress(OSError):  # something is in it
                parent.rmdir()


@contextmanager
def making(entry: Path, what: str) -> Iterator[None]:
    """While this process makes something in the cache directory: a second one says that it waits for `what`, and waits.

    It then looks again at what is there. The lock lies apart from `entry`, which may be replaced or removed.
    """
    folder = cache_directory() / "locks"
    with writing(entry):
        folder.mkdir(parents=True, exist_ok=True)
    lock = folder / f"{hashlib.sha256(str(entry.absolute()).encode(errors='surrogateescape')).hexdigest()[:32]}.lock"
    with _locked(lock, entry, waiting=f"another rescore process is making {what}; waiting for it"):
        yield


@contextmanager
def _locked(path: Path, target: Path, *, refusal: str = "", waiting: str = "") -> Iterator[None]:
    """Holds the lock at `path` for `target`; where another process has it: raises `OutputError` with the refusal, or
    says that it waits, and waits."""
    key = (threading.get_ident(), str(path))
    if key in _locked_here:
        yield
        return
    lock = FileLock(path)
    with warnings.catch_warnings(action="ignore"):  # of a file system without locks, told below
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if refusal:
                    raise OutputError(refusal) from None
                warn(waiting)
                lock.acquire(timeout=-1, poll_interval=POLL_SECONDS)
        except (OSError, NotImplementedError) as error:  # `Timeout` is an `OSError`, and is caught above
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                with writing(target):
                    raise
            warn(f"the file system of {path.parent} has no locks; let no second process write to {target} meanwhile")
    _locked_here.add(key)
    try:
        yield
    finally:
        _locked_here.discard(key)
        if lock.is_locked:
            with suppress(OSError):  # before it is let go: who waits for this very file sees that it is gone
                path.unlink(missing_ok=True)
            with suppress(OSError):
                lock.release()
