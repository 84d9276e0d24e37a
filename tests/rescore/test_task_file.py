"""A task of the user's own: what its YAML file means, and what is said of a wrong one, always with the line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_lines
from evaluating import evaluated, opened, recorded_trace

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from rescore.tasks import Example, HubSource, Limits, load_task
from rescore.tasks.data import load_examples

MINE = """\
# answers about bridges
name: bridges
description: questions about
  bridges
source:
  file: bridges.jsonl
prompt: |
  Q: {question}
  {{A}}:
reference: answers.text
metric: [exact_match, f1, Rouge L]
chat: false
passage: context
limits:
  examples: 2
  new_tokens: 9
  prompt_tokens: 30
"""
ROWS = [
    {
        "question": f"When was bridge {i} built? 🌉 \u202e\u05de\u05ea\u05d9\u202c\x07",
        "context": f"In {1900 + i}.",
        "answers": {"text": [str(1900 + i)]},
    }
    for i in range(4)
]
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a YAML file, with texts in it replaced, and its data beside it."""
    write_lines(tmp_path / "bridges.jsonl", ROWS)

    def put(*changes: tuple[str, str], text: str | bytes = MINE, name: str = "mine.yaml") -> str:
        content = text.encode() if isinstance(text, str) else text
        for old, new in changes:
            assert old.encode() in content
            content = content.replace(old.encode(), new.encode())
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return put


class TestMeaning:
    def test_all_keys(self, write: Write, tmp_path: Path) -> None:
        task = load_task(write())
        assert (task.name, task.description, task.chat) == ("bridges", "questions about bridges", False)
        assert task.fields == ("question", "answers", "context") and task.passage == "context"
        assert [metric.name for metric in task.metrics] == ["exact match", "F1", "ROUGE-L"]
        assert task.limits == Limits(examples=2, new_tokens=9, prompt_tokens=30)
        found = load_examples(task)
        assert found.source["kind"] == "file" and found.source["path"] == str(tmp_path / "bridges.jsonl")
        assert found.examples[1] == Example("2", f"Q: {ROWS[1]['question']}\n{{A}}:\n", ("1901",), "In 1901.")
        assert len(found.examples) == 2 and len(load_examples(task, limit=3).examples) == 3

    def test_the_least_is_a_source_and_a_prompt(self, write: Write) -> None:
        task = load_task(write(text="source: {file: x.jsonl}\nprompt: '{question}'\n", name="my-task.v2.yml"))
        assert (task.name, task.metrics, task.chat, task.limits) == ("my-task.v2", (), True, Limits())
        assert task.example({"question": "q"}, id="1") == Example("1", "q", ())

    def test_a_data_set_of_the_hub(self, write: Write) -> None:
        hub = "{hub: owner/name, split: test, config: en, revision: main, files: a.jsonl}"
        task = load_task(write(text=f"source: {hub}\nprompt: '{{text}}'\nreference: summary\n"))
        assert task.hub == HubSource("owner/name", "en", "test", "main", "a.jsonl") and task.file is None
        assert task.example({"text": "t", "summary": ["a", "b", "a"]}, id="1").references == ("a", "b")

    def test_given_data_go_before_the_files(self, write: Write, tmp_path: Path) -> None:
        other = write_lines(tmp_path / "other.jsonl", ROWS[3:])
        assert [e.references for e in load_examples(load_task(write()), data=other).examples] == [("1903",)]

    @pytest.mark.parametrize(
        ("answers", "message"),
        [
            (None, "no field 'answers.text'"),
            ({}, "no field 'answers.text'"),
            ({"text": 3}, "the field 'answers.text' holds a number where text or a list of it is needed"),
            ({"text": []}, "the field 'answers.text' holds an empty list"),
            ({"text": ["a", None]}, "the field 'answers.text' holds null"),
            ({"text": json.loads('"\\ud83d"')}, "the field 'answers.text' holds half a surrogate pair"),
        ],
    )
    def test_a_row_that_lacks_the_reference_is_named(self, write: Write, tmp_path: Path, answers, message) -> None:
        data = write_lines(tmp_path / "bad.jsonl", [ROWS[0] | {"answers": answers}])
        with pytest.raises(InvalidDataError, match=f"bad.jsonl line 1: {message}"):
            load_examples(load_task(write()), data=data)

    def test_a_document_of_100k_characters(self, write: Write, options: dict[str, Any], tmp_path: Path) -> None:
        data = write_lines(tmp_path / "long.jsonl", [ROWS[0] | {"question": "word " * 20_000}])
        (example,) = load_examples(load_task(write()), data=data).examples
        assert len(example.prompt) > 100_000
        (result,) = evaluated(dict(tasks=(write(),), data=str(data), **options)).document.results
        assert result.n == 1, "cut to the 30 tokens of the file's limit"


