"""Cache entries: what is kept under a key of everything that it follows from, in one way for every cache.

What is kept in the cache directory is used only under a key of all that its content depends on, so that no number
depends on what an earlier command left there. To that belong the libraries that compute it (`software`): another minor
version may read a model, cut text or round in another way, and a cache is then made again. A folder that the user gave
(`--out`) is no cache: it goes on with what it began with, or says what has changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lattices.errors import OutputError
from lm.files import atomic_file, cache_directory, sha256_of_file
from lm.locks import making, warn

SETTLED = 3.0  # seconds after which a change leaves other times, on every file system
_HASHES: dict[str, str] = {}  # those remembered, of this process
Content = TypeVar("Content")
Stamp = tuple[str, int, int, int, int, int]


def key_of(document: Any, length: int = 64) -> str:
    """The first `length` hex digits of the sha256 of a document of JSON values, records, sets and dtypes.

    The order of names in an object does not matter. Raises `TypeError` for anything else: a value that is known by its
    address in memory would be another one in every process.
    """
    text = json.dumps(document, sort_keys=True, ensure_ascii=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _plain(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return msgspec.structs.asdict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if type(value).__name__ in ("AddedToken", "dtype"):
        return str(value) if type(value).__name__ == "dtype" else repr(value)
    if isinstance(value, type):
        return value.__name__
    raise TypeError(f"{type(value).__name__} has no place in a key")


def software(*libraries: str) -> dict[str, str]:
    """Major and minor versions of the libraries (default: those that run a model and cut its text)."""
    names = libraries or ("torch", "transformers", "tokenizers")
    return {name: ".".join(importlib.metadata.version(name).split(".")[:2]) for name in names}


def cache_entry(kind: str, name: str, document: Any, *, suffix: str = "") -> Path:
    """Where the cache keeps an entry: in the folder `kind`, by its name and a key of the document of all that it
    follows from."""
    return cache_directory() / kind / f"{name}-{key_of(document, 24)}{suffix}"


def cached(
    entry: Path,
    what: str,
    *,
    read: Callable[[Path], Content | None],
    make: Callable[[Path], Content],
    is_broken: Callable[[Path], bool] = Path.exists,
) -> Content:
    """What lies at a cache entry, made there first if need be.

    what: names it for users, who are told if another process is making it (it is waited for) or if it was broken.
    read: gives it, None where nothing lies there or what lies there is broken.
    make: writes it and gives it.
    is_broken: whether that of which `read` gave nothing is to be removed, rather than gone on with.
    """
    if (content := read(entry)) is not None:
        return content
    with making(entry, what):
        if (content := read(entry)) is not None:  # made by the process that was waited for
            return content
        if is_broken(entry):
            warn(f"{what} in {entry} is broken; it is made again")
            shutil.rmtree(entry, ignore_errors=True)
            with suppress(OSError):  # of a folder; what can't be removed can't be written either, and `make` says so
                entry.unlink()
        return make(entry)


def remembered_sha256(path: Path) -> str:
    """sha256 of a large file, remembered in the cache directory by the file's path, size and times of change.

    A file that has just been changed could change again and keep its times: it is remembered once it has settled. A
    memo that is no sha256 (a full disk left it) is made again.
    """
    before = file_stamp(path)
    key = key_of(before)
    if key in _HASHES:
        return _HASHES[key]
    memo = cache_directory() / "hashes" / key
    with suppress(OSError, UnicodeDecodeError):
        if re.fullmatch("[0-9a-f]{64}", text := memo.read_text()):
            _HASHES[key] = text
            return text
    digest = sha256_of_file(path)
    if file_stamp(path) == before and is_settled(before):
        _HASHES[key] = digest
        with suppress(OutputError), atomic_file(memo) as temporary:  # a cache that can't be written costs time only
            temporary.write_text(digest)
    return digest


def file_stamp(path: Path) -> Stamp:
    """Place, size and times of a file: while they stay, so does what was read of it."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev


def is_settled(*stamps: Stamp) -> bool:
    """Whether a change of these files from now on gives them other times, however coarse a file system keeps them."""
    return time.time() - max((max(stamp[2:4]) for stamp in stamps), default=0) / 1e9 > SETTLED
