"""Typed records as JSON: written as they are, read back with a message that names the file and the field.

Records are dataclasses or `msgspec.Struct`s; msgspec checks every field's type.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from lattices.errors import InvalidDataError
from lm.files import read_json_object

Record = TypeVar("Record")
Count = Annotated[int, msgspec.Meta(ge=0)]
Number = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max)]  # finite: NaN is outside too


def plain(record: Any) -> Any:
    """A record as dictionaries, lists, text and numbers, as it is read back from JSON."""
    return json.loads(json.dumps(msgspec.to_builtins(record, str_keys=True)))  # which leaves tuples


def object_of(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The JSON object under a name among settings that anybody may have written; empty where there is none."""
    value = settings.get(name)
    return value if isinstance(value, dict) else {}


def convert_record(value: Any, kind: type[Record], *, where: str, advice: str) -> Record:
    """The record of a type in what JSON gave. Raises `InvalidDataError`: `where`, what is wrong, `advice`."""
    try:
        return msgspec.convert(value, type=kind, str_keys=True)  # keys of JSON objects are text, those of p too
    except (msgspec.ValidationError, RecursionError, UnicodeEncodeError) as error:  # the last: half a surrogate pair
        reason = str(error).replace("`$.", "`").replace("`$", "`").rstrip(".")  # paths without msgspec's dollar
        raise InvalidDataError(f"{where}: {reason}; {advice}") from error


def read_record(
    path: Path, kind: type[Record], *, missing: str, advice: str = "get or make it again", schema: str | None = None
) -> Record:
    """The record of a type in a JSON file, with this `schema` where one is given.

    Raises as `read_json_object` and `convert_record`, `InvalidDataError` for another schema.
    """
    fields = read_json_object(path, missing=missing, advice=advice)  # msgspec would refuse escapes of odd file names
    if schema is not None and (recorded := fields.get("schema", schema)) != schema:
        raise InvalidDataError(f"{path} has schema {recorded!r}; this version reads {schema!r}; {advice}")
    return convert_record(fields, kind, where=str(path), advice=advice)
