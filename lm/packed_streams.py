"""Reads files to their very end, unpacked: gzip, zstd, bzip2 and xz, of one stream or several.

Python's own readers take bytes after a stream of bzip2 or xz that begin no other for the end of the file: a file whose
second stream is damaged would be read as its first.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lattices.errors import InvalidDataError, unreadable

READ_BYTES = 1 << 18
XZ_PADDING = 4  # zero bytes after a stream of xz come in fours
PACKING_ENDINGS = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bzip2", ".xz": "xz"}
PACKING_BYTES = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # the second: notes before the first data
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
}


def packing_of(first: bytes) -> str | None:
    """How a file that begins with these bytes is packed: a key of `PACKING_BYTES`, None: not."""
    return next((name for name, magic in PACKING_BYTES.items() if magic.match(first)), None)


def pieces(path: Path, packing: str | None, size: int) -> Iterator[bytes]:
    """The bytes that a file holds, unpacked, up to `size` at a time. Raises as `reading`."""
    with reading(path, packing), path.open("rb") as stream:
        unpacked: Any = stream
        if packing in ("bzip2", "xz"):
            yield from _streams(stream, packing, size)
            return
        if packing == "gzip":
            unpacked = gzip.open(stream)  # noqa: SIM115
        elif packing == "zstd":
            import pyarrow  # unlike the package zstandard it notices a file that was cut short

            unpacked = pyarrow.CompressedInputStream(stream, "zstd")
        while piece := unpacked.read(size):
            yield piece


@contextmanager
def reading(path: Path, packing: str | None = None) -> Iterator[None]:
    """One line for what can go wrong while a file is read: `InvalidDataError` for a packed one that is cut short or
    damaged, `RescoreError` for one that can't be read."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise InvalidDataError(f"{path} is not a whole {packing} file: {error}") from error
    except OSError as error:
        if packing and error.errno is None:  # bzip2's and pyarrow's way to say it
            raise InvalidDataError(f"{path} is not a whole {packing} file: {error}") from error
        raise unreadable(path, error) from error


def _streams(stream: IO[bytes], packing: str, size: int) -> Iterator[bytes]:
    """The bytes in streams of bzip2 or xz, up to `size` at a time.

    Raises `EOFError` where they are cut short, `OSError` (without a number) or `lzma.LZMAError` where they are damaged
    or anything but another stream (xz: zero bytes in fours) follows one.
    """
    is_xz = packing == "xz"
    decompressor: Any = None
    data, zeros = stream.read(READ_BYTES), 0
    while True:
        if decompressor is None:  # between two streams
            following = data.lstrip(b"\0") if is_xz else data
            zeros += len(data) - len(following)
            if data and not following:
                data = stream.read(READ_BYTES)
                continue
            if zeros % XZ_PADDING:
                raise lzma.LZMAError(f"{zeros} zero bytes follow a stream")
            if not following:
                return
            decompressor, data = lzma.LZMADecompressor(lzma.FORMAT_XZ) if is_xz else bz2.BZ2Decompressor(), following
        if piece := decompressor.decompress(data, size):
            yield piece
        data = b""
        if decompressor.eof:
            data, zeros, decompressor = decompressor.unused_data or stream.read(READ_BYTES), 0, None
        elif decompressor.needs_input and not (data := stream.read(READ_BYTES)):
            raise EOFError("it ends before its data does")
