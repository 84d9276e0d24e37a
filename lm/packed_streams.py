"""Reads bzip2 and xz files of one stream or several to their very end.

Python's own readers take bytes behind a stream that begin no other for the end of the file: a file whose second
stream is damaged would be read as its first.
"""

from __future__ import annotations

import bz2
import io
import lzma
from typing import IO, Any

READ_BYTES = 1 << 18
XZ_PADDING = 4  # zero bytes behind a stream of xz come in fours
BUFFER_BYTES = 1 << 16


def open_packed(stream: IO[bytes], packing: str) -> io.BufferedReader:
    """The bytes that a file packed with `bzip2` or `xz` holds.

    Reading raises `EOFError` where it is cut short, `OSError` (without a number) or `lzma.LZMAError` where it is
    damaged or anything but another stream (xz: zero bytes in fours) follows a stream.
    """
    return io.BufferedReader(_Streams(stream, packing), BUFFER_BYTES)


class _Streams(io.RawIOBase):
    def __init__(self, stream: IO[bytes], packing: str) -> None:
        self._stream, self._is_xz = stream, packing == "xz"
        self._held = b""  # packed bytes that the decompressor has not seen
        self._decompressor = self._new()

    def _new(self) -> Any:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ) if self._is_xz else bz2.BZ2Decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._decompressor.eof and not self._begin_next():
                return 0
            if self._decompressor.needs_input and not self._held:
                self._held = self._stream.read(READ_BYTES)
                if not self._held:
                    raise EOFError("it ends before its data does")
            unpacked = self._decompressor.decompress(self._held, len(buffer))
            self._held = b""
            if unpacked:
                buffer[: len(unpacked)] = unpacked
                return len(unpacked)

    def _begin_next(self) -> bool:
        """Whether more than padding follows the stream that has ended."""
        read, zeros = self._decompressor.unused_data or self._stream.read(READ_BYTES), 0
        follows = read.lstrip(b"\0") if self._is_xz else read
        while read and not follows:
            zeros += len(read)
            read = self._stream.read(READ_BYTES)
            follows = read.lstrip(b"\0")
        zeros += len(read) - len(follows)
        if zeros % XZ_PADDING:
            raise lzma.LZMAError(f"{zeros} zero bytes follow a stream")
        if follows:
            self._held, self._decompressor = follows, self._new()
        return bool(follows)
