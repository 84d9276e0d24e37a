"""Suites of live decoding: peers, tables of speed and of outputs that differ, and the two that come with the docs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import refused, squad_records, write_lines
from made_records import made_latency, made_result

import lm.base.catalog
from lattices.errors import IncompatibleError, InvalidDataError
from lm.heads.block_heads import heads_sha256
from rescore.costs.kept import keep_costs, this_machine
from rescore.costs.table import Costs, HeadsCost
from rescore.peers.transformers_generate import TransformersGenerate
from rescore.runs.evaluated import load_run
from rescore.runs.models import Models
from rescore.runs.records import Divergence, Identical, Result
from rescore.suites import run as suite_module
from rescore.suites.files import read_manifest
from rescore.suites.plan import Plan, SuiteRescorer, SuiteTask, read_plan
from rescore.suites.run import Suite, run_suite
from rescore.suites.tables import speed_table, suite_page, suite_table, suite_tables

SUITES = Path(__file__).parents[2] / "docs" / "suites"
BODY = """\
mode: live
limit: 4
max_new_tokens: 8
k: 4
device: cpu
tasks: [squad, gsm8k]
rescorers: [none, oracle]
peers: [transformers, 'transformers:lookup=3']
"""
PEERS = ["transformers", "transformers:lookup=3"]


@pytest.fixture
def suite_file(tmp_path: Path, tiny_folder: Path, tiny_heads_folder: Path) -> Path:
    """A live suite of two tasks for the tiny model; their data lie in the folder beside it."""
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "squad.jsonl", squad_records(6))
    write_lines(tmp_path / "data" / "gsm8k.jsonl", [r | {"answer": "42"} for r in squad_records(6)])
    path = tmp_path / "live.yaml"
    path.write_text(f"base: {tiny_folder}\nheads: {tiny_heads_folder}\n{BODY}")
    return path


def run(path: Path, out: Path) -> Suite:
    return run_suite(read_plan(path, data=path.parent / "data"), out, source=path.name)


class TestRun:
    def test_every_task_run_and_peer_has_its_line(self, suite_file: Path, tmp_path: Path):
        suite = run(suite_file, tmp_path / "out")
        sides = ["none", "oracle", *PEERS]
        wanted = [(task, side, 4) for task in ("squad", "gsm8k") for side in sides]
        assert [(r.task, r.rescorer, r.n) for r in suite.document.results] == wanted
        assert read_manifest(tmp_path / "out") == suite.document and suite.document.plan["peers"] == PEERS
        page = (tmp_path / "out" / "table.md").read_text()
        assert page.startswith("Live decode of ") and "on cpu with 1 threads, torch " in page
        assert [line for line in page.splitlines() if line.startswith("## ")] == [
            "## Speed-up over greedy decoding", "## All runs"
        ]  # fmt: skip
        assert f"| task | greedy tok/s | {' | '.join(sides)} |" in page
        assert re.search(r"^\| mean \| - \|( [\d.]+x(\\\*)? \|){4}$", page, re.M)
        head = "| task | rescorer | p | examples | groups | block eff. | 95 % | tok/s | speed-up | 95 % | identical |"
        assert head in page
        number = r"\d+\.\d+"
        cells = [r"1\.000", r"1\.000 to 1\.000", number, f"{number}x", f"{number}x to {number}x", "4/4"]
        assert re.search(rf"^\| gsm8k \| transformers \| 1 \| 4 \| 4 \| {' . '.join(cells)} \|$", page, re.M)

    def test_it_goes_on_where_it_was_stopped(self, suite_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        out, load = tmp_path / "out", TransformersGenerate.load
        loaded: list[str] = []

        def dies(self: TransformersGenerate, *given: Any) -> Any:
            loaded.append(self.name)
            if len(loaded) == 4:  # the last peer of the second task
                raise SystemError("killed")
            return load(self, *given)

        with monkeypatch.context() as dying:
            dying.setattr(TransformersGenerate, "load", dies)
            with pytest.raises(SystemError):
                run(suite_file, out)
        first = load_run(out / "runs" / "squad").results
        whole = run(suite_file, out)
        assert whole.document.results[:4] == first and len(whole.document.results) == 8
        monkeypatch.setattr(lm.base.catalog, "load_base", lambda *_, **__: pytest.fail("the base LM was loaded"))
        monkeypatch.setattr(suite_module, "evaluate", lambda *_, **__: pytest.fail("evaluated again"))
        assert run(suite_file, out).document.results == whole.document.results

    def test_another_version_of_a_peer_is_told(self, suite_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        run(suite_file, tmp_path / "out")
        monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
        message = r"peers.transformers: transformers [\d.]+ -> transformers 9.9"
        with pytest.raises(IncompatibleError, match=message):
            run(suite_file, tmp_path / "out")

    def test_each_task_lets_go_of_its_models(self, suite_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Else a suite of many tasks would hold as many base LMs."""
        held: list[Models] = []
        release = Models.release

        def noted(self: Models) -> None:
            assert "base" in vars(self) and not any("base" in vars(before) for before in held)
            release(self)
            held.append(self)

        monkeypatch.setattr(Models, "release", noted)
        run(suite_file, tmp_path / "out")
        assert len(held) == 2 and not any({"base", "heads"} & vars(each).keys() for each in held)

    def test_what_a_step_costs_is_shown_where_it_is_measured(self, suite_file: Path, tmp_path: Path):
        plan = read_plan(suite_file)
        identity, heads = lm.base.catalog.identify(str(plan.base)), heads_sha256(Path(str(plan.heads)))
        costs = Costs(
            base="tiny", weights_sha256=identity.weights_sha256, config_sha256=identity.config_sha256,
            dtype=identity.dtype, device="cpu", compiles=True, machine=this_machine("cpu"), contexts=[64],
            nodes=[1, 2], step_ms=[[20.0, 30.0]], tree_ms=0.5, heads=HeadsCost(sha256=heads, h=4, ms=5.0),
        )  # fmt: skip
        keep_costs(costs)
        keep_costs(msgspec.structs.replace(costs, heads=HeadsCost(sha256="of others", h=9, ms=7.0)))
        run(suite_file, tmp_path / "out")
        page = (tmp_path / "out" / "table.md").read_text()
        shown = page[page.index("## What a step costs there") :]
        assert "| 2 | 30.0 | 1.50x |" in shown and "heads (h = 4) 5.0 ms more" in shown

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("mode: live\n", "", "line 9: peers: peers are timed beside live decoding; drop them, or add mode: live"),
            (
                "[transformers,",
                "[transfomers,",
                "line 10: peers[1]: unknown peer 'transfomers'; did you mean transform",
            ),
            (
                "lookup=3",
                "lookup=x",
                "line 10: peers[2]: --peer transformers: lookup is a whole number, and 'x' is none",
            ),
            ("[transformers,", "[4,", "line 10: peers[1]: a number ('4') stands where text is needed"),
        ],
    )
    def test_refused_with_the_line(self, suite_file: Path, old: str, new: str, message: str):
        suite_file.write_text(suite_file.read_text().replace(old, new))
        refused(lambda: read_plan(suite_file), message, InvalidDataError)


