"""Groups of examples: which tasks have which, what a limit takes, and what is held out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from conftest import refused, squad_records, write_lines
from evaluating import evaluated, opened, recorded_trace, swept
from hypothesis import given
from hypothesis import strategies as st
from made_records import example_record
from msgspec.structs import replace

from lattices.errors import InvalidDataError
from rescore.runs.evaluated import load_run
from rescore.runs.records import Alpha, RunRecord
from rescore.runs.summary import is_cut, summarize
from rescore.runs.weights import alpha_notices
from rescore.studies.analysis.collect import analyse_folders
from rescore.suites.plan import read_plan
from rescore.suites.run import run_suite
from rescore.tasks import Task, load_task
from rescore.tasks.data import load_examples
from rescore.tasks.groups import digest, held_out, one_of_each_first
from rescore.tasks.task_file import load_task_file
from rescore.tracing import read_trace

GROUPS = st.lists(st.sampled_from("abcdef"), max_size=20)


def paragraphs(*questions: int) -> list[dict[str, Any]]:
    """SQuAD's rows, so many questions on each of the paragraphs, one paragraph after the other."""
    (template,) = squad_records(1)
    return [
        {**template, "id": f"p{p}q{q}", "context": f"Bridge {p} was built in 19{p}0.", "question": f"When, {q}?"}
        for p, count in enumerate(questions)
        for q in range(count)
    ]


def ngram(alpha: Alpha) -> RunRecord:
    return RunRecord(rescorer="ngram", k=4, p=1, alpha=alpha)


class TestOrder:
    def test_by_hand(self):
        assert one_of_each_first(["a", "a", "b", "a", "c", "b"]) == [0, 2, 4, 1, 5, 3]
        assert one_of_each_first([]) == [] and one_of_each_first(["x", "y"]) == [0, 1]

    @given(GROUPS)
    def test_a_prefix_has_as_many_groups_as_can_be(self, groups: list[str]):
        order = one_of_each_first(groups)
        assert sorted(order) == list(range(len(groups)))
        taken = [groups[place] for place in order]
        for size in range(len(groups) + 1):
            assert len(set(taken[:size])) == min(size, len(set(groups)))
        assert [taken[place] for place in one_of_each_first(taken)] == taken, "in order already"


