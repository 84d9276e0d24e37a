"""Text and rows that users give: content and name say what a file holds, and it is read right or refused.

One reader for all: task data, prompts, corpora. A file may be packed (gzip, zstd, bzip2, xz: by its first bytes, in
whatever case its ending is) and is read to its very end: one that was cut short is an error with its name, never half
a file. Its layout is

- `lines`: JSON lines (`.jsonl`, `.ndjson`, `.json` with an object a line; a name that says nothing and such a first
  line);
- `array`: a JSON array of objects;
- `csv` and `tsv`: a table with a line of names; all its values are text, as they stand there;
- `parquet` and `arrow`: read through pyarrow, not packed besides;
- `text`: anything else, UTF-8 with or without a byte order mark.

The rows of a table are objects like those of JSON lines, its columns are the fields. Archives, UTF-16 and other
formats are refused by name.
"""

from __future__ import annotations

import csv
import json
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lattices.errors import InvalidDataError, RescoreError, unreadable
from lm.packed_streams import PACKING_ENDINGS, packing_of, pieces, reading

BLOCK_BYTES = 1 << 23  # text in hand at a time
FIRST_BYTES = 1 << 16  # what the layout is seen by
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LINES, ARRAY, CSV, TSV, PARQUET, ARROW, TEXT = "lines", "array", "csv", "tsv", "parquet", "arrow", "text"
TEXT_ENDINGS = (".txt", ".text")
ROW_ENDINGS = {
    ".jsonl": LINES, ".ndjson": LINES, ".jsonlines": LINES, ".jl": LINES, ".json": LINES, ".csv": CSV, ".tsv": TSV,
    ".tab": TSV, ".parquet": PARQUET, ".pq": PARQUET, ".arrow": ARROW, ".feather": ARROW,
}  # fmt: skip
TABLES = {b"PAR1": PARQUET, b"ARROW1\0\0": ARROW, b"\xff\xff\xff\xff": ARROW}
NAMES = {LINES: "JSON lines", ARRAY: "a JSON array", CSV: "CSV", TSV: "TSV", PARQUET: "Parquet", ARROW: "Arrow"}
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
UNREADABLE = {
    b"PK\x03\x04": "a zip archive (or an office file); unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!\x1a\x07": "a rar archive; unpack it",
    b"\x04\x22\x4d\x18": "packed with lz4; unpack it",
    b"\x1f\x9d": "packed with compress; unpack it",
    b"%PDF-": "a PDF; give its text",
    b"SQLite format 3\0": "an SQLite data base; export JSON lines",
    b"Obj\x01": "an Avro table; export JSON lines or Parquet",
    b"\x93NUMPY": "a NumPy array; export JSON lines",
}
TAR = slice(257, 262)  # where a tar archive says what it is
JSON_ARRAY = re.compile(rb'\s*\[\s*(\{\s*["}]|"[^"\n]*"\s*[,\]])')  # not "[Music] ..." or "[[1]] ...", which are text
BETWEEN_ROWS = re.compile(r"\s*[\[,]\s*")
JSON_OBJECT = re.compile(rb'\s*\{\s*("|\}\s*\Z)')
UTF_16, UTF_32 = (b"\xff\xfe", b"\xfe\xff"), (b"\xff\xfe\0\0", b"\0\0\xfe\xff")


@dataclass(frozen=True)
class TextFile:
    """A file that is there, how it is packed (None: not), its layout, and what a line or row of it is called."""

    path: Path
    packing: str | None
    layout: str

    @property
    def has_rows(self) -> bool:
        """Whether it holds objects with fields, not running text."""
        return self.layout != TEXT

    @property
    def unit(self) -> str:
        """What is numbered in it, from 1: `line` or `row`."""
        return "row" if self.layout in (ARRAY, CSV, TSV, PARQUET, ARROW) else "line"


