"""Newsroom, whose data may not be redistributed: rows of its schema, written here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lattices.errors import InvalidDataError, RescoreError
from rescore.tasks import load_task
from rescore.tasks.data import load_examples

ROW: dict[str, Any] = {
    "url": "http://news.example/rain", "archive": "http://archive.example/1", "title": "Rain at last",
    "date": "20160302060024", "text": "It rained.\n\nThe farmers danced.", "summary": "Farmers dance in the rain.",
    "compression": 2.4, "coverage": 0.8, "density": 1.1, "compression_bin": "low", "coverage_bin": "medium",
    "density_bin": "abstractive",
}  # fmt: skip


def test_title_and_text_are_asked_for_a_summary(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"title": None}) + "\n")
    first, untitled = load_examples(load_task("newsroom"), data=path).examples
    request = "Please write a short summary for the following article:"
    assert first.prompt == f"{request} Rain at last It rained.\n\nThe farmers danced."
    assert untitled.prompt == f"{request}  It rained.\n\nThe farmers danced."
    assert first.references == untitled.references == ("Farmers dance in the rain.",)


def test_a_row_without_title_or_with_another_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    for row, message in (
        ({name: value for name, value in ROW.items() if name != "title"}, "no field 'title'"),
        (ROW | {"text": None}, "the field 'text' holds null"),
        (ROW | {"title": 3}, "the field 'title' holds a number"),
    ):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(InvalidDataError, match=f"line 1: {message}"):
            load_examples(load_task("newsroom"), data=path)


def test_without_a_file_it_says_where_to_ask() -> None:
    with pytest.raises(RescoreError, match=r"may not be redistributed; ask for it at https://.*; give --data PATH"):
        load_examples(load_task("newsroom"))
