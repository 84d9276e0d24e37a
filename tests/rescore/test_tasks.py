"""Tasks: prompts of the paper, references of every shape in use, the registry, the embedded sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattices.errors import InvalidDataError, RescoreError, UnknownNameError
from rescore.tasks import Example, HubSource, Record, Task, load_task, task_names
from rescore.tasks.base import only_reference
from rescore.tasks.groups import digest

BUILT_IN = ["cnn_dailymail", "gsm8k", "lambada", "multi_news", "newsroom", "samsum", "squad", "xsum"]
SPEC_BENCH = ["mt_bench", "qa", "rag", "summarization", "translation"]
TEXT = st.text(st.characters(codec="utf-8"))


def make_task(**changes: Any) -> Task:
    arguments: dict[str, Any] = {
        "name": "echo",
        "description": "says it again",
        "fields": ("text",),
        "template": "Say: {text}",
        "references": only_reference("text"),
    }
    return Task(**(arguments | changes))


class TestPrompts:
    @pytest.mark.parametrize(
        ("name", "record", "prompt"),
        [
            ("squad", {"question": "Who?", "context": "Ann.", "answers": ["Ann"]}, "question: Who? context: Ann."),
            ("gsm8k", {"question": "1 + 1?", "answer": "#### 2"}, "1 + 1?"),
            ("xsum", {"document": "News.", "summary": "N."}, "Summarize: News."),
            ("cnn_dailymail", {"article": "News.", "highlights": "N."}, "summarize: News."),
            (
                "multi_news",
                {"document": "News. ||||| More.", "summary": "N."},
                "Write a summary based on this article: News. ||||| More.",
            ),
            (
                "samsum",
                {"dialogue": "A: hi\nB: ho", "summary": "They greet."},
                "Here is a dialogue: A: hi\nB: ho\nWrite a short summary!",
            ),
            ("lambada", {"text": "One two\n three"}, "One two"),
            (
                "newsroom",
                {"title": "Rain", "text": "It rains.", "summary": "R."},
                "Please write a short summary for the following article: Rain It rains.",
            ),
        ],
    )
    def test_prompt_of_a_record(self, name: str, record: Record, prompt: str) -> None:
        assert load_task(name).prompt(record) == prompt

    def test_only_lambada_goes_without_the_chat_template(self) -> None:
        assert [name for name in BUILT_IN if not load_task(name).chat] == ["lambada"]

    @given(question=TEXT, context=TEXT)
    def test_the_text_of_a_record_is_kept_as_it_is(self, question: str, context: str) -> None:
        """Braces, percent signs and the like in a record are text, not part of the template."""
        record = {"question": question, "context": context, "answers": ["x"]}
        assert load_task("squad").prompt(record) == f"question: {question} context: {context}"

    @given(st.text("ab .\n{}", min_size=1))
    def test_lambada_prompt_and_reference_make_up_the_passage(self, text: str) -> None:
        task = load_task("lambada")
        if len(text.split()) < 2:
            with pytest.raises(InvalidDataError, match="two words"):
                task.example({"text": text}, id="1")
            return
        example = task.example({"text": text}, id="1")
        (word,) = example.references
        assert text.startswith(example.prompt) and text.rstrip().endswith(word)
        assert text.split() == [*example.prompt.split(), word]

    def test_a_template_that_names_no_field_is_a_mistake_of_the_task(self) -> None:
        with pytest.raises(ValueError, match=r"\{txt\}"):
            make_task(template="Say: {txt}")
        with pytest.raises(ValueError, match="template"):
            make_task(template="Say: {text.__class__}")


WHO = {"question": "Who?", "context": "Ann or Bo."}


class TestReferences:
    @pytest.mark.parametrize(
        "answers",
        [
            {"text": ["Ann", "Ann", "Bo"], "answer_start": [0, 0, 7]},  # the hub's shape
            ["Ann", "Bo"],  # a plain list
        ],
    )
    def test_squad_takes_both_shapes(self, answers: object) -> None:
        example = load_task("squad").example({**WHO, "answers": answers}, id="q")
        group = digest("Ann or Bo.")
        assert example == Example("q", "question: Who? context: Ann or Bo.", ("Ann", "Bo"), group=group)

    @pytest.mark.parametrize(
        ("answers", "message"),
        [
            (None, "null where a list of text is needed"),
            ("Ann", "text where a list of text is needed"),
            ([], "no answer"),
            ({"text": []}, "no answer"),
            ({"answer_start": [0]}, "no list 'text'"),
            ({"text": "Ann"}, "text where a list"),
            (["Ann", 1], "a number where text"),
        ],
    )
    def test_squad_names_what_is_wrong_with_answers(self, answers: object, message: str) -> None:
        with pytest.raises(InvalidDataError, match=message) as caught:
            load_task("squad").example({**WHO, "answers": answers}, id="q")
        assert "'answers'" in str(caught.value)

    def test_the_other_tasks_have_one(self) -> None:
        record = {
            "question": "q",
            "answer": "a",
            "article": "d",
            "highlights": "h",
            "document": "d",
            "dialogue": "d",
            "summary": "s",
            "title": "t",
            "text": "so it goes",
        }
        found = {name: load_task(name).references(record) for name in BUILT_IN if name != "squad"}
        summaries = {name: ("s",) for name in ("multi_news", "newsroom", "samsum", "xsum")}
        assert found == {"cnn_dailymail": ("h",), "gsm8k": ("a",), "lambada": ("goes",), **summaries}


class TestRecords:
    def test_a_missing_field_is_named(self) -> None:
        with pytest.raises(InvalidDataError, match=r"no field 'answer' \(task gsm8k needs: question, answer\)"):
            load_task("gsm8k").example({"question": "q"}, id="1")

    @pytest.mark.parametrize(
        ("value", "kind"), [(None, "null"), (3, "a number"), (True, "true or false"), ([], "a list"), ({}, "an object")]
    )
    def test_a_field_that_is_no_text_is_named_with_what_it_is(self, value: object, kind: str) -> None:
        with pytest.raises(InvalidDataError, match=f"'question' holds {kind} where text is needed"):
            load_task("gsm8k").example({"question": value, "answer": "a"}, id="1")

    def test_half_a_surrogate_pair_is_no_text(self) -> None:
        with pytest.raises(InvalidDataError, match="'question' holds half a surrogate pair"):
            load_task("gsm8k").example({"question": json.loads('"\\ud83d"'), "answer": "a"}, id="1")

    def test_empty_text_is_text(self) -> None:
        """XSum's test split has a record with an empty document."""
        assert load_task("xsum").example({"document": "", "summary": "s"}, id="1").prompt == "Summarize: "


