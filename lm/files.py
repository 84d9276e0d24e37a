"""Files that are whole or not there: hashes, atomic writes, appended JSON lines, the user's cache directory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lattices.errors import InvalidDataError, OutputError, RescoreError


def cache_directory() -> Path:
    """Where converted models and recorded traces are kept: `$RESCORE_CACHE`, else `$XDG_CACHE_HOME/rescore`."""
    if chosen := os.environ.get("RESCORE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rescore"


def sha256_of_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write (full disk, read-only folder, file in the way) into one clear line."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"can't write {path}: {error.strerror or error}; what was written before is kept") from error


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` if the block ends well, and vanishes if not."""
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield temporary
            if folder.is_dir():  # another process was faster, or an older version is replaced
                shutil.rmtree(folder)
            os.replace(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def write_json(path: Path, document: Any) -> None:
    """Writes a JSON document atomically, indented, with a final newline."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w") as stream:
                json.dump(document, stream, indent=2, ensure_ascii=False)
                stream.write("\n")
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def read_json_lines(path: Path, *, torn_tail: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a JSON lines file; blank lines are passed over.

    `torn_tail` tolerates a last line that a killed writer left unfinished. Raises `InvalidDataError` with the number
    of the line that is not a JSON object, `RescoreError` if the file can't be read.
    """
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    if torn_tail and not line.endswith(b"\n"):
                        return
                    raise InvalidDataError(f"{path} line {number} is not valid JSON") from error
                if not isinstance(value, dict):
                    raise InvalidDataError(f"{path} line {number} is not a JSON object")
                yield number, value
    except OSError as error:
        raise RescoreError(f"can't read {path}: {error.strerror}") from error


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
    return path.open("a", encoding="utf-8")
