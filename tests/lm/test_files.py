"""Files are whole or not there; what a killed writer leaves is passed over by readers and cut off by the next one."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from lattices.errors import InvalidDataError, OutputError, RescoreError
from lm import files

exhaustive = settings(
    deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
json_objects = st.dictionaries(
    st.text(max_size=5), st.none() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])), max_size=3
)


def one_line(caught: pytest.ExceptionInfo[RescoreError]) -> str:
    """The error's message, which must be one line."""
    message = str(caught.value)
    assert "\n" not in message
    return message


def fail(error: BaseException):
    """A function that does nothing but raise."""

    def raises(*_args, **_kwargs):
        raise error

    return raises


class TestAtomicFolder:
    def test_becomes_the_folder_at_the_end(self, tmp_path: Path):
        with files.atomic_folder(tmp_path / "a" / "b") as temporary:
            (temporary / "x").write_text("1")
            assert not (tmp_path / "a" / "b").exists()
        assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
        assert (tmp_path / "a" / "b" / "x").read_text() == "1"

    def test_replaces_an_older_version(self, tmp_path: Path):
        for content in ("old", "new"):
            with files.atomic_folder(tmp_path / "b") as temporary:
                (temporary / content).write_text("")
        assert [p.name for p in tmp_path.rglob("*")] == ["b", "new"]

    @pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
    def test_vanishes_on_failure(self, tmp_path: Path, error: BaseException):
        with pytest.raises(type(error)), files.atomic_folder(tmp_path / "b") as temporary:
            (temporary / "x").write_text("1")
            raise error
        assert not list(tmp_path.iterdir())

    def test_a_full_disk_is_one_line_and_leaves_nothing(self, tmp_path: Path):
        with pytest.raises(OutputError, match=r"can't write .*No space left") as caught:  # noqa: SIM117
            with files.atomic_folder(tmp_path / "b"):
                raise FULL
        one_line(caught)
        assert not list(tmp_path.iterdir())

    def test_a_file_in_its_place_stays(self, tmp_path: Path):
        (tmp_path / "b").write_text("mine")
        with pytest.raises(OutputError), files.atomic_folder(tmp_path / "b"):
            pass
        assert [p.name for p in tmp_path.iterdir()] == ["b"]
        assert (tmp_path / "b").read_text() == "mine"

    def test_there_is_a_version_at_every_moment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        with files.atomic_folder(tmp_path / "b") as temporary:
            (temporary / "old").write_text("")
        replace, seen = os.replace, []

        def spy(*arguments):
            replace(*arguments)
            seen.append(sorted(p.parent.name == "b" for p in tmp_path.rglob("old")))

        monkeypatch.setattr(files.os, "replace", spy)
        with files.atomic_folder(tmp_path / "b") as temporary:
            (temporary / "new").write_text("")
        assert seen == [[False], [False]], "the old one was moved, not deleted, until the new one was there"
        assert [p.name for p in tmp_path.rglob("*")] == ["b", "new"]

    def test_the_old_version_comes_back_if_the_new_one_can_not_be_moved(self, tmp_path: Path, monkeypatch):
        with files.atomic_folder(tmp_path / "b") as temporary:
            (temporary / "old").write_text("")
        replace = os.replace

        def refuses_the_new(source, target):
            if Path(target).name == "b" and (Path(source) / "new").exists():
                raise FULL
            replace(source, target)

        monkeypatch.setattr(files.os, "replace", refuses_the_new)
        with pytest.raises(OutputError, match="No space left"), files.atomic_folder(tmp_path / "b") as temporary:
            (temporary / "new").write_text("")
        assert [p.name for p in tmp_path.rglob("*")] == ["b", "old"]

    def test_a_version_that_a_kill_left_aside_is_put_back(self, tmp_path: Path):
        aside = tmp_path / f".b-0123abcd{files.ASIDE}"
        aside.mkdir()
        (aside / "old").write_text("")
        with pytest.raises(ValueError), files.atomic_folder(tmp_path / "b"):
            assert [p.name for p in (tmp_path / "b").iterdir()] == ["old"]
            raise ValueError
        assert [p.name for p in tmp_path.rglob("*")] == ["b", "old"]

    def test_what_kills_left_goes(self, tmp_path: Path):
        names = [".b-0123abcd", ".b-4567cdef", f".b-89abcdef{files.ASIDE}", ".bb-0123abcd", "b"]
        for name in names:
            (tmp_path / name / "part").mkdir(parents=True)
            (tmp_path / name / "part" / "x").write_text("")
        before = time.time() - 2 * files.LEFT_AFTER
        for path in [p for name in (".b-0123abcd", ".bb-0123abcd") for p in (tmp_path / name).rglob("*")]:
            os.utime(path, (before, before))
        for name in (".b-0123abcd", ".b-4567cdef", ".bb-0123abcd"):
            os.utime(tmp_path / name, (before, before))
        with files.atomic_folder(tmp_path / "b"):
            pass
        left = sorted(p.name for p in tmp_path.iterdir())
        assert left == [".b-4567cdef", ".bb-0123abcd", "b"], "another writer may be at work; the other is not b's"

    def test_a_link_stays_one(self, tmp_path: Path):
        (tmp_path / "disk" / "model").mkdir(parents=True)
        (tmp_path / "b").symlink_to(tmp_path / "disk" / "model")
        with files.atomic_folder(tmp_path / "b") as temporary:
            (temporary / "new").write_text("")
        assert (tmp_path / "b").is_symlink() and (tmp_path / "disk" / "model" / "new").is_file()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "disk"]


