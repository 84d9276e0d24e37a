"""A whole table from one YAML: what it makes, and how it goes on at the next example."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import refused, squad_records, write_lines
from evaluating import evaluated, recorded_trace, swept
from made_costs import costs_of
from suite_runs import Write, run, write_fixture, writer_in  # noqa: F401 (fixtures)

import lm.base.catalog
import lm.base.generation
from lattices.errors import IncompatibleError, OutputError
from lm.base.catalog import identify
from lm.files import cache_directory
from lm.heads.block_heads import heads_sha256
from lm.locks import writing_to
from lm.records import plain
from rescore.costs.kept import keep_costs
from rescore.costs.table import ChoiceCost
from rescore.reports.inspection import inspect_example
from rescore.reports.page import report
from rescore.reports.sources import load_sources
from rescore.rescorers import load_rescorer
from rescore.runs.evaluated import load_run
from rescore.runs.log import ExampleLog
from rescore.runs.records import ExampleRecord
from rescore.runs.tables import results_csv
from rescore.studies.analysis.collect import analyse_folders
from rescore.studies.comparison import Selection
from rescore.studies.comparison import compare_folders as compared
from rescore.suites import run as suite_module
from rescore.suites.files import load_runs, read_manifest, run_of_task
from rescore.suites.plan import read_plan
from rescore.suites.run import Suite, run_suite
from rescore.suites.tables import suite_page, suite_table
from rescore.tasks import load_task
from rescore.tasks.data import load_examples
from rescore.tasks.groups import digest


def records(out: Path) -> list[tuple[Any, ...]]:
    found = []
    for path in sorted(out.glob("runs/*/examples.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found += [(path.parent.name, r["rescorer"], r["p"], r["id"]) for r in lines]
    return found


@pytest.fixture(scope="module")
def only_read(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_heads_folder: Path
) -> Iterator[tuple[Suite, Path]]:
    """The suite and its folder, for tests that change nothing in it; with its cache."""
    folder = tmp_path_factory.mktemp("suite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESCORE_CACHE", str(folder / "cache"))
        suite = run(writer_in(folder, tiny_folder, tiny_heads_folder)(), folder / "out")
    yield suite, folder / "out"


class TestTable:
    def test_every_task_k_and_rescorer_has_its_result(self, only_read: tuple[Suite, Path]):
        suite, out = only_read
        ran = [("none", 1), ("none", 2), ("context-ngram:none", 1), ("oracle", 1)]
        wanted = [(task, k, *side) for task in ("squad", "gsm8k") for k in (4, 2) for side in ran]
        assert [(r.task, r.k, r.rescorer, r.p) for r in suite.document.results] == wanted
        assert [r.n for r in suite.document.results] == [4] * 8 + [3] * 8
        assert {r.alpha for r in suite.document.results if r.rescorer == "context-ngram:none"} <= {0.0, 0.5, 1.0}
        assert [(t.task, t.k, t.p, len(t.held_out)) for t in suite.document.tuned] == [
            ("squad", 4, 1, 2), ("squad", 2, 1, 2), ("gsm8k", 4, 1, 2), ("gsm8k", 2, 1, 2)
        ]  # fmt: skip
        assert len(list((out.parent / "cache" / "traces").iterdir())) == 2, "k shares the trace of its task"
        assert not (out.parent / "cache" / "tuned").exists(), "the weights are the suite's own"

    def test_its_folders_are_those_of_eval(self, only_read: tuple[Suite, Path]):
        suite, out = only_read
        assert [r.folder for r in suite.document.runs] == ["runs/squad", "runs/gsm8k"]
        found = load_run(out / "runs/squad")
        options = dataclasses.asdict(found.config.inputs["squad"]) | {"rescorers": ("none", "oracle"), "p": (1, 2)}
        same = [r for r in suite.document.results if (r.task, r.k) == ("squad", 4) and r.alpha is None]
        assert same == evaluated(options | {"k": 4}).results
        assert compared(out, selection=Selection(a_rescorer="none", b_rescorer="oracle")).rows[0].n == 4
        assert inspect_example(out, "2", task="gsm8k", k=2).k == 2

    def test_the_files(self, only_read: tuple[Suite, Path]):
        suite, out = only_read
        manifest = json.loads((out / "suite.json").read_text())
        assert manifest["schema"] == "rescore.suite/4" and manifest == plain(suite.document)
        assert read_manifest(out) == suite.document
        page = (out / "table.md").read_text()
        assert "`rescore suite table.yaml --out DIR`" in page and "3 or 4 examples of a task" in page
        head = "task rescorer k p examples groups alpha block.eff. 95.% gain 95.% won tied lost oracle"
        assert re.search(rf"^\| {' . '.join(head.split())} \|$", page, re.M)
        number = r"\d\.\d{3}"
        cells = ["squad", "oracle", "4", "1", "4", "4", "-", number, f"{number} to {number}", r"\+\S+%", r"\S+ to \S+%"]
        assert re.search(rf"^\| {' . '.join([*cells, *[r'[0-9.]+%'] * 3, number])} \|$", page, re.M)
        rows = list(csv.reader((out / "table.csv").open()))
        assert rows[0] == results_csv(suite.document.results).csv().splitlines()[0].split(",") and len(rows) == 17
        assert rows[0][10:13] == ["block_efficiency", "block_efficiency_low", "block_efficiency_high"]
        assert rows[1][:6] == ["squad", "none", "1", "4", "4", ""]
        oracle = suite.document.results[3]
        assert [float(cell) for cell in rows[4][10:13]] == [oracle.block_efficiency, *oracle.block_efficiency_ci95]

    def test_several_h_and_large_k(self, write: Write, tmp_path: Path):
        body = "k: [2, 40]\nh: [2, 4]\nlimit: 2\nmax_new_tokens: 6\ndevice: cpu\ntasks: squad\nrescorers: none\n"
        suite = run_suite(read_plan(write(body=body), data=tmp_path), tmp_path / "out")
        assert [(r.k, r.h) for r in suite.document.results] == [(2, 2), (40, 2), (2, 4), (40, 4)]
        assert len(list((cache_directory() / "traces").iterdir())) == 1
        assert "| 40 | 4 |" in suite_page(suite.document.results, suite.plan, "")

    def test_every_reader_takes_its_folder(self, only_read: tuple[Suite, Path], tmp_path: Path):
        _, out = only_read
        runs = load_runs(out)
        assert [r.folder.name for r in runs] == ["squad", "squad", "gsm8k", "gsm8k"]
        written = report([out], tmp_path / "report.html", examples=0)
        assert len(list(csv.DictReader(written.csv.open()))) == 16
        assert report([out.parent], tmp_path / "again.html", examples=0).csv.read_text() == written.csv.read_text()
        found = analyse_folders(results=[out])
        assert [(r.task, r.k) for r in found.runs] == [("squad", 4), ("squad", 2), ("gsm8k", 4), ("gsm8k", 2)]

    def test_its_sweeps_are_in_the_report(self, write: Write, tmp_path: Path):
        suite = run(write(), tmp_path / "out")
        found = [sweep for view in load_sources([tmp_path / "out"]).views for sweep in view.sweeps]
        assert [(s.task, s.k, s.alphas, s.alpha) for s in found] == [
            (t.task, t.k, t.alphas, t.alpha) for t in suite.document.tuned
        ]
        lines = (tmp_path / "out" / "tuned.jsonl").read_text().splitlines()
        broken = [json.loads(lines[0]) | {"alphas": "much"}, *map(json.loads, lines[1:])]
        write_lines(tmp_path / "out" / "tuned.jsonl", broken)
        assert load_sources([tmp_path / "out"]).views[0].sweeps == ()

    def test_inspect_asks_which_run(self, write: Write, tmp_path: Path):
        out = tmp_path / "out"
        run(write(("k: [4, 2]", "k: [4, 2]\nh: [2, 3]")), out)
        refused(lambda: inspect_example(out, task="squad"), "has several k of squad; choose one with --k: 2, 4")
        refused(lambda: inspect_example(out, task="squad", k=2), "has several h of squad; choose one with --h: 2, 3")
        refused(lambda: inspect_example(out, task="squad", k=2, h=4), "with h = 4, only 2, 3")
        found = inspect_example(out, task="squad", k=2, h=3)
        assert (found.k, found.h) == (2, 3)

    def test_given_traces(self, write: Write, tmp_path: Path):
        plan = read_plan(write())
        inputs = dataclasses.asdict(plan.inputs(plan.tasks[0], None))
        recorded_trace(inputs | {"limit": 3, "k": 4}, tmp_path / "trace")
        body = f"device: cpu\nk: 4\ntasks:\n- trace: {tmp_path / 'trace'}\nrescorers: [none, oracle]\n"
        suite = run(write(body=body), tmp_path / "out")
        assert [(r.task, r.n) for r in suite.document.results] == [("squad", 3)] * 2
        assert run(write(body=body), tmp_path / "out").document.results == suite.document.results

    @pytest.mark.parametrize(
        ("line", "ps"), [("", [1, 64]), ("p: [1, 2]", [1, 2, 1, 2]), ("k: 4", [1, 64])], ids=["none", "p", "k"]
    )
    @pytest.mark.usefixtures("shipped_ngram")
    def test_a_tree_has_all_its_branches_where_no_p_is_given(self, write: Write, line: str, ps: list[int]):
        body = f"{line}\ntasks: [{{name: squad, data: DATA/squad.jsonl}}]\nrescorers: [none, 'joint:nodes=64']\n"
        assert [p for rescorer in read_plan(write(body=body)).rescorers for p in rescorer.p] == ps

    def test_speed_ups_are_predicted_by_its_costs(
        self, write: Write, tmp_path: Path, tiny_folder: Path, tiny_heads_folder: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """Measured again, they are predicted again, and nothing is decoded again for it."""
        body = "costs: DATA/costs.json\nk: 4\nlimit: 2\nmax_new_tokens: 8\ndevice: cpu\nrescorers: [none, oracle]\n"
        path = write(body=f"{body}tasks: [{{name: squad, data: DATA/squad.jsonl}}]\n")
        refused(lambda: read_plan(path), "table.yaml", "line 3", "no costs in", "measure them: rescore bench costs")
        base = identify(str(tiny_folder))
        of = {"weights_sha256": base.weights_sha256, "config_sha256": base.config_sha256}
        choices = [ChoiceCost(rescorer="none", k=4, p=1, ms=1.0)]
        slow, fast = (
            costs_of([[5.0, 5.0 + more]], contexts=(9,), nodes=(1, 4), heads=heads_sha256(tiny_heads_folder),
                     choices=choices, **of) for more in (4.0, 0.0)
        )  # fmt: skip
        keep_costs(slow, tmp_path / "costs.json")
        first = run(path, tmp_path / "out").document.results[0]
        keep_costs(fast, tmp_path / "costs.json")
        monkeypatch.setattr(lm.base.catalog, "load_base", lambda *_, **__: pytest.fail("the base LM was loaded"))
        suite = run(path, tmp_path / "out")
        then, oracle = suite.document.results
        assert first.predicted_speedup < then.predicted_speedup and oracle.predicted_speedup is None
        assert dataclasses.replace(first, predicted_speedup=then.predicted_speedup) == then
        page = (tmp_path / "out" / "table.md").read_text()
        assert "| predicted |" in page and "predicted: the speed-up over greedy decoding by the costs" in page

    def test_what_was_tuned_outside_is_no_part_of_it(self, write: Write, tmp_path: Path):
        path = write(("    tune: {limit: 2, alphas: [0.5, 1]}\n", ""))
        plan = read_plan(path)
        inputs = dataclasses.asdict(plan.inputs(plan.tasks[0], None))
        swept(inputs | {"rescorers": ("context-ngram:none",)}, alphas=(3.0,), ks=(4,), ps=(1,))
        assert (cache_directory() / "tuned").exists()
        used = {r.alpha for r in run(path, tmp_path / "out").document.results if r.rescorer == "context-ngram:none"}
        assert used == {load_rescorer("context-ngram:none").alpha}

    def test_weights_of_other_data_are_tuned_anew(self, write: Write, tmp_path: Path):
        """Stopped behind the sweeps: what was tuned on the old file is no weight for the new one."""
        path, out = write(), tmp_path / "out"
        run(path, out)
        shutil.rmtree(out / "runs")
        (out / "suite.json").rename(tmp_path / "first.json")
        data = next(tmp_path.rglob("squad.jsonl"))
        first, text = json.loads((tmp_path / "first.json").read_text()), data.read_text()
        data.write_text("".join(reversed(text.splitlines(keepends=True))))
        again, fresh = run(path, out), run(path, tmp_path / "fresh")
        assert again.document.results == fresh.document.results
        assert again.document.tuned == fresh.document.tuned and len((out / "tuned.jsonl").read_text().splitlines()) == 6
        data.write_text(text)  # put back: the last line of the file is of other data now
        shutil.rmtree(out / "runs")
        assert plain(run(path, out).document.tuned) == first["tuned"]

    def test_weights_of_other_examples_are_tuned_anew(self, write: Write, tmp_path: Path):
        """Stopped behind the sweeps: the list of examples to leave out now names one that was tuned on."""
        left_out, out = tmp_path / "list.yaml", tmp_path / "out"
        path = write(("limit: 4\n", f"limit: 4\nleave_out: {left_out}\n"))
        prompts = [e.prompt for e in load_examples(load_task("squad"), data=tmp_path / "squad.jsonl").examples]
        told = []
        for prompt in (prompts[0], prompts[-1]):
            body = f"schema: rescore.overlap/1\nn: 13\ntasks:\n  squad:\n  - {{prompt: '{digest(prompt)}'}}\n"
            left_out.write_text(body)
            told.append({(t.task, t.k): t.held_out for t in run(path, out).document.tuned})
            shutil.rmtree(out / "runs")
            (out / "suite.json").unlink()
        assert "q5" in told[0]["squad", 4] and "q5" not in told[1]["squad", 4]

    def test_a_second_process_is_refused(self, write: Write, tmp_path: Path):
        held = threading.Event()

        def refused_within() -> None:
            refused(lambda: run(write(), tmp_path / "out"), "another rescore process is writing to", OutputError)
            held.set()

        with writing_to(tmp_path / "out"):
            thread = threading.Thread(target=refused_within)
            thread.start()
            thread.join(60)
        assert held.is_set()

    def test_one_run_of_several_is_chosen_by_task_and_h(self, write: Write, tmp_path: Path):
        run(write(("k: [4, 2]", "k: 4\nh: [2, 3]")), tmp_path / "out")
        found = run_of_task(tmp_path / "out", "gsm8k", h=3)
        assert found.tasks == ["gsm8k"] and found.results[0].h == len(found.results[0].marginal) == 3
        refused(lambda: run_of_task(tmp_path / "out", None), "give one task with --task: squad, gsm8k")
        refused(lambda: run_of_task(tmp_path / "out", "xsum"), "has no task xsum; give one of squad, gsm8k")
        refused(lambda: run_of_task(tmp_path / "out", "squad"), "several runs of squad; give the folder of one")
        assert run_of_task(found.folder, None).folder == found.folder

    def test_names_cannot_break_the_table(self, write: Write, tmp_path: Path):
        suite = run(write(), tmp_path / "out")
        nasty = [dataclasses.replace(suite.document.results[0], task="a|b<img>\x1b[2J`x`")]
        page = suite_page(nasty, suite.plan, "")
        assert r"| a\|b\<img\>\\x1b\[2J\`x\` |" in page and "\x1b" not in page
        assert "\x1b" not in suite_table(nasty).text()
        formula = dataclasses.replace(suite.document.results[0], task="=1+1\x1b[2J")
        assert "\n'=1+1\\x1b[2J," in results_csv([formula]).csv()


class TestGoingOn:
    @pytest.mark.parametrize("at", [1, 3, 7, 20])
    def test_a_kill_loses_no_finished_example(self, write: Write, tmp_path: Path, monkeypatch: Any, at: int):
        """As after a kill: what was appended stays, the last line may be torn."""
        whole = run(write(), tmp_path / "whole")
        add, calls = ExampleLog.add, []

        def die(self: ExampleLog, record: ExampleRecord) -> None:
            calls.append(1)
            if len(calls) == at:
                raise SystemError("killed")
            add(self, record)

        with monkeypatch.context() as dying:
            dying.setattr(ExampleLog, "add", die)
            with pytest.raises(SystemError):
                run(write(), tmp_path / "out")
        assert not (tmp_path / "out" / "suite.json").exists() and len(records(tmp_path / "out")) == at - 1
        with (tmp_path / "out" / "tuned.jsonl").open("a") as stream:
            stream.write('{"task": "gs')
        refused(lambda: compared(tmp_path / "out", selection=Selection(a_p=1, b_p=2)), "has not finished")
        calls.clear()

        def count(self: ExampleLog, record: ExampleRecord) -> None:
            calls.append(1)
            add(self, record)

        monkeypatch.setattr(ExampleLog, "add", count)
        again = run(write(), tmp_path / "out")
        assert len(calls) == len(records(tmp_path / "whole")) - (at - 1)
        assert again.document.results == whole.document.results and sorted(records(tmp_path / "out")) == sorted(
            records(tmp_path / "whole")
        )

    def test_ctrl_c_keeps_and_shows_what_is_finished(self, write: Write, tmp_path: Path, monkeypatch: Any):
        add, calls = ExampleLog.add, []

        def stop(self: ExampleLog, record: ExampleRecord) -> None:
            calls.append(1)
            if len(calls) == 20:
                raise KeyboardInterrupt
            add(self, record)

        with monkeypatch.context() as stopping:
            stopping.setattr(ExampleLog, "add", stop)
            cut = run(write(), tmp_path / "out")
        assert cut.interrupted and [r.k for r in cut.document.results] == [4, 4, 4, 4, 2]
        assert not (tmp_path / "out" / "table.md").exists() and cut.document.runs == []
        again = run(write(), tmp_path / "out")
        assert not again.interrupted and again.document.results[:4] == cut.document.results[:4]

    def test_ctrl_c_while_tuning(self, write: Write, tmp_path: Path, monkeypatch: Any):
        def stop(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as stopping:
            stopping.setattr(suite_module, "tune", stop)
            cut = run(write(), tmp_path / "out")
        assert cut.interrupted and cut.document.results == []
        assert len(run(write(), tmp_path / "out").document.results) == 16

    def test_what_is_finished_needs_no_model(self, write: Write, tmp_path: Path, monkeypatch: Any):
        first = run(write(), tmp_path / "out")
        monkeypatch.setattr(lm.base.catalog, "load_base", lambda *_, **__: pytest.fail("the base LM was loaded"))
        monkeypatch.setattr(suite_module, "tune", lambda *_, **__: pytest.fail("tuned again"))
        monkeypatch.setattr(suite_module, "evaluate", lambda *_, **__: pytest.fail("evaluated again"))
        assert run(write(), tmp_path / "out").document.results == first.document.results

    def test_each_trace_is_recorded_once(self, write: Write, tmp_path: Path, monkeypatch: Any):
        made: list[int] = []
        generate = lm.base.generation.generate

        def counted(base: Any, prompts: list[Any], **more: Any) -> Any:
            made.append(len(prompts))
            return generate(base, prompts, **more)

        monkeypatch.setattr(lm.base.generation, "generate", counted)
        run(write(), tmp_path / "out")
        assert sum(made) == (4 + 2) + (3 + 2), "the evaluated examples and those held out, of each task"

    def test_new_data_are_told(self, write: Write, tmp_path: Path):
        run(write(), tmp_path / "out")
        write_lines(tmp_path / "squad.jsonl", squad_records(5))
        refused(lambda: run(write(), tmp_path / "out"), "data.squad.sha256", IncompatibleError)
