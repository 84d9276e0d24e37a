"""`rescore compare`, `suite` and `inspect` as commands: documents on stdout, one line per mistake, exit codes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, write_lines

from rescore.runs.log import ExampleLog
from rescore.runs.records import ExampleRecord


@pytest.fixture
def results(rescore: Command, model: list[object], tmp_path: Path) -> Path:
    """Results of the unrescored drafts and the oracle on six examples."""
    asked = ["eval", *model, "--rescorer", "none", "--rescorer", "oracle", "--p", "1,2", "--out", tmp_path / "results"]
    assert rescore(*asked).code == 0
    return tmp_path / "results"


class TestCompare:
    def test_two_rescorers_in_one_table(self, rescore: Command, results: Path):
        run = rescore("compare", results, "--a-rescorer", "none", "--b-rescorer", "oracle", "--a-p", 1)
        assert (run.code, run.err) == (0, "")
        interval = r"[+-]\d\.\d{3} to [+-]\d\.\d{3}"
        assert re.search(
            rf"\nsquad  none p=1 +oracle p=1 +6 +6 +1\.\d{{3}} +\d\.\d{{3}} +\+\d\.\d{{3}}  {interval} ", run.out
        )

    def test_the_document(self, rescore: Command, model: list[object], results: Path, tmp_path: Path):
        assert rescore("eval", *model, "--limit", 4, "--out", tmp_path / "other").code == 0
        run = rescore("compare", results, tmp_path / "other", "--rescorer", "none", "--p", 1, "--json")
        assert run.code == 0 and "of 6 in A and 4 in B" in run.err
        document: dict[str, Any] = run.document
        assert list(document) == ["schema", "a", "b", "rows", "notices"]
        (row,) = document["rows"]
        assert (row["n"], row["difference"]["tied"], row["a"]["p"]) == (4, 4, 1)

    def test_mistakes(self, rescore: Command, results: Path, tmp_path: Path):
        rescore("compare", results).refused("would be compared with itself")
        rescore("compare", results, tmp_path / "none").refused("no such folder: .*; rescore eval --out")
        rescore("compare", results, "--a-rescorer", "none", "--b-rescorer", "orcale").refused("did you mean oracle")
        (results / "results.json").unlink()
        rescore("compare", results, "--a-p", 1, "--b-p", 2).refused("has not finished")
        write_lines(results / "results.json", [[]])
        rescore("compare", results, "--a-p", 1, "--b-p", 2).refused("is not a JSON object")


class TestInspect:
    def test_one_example(self, rescore: Command, results: Path):
        run = rescore("inspect", results, "--example", "q1", "--show", "1-2", "--rescorer", "none", "--p", 1)
        assert (run.code, run.err) == (0, "") and "\x1b" not in run.out
        assert run.out.startswith("squad, example q1 (2 of 6), h = 4, k = 16\nprompt: question: ")
        assert re.search(
            r"\nblock 1, output token 1: none p=1 accepts \d\n +slot +base wanted +rank +lattice 1 ", run.out
        )
        assert re.search(r"\n +1 +\S+ +1 .*\[\S+\]\n", run.out) and "--show 3- shows more" in run.out

    def test_colour_where_stdout_is_a_terminal(self, rescore: Command, results: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert "\x1b[32m[" in rescore("inspect", results).out
        monkeypatch.setenv("NO_COLOR", "1")
        assert "\x1b" not in rescore("inspect", results).out

    def test_the_document(self, rescore: Command, results: Path):
        document = rescore("inspect", results, "--show", "all", "--json").document
        assert document["total"] == len(document["blocks"]) and document["blocks"][0]["slots"][0]["rank"] == 1

    def test_mistakes(self, rescore: Command, results: Path):
        rescore("inspect", results, "--example", "q9").refused("unknown example 'q9'")
        rescore("inspect", results, "--example", "\x1b[2J").refused(r"unknown example '\\x1b\[2J'")
        rescore("inspect", results, "--show", "9-1").refused("the range ends before it begins; give 1-9")
        rescore("inspect", results, "--show", "99").refused("choose from these")
        rescore("inspect", results, "--h", 3).refused("no results of squad with h = 3, only 4")


class TestSuite:
    @pytest.fixture
    def plan(self, model: list[object], squad_file: Path, tmp_path: Path) -> Path:
        path = tmp_path / "table.yaml"
        path.write_text(
            f"base: {model[1]}\nheads: {model[3]}\ndevice: cpu\nlimit: 4\nmax_new_tokens: 6\nk: 4\n"
            f"tasks: squad\nrescorers: [none, oracle]\n"
        )
        return path

    def test_a_table(self, rescore: Command, plan: Path, squad_file: Path, tmp_path: Path):
        asked = ["suite", plan, "--data", squad_file.parent, "--out", tmp_path / "out"]
        run = rescore(*asked)
        assert (run.code, run.err) == (0, "")
        assert re.search(r"\nsquad +oracle +1 +4 +4 +- +\d\.\d{3} +\d\.\d{3} to \d\.\d{3} ", run.out)
        assert rescore(*asked).out == run.out
        assert rescore(*asked, "--json").document["schema"] == "rescore.suite/4"
        plan.write_text(plan.read_text().replace("limit: 4", "limit: 5"))
        rescore(*asked).refused("limit: 4 -> 5.; use another --out")
        plan.write_text(plan.read_text() + "rescorer: none\n")
        rescore(*asked).refused("table.yaml line 9: unknown key 'rescorer'; did you mean 'rescorers'")

    def test_ctrl_c(self, rescore: Command, plan: Path, squad_file: Path, tmp_path: Path, monkeypatch: Any):
        add, calls = ExampleLog.add, []

        def stop(self: ExampleLog, record: ExampleRecord) -> None:
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            add(self, record)

        asked = ["suite", plan, "--data", squad_file.parent, "--out", tmp_path / "out"]
        with monkeypatch.context() as stopping:
            stopping.setattr(ExampleLog, "add", stop)
            run = rescore(*asked)
        assert run.code == 130 and "the same command goes on" in run.err
        assert re.search(r"\nsquad +none +1 +3 +3 +- +1", run.out)
        assert rescore(*asked).code == 0