class TestMistakes:
    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("metric:", "metrics:", "line 11: unknown key 'metrics'; did you mean 'metric'?"),
            ("  file:", "  fille:", "line 6: unknown key 'fille' in 'source'; did you mean 'file'?"),
            ("new_tokens", "newtokens", "line 16: unknown key 'newtokens' in 'limits'; did you mean 'new_tokens'?"),
            ("prompt: |", "instruction: |", "line 7: unknown key 'instruction'; "),
            ("name: bridges", "name: 3", "line 2: name: a number ('3') stands where text is needed"),
            ("name: bridges", "name: ../up", "line 2: name: '../up' is no name"),
            ("name: bridges", "name: squad", "mine.yaml: 'squad' is the name of another task"),
            ("chat: false", "chat: never", "line 12: chat: text ('never') stands where true or false is needed"),
            ("examples: 2", "examples: 0", "line 15: limits.examples: 0 is too small; give 1 or more"),
            ("examples: 2", "examples: many", "line 15: limits.examples: text ('many') stands where a whole number"),
            ("f1", "f-2", "line 11: metric[2]: unknown metric 'f-2'; did you mean 'F1'?"),
            ("f1", "exact match", "line 11: metric[2]: the metric 'exact match' is there twice"),
            ("[exact_match, f1, Rouge L]", "[]", "line 11: metric: the list is empty"),
            ("[exact_match, f1, Rouge L]", "{a: b}", "line 11: metric: a mapping (key: value) stands where text"),
            ("reference: answers.text\n", "", "line 10: metric: a metric needs answers to compare with"),
            ("answers.text", "answers..text", "line 10: reference: 'answers..text' is no field"),
            ("{question}", "{}", "line 7: prompt: {} names no field"),
            ("{question}", "{0}", "line 7: prompt: {0} names no field"),
            ("{question}", "{question.x}", "line 7: prompt: {question.x} names no field"),
            ("{question}", "{question!r}", "line 7: prompt: {question} names no field"),
            ("{question}", "{question:>9}", "line 7: prompt: {question} names no field"),
            ("{question}", "{question", "line 7: prompt: unexpected '{' in field name; a field stands in braces"),
            ("{question}", "question", "line 7: prompt: no field in braces"),
            ("Q: {question}", "\U0001f642", "line 7: prompt: no field in braces"),
            ("  file: bridges.jsonl", "  split: test", "line 6: source: the key 'hub' is missing; give file: PATH"),
            ("  file: bridges.jsonl", "  hub: a/b", "line 6: source: the key 'split' is missing"),
            ("  file: bridges.jsonl", "  {file: a, hub: b}", "line 6: source: file and hub can't stand together"),
            ("  file: bridges.jsonl\n", "", "line 2: the key 'source' is missing or empty"),
        ],
    )
    def test_one_line_that_says_where(self, write: Write, old: str, new: str, message: str) -> None:
        with pytest.raises(InvalidDataError) as caught:
            load_task(write((old, new)))
        assert "\n" not in str(caught.value) and message in str(caught.value)

    def test_half_a_surrogate_pair(self, write: Write) -> None:
        for text in ('source: {file: x}\nprompt: "{x} \\ud83d"\n', "source: {file: \"\\ud83d\"}\nprompt: '{x}'\n"):
            with pytest.raises(InvalidDataError, match=r"line [12]: .*half a surrogate pair"):
                load_task(write(text=text))

    def test_missing_keys(self, write: Write) -> None:
        for text, key in (("prompt: '{x}'", "source"), ("source: {file: x}", "prompt")):
            with pytest.raises(InvalidDataError, match=f"line 1: the key '{key}' is missing"):
                load_task(write(text=text + "\n"))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is empty"),
            (b"prompt: \xff", "line 1: no valid UTF-8"),
            (MINE.encode("utf-16"), "no valid UTF-8"),
            (b"prompt: [a\nsource: b", "line 2: .*; mend the YAML there"),
            (b"- prompt", "line 1: a list stands where keys with values"),
            (b"prompt: \x07", "line 1: a control character"),
            (b"prompt: !!python/object/apply:os.system [x]", "the tag .* is not taken"),
        ],
    )
    def test_what_is_no_yaml(self, write: Write, content: bytes, message: str) -> None:
        with pytest.raises(InvalidDataError, match=message):
            load_task(write(text=content))

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(RescoreError, match=r"can't read .*mine.yaml: No such file or directory"):
            load_task(str(tmp_path / "mine.yaml"))
        with pytest.raises(RescoreError, match=r"no such file: .*gone.jsonl; the data of task mine"):
            path = tmp_path / "mine.yaml"
            path.write_text("source: {file: gone.jsonl}\nprompt: '{x}'\n")
            load_examples(load_task(str(path)))

    def test_a_file_name_that_is_no_name(self, write: Write) -> None:
        with pytest.raises(InvalidDataError, match=r"gives no name.*; add name: my-task"):
            load_task(write(text="source: {file: x.jsonl}\nprompt: '{x}'\n", name="my task.yaml"))


