"""Spec-Bench's categories: each task reads its rows of the one file, the first turn is the prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lattices.errors import InvalidDataError
from rescore.tasks import Example, load_task
from rescore.tasks.data import file_in, load_examples
from rescore.tasks.spec_bench import MT_BENCH, TASKS
from tests.conftest import refused

ROWS: list[dict[str, Any]] = [
    {"question_id": 81, "category": "writing", "turns": ["Write a post.", "Once more."]},
    {"question_id": 101, "category": "reasoning", "turns": ["Who is second?", "And last?"], "reference": ["You.", "?"]},
    {"question_id": 161, "category": "translation", "turns": ["Translate: Hund"], "reference": ["dog"]},
    {"question_id": 241, "category": "summarization", "turns": ["Summarize: It rained."], "reference": ["Rain."]},
    {"question_id": 321, "category": "qa", "turns": ["Who played Anna?"]},
    {"question_id": 401, "category": "math_reasoning", "turns": ["1 + 1?"], "reference": ["1 + 1 = 2\n#### 2"]},
    {"question_id": 481, "category": "rag", "turns": ["It rained. What?"], "reference": [["rain", "water", "rain"]]},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize(
    ("task", "examples"),
    [
        ("mt_bench", [Example("81", "Write a post.", ()), Example("101", "Who is second?", ("You.",))]),
        ("translation", [Example("161", "Translate: Hund", ("dog",))]),
        ("summarization", [Example("241", "Summarize: It rained.", ("Rain.",))]),
        ("qa", [Example("321", "Who played Anna?", ())]),
        ("gsm8k", [Example("401", "1 + 1?", ("1 + 1 = 2\n#### 2",))]),
        ("rag", [Example("481", "It rained. What?", ("rain", "water"))]),
    ],
)
def test_every_task_reads_its_own_rows(file: Path, task: str, examples: list[Example]) -> None:
    assert list(load_examples(load_task(task), data=file).examples) == examples


def test_the_limit_counts_the_tasks_rows_only(file: Path) -> None:
    assert [e.id for e in load_examples(load_task("mt_bench"), data=file, limit=1).examples] == ["81"]
    assert [e.id for e in load_examples(load_task("rag"), data=file, limit=1).examples] == ["481"]


def test_every_category_is_one_tasks(file: Path) -> None:
    found = [
        e.id
        for name in (*(task.name for task in TASKS), "gsm8k")
        for e in load_examples(load_task(name), data=file).examples
    ]
    assert sorted(map(int, found)) == [row["question_id"] for row in ROWS] and len(MT_BENCH) == 8


def test_copies_of_one_category_need_no_category_and_may_say_prompt(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text('{"prompt": "Who?"}\n{"prompt": ["What?", "Why?"], "reference": "That."}\n')
    assert list(load_examples(load_task("qa"), data=path).examples) == [
        Example("1", "Who?", ()), Example("2", "What?", ("That.",))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"turns": []}, "the field 'turns' holds an empty list where a list of text is needed"),
        ({"turns": None}, "the field 'turns' holds null where"),
        ({"turns": [3]}, "the field 'turns' holds a number where text"),
        ({"category": 3}, "the field 'category' holds a number where text"),
        ({"reference": [3]}, "the field 'reference' holds a number where text"),
        ({"reference": [["a", None]]}, "the field 'reference' holds null where text"),
        ({"question_id": [1]}, "the field 'id' holds a list where text or a whole number"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[4] | change) + "\n")
    with pytest.raises(InvalidDataError, match=f"bad.jsonl line 2: {message}"):
        load_examples(load_task("qa"), data=path)


def test_another_file_has_no_rows_of_the_task(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(
        InvalidDataError, match=r"has no rows of task rag; task rag needs Spec-Bench's rows of category"
    ):
        load_examples(load_task("rag"), data=path)
    path.write_text('{"question": "q", "context": "c"}\n')
    with pytest.raises(InvalidDataError, match="line 1: no field 'turns'; rows of Spec-Bench have question_id"):
        load_examples(load_task("rag"), data=path)
    with pytest.raises(InvalidDataError, match=r"no field 'answer' \(task gsm8k needs: question, answer\)"):
        path.write_text('{"category": "math_reasoning", "turns": ["1?"]}\n')
        load_examples(load_task("gsm8k"), data=path)


def test_the_one_file_of_a_data_folder_is_found(tmp_path: Path) -> None:
    """Unless the task has a file of its own there; where there is neither, its own is what is missing."""
    qa, squad = load_task("qa"), load_task("squad")
    assert file_in(tmp_path, qa) == tmp_path / "qa.jsonl"
    (tmp_path / "spec_bench.jsonl").touch()
    assert file_in(tmp_path, qa) == tmp_path / "spec_bench.jsonl" and file_in(tmp_path, squad).name == "squad.jsonl"
    (tmp_path / "qa.csv").touch()
    assert file_in(tmp_path, qa) == tmp_path / "qa.csv"


def test_a_row_without_a_source_is_told_as_one_of_translation(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"src": "Hund", "reference": "dog"}\n')
    refused(lambda: load_examples(load_task("translation"), data=path), "line 1", "no field 'source'")