class TestAtomicFile:
    def test_json_is_indented_utf8_with_a_final_newline(self, tmp_path: Path):
        files.write_json(tmp_path / "new" / "x.json", {"é": [1]})
        assert (tmp_path / "new" / "x.json").read_bytes() == '{\n  "é": [\n    1\n  ]\n}\n'.encode()

    def test_the_old_document_stays_if_the_new_one_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        path = tmp_path / "x.json"
        files.write_json(path, [1])
        with pytest.raises(TypeError):
            files.write_json(path, {"a": [1, object()]})
        monkeypatch.setattr(files.json, "dump", fail(FULL))
        with pytest.raises(OutputError, match="No space left") as caught:
            files.write_json(path, [2])
        assert str(path) in one_line(caught)
        assert json.loads(path.read_text()) == [1]
        assert [p.name for p in tmp_path.iterdir()] == ["x.json"]

    def test_a_file_where_a_folder_is_needed_is_one_line(self, tmp_path: Path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError) as caught:
            files.write_json(tmp_path / "file" / "x.json", [])
        assert str(tmp_path / "file" / "x.json") in one_line(caught)

    def test_others_may_read_what_the_umask_lets_them(self, tmp_path: Path):
        before = os.umask(0o022)
        try:
            files.write_json(tmp_path / "x.json", [])
            with files.atomic_folder(tmp_path / "folder"):
                pass
        finally:
            os.umask(before)
        assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o644
        assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755


def test_writing_knows_the_name_safetensors_has_for_a_full_disk(tmp_path: Path):
    with pytest.raises(OutputError, match=r"can't write .*No space left") as caught, files.writing(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    one_line(caught)


class TestReadJsonLines:
    def test_lines_are_numbered_from_1_and_blank_ones_passed_over(self, tmp_path: Path):
        path = tmp_path / "x.jsonl"
        path.write_text('{"a": 1}\n\n   \n{"a": "\u2028"}')
        assert list(files.read_json_lines(path)) == [(1, {"a": 1}), (4, {"a": "\u2028"})]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b"{", "line 3 is not valid JSON"),
            (b"[1]", "line 3 is not a JSON object"),
            (b"7", "line 3 is not a JSON object"),
            (b'{"a": "\xff"}', "line 3 is not valid JSON"),
            (b"[" * 100_000, "line 3 is not valid JSON"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path: Path, line: bytes, message: str):
        path = tmp_path / "x.jsonl"
        path.write_bytes(b"{}\n\n" + line + b"\n{}\n")
        for torn_tail in (False, True):  # only the tail may be torn
            with pytest.raises(InvalidDataError, match=message) as caught:
                list(files.read_json_lines(path, torn_tail=torn_tail))
            assert str(path) in one_line(caught)

    @pytest.mark.parametrize("tail", ['{"a": 2', '{"a": "\u00e9'.encode()[:-1], "1", '{"a": 2}', " "])
    def test_a_torn_tail_is_tolerated_only_when_asked(self, tmp_path: Path, tail: str | bytes):
        path = tmp_path / "x.jsonl"
        path.write_bytes(b'{"a": 1}\n' + (tail if isinstance(tail, bytes) else tail.encode()))
        assert list(files.read_json_lines(path, torn_tail=True)) == [(1, {"a": 1})]
        if tail == '{"a": 2}':  # someone's file without a final newline
            assert [n for n, _ in files.read_json_lines(path)] == [1, 2]
        elif tail != " ":
            with pytest.raises(InvalidDataError, match="line 2"):
                list(files.read_json_lines(path))

    def test_a_missing_file_is_one_line(self, tmp_path: Path):
        for path in (tmp_path / "none", tmp_path):
            with pytest.raises(RescoreError, match="can't read") as caught:
                list(files.read_json_lines(path))
            one_line(caught)