class TestHeldOut:
    def test_single_examples_are_those_at_the_end(self):
        assert held_out(list("abcdef"), 2) == [4, 5]
        assert held_out(list("abcdef"), 100) == [3, 4, 5], "at most half"
        assert held_out(["a"], 100) == [0] and held_out([], 3) == []
        for none in (0, -3):
            refused(lambda none=none: held_out(["a"], none), f"--held-out {none}; at least one example is needed")

    def test_whole_groups_one_of_each_first(self):
        groups = list("aabbccdd")
        assert held_out(groups, 2) == [4, 6], "the first examples of c and d"
        assert held_out(groups, 3) == [4, 5, 6]
        assert held_out(groups, 100) == [4, 5, 6, 7]
        assert held_out(["a"] * 5, 100) == [3, 4], "of one source there is nothing apart"

    def test_what_is_evaluated_is_not_held_out_while_there_is_more(self):
        groups = list("aabbccdd")
        assert held_out(groups, 9, evaluated={"a", "d"}) == [2, 3, 4, 5]
        assert held_out(groups, 9, evaluated=set("abcd")) == [4, 5, 6, 7]

    @given(GROUPS, st.integers(1, 12), st.sets(st.sampled_from("abcdef")))
    def test_evaluated_from_the_front_and_held_out_share_nothing(self, groups, count, evaluated):
        found = held_out(groups, count)
        order = list(dict.fromkeys(groups))
        if len(order) > 1:
            first = set(order[: len(order) - len(order) // 2])
            assert not first & {groups[place] for place in found}
        assert len(found) <= count and sorted(set(found)) == found
        if set(groups) - evaluated:
            assert not len(order) > 1 or not evaluated & {
                groups[p] for p in held_out(groups, count, evaluated=evaluated)
            }


class TestTasks:
    @pytest.mark.parametrize(
        ("task", "record", "source"),
        [
            ("squad", {"context": "C", "question": "Q", "answers": ["A"]}, "C"),
            ("cnn_dailymail", {"article": "A", "highlights": "H"}, "A"),
            ("samsum", {"dialogue": "D", "summary": "S"}, "D"),
            ("xsum", {"document": "D", "summary": "S"}, "D"),
            ("multi_news", {"document": "D", "summary": "S"}, "D"),
            ("newsroom", {"title": "T", "text": "X", "summary": "S"}, "X"),
            ("gsm8k", {"question": "Q", "answer": "#### 1"}, "Q"),
            ("lambada", {"text": "the last word"}, "the last"),
            ("rag", {"prompt": "P", "references": []}, "P"),
        ],
    )
    def test_the_source_of_each(self, task: str, record: dict[str, Any], source: str):
        assert load_task(task).example(record, id="x").group == digest(source)

    def test_a_file_of_ones_own_names_a_field(self, tmp_path: Path):
        path = tmp_path / "mine.yaml"
        path.write_text('source: {file: x.jsonl}\nprompt: "{q}"\ngroup: source.document\n')
        task = load_task_file(path)
        one, two = ({"q": q, "source": {"document": 7}} for q in ("first", "second"))
        assert task.example(one, id="1").group == task.example(two, id="2").group == digest("7")
        with pytest.raises(InvalidDataError, match=r"no field 'source.document'"):
            task.example({"q": "x", "source": {}}, id="1")
        with pytest.raises(InvalidDataError, match=r"'source.document' holds true or false"):
            task.example({"q": "x", "source": {"document": True}}, id="1")

    def test_an_empty_source_is_none(self):
        task = Task(name="t", description="", fields=("q", "c"), template="{q}", references=lambda r: (),
                    group=lambda r: str(r["c"]))  # fmt: skip
        first, second = (task.example({"q": q, "c": " "}, id=q) for q in "ab")
        assert (first.group, second.group) == (digest("a"), digest("b"))


class TestLimit:
    def test_one_question_of_each_paragraph_first(self, tmp_path: Path):
        path = write_lines(tmp_path / "squad.jsonl", paragraphs(3, 1, 2))
        task = load_task("squad")
        every = [e.id for e in load_examples(task, data=path).examples]
        assert every == ["p0q0", "p1q0", "p2q0", "p0q1", "p2q1", "p0q2"]
        for limit in range(1, 7):
            assert [e.id for e in load_examples(task, data=path, limit=limit).examples] == every[:limit]

    def test_no_more_is_read_than_is_needed(self, tmp_path: Path):
        path = write_lines(tmp_path / "squad.jsonl", [*paragraphs(2, 1, 2), {"context": None}])
        task = load_task("squad")
        assert [e.id for e in load_examples(task, data=path, limit=3).examples] == ["p0q0", "p1q0", "p2q0"]
        with pytest.raises(InvalidDataError, match="line 6"):
            load_examples(task, data=path, limit=4)

    def test_of_a_trace_too(self, model: dict[str, Any], tmp_path: Path):
        data = str(write_lines(tmp_path / "squad.jsonl", paragraphs(2, 2, 2)))
        recorded_trace(dict(**model, data=data), tmp_path / "trace")
        trace = read_trace(tmp_path / "trace")
        shuffled = dataclasses.replace(trace, examples=tuple(sorted(trace.examples, key=lambda e: e.id)))
        assert [e.id for e in shuffled.first_examples(3).examples] == ["p0q0", "p1q0", "p2q0"]
        (result,) = evaluated(dict(trace=str(tmp_path / "trace"), k=4, limit=4)).document.results
        assert (result.n, result.groups) == (4, 3)
        (found,) = analyse_folders(traces=[tmp_path / "trace"], limit=5, only=("oracle",)).traces
        assert (found.examples, found.groups) == (5, 3)


@pytest.fixture
def model(tiny_folder: Path, tiny_heads_folder: Path) -> dict[str, Any]:
    return {
        "base": str(tiny_folder), "heads": str(tiny_heads_folder), "device": "cpu", "k": 4, "max_new_tokens": 6,
        "rescorers": ("none",),
    }  # fmt: skip


class TestRuns:
    def test_groups_go_from_the_data_into_every_number(self, model: dict[str, Any], tmp_path: Path):
        data = str(write_lines(tmp_path / "squad.jsonl", paragraphs(3, 2, 2, 1)))
        options = dict(**{**model, "rescorers": ("none", "oracle")}, data=data)
        results = evaluated(options, out=tmp_path / "run").document.results
        assert [(r.n, r.groups) for r in results] == [(8, 4)] * 2
        run = load_run(tmp_path / "run")
        records = run.records("squad", "none", 1)
        assert {r.id: r.group for r in records}["p0q2"] == digest("Bridge 0 was built in 1900.")
        trace = run.trace("squad")
        assert trace is not None and len({e.group for e in trace.examples}) == 4

    def test_a_trace_without_the_column_takes_them_from_the_data(
        self, model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        from rescore import tracing

        data = str(write_lines(tmp_path / "squad.jsonl", paragraphs(3, 2)))
        write, columns = tracing.write_part, tracing._features()
        with monkeypatch.context() as older:
            older.setattr(
                tracing, "_features", lambda: type(columns)({n: c for n, c in columns.items() if n != "group"})
            )
            older.setattr(
                tracing,
                "write_part",
                lambda folder, rows: write(folder, [{n: v for n, v in r.items() if n != "group"} for r in rows]),
            )
            evaluated(dict(**model, data=data))
        (result,) = evaluated(dict(**model, data=data), out=tmp_path / "run").document.results
        assert result.groups == 2
        trace = load_run(tmp_path / "run").trace("squad")
        assert trace is not None and len({e.group for e in trace.examples}) == 2

    def test_tuning_is_on_other_sources(self, model: dict[str, Any], tmp_path: Path):
        data = str(write_lines(tmp_path / "squad.jsonl", paragraphs(3, 3, 3, 3)))
        options = dict(**{**model, "rescorers": ("context-ngram:none",)}, data=data)
        (tuned,) = swept(dict(options, limit=3), alphas=(0.5,), ks=(4,), ps=(1,), keep=False)
        assert set(tuned.held_out) == {"p2q0", "p3q0", "p2q1"} and len(tuned.held_out_groups) == 2
        task = load_task("squad")
        first = load_examples(task, data=Path(data), limit=2).examples
        evaluated_groups = {e.group for e in first}
        assert not evaluated_groups & set(tuned.held_out_groups)
        (tuned,) = swept(options, alphas=(0.5,), ks=(4,), ps=(1,), evaluated=evaluated_groups, keep=False)
        assert set(tuned.held_out) == {f"p{p}q{q}" for p in (2, 3) for q in range(3)}

    def test_a_weight_that_was_tuned_on_the_same_sources_is_told(self, model: dict[str, Any], tmp_path: Path):
        data = str(write_lines(tmp_path / "squad.jsonl", paragraphs(2, 2, 2)))
        (task,) = opened(dict(**model, data=data, limit=5))
        held = Alpha(alpha=0.5, source="tuned", held_out=("p2q1",), held_out_groups=(task.groups[2],))
        (line,) = alpha_notices([ngram(held)], task)
        assert line.endswith("alpha was tuned on examples that share their source with 1 of these 5")
        (line,) = alpha_notices([ngram(replace(held, held_out=("p2q0",)))], task)
        assert line.endswith("alpha was tuned on 1 of these 5 examples")
        assert alpha_notices([ngram(replace(held, held_out_groups=("other",)))], task) == []

    def test_a_suite_tunes_on_none_of_the_sources_that_it_evaluates(self, model: dict[str, Any], tmp_path: Path):
        data = write_lines(tmp_path / "squad.jsonl", paragraphs(4, 4, 4))
        body = "".join(f"{name}: {model[name]}\n" for name in ("base", "heads", "device", "k", "max_new_tokens"))
        body += f"limit: 2\ntune: {{limit: 9, alphas: [0.5]}}\ntasks: [{{name: squad, data: {data}}}]\n"
        (tmp_path / "table.yaml").write_text(body + "rescorers: ['context-ngram:none']\n")
        suite = run_suite(read_plan(tmp_path / "table.yaml"), tmp_path / "out").document
        assert suite.tuned[0].held_out == ("p2q0", "p2q1", "p2q2", "p2q3"), "more of the one that is left, not others"
        assert suite.tuned[0].held_out_groups == (digest("Bridge 2 was built in 1920."),)
        assert [(r.n, r.groups) for r in suite.results] == [(2, 2)]
        assert not any("tuned on" in line for line in suite.notices)


def test_the_share_of_outputs_that_were_cut(model: dict[str, Any], tmp_path: Path):
    data = str(write_lines(tmp_path / "squad.jsonl", squad_records(4)))
    cut, whole = dict(**{**model, "max_new_tokens": 1}, data=data), [7, 8, 256]
    for mode in ("replay", "live"):
        (result,) = evaluated(dict(cut, mode=mode)).document.results
        assert result.cut_at_limit == 1.0 and set(result.quality) == {"exact match", "F1"}
    assert is_cut(whole, {256}) is False and is_cut(whole[:2], {256}) is True and is_cut(whole, ()) is None
    records = [example_record(cut=value) for value in (True, False, True, True)]
    assert summarize(records, seed=0).cut_at_limit == 0.75
    assert summarize([*records, example_record(cut=None)], seed=0).cut_at_limit is None
