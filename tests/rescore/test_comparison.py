"""Two results against each other: paired by example, refused where they are not about the same outputs."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import refused, squad_records, write_lines
from evaluating import evaluated, recorded_trace

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from rescore.accounting import paired_difference
from rescore.runs.evaluated import Evaluation, load_run
from rescore.studies.comparison import Comparison, Selection, compare
from rescore.studies.comparison import compare_folders as compared
from rescore.studies.tables import comparison_table
from rescore.tracing import Trace


@pytest.fixture(scope="module")
def options(tiny_folder: Path, tiny_heads_folder: Path, squad_file: Path) -> dict[str, Any]:
    return {
        "base": str(tiny_folder), "heads": str(tiny_heads_folder), "data": str(squad_file), "device": "cpu", "k": 4,
        "max_new_tokens": 8, "rescorers": ("none", "oracle"), "p": (1, 2), "tasks": ("squad",),
    }  # fmt: skip


Make = Callable[..., Path]


@pytest.fixture
def make(options: dict[str, Any], tmp_path: Path) -> Make:
    """Evaluates into a folder of this name."""

    def made(name: str, **changes: Any) -> Path:
        evaluated(dict(**{**options, **changes}), out=tmp_path / name)
        return tmp_path / name

    return made


def edited(folder: Path, name: str, **changes: Any) -> Path:
    """A copy of a results folder with other settings in its traces."""
    copy = shutil.copytree(folder, folder.with_name(name))
    document = json.loads((copy / "results.json").read_text())
    for key, value in changes.items():
        settings = document["config"]["traces"]["squad"]
        *outer, last = key.split("__")
        for part in outer:
            settings = settings[part]
        settings[last] = value
    (copy / "results.json").write_text(json.dumps(document))
    return copy


def sides(comparison: Comparison) -> list[tuple[str, int, str, int]]:
    return [(row.a.rescorer, row.a.p, row.b.rescorer, row.b.p) for row in comparison.rows]


class TestPairs:
    def test_the_same_results_tie(self, make: Make):
        a, b = make("a"), make("b")
        found = compared(a, b)
        assert sides(found) == [("none", 1, "none", 1), ("none", 2, "none", 2), ("oracle", 1, "oracle", 1)]
        for row in found.rows:
            d = row.difference
            assert (row.task, row.h, row.n, d.difference, d.gain) == ("squad", 4, 6, 0.0, 0.0)
            assert (d.won, d.tied, d.lost) == (0, 6, 0) and d.difference_ci95 == (0.0, 0.0)
        assert found.notices == []

    def test_two_rescorers_of_one_folder(self, make: Make):
        a = make("a")
        found = compared(a, selection=Selection(a_rescorer="none", b_rescorer="oracle"))
        assert sides(found) == [("none", 1, "oracle", 1), ("none", 2, "oracle", 1)]
        run = load_run(a)
        accepted = [[r.accepted for r in run.records("squad", *side)] for side in (("none", 1), ("oracle", 1))]
        assert found.rows[0].difference == paired_difference(*accepted)
        by_name = {(r.rescorer, r.p): r for r in run.results}
        assert found.rows[0].difference.gain == pytest.approx(by_name["oracle", 1].gain)
        assert found.rows[0].difference.gain_ci95 == pytest.approx(by_name["oracle", 1].gain_ci95)
        assert found.rows[0].b.block_efficiency == by_name["oracle", 1].block_efficiency

    def test_two_p_and_one_rescorer(self, make: Make):
        a = make("a")
        assert sides(compared(a, selection=Selection(rescorer="none", a_p=1, b_p=2))) == [("none", 1, "none", 2)]
        assert sides(compared(a, make("b"), selection=Selection(rescorer="none", p=2))) == [("none", 2, "none", 2)]

    def test_of_other_lengths_what_both_have(self, make: Make):
        found = compared(make("a"), make("b", limit=4, rescorers=("oracle", "none"), p=1))
        assert sides(found) == [("none", 1, "none", 1), ("oracle", 1, "oracle", 1)]
        assert [(r.n, r.only_a, r.only_b) for r in found.rows] == [(4, 2, 0)] * 2
        assert found.notices == [
            "squad: none with p = 2 is only in A: left out",
            "squad: the 4 examples that both have are compared, of 6 in A and 4 in B",
        ]

    def test_tasks_that_one_lacks_are_left_out(self, make: Make, tmp_path: Path):
        data = str(write_lines(tmp_path / "both.jsonl", [r | {"answer": "42"} for r in squad_records(3)]))
        found = compared(make("a", tasks=("gsm8k", "squad"), data=data), make("b", data=data))
        assert {r.task for r in found.rows} == {"squad"} and found.notices[0] == "gsm8k is only in A: left out"
        with pytest.raises(RescoreError, match=r"nothing in common to compare .gsm8k is only in A"):
            compared(make("c", tasks=("gsm8k",), data=data), make("b", data=data))

    def test_few_examples_have_no_interval(self, make: Make):
        found = compared(make("a"), make("b", limit=1))
        assert found.rows[0].difference.difference_ci95 is None
        assert "squad: too few groups for an interval (1; 4 are needed)" in found.notices
        assert "-" in comparison_table(found).text().splitlines()[5].split()

    def test_other_k_and_heads_are_told(self, make: Make):
        a = make("a")
        found = compared(a, make("b", k=3))
        assert found.notices == ["squad: k = 4 in A and 3 in B"] and "k=3 p=1" in comparison_table(found).text()
        assert compared(a, edited(a, "c", heads_sha256="0")).notices == ["squad: A and B have different block heads"]


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"base__weights_sha256": "0" * 64}, "base.weights_sha256: "),
            ({"base__tokenizer_sha256": "0" * 64}, "base.tokenizer_sha256: "),
            ({"base__dtype": "float16"}, "base.dtype: float32 -> float16"),
            ({"data_sha256": "0" * 64}, "-> 000000000000;"),
            ({"template": "Q: {question}"}, "-> Q: {question};"),
            ({"max_new_tokens": 9, "max_prompt_tokens": 7}, "max_new_tokens: 8 -> 9; max_prompt_tokens: None -> 7;"),
        ],
    )
    def test_other_bases_prompts_and_limits(self, make: Make, changes: dict[str, Any], message: str):
        a = make("a")
        b = edited(a, "b", **changes)
        refused(lambda: compared(a, b), message, IncompatibleError)
        refused(lambda: compared(a, b), "A and B don't compare on squad", IncompatibleError)

    def test_another_h(self, make: Make):
        refused(lambda: compared(make("a"), make("b", h=3)), "h: 4 -> 3", IncompatibleError)

    def test_itself(self, make: Make):
        a = make("a")
        refused(
            lambda: compared(a),
            "compared with itself; name two results, or two rescorers of it, like --a-rescorer none",
        )
        refused(lambda: compared(a, a, selection=Selection(rescorer="none")), "would be compared with itself")

    def test_a_rescorer_or_p_that_is_not_there(self, make: Make):
        a, b = make("a"), make("b")
        refused(lambda: compared(a, b, selection=Selection(rescorer="nonne")), "did you mean none?")
        refused(lambda: compared(a, b, selection=Selection(b_p=5)), "B has no p = 5 of any rescorer, only 1, 2")

    def test_an_older_schema_and_a_run_still_going_on(self, make: Make):
        a, b = make("a"), make("b")
        document = json.loads((b / "results.json").read_text())
        (b / "results.json").write_text(json.dumps({**document, "schema": "rescore.results/1"}))
        refused(lambda: compared(a, b), "'rescore.results/1'", InvalidDataError)
        (b / "results.json").unlink()
        refused(lambda: compared(a, b), "has not finished")

    def test_steps_that_make_no_sense(self, make: Make):
        a, b = make("a", rescorers=("none",), p=1), make("b", rescorers=("none",), p=1)
        lines = [json.loads(line) for line in (b / "examples.jsonl").read_text().splitlines()]
        lines[0]["accepted"] = []
        write_lines(b / "examples.jsonl", lines)
        found = compared(a, b)
        assert found.rows[0].n == 5 and "has no steps" in found.notices[0]
        lines[1]["accepted"] = [0]
        write_lines(b / "examples.jsonl", lines)
        refused(lambda: compared(a, b), "has steps that accepted no token", InvalidDataError)


class TestOutputs:
    """Traces made elsewhere don't say what they are of: the outputs have to tell."""

    @pytest.fixture
    def foreign(self, options: dict[str, Any], tmp_path: Path) -> Callable[[str, int], Path]:
        def made(name: str, examples: int) -> Path:
            recorded_trace(dict(**{**options, "limit": examples}), tmp_path / f"trace-{name}")
            header = json.loads((tmp_path / f"trace-{name}" / "trace.json").read_text())
            header["settings"] = {"drafter": name}
            (tmp_path / f"trace-{name}" / "trace.json").write_text(json.dumps(header))
            given = dict(trace=str(tmp_path / f"trace-{name}"), tasks=("chat",), k=4, device="cpu")
            evaluated(given, out=tmp_path / name)
            return tmp_path / name

        return made

    def test_equal_ones_compare(self, foreign: Callable[[str, int], Path]):
        assert [row.n for row in compared(foreign("medusa", 4), foreign("eagle", 5)).rows] == [4]

    def test_others_are_refused(self, foreign: Callable[[str, int], Path]):
        a, b = foreign("medusa", 4), foreign("eagle", 4)
        (b / "examples.jsonl").write_text(
            (b / "examples.jsonl").read_text().replace('"output_ids": [', '"output_ids": [9, ')
        )
        refused(lambda: compared(a, b), "has another output in B than in A", IncompatibleError)

    def test_of_the_same_base_they_are_told(self, make: Make, monkeypatch: pytest.MonkeyPatch):
        a, b = make("a"), make("b")
        (b / "examples.jsonl").write_text(
            (b / "examples.jsonl").read_text().replace('"output_ids": [', '"output_ids": [9, ')
        )
        (notice,) = compared(a, b).notices
        assert re.search(r"6 of 6 outputs differ .* leads by \S+ at most, which is no near-tie in float32", notice)
        for margin, cause in ((1e-3, "leads by 0.001 at most: near-ties, decided otherwise"), (None, "is not known")):
            read = Evaluation.trace

            def traced(run: Evaluation, task: str, margin: float | None = margin, read: Any = read) -> Trace | None:
                found = read(run, task)
                return margin and Trace(
                    found.header,
                    tuple(dataclasses.replace(e, margins=e.margins * 0 + margin) for e in found.examples),
                )

            with monkeypatch.context() as patched:
                patched.setattr(Evaluation, "trace", traced)
                assert cause in compared(a, b).notices[0]


def test_names_cannot_control_the_terminal(make: Make):
    a = make("a")
    found = compared(a, make("b"))
    found.rows[0] = type(found.rows[0])(**{**vars(found.rows[0]), "task": "\x1b[2Jsquad"})
    assert "\x1b" not in comparison_table(found).text() and "\\x1b[2Jsquad" in comparison_table(found).text()


def test_evaluations_as_objects(make: Make, options: dict[str, Any]):
    folder = make("a")
    a, b = load_run(folder), evaluated({**options, "limit": 4})
    assert compare(a, b).rows == compared(folder, make("b", limit=4)).rows and compare(a, b).b == "results in memory"
    chosen = Selection(a_rescorer="none", b_rescorer="oracle")
    assert compare(a, selection=chosen).as_dict() == compared(folder, selection=chosen).as_dict()
    assert str(compare(a, b)) == comparison_table(compare(a, b)).text()
    refused(lambda: compare(a), "would be compared with itself")