class TestReadJsonObject:
    def test_an_object(self, tmp_path: Path):
        (tmp_path / "x.json").write_bytes('{"é": [1]}'.encode())
        assert files.read_json_object(tmp_path / "x.json", missing="nothing") == {"é": [1]}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is not valid JSON"),
            (b"{", "is not valid JSON"),
            (b'{"a": "\xff"}', "is not valid JSON"),
            (b"[" * 100_000, "is not valid JSON"),
            (b"[1]", "is not a JSON object"),
            (b"null", "is not a JSON object"),
        ],
    )
    def test_anything_else_is_one_line(self, tmp_path: Path, content: bytes, message: str):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(InvalidDataError, match=f"x.json {message}.*; bake another$") as caught:
            files.read_json_object(tmp_path / "x.json", missing="no cake", advice="bake another")
        one_line(caught)

    def test_a_file_that_can_not_be_read(self, tmp_path: Path):
        for path, reason in ((tmp_path / "none.json", "No such file"), (tmp_path, "Is a directory")):
            with pytest.raises(RescoreError, match=f"^no cake: can't read {path.name} \\({reason}"):
                files.read_json_object(path, missing="no cake")


class TestAppending:
    @pytest.mark.parametrize(
        ("before", "kept"),
        [
            (b"", b""),
            (b"{}\n", b"{}\n"),
            (b'{}\n{"a"', b"{}\n"),
            (b'{}\n{"a": 1}', b"{}\n"),
            (b'{"a"', b""),
            (b"\n", b"\n"),
            (b"{}\n" + b"x" * 200_000, b"{}\n"),
            (b"x" * 200_000, b""),
            (b"{}\n" * 50_000 + b'{"a"', b"{}\n" * 50_000),
            (b"x" * ((1 << 16) - 1) + b"\n" + b"y" * (1 << 16), b"x" * ((1 << 16) - 1) + b"\n"),
        ],
    )
    def test_a_torn_last_line_is_cut_off(self, tmp_path: Path, before: bytes, kept: bytes):
        path = tmp_path / "x.jsonl"
        path.write_bytes(before)
        with files.open_appending(path) as stream:
            files.append_json_line(stream, {"b": "é\u2028"})
        assert path.read_bytes() == kept + '{"b": "é\u2028"}\n'.encode()

    def test_folders_are_made(self, tmp_path: Path):
        with files.open_appending(tmp_path / "a" / "x.jsonl"):
            pass
        assert (tmp_path / "a" / "x.jsonl").read_bytes() == b""

    def test_every_record_is_on_disk_at_once(self, tmp_path: Path):
        with files.open_appending(tmp_path / "x.jsonl") as stream:
            files.append_json_line(stream, {})
            assert (tmp_path / "x.jsonl").read_bytes() == b"{}\n"

    @exhaustive
    @given(records=st.lists(json_objects, max_size=5), cut=st.integers(0, 200), more=json_objects)
    def test_reader_and_writer_agree_on_what_survives_a_kill(self, tmp_path: Path, records, cut, more):
        path = tmp_path / "x.jsonl"
        path.unlink(missing_ok=True)
        with files.open_appending(path) as stream:
            for record in records:
                files.append_json_line(stream, record)
        path.write_bytes(path.read_bytes()[:cut])
        survivors = [record for _, record in files.read_json_lines(path, torn_tail=True)]
        assert survivors == records[: len(survivors)]
        with files.open_appending(path) as stream:
            files.append_json_line(stream, more)
        assert [record for _, record in files.read_json_lines(path)] == [*survivors, more]


def test_changed_settings_names_the_innermost_difference():
    found = {"base": {"name": "a", "size": 1}, "limit": 2, "gone": 0}
    assert files.changed_settings(found, {"base": {"name": "a", "size": 1}, "limit": 2}) == []
    assert files.changed_settings(found, {"base": {"name": "b", "size": 1}, "limit": 3, "new": None, "more": 1}) == [
        "base.name: a -> b",
        "limit: 2 -> 3",
        "more: None -> 1",
    ]


def test_is_text():
    assert files.is_text("a \U0001f600\u2028")
    assert not any(map(files.is_text, ["", " \n", None, 3, ["a"], "\ud83d"]))


def test_the_cache_directory_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("RESCORE_CACHE", str(tmp_path / "own"))
    assert files.cache_directory() == tmp_path / "own"
    monkeypatch.delenv("RESCORE_CACHE")
    assert files.cache_directory() == tmp_path / "xdg" / "rescore"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_directory() == tmp_path / ".cache" / "rescore"


def test_nothing_is_said_to_be_kept_where_nothing_could_be(tmp_path: Path):
    (tmp_path / "file").touch()
    for place, is_kept in ((tmp_path / "file" / "x.json", False), (tmp_path, True)):
        with pytest.raises(OutputError) as caught:
            files.write_json(place, {})
        assert ("what was written before is kept" in str(caught.value)) == is_kept
