"""Typed records as JSON: written as they are, read back with a message that names the file and the field.

Records are dataclasses or `msgspec.Struct`s; msgspec checks every field's type.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from lattices.errors import InvalidDataError, RescoreError

Record = TypeVar("Record")
Count = Annotated[int, msgspec.Meta(ge=0)]
Number = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max)]  # finite: NaN is outside too


def plain(record: Any) -> Any:
    """A record as dictionaries, lists, text and numbers, as it is read back from JSON."""
    return json.loads(json.dumps(msgspec.to_builtins(record, str_keys=True)))  # which leaves tuples


def decode_record(text: bytes | str, kind: type[Record], *, where: str, advice: str) -> Record:
    """The record of a type in JSON text. Raises `InvalidDataError`: `where`, what is wrong, `advice`."""
    try:
        value = json.loads(text)  # msgspec would refuse the escapes that `lm.files.write_json` makes of odd file names
    except (ValueError, RecursionError) as error:
        raise InvalidDataError(f"{where} is not valid JSON ({error}); {advice}") from error
    return convert_record(value, kind, where=where, advice=advice)


def convert_record(value: Any, kind: type[Record], *, where: str, advice: str) -> Record:
    """The record of a type in what JSON gave, as `decode_record`."""
    try:
        return msgspec.convert(value, type=kind, str_keys=True)  # keys of JSON objects are text, those of p too
    except (msgspec.ValidationError, RecursionError) as error:
        raise InvalidDataError(f"{where}: {_reason(error)}; {advice}") from error


def read_record(path: Path, kind: type[Record], *, missing: str, advice: str = "get or make it again") -> Record:
    """The record of a type in a JSON file.

    Raises `RescoreError` that begins with `missing` if the file can't be read, else as `decode_record`.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise RescoreError(f"{missing}: can't read {path.name} ({error.strerror})") from error
    return decode_record(text, kind, where=str(path), advice=advice)


def _reason(error: Exception) -> str:
    """msgspec's message, its paths `$.results[...].gain` without the dollar."""
    return str(error).replace("`$.", "`").replace("`$", "`").rstrip(".")
