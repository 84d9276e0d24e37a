"""Locks between real processes: who waits, who is refused, and what a killed process leaves."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lattices.errors import OutputError
from lm import locks
from lm.locks import LOCK_FILE, making, writing_to

HOLDER = """
import sys, time
from pathlib import Path
from lm.locks import making, writing_to
kind, folder = sys.argv[1], Path(sys.argv[2])
with writing_to(folder) if kind == "writing" else making(folder, "it"):
    (folder.parent / "held").touch()
    while not (folder.parent / "go").exists():
        time.sleep(0.01)
"""


@contextmanager
def held(kind: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the lock until a file `go` is there."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, kind, str(folder)]) as process:
        try:
            while not (folder.parent / "held").exists():
                assert process.poll() is None
                time.sleep(0.01)
            yield process
        finally:
            process.kill()


def test_a_second_writer_is_refused_and_a_killed_one_leaves_nothing(tmp_path: Path):
    out = tmp_path / "out"
    with held("writing", out) as process:
        wanted = r"another rescore process is writing to \S+/out; wait for it, or use"
        with pytest.raises(OutputError, match=wanted), writing_to(out):
            raise AssertionError
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (out / LOCK_FILE).exists(), "a name, but no lock"
        with writing_to(out):
            (out / "x").touch()
    assert [path.name for path in out.iterdir()] == ["x"]


def test_who_makes_the_same_waits_and_says_so(tmp_path: Path, cache_folder: Path, caplog: pytest.LogCaptureFixture):
    entry = tmp_path / "entry"
    with held("making", entry) as process:
        notices = caplog.messages

        def go(_line: str) -> None:
            notices.append(_line)
            (tmp_path / "go").touch()

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(locks, "warn", go)
            with making(entry, "the trace of squad"):
                process.wait()
    assert notices == ["another rescore process is making the trace of squad; waiting for it"]
    assert not list((cache_folder / "locks").iterdir())


def test_a_lock_held_is_taken_again_by_what_is_called(tmp_path: Path):
    with writing_to(tmp_path / "a"), writing_to(tmp_path / "a" / ".." / "a"):
        assert (tmp_path / "a" / LOCK_FILE).exists()
    with making(tmp_path / "b", ""), making(tmp_path / "b", ""), writing_to(tmp_path / "b"):
        pass
    assert not list(tmp_path.iterdir()), "nothing came into the folders"


def test_beside_a_folder_that_is_replaced(tmp_path: Path):
    with writing_to(tmp_path / "model", beside=True):
        assert [path.name for path in tmp_path.iterdir()] == [f".model{LOCK_FILE}"]
        (tmp_path / "model").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_place_that_can_t_be_written_to(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't write"), writing_to(tmp_path / "file" / "out"):
        raise AssertionError


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_used(tmp_path: Path, monkeypatch, code: int):
    def fails(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    told: list[str] = []
    monkeypatch.setattr(locks, "warn", told.append)
    monkeypatch.setattr(locks.FileLock, "acquire", fails)
    with writing_to(tmp_path / "out"):
        (tmp_path / "out" / "x").touch()
    (line,) = told
    assert "has no locks; let no second process write to" in line


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_cache_that_cannot_be_written_is_told_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, cache_folder: Path, code: int
):
    """Also where the folder of locks is there already."""

    def refuses(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locks.FileLock, "acquire", refuses)
    with pytest.raises(OutputError) as caught, making(cache_folder / "traces" / "it", "it"):
        pytest.fail("it is not locked")
    place = cache_folder / "traces" / "it"
    advice = "set RESCORE_CACHE to a folder where rescore may keep files"
    assert str(caught.value) == f"can't write {place}: {os.strerror(code)}; {advice}"
