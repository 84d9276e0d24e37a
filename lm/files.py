"""Files that are whole or not there: atomic writes, JSON documents, appended JSON lines, the user's cache directory."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from lattices.errors import InvalidDataError, OutputError, RescoreError, unreadable
from lattices.paths import cache_directory as cache_directory  # its name everywhere above the ground floor

ASIDE = ".old"  # ends the name of a folder that makes room for its next version
SHIPPED = Path(__file__).parent / "weights"  # trained weights that come with the package, by base LM
ODD = "backslashreplace"  # a file name that is no UTF-8 becomes an escape of JSON, which reads back as the same name
NO_PLACE = (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError)
LEFT_AFTER = 3600.0  # seconds without a change, after which a temporary folder is taken for a killed writer's


def sha256_of_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write (full disk, read-only folder, file in the way) into one clear line."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has its own name for a full disk
        reason = getattr(error, "strerror", None) or error
        if "requested and" in str(error):  # numpy's words for what was not written, without a number of the system's
            reason = os.strerror(errno.ENOSPC)
        elif isinstance(error, FileExistsError) and path.is_file():
            reason = "it is a file, and a folder is to be made there; choose another --out"
        advice = ""
        with suppress(RescoreError):
            if path.is_relative_to(cache_directory()):
                advice = "; set RESCORE_CACHE to a folder where rescore may keep files"
        nothing_written = isinstance(error, NO_PLACE) or getattr(error, "errno", None) == errno.EROFS
        if path.exists() or not nothing_written:
            advice += "; what was written before is kept"
        raise OutputError(f"can't write {path}: {reason}{advice}") from error


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` if the block ends well, and vanishes if not.

    An older version is moved aside, then deleted: a kill at any time leaves the old or the new one, at worst aside,
    and the next call puts it back. What killed calls left beside `folder` goes as well. Raises `OutputError` if it
    can't be written.
    """
    with writing(folder):
        if folder.is_symlink():  # what it stands for is replaced, not the link
            folder = folder.resolve()
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear_up(folder)
        temporary = _beside(folder)
        temporary.mkdir()
        try:
            yield temporary
            _replace_folder(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _replace_folder(temporary: Path, folder: Path) -> None:
    """Moves `temporary` to `folder`, where an older version may be, or another process's that was faster."""
    aside = temporary.with_name(temporary.name + ASIDE)
    if folder.is_dir():
        os.replace(folder, aside)
    try:
        os.replace(temporary, folder)
    except BaseException:
        with suppress(OSError):
            os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _clear_up(folder: Path) -> None:
    """Removes what killed calls left, and puts back a version that one of them had only moved aside."""
    for aside in folder.parent.glob(f".{glob.escape(folder.name)}-????????{ASIDE}"):
        with suppress(OSError):
            if not folder.exists():
                os.replace(aside, folder)
        shutil.rmtree(aside, ignore_errors=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}-????????"):
        with suppress(OSError):
            touched = max(path.stat().st_mtime for path in (left, *left.rglob("*")))
            if left.is_dir() and time.time() - touched > LEFT_AFTER:
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` if the block ends well, and vanishes if not.

    Raises `OutputError` if it can't be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path)
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def replaced_files(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files take their places in `folder`, beside what is there, when all are written.

    Configurations come last, so that a folder with one is whole. Raises `OutputError` if it can't be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            yield Path(temporary)
            for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name.endswith("config.json")):
                os.replace(file, folder / file.name)


def _beside(path: Path) -> Path:
    # Not `tempfile`: what it makes only its owner may read, and the name it stands in for keeps those rights.
    return path.with_name(f".{path.name}-{secrets.token_hex(4)}")


def write_array(stream: IO[bytes], array: Any) -> None:
    """Writes an array's raw bytes, row by row. numpy's `tofile` (and `save`, which calls it) reports no error where a
    disk fills up within the last 4 KiB: a file cut short passes for a whole one."""
    stream.write(array.data if array.flags.c_contiguous else array.tobytes())


def write_json(path: Path, document: Any) -> None:
    """Writes a JSON document atomically, indented, with a final newline. Raises `OutputError`."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", errors=ODD) as stream:
        json.dump(document, stream, indent=2, ensure_ascii=False)
        stream.write("\n")


# What to do where a checkpoint of others is not on this machine: nothing of theirs is fetched.
FETCH = "give a folder on this machine (hf download REPOSITORY --local-dir FOLDER gets one)"


def read_json_object(path: Path, *, missing: str, advice: str = "get or make it again") -> dict[str, Any]:
    """The object in a JSON file.

    Raises `RescoreError` that begins with `missing` if the file can't be read, `InvalidDataError` if it holds anything
    else; both end with `advice`.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RescoreError(f"{missing}: can't read {path.name} ({error.strerror}); {advice}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidDataError(f"{path} is not valid JSON ({error}); {advice}") from error
    if not isinstance(document, dict):
        raise InvalidDataError(f"{path} is not a JSON object; {advice}")
    return document


def read_json_lines(path: Path, *, torn_tail: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a JSON lines file; blank lines are passed over.

    `torn_tail` passes over a last line without its line end: a killed writer left it, and `open_appending` cuts it off.
    Raises `InvalidDataError` with the number of the line that is not a JSON object, `RescoreError` if the file
    can't be read.
    """
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if torn_tail and not line.endswith(b"\n"):
                    return
                if line.strip():
                    try:
                        value = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise InvalidDataError(f"{path} line {number} is not valid JSON") from error
                    if not isinstance(value, dict):
                        raise InvalidDataError(f"{path} line {number} is not a JSON object")
                    yield number, value
    except OSError as error:
        raise unreadable(path, error) from error


def is_text(value: Any) -> bool:
    """Whether a value from JSON is text that a tokenizer takes: more than space, no half of a surrogate pair."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)


def append_json_line(stream: IO[str], record: dict[str, Any]) -> None:
    """Appends one record and flushes it, so that a kill loses at most the line being written."""
    stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    stream.flush()


def open_appending(path: Path) -> IO[str]:
    """Opens a JSON lines file for appending; an unfinished last line (of a killed writer) is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as stream:
        end = stream.tell()
        while end:  # backwards in blocks to the last line end
            start = max(0, end - (1 << 16))
            stream.seek(start)
            newline = stream.read(end - start).rfind(b"\n")
            if newline >= 0:
                stream.truncate(start + newline + 1)
                break
            end = start
        else:
            stream.truncate(0)
    return path.open("a", encoding="utf-8", errors=ODD)


def changed_settings(
    recorded: dict[str, Any], settings: dict[str, Any], prefix: str = "", *, whole: bool = False
) -> list[str]:
    """What keeps a run from being resumed: `name: recorded -> now` for each of the settings that differs, names
    dotted; with `whole` also what was added, and what is recorded only."""
    changed = []
    for key in dict.fromkeys([*(recorded if whole else ()), *settings]):
        before, now = recorded.get(key), settings.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            changed += changed_settings(before, now, f"{prefix}{key}.", whole=whole)
        elif whole and not (key in recorded and key in settings):
            changed.append(f"{prefix}{key}: {'removed' if key in recorded else 'added'}")
        elif before != now:
            changed.append(f"{prefix}{key}: {before} -> {now}")
    return changed
