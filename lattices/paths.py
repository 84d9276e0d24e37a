"""Names of files and folders that a user gives, and the folders that rescore itself and numba may keep things in.

On the ground floor because numba must be told where to keep compiled code before it is imported. Imports the standard
library only.
"""

from __future__ import annotations

import os
import secrets
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from lattices.errors import RescoreError


def user_path(given: str | Path, what: str = "the path") -> Path:
    """A path as a user gives it, with `~` and `~name` expanded; `what` names it in errors (`--data`).

    Raises `RescoreError` for an empty one (`Path("")` would be the working folder), one with a NUL, and a `~` that
    stands for no known home folder (a folder called `~` is not what was meant; `./~` is).
    """
    text = os.fspath(given)
    if not text.strip():
        raise RescoreError(f"{what} is empty; give a path, or leave it out")
    if "\0" in text:
        raise RescoreError(f"{what} {text!r} holds a NUL character, which no file name has")
    if not text.startswith("~"):
        return Path(text)
    expanded = os.path.expanduser(text)  # unlike `Path.expanduser`, it leaves what it does not know as it is
    if expanded.startswith("~"):
        who = text.partition("/")[0]
        raise RescoreError(f"{what} {text}: no home folder is known for {who}; write the whole path, or ./{text}")
    return Path(expanded)


def encodable(path: Path, what: str) -> Path:
    """The path itself, for what can be written by its name in UTF-8 only (Arrow, safetensors). Raises `RescoreError`
    for a name that is none: before the work, not at its end."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise RescoreError(f"{what} {path} is no UTF-8 name, which can't be written to here; give another") from error
    return path


def cache_directory() -> Path:
    """Where converted models and recorded traces are kept: `$RESCORE_CACHE`, else `$XDG_CACHE_HOME/rescore`, else
    `~/.cache/rescore`. Raises `RescoreError` where none of them is known (no HOME, no entry of the user)."""
    if chosen := os.environ.get("RESCORE_CACHE"):
        return encodable(user_path(chosen, "RESCORE_CACHE"), "RESCORE_CACHE")
    parent = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if parent.startswith("~"):
        raise RescoreError("this user has no home folder; set RESCORE_CACHE to a folder where rescore may keep files")
    return encodable(Path(parent), "the cache folder") / "rescore"


def working_folder(name: str) -> Path:
    """A folder for what libraries keep: `name` in the cache directory, else (it can't be written to, or there is none)
    in a folder of this user's own below the system's temporary one. It exists and can be written to."""
    with suppress(RescoreError, OSError):
        folder = cache_directory() / name
        folder.mkdir(parents=True, exist_ok=True)
        if is_writable(folder):
            return folder
    folder = _own_temporary() / name
    folder.mkdir(exist_ok=True)
    return folder


def is_writable(folder: Path) -> bool:
    """Whether a file can be made in a folder that exists. It is tried out: permissions alone do not tell it of a file
    system that is mounted read-only, nor of one that is full."""
    try:
        probe = folder / f".rescore-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True


def _own_temporary() -> Path:
    """The same folder at every start, unless another user made one of that name: compiled code is run."""
    folder = Path(tempfile.gettempdir()) / f"rescore-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="rescore-"))


def place_compiled_code() -> None:
    """Tells numba where to keep compiled code, if it can't be kept beside the source (numba's own place, which is
    left alone): in `numba` of the cache directory. A user's NUMBA_CACHE_DIR goes before. Without any place numba
    refuses to compile at all ("no locator available")."""
    if "NUMBA_CACHE_DIR" in os.environ:
        return
    beside = Path(__file__).with_name("__pycache__")
    with suppress(OSError):
        beside.mkdir(exist_ok=True)
    if is_writable(beside):
        return
    os.environ["NUMBA_CACHE_DIR"] = str(working_folder("numba"))
    if "numba" in sys.modules:  # imported by somebody else: it has read its settings
        sys.modules["numba"].config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]