@pytest.fixture
def options(tiny_folder: Path, tiny_heads_folder: Path) -> dict[str, Any]:
    return {"base": str(tiny_folder), "heads": str(tiny_heads_folder), "device": "cpu", "k": 4}


class TestEvaluation:
    def test_it_is_evaluated_with_its_limits_and_metrics(self, write: Write, options: dict[str, Any]) -> None:
        document = evaluated(dict(tasks=(write(),), **options)).document
        (result,) = document.results
        assert (result.task, result.n, result.tokens) == ("bridges", 2, 18)
        assert list(result.quality) == ["exact match", "F1", "ROUGE-L"]
        settings = document.config.traces["bridges"]
        assert (settings["max_new_tokens"], settings["max_prompt_tokens"], settings["chat"]) == (9, 30, False)
        assert settings["definition"]["limits"] == {"examples": "2", "new_tokens": "9", "prompt_tokens": "30"}
        given = evaluated(dict(tasks=(write(),), limit=1, max_new_tokens=5, max_prompt_tokens=8, **options))
        (result,) = given.document.results
        assert (result.n, result.tokens) == (1, 5)
        assert given.document.config.traces["bridges"]["max_prompt_tokens"] == 8

    def test_a_changed_file_is_another_task(self, write: Write, options: dict[str, Any], tmp_path: Path) -> None:
        recorded = dict(tasks=(write(),), **options)
        recorded_trace(recorded, tmp_path / "trace")
        recorded_trace(recorded, tmp_path / "trace")  # the same goes on
        for change in (("[exact_match, f1, Rouge L]", "f1"), ("Q: ", "Question: "), ("answers.text", "context")):
            write(change)
            with pytest.raises(IncompatibleError, match=r"holds a trace with other settings"):
                recorded_trace(recorded, tmp_path / "trace")
        write(("# answers about bridges", "# another remark"))
        recorded_trace(recorded, tmp_path / "trace")

    def test_its_trace_knows_its_metrics_without_the_file(self, write, options, tmp_path, cache_folder) -> None:
        recorded = dict(tasks=(write(),), **options)
        (direct,) = evaluated(recorded).document.results
        recorded_trace(dict(recorded, k=8), tmp_path / "trace")
        given = dict(trace=str(tmp_path / "trace"), k=4, device="cpu")
        (with_file,) = evaluated(dict(given, tasks=(write(),))).document.results
        Path(write()).unlink()
        (alone,) = evaluated(given).document.results
        assert direct == with_file == alone

    def test_it_can_be_resumed_and_read_back(self, write: Write, options: dict[str, Any], tmp_path: Path) -> None:
        from rescore.runs.evaluated import load_run

        recorded = dict(tasks=(write(),), **options)
        for _ in range(2):
            (found,) = evaluated(recorded, out=tmp_path / "run").document.results
        run = load_run(tmp_path / "run")
        trace = run.trace("bridges")
        assert run.tasks == ["bridges"] and trace is not None and len(trace.examples) == found.n == 2

    def test_tasks_that_share_a_name_are_refused(self, write: Write, options: dict[str, Any]) -> None:
        with pytest.raises(RescoreError, match="two of the tasks are called bridges"):
            opened(dict(tasks=(write(), write(name="other.yaml")), **options))