class TestRegistry:
    def test_every_built_in_task_loads_under_its_own_name(self) -> None:
        assert set(BUILT_IN) <= set(task_names())
        assert task_names() == sorted(set(task_names()))
        for name in task_names():
            assert load_task(name).name == name

    def test_metrics_hub_and_sample(self) -> None:
        metrics = {name: [metric.name for metric in load_task(name).metrics] for name in BUILT_IN + SPEC_BENCH}
        answers, summaries = ["exact match", "F1"], ("cnn_dailymail", "multi_news", "newsroom", "samsum", "xsum")
        assert metrics == {
            **{name: ["ROUGE-L"] for name in (*summaries, "summarization")},
            **{name: answers for name in ("squad", "qa", "rag")},
            "gsm8k": ["final answer"], "lambada": ["last word"], "translation": ["chrF", "BLEU"], "mt_bench": [],
        }  # fmt: skip
        tasks = [load_task(name) for name in BUILT_IN + SPEC_BENCH]
        assert {task.name for task in tasks if not isinstance(task.hub, HubSource)} == {"newsroom"}
        assert {task.name for task in tasks if task.sample} == {"squad"}
        sample = load_task("squad").sample
        assert sample is not None and sample.is_file()
        assert {task.name for task in tasks if task.passage} == {"lambada"}

    def test_an_unknown_name_gets_the_nearest_ones(self) -> None:
        with pytest.raises(UnknownNameError, match=r"unknown task 'squat'; did you mean squad"):
            load_task("squat")

    def test_another_package_brings_a_task(self, plugin: Any) -> None:
        plugin("echo = plugin_tasks:ECHO", "squad = plugin_tasks:ECHO")
        assert "echo" in task_names()
        assert load_task("echo").prompt({"text": "hi"}) == "hi!"
        assert load_task("squad").description != "from elsewhere"  # the built-in one stays

    @pytest.mark.parametrize("target", ["plugin_tasks:MISSING", "no_such_module:ECHO", "plugin_tasks:NUMBER"])
    def test_another_packages_broken_task_is_named_with_its_package(self, plugin: Any, target: str) -> None:
        plugin(f"broken = {target}")
        with pytest.raises(RescoreError, match=r"'broken' of the package plugin-tasks"):
            load_task("broken")
        assert load_task("squad").name == "squad"

    @pytest.fixture
    def plugin(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Installs a package with the given entry points, as far as `importlib.metadata` can tell."""

        def install(*entry_points: str) -> None:
            (tmp_path / "plugin_tasks.py").write_text(
                "from rescore.tasks.base import Task, only_reference\n"
                "ECHO = Task(name='echo', description='from elsewhere', fields=('text',), template='{text}!',\n"
                "            references=only_reference('text'))\n"
                "NUMBER = 1\n"
            )
            metadata = tmp_path / "plugin_tasks-1.0.dist-info"
            metadata.mkdir()
            (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-tasks\nVersion: 1.0\n")
            (metadata / "entry_points.txt").write_text("\n".join(["[rescore.tasks]", *entry_points, ""]))
            monkeypatch.syspath_prepend(tmp_path)

        return install


class TestSquadSample:
    """The 40 passages written for this project, in SQuAD's own shape."""

    @pytest.fixture(scope="class")
    @staticmethod
    def records() -> list[dict[str, Any]]:
        path = load_task("squad").sample
        assert path is not None
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def test_forty_different_passages(self, records: list[dict[str, Any]]) -> None:
        assert len(records) == 40
        for field in ("id", "context", "question"):
            assert len({record[field] for record in records}) == 40

    def test_every_passage_has_80_to_140_words(self, records: list[dict[str, Any]]) -> None:
        assert all(80 <= len(record["context"].split()) <= 140 for record in records)

    def test_every_answer_stands_in_its_passage_where_it_says(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            texts, starts = record["answers"]["text"], record["answers"]["answer_start"]
            assert 1 <= len(texts) <= 3 and len(texts) == len(starts)
            for text, start in zip(texts, starts, strict=True):
                assert record["context"][start : start + len(text)] == text

    def test_every_answer_scores_1_and_the_question_scores_0(self, records: list[dict[str, Any]]) -> None:
        task = load_task("squad")
        for record in records:
            example = task.example(record, id=record["id"])
            for metric in task.metrics:
                assert all(metric.score(answer, example.references) == 1.0 for answer in example.references)
            assert task.metrics[0].score(record["question"], example.references) == 0.0
