"""What studies return: plain frozen records of numbers. docs/analyses.md defines every number."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

Made = TypeVar("Made")


class Record:
    """A dataclass that becomes one JSON object."""

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, records inside as objects."""
        fields: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        return fields


def record_of(kind: type[Made], source: Any, /, **others: Any) -> Made:
    """A record with `others` as fields, and for the rest the fields of the same name of another record, `source`."""
    names = [field.name for field in dataclasses.fields(kind) if field.name not in others]  # type: ignore[arg-type]
    return kind(**{name: getattr(source, name) for name in names}, **others)