def identify(path: Path, *, wants_rows: bool = False) -> TextFile:
    """What a file is, by its first bytes and its name.

    `wants_rows`: whatever its name, it is to be read by `rows`; else text (`.txt`) that holds JSON is refused. Raises
    `RescoreError` if it can't be read, `InvalidDataError` for a format that is not read here, and for a packed file
    that is none.
    """
    named, ending = _endings(path)
    with reading(path):
        if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
            raise RescoreError(f"can't read {path}: it is no regular file, and it is read more than once; save it")
        with path.open("rb") as stream:
            first = stream.read(FIRST_BYTES)
    packing = packing_of(first)
    if named and packing is None:
        raise InvalidDataError(f"{path} is not a whole {named} file: it {'holds other bytes' if first else 'is empty'}")
    if packing:
        first = _beginning(pieces(path, packing, FIRST_BYTES), FIRST_BYTES)
    return TextFile(path, packing, _layout(path, packing, ending, first, wants_rows))


def _beginning(parts: Iterator[bytes], least: int) -> bytes:
    """The first parts together, `least` bytes or more if there are so many."""
    first = b""
    for part in parts:
        first += part
        if len(first) >= least:
            break
    return first


def _endings(path: Path) -> tuple[str | None, str]:
    """The packing that the name says, and the ending before that, lower case."""
    endings = [ending.lower() for ending in path.suffixes]
    packing = PACKING_ENDINGS.get(endings.pop()) if endings and endings[-1] in PACKING_ENDINGS else None
    return packing, endings[-1] if endings else ""


def name_without_endings(path: Path) -> str:
    """The name of a file without the endings that say how it is packed and what it holds."""
    packing, ending = _endings(path)
    name = path.stem if packing else path.name
    return Path(name).stem if ending else name


def may_hold_text(path: Path) -> bool:
    """Whether a file's name says that it is text or rows: what of a folder is read."""
    return _endings(path)[1] in (*TEXT_ENDINGS, *ROW_ENDINGS)


def rows_file(folder: Path, name: str) -> Path:
    """The file of rows called `name` in a folder: NAME.jsonl, which need not be there, or the only one called NAME
    with another ending of rows. Raises `RescoreError` for several."""
    usual = folder / f"{name}.jsonl"
    with reading(folder):
        if usual.exists() or not folder.is_dir():
            return usual
        rows_files = (path for path in sorted(folder.iterdir()) if _endings(path)[1] in ROW_ENDINGS)
        called = [path for path in rows_files if name_without_endings(path) == name]
    if len(called) > 1:
        raise RescoreError(f"{folder} has {' and '.join(path.name for path in called)}; keep one of them")
    return called[0] if called else usual


def _layout(path: Path, packing: str | None, ending: str, first: bytes, wants_rows: bool) -> str:
    for magic, layout in TABLES.items():
        if first.startswith(magic):
            if packing:
                raise InvalidDataError(f"{path} is {NAMES[layout]} in a {packing} file; unpack it")
            return layout
    for magic, what in UNREADABLE.items():
        if first.startswith(magic):
            raise InvalidDataError(f"{path} is {what}")
    if first[TAR] == b"ustar":
        raise InvalidDataError(f"{path} is a tar archive; unpack it and give the files in it")
    if packing and packing_of(first):
        raise InvalidDataError(f"{path} is packed twice; unpack it once")
    if first.startswith((*UTF_16, *UTF_32)) or _alternates(first):
        which = "UTF-32" if first.startswith(UTF_32) else "UTF-16"
        raise InvalidDataError(f"{path} is {which} text; save it as UTF-8")
    named = ROW_ENDINGS.get(ending)
    if named in (PARQUET, ARROW):
        raise InvalidDataError(f"{path} is not {NAMES[named]}, as its name says; give it the ending of what it is")
    first = first.removeprefix(BYTE_ORDER_MARK).lstrip()
    content = ARRAY if named == LINES and first.startswith(b"[") else _json_layout(first)
    if content and (named in (CSV, TSV) or (ending in TEXT_ENDINGS and not wants_rows)):
        called, ending = NAMES[named] if named else "text", ".jsonl" if content == LINES else ".json"
        raise InvalidDataError(
            f"{path} is called {called} and holds {NAMES[content]}; name it {ending} to have its rows read"
        )
    return content or named or TEXT


