"""Typed records as JSON: what is written is read back, and what does not fit is told with its field."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lattices.errors import InvalidDataError, RescoreError
from lm.files import write_json
from lm.records import Count, Number, convert_record, plain, read_record


@dataclass(frozen=True, kw_only=True)
class Inner:
    value: Number


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    places: tuple[Count, ...] = ()
    by_p: dict[int, Inner] = field(default_factory=dict)


RECORD = Outer(name="a", places=(1, 2), by_p={16: Inner(value=0.5)})


def test_plain_is_what_json_gives_back():
    assert plain(RECORD) == {"name": "a", "places": [1, 2], "by_p": {"16": {"value": 0.5}}}
    assert plain({"records": (RECORD,)}) == {"records": [plain(RECORD)]}


@pytest.mark.parametrize("name", ["a", "é\u2028\U0001f600", "odd \udcff name"])
def test_what_is_written_is_read_back(tmp_path: Path, name: str):
    """Also a file name that is no UTF-8."""
    record = Outer(name=name, by_p={1: Inner(value=1)})
    write_json(tmp_path / "record.json", {**plain(record), "more": name})
    assert read_record(tmp_path / "record.json", Outer, missing="") == record


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, "Expected `str`, got `null` - at `name`"),
        ({"places": [1, -1]}, "Expected `int` >= 0 - at `places[1]`"),
        ({"places": [1, 1.5]}, "Expected `int`, got `float` - at `places[1]`"),
        ({"by_p": {"x": {"value": 1}}}, "Expected `int`, got `str` - at `key` in `by_p`"),
        ({"by_p": {"1": {}}}, "Object missing required field `value` - at `by_p[...]`"),
        ({"by_p": {"1": {"value": True}}}, "Expected `float`, got `bool` - at `by_p[...].value`"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, object], message: str):
    with pytest.raises(InvalidDataError) as caught:
        convert_record(plain(RECORD) | changes, Outer, where="x.json", advice="make it again")
    assert str(caught.value) == f"x.json: {message}; make it again"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_are_finite(value: str):
    with pytest.raises(InvalidDataError, match=r"^x: Expected `float` .* - at `value`; again$"):
        convert_record({"value": float(value)}, Inner, where="x", advice="again")


@pytest.mark.parametrize("text", [b"", b"{", b'{"name": "\xff"}', b"[" * 100_000])
def test_what_is_no_json_is_told_in_one_line(tmp_path: Path, text: bytes):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(InvalidDataError, match=r"x.json is not valid JSON \(.*\); make it again$"):
        read_record(tmp_path / "x.json", Outer, missing="", advice="make it again")


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(RescoreError, match=r"^no weight: can't read x.json \(No such file .*\); get or make it again$"):
        read_record(tmp_path / "x.json", Outer, missing="no weight")


def test_another_kind_of_document():
    with pytest.raises(InvalidDataError, match=r"^x: Expected `object`, got `array`; again$"):
        convert_record([1], Outer, where="x", advice="again")
