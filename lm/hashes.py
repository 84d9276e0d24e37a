"""Hashes of large files, remembered: what a file holds is told without reading it again."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lattices.errors import OutputError
from lm.files import atomic_file, cache_directory, sha256_of_file
from lm.keys import key_of

SETTLED = 3.0  # seconds after which a change leaves other times, on every file system
_HASHES: dict[str, str] = {}  # those remembered, of this process


def remembered_sha256(path: Path) -> str:
    """sha256 of a file, remembered in the cache directory by the file's path, size and times of change.

    A file that has just been changed could change again and keep its times: it is remembered once it has settled. A
    memo that is no sha256 (a full disk left it) is made again.
    """
    before = _stamp(path)
    key = key_of(before)
    if key in _HASHES:
        return _HASHES[key]
    memo = cache_directory() / "hashes" / key
    with suppress(OSError, UnicodeDecodeError):
        if re.fullmatch("[0-9a-f]{64}", found := memo.read_text()):
            _HASHES[key] = found
            return found
    digest = sha256_of_file(path)
    status = path.stat()
    age = time.time() - max(status.st_mtime, status.st_ctime)
    if _stamp(path) == before and age > SETTLED:
        _HASHES[key] = digest
        with suppress(OutputError), atomic_file(memo) as temporary:  # a cache that can't be written costs time only
            temporary.write_text(digest)
    return digest


def _stamp(path: Path) -> list[Any]:
    found = path.stat()
    return [str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]
