"""What a suite refuses, of its YAML with the line, before any work; and that of the docs is read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import refused
from evaluating import recorded_trace
from suite_runs import BODY, Write, run, write_fixture  # noqa: F401 (fixtures)

import lm.base.catalog
from lattices.errors import IncompatibleError, InvalidDataError
from lm.files import SHIPPED
from rescore.suites.files import load_runs
from rescore.suites.plan import read_plan
from rescore.suites.run import run_suite

pytestmark = pytest.mark.usefixtures("shipped_ngram")


class TestRefused:
    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("limit: 4", "limt: 4", "line 3: unknown key 'limt'; did you mean 'limit'?"),
            ("limit: 3", "lines: 3", "line 13: unknown key 'lines' in 'tasks[2]'"),
            ("limit: 4", "limit: four", "line 3: limit: text ('four') stands where a whole number is needed"),
            ("limit: 4", "limit: 0", "line 3: limit: 0 is too small"),
            ("k: [4, 2]", "k: [4, x]", "line 5: k[2]: text ('x')"),
            ("k: [4, 2]", "h: 1", "line 5: h: 1 is too small; give 2 or more"),
            ("name: gsm8k", "name: gsmk", "line 11: tasks[2].name: unknown task 'gsmk'; did you mean gsm8k"),
            ("name: gsm8k", "name: squad", "line 11: tasks[2]: the task squad is there twice"),
            ("- oracle", "- orcale", "line 19: rescorers[3]: unknown rescorer 'orcale'; did you mean oracle"),
            ("- oracle", "- none", "line 19: rescorers[3]: the rescorer none is there twice"),
            ("- oracle", "- {name: oracle, alpha: 1}", "has no weight; drop alpha"),
            ("tune: {", "alpha: 1\n    tune: {", "a weight that is given is not tuned"),
            ("name: context-ngram:none", "name: context-ngram:none,alpha=2", "a weight that is given is not tuned"),
            ("tune: {", "alpha: 65\n    x: {", "unknown key 'x' in 'rescorers[2]'"),
            ("alphas: [0.5, 1]", "alphas: [0.5, -1]", "line 18: rescorers[2].tune.alphas[2]: -1 is outside 0 to 64"),
            ("device: cpu", "mode: lives", "line 7: mode: 'lives' is not known; did you mean 'live'?"),
            ("device: cpu", "verify: batch", "line 7: verify: batch is how live decoding verifies; drop it, or add"),
            ("name: gsm8k", "trace: x", "a trace has its own examples; drop data or trace"),
            ("- oracle\n", "- oracle\ntasks: {trace: x, max_new_tokens: 3}\n", "there twice"),
        ],
    )
    def test_with_the_line(self, write: Write, old: str, new: str, message: str):
        refused(lambda: read_plan(write((old, new))), message, InvalidDataError)

    def test_no_tasks(self, write: Write):
        refused(lambda: read_plan(write(body="rescorers: none\n")), "line 1: the key 'tasks' is missing")

    def test_data_that_are_not_there_before_any_work(self, write: Write, tmp_path: Path, monkeypatch: Any):
        monkeypatch.setattr(lm.base.catalog, "load_base", lambda *_, **__: pytest.fail("the base LM was loaded"))
        refused(lambda: run(write(("gsm8k.jsonl", "none.jsonl")), tmp_path / "out"), "no such file")
        refused(lambda: run(write(("k: [4, 2]", "k: 258")), tmp_path / "b"), "vocabulary's 257")

    def test_what_is_refused_claims_no_folder(self, write: Write, tmp_path: Path):
        refused(lambda: run(write(("gsm8k.jsonl", "none.jsonl")), tmp_path / "out"), "no such file")
        assert len(run(write(("k: [4, 2]", "k: 4")), tmp_path / "out").document.results) == 8

    def test_tasks_that_would_share_a_folder(self, write: Write, tmp_path: Path):
        plan, trace = read_plan(write()), tmp_path / "trace"
        recorded_trace(dataclasses.asdict(plan.inputs(plan.tasks[0], None)) | {"limit": 2, "k": 4}, trace)
        header = json.loads((trace / "trace.json").read_text())
        del header["settings"]["task"]  # as one made elsewhere, which may go by any name
        (trace / "trace.json").write_text(json.dumps(header))
        tasks = [{"name": name, "trace": str(trace)} for name in ("my task", "my_task")]
        plan = read_plan(write(body=f"k: 4\ntasks: {json.dumps(tasks)}\nrescorers: none\n"))
        refused(lambda: run_suite(plan, tmp_path / "out"), "my task and my_task would share a folder; rename one")

    def test_a_weight_in_a_spec_is_not_tuned(self, write: Write):
        body = BODY.replace("context-ngram:none", "context-ngram:alpha=0.5").replace("  tune: {limit: 2", "  #")
        plan = read_plan(write(body=f"{body}tune: {{limit: 3}}\n"))
        assert plan.tuning("context-ngram:alpha=0.5") is None and plan.tuning("oracle") is not None

    def test_a_changed_plan_with_the_difference(self, write: Write, tmp_path: Path):
        run(write(("k: [4, 2]", "k: 4")), tmp_path / "out")
        changes = ("k: [4, 2]", "k: 4"), ("limit: 3", "limit: 2"), ("  - oracle\n", "")
        message = "tasks.gsm8k.limit: 3 -> 2; rescorers.oracle: removed)"
        refused(lambda: run(write(*changes), tmp_path / "out"), message, IncompatibleError)

    def test_a_folder_of_something_else(self, write: Write, tmp_path: Path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes").touch()
        refused(lambda: run(write(), tmp_path / "out"), "holds something else than a suite")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"schema": "rescore.suite/1"}, "has schema 'rescore.suite/1'; this version reads 'rescore.suite/4'"),
            ({"runs": [{"task": "squad", "k": 4, "h": None}]}, "required field `folder` - at `runs[0]`"),
            ({"runs": None}, "Expected `array`, got `null` - at `runs`"),
            ({"results": [{}]}, "required field `task` - at `results[0]`"),
        ],
    )
    def test_a_broken_manifest(self, write: Write, tmp_path: Path, changes: dict[str, Any], message: str):
        run(write(("k: [4, 2]", "k: 4")), tmp_path / "out")
        path = tmp_path / "out" / "suite.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        refused(lambda: load_runs(tmp_path / "out"), message, InvalidDataError)
        refused(lambda: load_runs(tmp_path / "out"), "suite.json", InvalidDataError)
        refused(lambda: load_runs(tmp_path / "out"), "; run the suite again", InvalidDataError)

    def test_a_broken_list_of_weights(self, write: Write, tmp_path: Path):
        run(write(), tmp_path / "out")
        (tmp_path / "out" / "tuned.jsonl").write_text("{}\n")
        refused(lambda: run(write(), tmp_path / "out"), "tuned.jsonl line 1 is no tuned weight: ", InvalidDataError)


@pytest.mark.parametrize(("name", "tasks"), [("evidence", 12), ("neural", 4), ("live", 12)])
def test_the_suites_of_the_readme_can_be_read(name: str, tasks: int, tmp_path: Path):
    for model in ("general", "in_domain"):
        (tmp_path / model).symlink_to(SHIPPED / "smollm2-135m" / "ngram")
    names = {model: str(tmp_path / model) for model in ("general", "in_domain")} if name == "evidence" else {}
    plan = read_plan(Path(__file__).parents[2] / "docs" / "suites" / f"{name}.yaml", data=Path("folder"), names=names)
    assert plan.tasks[0].data == "folder/squad.jsonl" and len(plan.tasks) == tasks
    assert (plan.rescorers[0].name, plan.leave_out) == ("none", "shipped")
    if name == "evidence":
        assert plan.h == (9, 6, 3) and plan.rescorers[0].p == (1, 16)
        assert {r.name: tuning.limit for r in plan.rescorers if (tuning := plan.tuning(r.name))}["ngram"] == 30
    if name == "neural":
        assert (tuning := plan.tuning("neural-61m")) and tuning.alphas == (0.25, 0.5, 1.0, 1.5)