def live(task: str, rescorer: str, speedup: float, *, greedy: float = 40.0, **changes: Any) -> Result:
    latency = made_latency(speedup=speedup, autoregressive_tokens_per_second=greedy, speedup_ci95=None)
    return made_result(
        task=task, rescorer=rescorer, latency=latency, identical=Identical(n=2, identical=2),
        oracle_block_efficiency=None if rescorer == "transformers" else 2.5, **{"divergence": [], **changes},
    )  # fmt: skip


class TestTables:
    def test_speed_by_task_and_run_with_its_mean(self):
        results = [
            live("squad", "none", 0.5), live("squad", "joint", 1.5, p=16), live("squad", "transformers", 1.0),
            live("xsum", "none", 1.0, greedy=30.0), live("xsum", "joint", 0.5, p=16), live("xsum", "transformers", 0.5),
        ]  # fmt: skip
        table = speed_table(results)
        assert [column.heading for column in table.columns] == ["task", "greedy tok/s", "none", "joint", "transformers"]
        assert table.cells() == [
            ["squad", "40.0", "0.50x", "1.50x*", "1.00x"],
            ["xsum", "30.0", "1.00x*", "0.50x", "0.50x"],
            ["mean", "-", "0.75x", "1.00x*", "0.75x"],
        ]

    def test_what_a_task_lacks_has_no_mean(self):
        table = speed_table([live("squad", "none", 0.5), live("squad", "joint", 2.0), live("xsum", "none", 1.5)])
        assert table.cells()[1:] == [["xsum", "40.0", "1.50x*", "-"], ["mean", "-", "1.00x*", "-"]]

    def test_runs_that_differ_in_p_k_and_h(self):
        table = speed_table(
            [live("squad", "joint", 1.0), live("squad", "joint", 2.0, p=8), live("squad", "joint", 3.0, k=4)]
        )
        headings = ["task", "k", "greedy tok/s", "joint, p = 1", "joint, p = 8"]
        assert [column.heading for column in table.columns] == headings
        assert [row[:2] for row in table.rows] == [["squad", 16], ["squad", 4], ["mean", None]]

    def test_live_suites_have_speed_and_replayed_ones_gains(self):
        replayed = suite_tables([made_result(gain=0.5)])
        assert len(replayed) == 1 and "gain" in replayed[0].text() and "tok/s" not in replayed[0].text()
        differs = [Divergence(id="a", position=7, margin=0.25), Divergence(id="b", position=9, margin=0.5)]
        _, every, differing = suite_tables([live("squad", "none", 1.0, divergence=differs)])
        assert "alpha" not in every.text() and re.search(r"squad +none +1 .* 87.6 +1.00x +- +2/2\n", every.text())
        assert re.search(r"squad +none +16 +1 +2/2 +7 +0.2500 +0.5000\n", differing.text())
        assert len(suite_tables([live("squad", "none", 1.0)])) == 2, "no outputs that differ"
        assert "alpha" in suite_table([live("squad", "ngram", 1.0, alpha=0.5)]).text()

    def test_the_page_escapes_what_its_tables_say(self):
        plan = Plan((SuiteTask("squad"),), (SuiteRescorer("none", (1,), (16,)),), mode="live")
        page = suite_page([live("a|b", "none", 1.0)], plan, "x.yaml")
        assert r"| a\|b | 40.0 | 1.00x\* |" in page and r"\* the fastest of a task" in page


class TestOfTheDocs:
    @pytest.mark.parametrize(("name", "tasks", "dtype"), [("live", 12, "float32"), ("live-bf16", 4, "bfloat16")])
    def test_they_can_be_read(self, name: str, tasks: int, dtype: str, tmp_path: Path):
        write_lines(tmp_path / "spec_bench.jsonl", [])
        plan = read_plan(SUITES / f"{name}.yaml", data=tmp_path)
        assert (plan.mode, plan.dtype, plan.leave_out, len(plan.tasks)) == ("live", dtype, "shipped", tasks)
        assert plan.peers[:2] == ("transformers", "transformers:lookup=10")
        files = {task.name: Path(str(task.data)).name for task in plan.tasks}
        assert files["squad"] == "squad.jsonl" and {*files.values()} - {f"{task}.jsonl" for task in files} <= {
            "spec_bench.jsonl"
        }
        ps = {run.label: run.p for run in plan.runs}
        assert ps["none"] == ps["lookup:tokens=8"] == ps["joint"] == 1 and max(ps.values()) > 1
