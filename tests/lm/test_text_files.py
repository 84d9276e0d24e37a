"""Files that users give: told by content and name, read to the end, or refused by name."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lattices.errors import InvalidDataError, RescoreError
from lm import packed_streams, text_files
from lm.text_files import (
    check_whole,
    identify,
    may_hold_text,
    name_without_endings,
    rows,
    rows_file,
    text_lines,
)

RECORDS = [{"id": "1", "text": "one\ntwo"}, {"id": "02", "text": 'said "né", 1999-12-31'}, {"id": "NA", "text": ""}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": lambda data: bytes(pyarrow.compress(data, codec="zstd", asbytes=True)),
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def table(delimiter: str = ",") -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return stream.getvalue().encode()


TABLE = pyarrow.Table.from_pylist(RECORDS)
TWICE = pyarrow.table([["1"], ["2"]], names=["a", "a"])
STRUCTS = pyarrow.table({"a": pyarrow.StructArray.from_arrays([["1"], ["2"]], names=["b", "b"])})


def arrow(file: bool, columns: pyarrow.Table = TABLE) -> bytes:
    sink = io.BytesIO()
    with (pyarrow.ipc.new_file if file else pyarrow.ipc.new_stream)(sink, columns.schema) as writer:
        writer.write_table(columns)
    return sink.getvalue()


def parquet(columns: pyarrow.Table = TABLE) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(columns, sink)
    return sink.getvalue()


def read(path: Path) -> list[dict[str, Any]]:
    return [record for _, record in rows(identify(path, wants_rows=True))]


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(InvalidDataError) as caught:
        file = identify(path, **options)
        list(rows(file) if file.has_rows else text_lines(file))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


class TestRows:
    @pytest.mark.parametrize(
        "name", ["x.jsonl", "x.ndjson", "x.JSONL", "x.json", "x.Json", "x.dat", "x", "x.jsonlines"]
    )
    @pytest.mark.parametrize("packing", [None, *PACKERS])
    @pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
    def test_json_lines(self, tmp_path: Path, name: str, packing: str | None, mark: bytes):
        content = mark + LINES.replace(b"\n", b"\r\n")
        for ending in [packing, packing.upper(), "bin"] if packing else [""]:  # also where the name does not say it
            path = written(tmp_path / f"{name}.{ending}".rstrip("."), PACKERS[packing](content) if packing else content)
            file = identify(path)
            assert file.has_rows and file.unit == "line"
            assert list(rows(file)) == list(enumerate(RECORDS, start=1))

    @pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x", "x.json.gz", "X.JSON.ZST"])
    @pytest.mark.parametrize("indent", [None, 2])
    def test_a_json_array(self, tmp_path: Path, name: str, indent: int | None):
        content = json.dumps(RECORDS, indent=indent).encode()
        packing = name.lower().rpartition(".")[2]
        path = written(tmp_path / name, PACKERS[packing](content) if packing in PACKERS else content)
        assert read(path) == RECORDS and identify(path).unit == "row"

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("x.csv", table()), ("x.CSV", b"\xef\xbb\xbf" + table()), ("x.csv.gz", gzip.compress(table(), mtime=0)),
            ("x.tsv", table("\t")), ("x.parquet", parquet()), ("x", parquet()), ("x.txt", parquet()),
            ("x.arrow", arrow(True)), ("x.arrow", arrow(False)), ("x.jsonl", arrow(False)),
        ],
    )  # fmt: skip
    def test_a_table_keeps_what_stands_in_it(self, tmp_path: Path, name: str, content: bytes):
        # 02 stays text, NA is no gap, nothing becomes a date.
        assert read(written(tmp_path / name, content)) == RECORDS

    def test_the_longest_values(self, tmp_path: Path):
        long = "word " * 60_000
        assert read(written(tmp_path / "x.csv", f"text\n{long}\n".encode())) == [{"text": long}]
        assert read(written(tmp_path / "x", json.dumps({"text": long}).encode())) == [{"text": long}]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("x.csv", b"a,b\n1\n", "row 1 (line 2) has 1 values for 2 columns"),
            ("x.csv", b"a,a\n1,2\n", "names a column twice"),
            ("x.parquet", parquet(TWICE), "names a column twice: a, a"),
            ("x.arrow", arrow(True, TWICE), "names a column twice: a, a"),
            ("x.arrow", arrow(True, STRUCTS), "has a column that can't be read"),
            ("x.arrow", arrow(False, TWICE), "names a column twice: a, a"),
            ("x.jsonl", b'{"a": 1}\n{"a": 1, "b": 2, "a": 1}\n', 'line 2 has the field "a" twice; keep one of them'),
            ("x.jsonl", b'{"a": [{"b": 1, "b": 2}]}\n', 'line 1 has the field "b" twice'),
            (
                "x.json",
                b'[{"a": 1, "b": "]"} ,\n {"a": 2, "\\u0061": 3}, {"a": 1, "a": 2}]',
                'row 2 has the field "a" twice',
            ),
            ("x.json", b'\xef\xbb\xbf [ {"a": {"b": 1, "b": 2}}]', 'row 1 has the field "b" twice'),
            ("x.csv", b'a,b\n1,"2\n', "not valid CSV"),
            ("x.csv", LINES, "is called CSV and holds JSON lines; name it .jsonl"),
            ("x.jsonl", b'{"a": 1}\n{"a": \n', "line 2 is not valid JSON"),
            ("x.jsonl", b'{"a": 1}\n[2]\n', "line 2 is not a JSON object"),
            ("x.json", b'[{"a": 1}, {"a"', "not a whole JSON array"),
            ("x.json", b'[{"a": 1}, 2]', "row 2 is not a JSON object"),
            ("x.json", b'{\n  "a": 1\n}\n', "line 1 is not valid JSON"),
            ("x.parquet", parquet()[:-8], "not a whole Parquet file"),
            ("x.parquet", LINES, "is not Parquet, as its name says"),
            ("x.arrow", arrow(False)[:200], "not a whole Arrow file"),
            ("x.parquet.gz", gzip.compress(parquet(), mtime=0), "is Parquet in a gzip file; unpack it"),
            ("x.jsonl", b'{"a": "\xff"}\n', "line 1 is not UTF-8 text"),
        ],
    )
    def test_what_is_broken_is_named(self, tmp_path: Path, name: str, content: bytes, message: str):
        assert message in refused(written(tmp_path / name, content))


@pytest.mark.parametrize(("name", "content"), [("x.parquet", parquet()), ("x.arrow", arrow(True)), ("x", arrow(False))])
def test_a_table_that_is_cut_short_is_refused(tmp_path: Path, name: str, content: bytes):
    for cut in range(8, len(content), 3):
        said = refused(written(tmp_path / name, content[:cut]))
        assert "is not a whole" in said, cut


@pytest.mark.parametrize("file", [True, False])
def test_a_table_whose_texts_lie_outside_of_it_is_refused(tmp_path: Path, file: bool):
    def places(*ends: int) -> bytes:
        return np.array([0, *ends], np.int32).tobytes()

    content = arrow(file, pyarrow.table({"a": ["b" * 77, "c" * 14]}))
    assert content.count(places(77, 91)) == 1
    for damaged in ((1 << 30, 91), (-5, 91), (77, 1 << 30)):
        path = written(tmp_path / "x.arrow", content.replace(places(77, 91), places(*damaged)))
        assert "is not a whole Arrow file" in refused(path)


class TestText:
    @pytest.mark.parametrize("packing", [None, *PACKERS])
    def test_lines(self, tmp_path: Path, packing: str | None, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(text_files, "BLOCK_BYTES", 5)
        content = "\ufeffa\u2028b\r\nné\n\n[Music] not JSON\n{neither}".encode()
        path = tmp_path / (f"x.txt.{packing}" if packing else "x.txt")
        file = identify(written(path, PACKERS[packing](content) if packing else content))
        assert not file.has_rows
        assert list(text_lines(file)) == ["a\u2028b", "né", "", "[Music] not JSON", "{neither}"]

    @pytest.mark.parametrize(
        "content", [b"[[1]] a link\n", b'"a", "b"\n', b"a,b\n1,2\n", b"[1, 2]\n", b"PKs\n", b"BZh"]
    )
    def test_what_only_looks_like_something_is_text(self, tmp_path: Path, content: bytes):
        assert not identify(written(tmp_path / "x.txt", content)).has_rows

    @pytest.mark.parametrize(
        ("content", "what"),
        [(LINES, "JSON lines; name it .jsonl"), (json.dumps(RECORDS).encode(), "a JSON array; name it .json")],
    )
    def test_rows_are_never_read_as_text(self, tmp_path: Path, content: bytes, what: str):
        path = written(tmp_path / "x.txt", content)
        assert f"is called text and holds {what}" in refused(path)
        assert read(path) == RECORDS  # where rows are wanted, they are what is there

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
    def test_utf_16_is_refused_by_name(self, tmp_path: Path, encoding: str):
        for name, text in (("x.txt", "some text\n" * 3), ("x.jsonl", LINES.decode()), ("x.csv", "a,b\nc,d\n")):
            said = refused(written(tmp_path / name, text.encode(encoding)))
            assert "is UTF-" in said and "save it as UTF-8" in said


class TestPacked:
    @pytest.mark.parametrize("packing", PACKERS)
    def test_cut_short_anywhere_it_is_refused(self, tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(text_files, "BLOCK_BYTES", 64)
        whole = PACKERS[packing](LINES * 20)
        for cut in range(len(whole)):
            path = written(tmp_path / f"x.jsonl.{packing}", whole[:cut])
            assert "is not a whole" in refused(path), cut
        for follows in (b"m", b"more", b"more" * 100, b"\1\0\0\0"):
            path.write_bytes(whole + follows)
            assert "is not a whole" in refused(path), follows

    @pytest.mark.parametrize("packing", PACKERS)
    def test_so_it_is_in_the_second_of_two_streams(self, tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(packed_streams, "READ_BYTES", 7)
        first, second = PACKERS[packing](LINES), PACKERS[packing](LINES * 2)
        path = tmp_path / f"x.jsonl.{packing}"
        for cut in range(1, len(second)):
            written(path, first + second[:cut])
            assert "is not a whole" in refused(path), cut
            with pytest.raises(InvalidDataError, match=r"x.jsonl.* is not a whole"):
                check_whole(identify(path))
        for place in range(4):  # what a stream is told by
            changed = bytearray(second)
            changed[place] ^= 0xFF
            assert "is not a whole" in refused(written(path, first + changed)), place
        assert read(written(path, first + second)) == RECORDS * 3

    @pytest.mark.parametrize("read_bytes", [1, 3, 1 << 18])
    def test_zero_bytes_in_fours_are_padding_of_xz(
        self, tmp_path: Path, read_bytes: int, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(packed_streams, "READ_BYTES", read_bytes)
        one, path = lzma.compress(LINES), tmp_path / "x.jsonl.xz"
        assert read(written(path, one + bytes(8) + one + bytes(4))) == RECORDS * 2
        for wrong in (one + bytes(3), one + bytes(5) + one, one + bytes(4) + b"more"):
            assert "is not a whole xz file" in refused(written(path, wrong))
        path = tmp_path / "x.jsonl.bz2"
        assert "is not a whole bzip2 file" in refused(written(path, bz2.compress(LINES) + bytes(4)))

    @pytest.mark.parametrize("packing", PACKERS)
    def test_much_text_is_read_whole(self, tmp_path: Path, packing: str):
        noise = np.random.default_rng(1).bytes(600_000).hex() + "\n"
        path = written(tmp_path / f"x.txt.{packing}", PACKERS[packing](noise.encode()) + PACKERS[packing](b"end\n"))
        assert list(text_lines(identify(path))) == [noise[:-1], "end"]

    @pytest.mark.parametrize("packing", PACKERS)
    def test_whoever_takes_the_first_rows_learns_it_too(self, tmp_path: Path, packing: str):
        noise = np.random.default_rng(0).bytes(300_000).hex()
        path = tmp_path / f"x.jsonl.{packing}"
        whole = PACKERS[packing](LINES + json.dumps({"text": noise}).encode())
        check_whole(identify(written(path, whole)))
        written(path, whole[: len(whole) // 2])
        with pytest.raises(InvalidDataError, match="is not a whole"):
            check_whole(identify(path))

    @pytest.mark.parametrize("packing", PACKERS)
    def test_one_after_the_other_is_one_file(self, tmp_path: Path, packing: str):
        path = written(tmp_path / f"x.jsonl.{packing}", PACKERS[packing](LINES) + PACKERS[packing](LINES))
        assert read(path) == RECORDS * 2

    def test_notes_of_zstd_are_passed_over(self, tmp_path: Path):
        note = b"\x50\x2a\x4d\x18\4\0\0\0note"
        assert read(written(tmp_path / "x", note + PACKERS["zst"](LINES))) == RECORDS

    def test_what_is_no_packed_file(self, tmp_path: Path):
        assert "it holds other bytes" in refused(written(tmp_path / "x.txt.gz", b"plain"))
        assert "it is empty" in refused(written(tmp_path / "x.txt.zst", b""))
        assert "packed twice" in refused(written(tmp_path / "x.txt.gz", gzip.compress(gzip.compress(b"a"))))

    def test_archives_are_refused_by_name(self, tmp_path: Path):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            archive.writestr("a.txt", "a")
        with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
            tar.add(tmp_path / "x.zip", "a")
        assert "a zip archive" in refused(tmp_path / "x.zip")
        assert "a tar archive" in refused(tmp_path / "x.tar.gz")
        assert "a PDF" in refused(written(tmp_path / "x.txt", b"%PDF-1.7 ..."))
        assert "a NumPy array" in refused(written(tmp_path / "x.npy", b"\x93NUMPY\1\0"))


class TestPlaces:
    def test_what_can_not_be_read(self, tmp_path: Path):
        os.mkfifo(tmp_path / "pipe")
        for path, message in (
            (tmp_path / "none", "No such file"), (tmp_path, "Is a directory"), (tmp_path / "pipe", "no regular file"),
            (tmp_path / ("x" * 300), "File name too long"),
        ):  # fmt: skip
            with pytest.raises(RescoreError, match=f"can't read .*{message}"):
                identify(path)

    def test_names(self):
        for name, stem in (("a.b.jsonl.GZ", "a.b"), ("a.txt", "a"), ("a.v1", "a"), ("a", "a"), (".jsonl", ".jsonl")):
            assert name_without_endings(Path(name)) == stem
        for name in ("a.txt", "a.JSONL", "a.csv.zst", "a.json.bz2", "a.parquet"):
            assert may_hold_text(Path(name)), name
        for name in ("a.md", "a", "a.gz", "txt"):
            assert not may_hold_text(Path(name)), name

    def test_the_rows_of_a_task_in_a_folder(self, tmp_path: Path):
        assert rows_file(tmp_path, "squad") == tmp_path / "squad.jsonl"
        written(tmp_path / "squad.yaml", b"")
        written(tmp_path / "squad.v2.csv", b"")
        packed = written(tmp_path / "squad.jsonl.gz", b"")
        assert rows_file(tmp_path, "squad") == packed
        written(tmp_path / "squad.csv", b"")
        with pytest.raises(RescoreError, match=r"has squad\.csv and squad\.jsonl\.gz; keep one"):
            rows_file(tmp_path, "squad")
        assert rows_file(tmp_path, "squad.v2") == tmp_path / "squad.v2.csv"