def _json_layout(first: bytes) -> str | None:
    """JSON lines or a JSON array, if the beginning of a file (no space before it) is that beyond doubt."""
    if JSON_ARRAY.match(first):
        return ARRAY
    line = first.split(b"\n", 1)[0]
    if not JSON_OBJECT.match(line):
        return None
    if len(line) == len(first) >= FIRST_BYTES // 2:  # a line too long to be seen whole
        return LINES
    try:
        return LINES if isinstance(json.loads(line), dict) else None
    except (ValueError, RecursionError):
        return None


def _alternates(first: bytes) -> bool:
    """Whether every other byte is nearly always 0, as in UTF-16 of Western text without a mark."""
    return len(first) >= 8 and any(2 * first[start::2].count(0) > len(first[start::2]) for start in (0, 1))


def check_whole(file: TextFile) -> None:
    """Reads a packed file to its end: whoever takes only its first rows still wants to know. Raises as `blocks`."""
    if file.packing:
        for _ in pieces(file.path, file.packing, BLOCK_BYTES):
            pass


def blocks(file: TextFile, *, errors: str = "strict", advice: str = "save it as UTF-8") -> Iterator[tuple[int, bytes]]:
    """(number of the first line, whole lines of valid UTF-8, each with its line end) of a file that is no table.

    `errors` is `strict` or `replace` (bad UTF-8 becomes U+FFFD). Raises `InvalidDataError` with the line that is no
    UTF-8 and the `advice`, and for a packed file that is cut short; `RescoreError` if it can't be read.
    """
    parts = pieces(file.path, file.packing, BLOCK_BYTES)
    number, carried = 1, b""  # a line that has not ended yet
    part: bytes | None = _beginning(parts, len(BYTE_ORDER_MARK)).removeprefix(BYTE_ORDER_MARK)
    while part is not None:
        cut = part.rfind(b"\n") + 1
        block, carried = (carried + part[:cut], part[cut:]) if cut else (b"", carried + part)
        if (part := next(parts, None)) is None and carried:  # the end of the file ends its last line
            block, carried = block + carried + b"\n", b""
        if block:
            yield number, _valid(block, file.path, number, errors, advice)
            number += block.count(b"\n")


def _valid(block: bytes, path: Path, number: int, errors: str, advice: str) -> bytes:
    try:
        block.decode("utf-8")
    except UnicodeDecodeError as error:
        if errors == "replace":
            return block.decode("utf-8", "replace").encode()
        line = number + block.count(b"\n", 0, error.start)
        raise InvalidDataError(f"{path} line {line} is not UTF-8 text ({error.reason}); {advice}") from error
    return block


def text_lines(file: TextFile) -> Iterator[str]:
    """The lines of a text file, without their line ends (LF, CRLF, CR; U+2028 ends none). Raises as `blocks`."""
    for _, block in blocks(file):
        text = block.decode("utf-8").removesuffix("\n").removesuffix("\r")
        yield from text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def rows(
    file: TextFile, *, errors: str = "strict", advice: str = "save it as UTF-8"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line or row from 1, its fields); blank lines are passed over. Text is read as JSON lines.

    Raises as `blocks`, and `InvalidDataError` with the number of what is no row.
    """
    read = {ARRAY: _array, CSV: _table, TSV: _table, PARQUET: _parquet, ARROW: _arrow}.get(file.layout, _json_lines)
    return read(file, errors, advice)


def _json_lines(file: TextFile, errors: str, advice: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for first, block in blocks(file, errors=errors, advice=advice):
        for number, line in enumerate(block.split(b"\n")[:-1], start=first):
            if line.strip():
                yield number, json_row(line, f"{file.path} line {number}")


class _NamedTwiceError(Exception):
    """An object of JSON has a name twice, of which Python would keep the last."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these names and values. Raises `_NamedTwiceError` for a name that it has twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _NamedTwiceError(f"has the field {json.dumps(twice)} twice; keep one of them")
    return fields


def json_row(line: bytes, where: str) -> dict[str, Any]:
    """The object of a line of JSON lines. Raises `InvalidDataError` that begins with `where`."""
    try:
        value = json.loads(line, object_pairs_hook=_once)
    except _NamedTwiceError as error:
        raise InvalidDataError(f"{where} {error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidDataError(f"{where} is not valid JSON") from error
    if not isinstance(value, dict):
        raise InvalidDataError(f"{where} is not a JSON object")
    return value


def _array(file: TextFile, errors: str, advice: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not through `datasets`: it gives all rows the same fields and types, and makes dates of text that looks like one.
    content = b"".join(block for _, block in blocks(file, errors=errors, advice=advice))
    try:
        values = json.loads(content, object_pairs_hook=_once)
    except _NamedTwiceError as error:
        raise InvalidDataError(f"{file.path} row {_row_named_twice(content)} {error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidDataError(f"{file.path} is not a whole JSON array ({error})") from error
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise InvalidDataError(f"{file.path} row {number} is not a JSON object")
        yield number, value


def _row_named_twice(content: bytes) -> int:
    """The number of the first row of a JSON array that `_once` refuses."""
    text, place, number = content.decode("utf-8"), 0, 0
    decoder = json.JSONDecoder(object_pairs_hook=_once)
    with suppress(_NamedTwiceError):
        while match := BETWEEN_ROWS.match(text, place):
            number += 1
            place = decoder.raw_decode(text, match.end())[1]
    return number


def _table(file: TextFile, errors: str, advice: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not through `datasets` either: an answer 007 or NA stays what it is.
    csv.field_size_limit(min(sys.maxsize, (1 << 31) - 1))  # a field may be a whole article
    lines = (
        line + "\n"
        for _, block in blocks(file, errors=errors, advice=advice)
        for line in block.decode("utf-8").removesuffix("\n").split("\n")
    )
    reader = csv.reader(lines, delimiter="\t" if file.layout == TSV else ",", strict=True)
    filled = filter(None, reader)
    try:
        _check_columns(file, names := next(filled, []))
        for number, values in enumerate(filled, start=1):
            if len(values) != len(names):
                where = f"{file.path} row {number} (line {reader.line_num})"
                raise InvalidDataError(f"{where} has {len(values)} values for {len(names)} columns")
            yield number, dict(zip(names, values, strict=True))
    except csv.Error as error:
        raise InvalidDataError(
            f"{file.path} line {reader.line_num} is not valid {NAMES[file.layout]}: {error}"
        ) from error


def _check_columns(file: TextFile, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise InvalidDataError(f"{file.path} names a column twice: {', '.join(names)}")


def _parquet(file: TextFile, errors: str, advice: str) -> Iterator[tuple[int, dict[str, Any]]]:
    from pyarrow.parquet import ParquetFile

    with _reading_table(file), file.path.open("rb") as stream:
        yield from _numbered(file, ParquetFile(stream).iter_batches(batch_size=1000))


def _arrow(file: TextFile, errors: str, advice: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow

    with _reading_table(file), file.path.open("rb") as stream:
        if stream.read(6) == b"ARROW1":
            opened = pyarrow.ipc.open_file(stream)
            yield from _numbered(file, (opened.get_batch(i) for i in range(opened.num_record_batches)))
            return
        stream.seek(max(0, file.path.stat().st_size - len(ARROW_END)))
        if stream.read() != ARROW_END:  # pyarrow takes the end of the file for the end of the stream
            raise InvalidDataError(f"{file.path} is not a whole {NAMES[ARROW]} file: it ends without an end mark")
        stream.seek(0)
        yield from _numbered(file, pyarrow.ipc.open_stream(stream))


def _numbered(file: TextFile, batches: Iterator[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # else what a damaged one points to may lie anywhere in memory
        _check_columns(file, batch.schema.names)
        try:
            rows_of_batch: list[dict[str, Any]] = batch.to_pylist()
        except ValueError as error:  # a name twice within a column, a value that Python has no type for
            raise InvalidDataError(f"{file.path} has a column that can't be read: {error}") from error
        yield from enumerate(rows_of_batch, start=number + 1)
        number += len(rows_of_batch)


@contextmanager
def _reading_table(file: TextFile) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(file.path, error) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InvalidDataError(f"{file.path} is not a whole {NAMES[file.layout]} file: {reason}") from error
