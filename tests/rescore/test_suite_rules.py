"""Suites with acceptance rules: each has results of its own, and nothing lossy stands without its mark and scores."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, refused, squad_records, write_lines
from made_records import made_latency, made_result
from suite_runs import Write, run, writer

import lm.base.catalog
from lattices.errors import InvalidDataError
from rescore.acceptance.options import Acceptance
from rescore.options import Spec
from rescore.reports.inspection import inspect_example
from rescore.reports.page import report
from rescore.runs.evaluated import load_run
from rescore.runs.records import Divergence, Identical, Result
from rescore.studies.analysis.collect import analyse_folders
from rescore.studies.comparison import Selection, compare_folders
from rescore.suites import run as suite_module
from rescore.suites.files import run_of_task
from rescore.suites.plan import read_plan
from rescore.suites.tables import speed_table, suite_table, suite_tables

BODY = """\
mode: live
limit: 4
max_new_tokens: 8
k: [4, 2]
device: cpu
acceptance: [greedy, "top-k:2"]
tasks:
  - name: squad
    data: DATA/squad.jsonl
rescorers:
  - none
  - name: context-ngram:none
    alpha: 1
  - name: lookup
    acceptance: greedy
  - name: draws
    temperature: 2
    top_p: 0.9
    sampling_seed: 3
  - oracle
"""
LOSSY, SAMPLED = " [lossy: top-k:2]", " [sampled: temperature 2, top-p 0.9]"


def writer_in(folder: Path, base: Path, heads: Path) -> Write:
    """Of suites for the tiny model in a folder, with lines of them replaced."""
    write_lines(folder / "squad.jsonl", squad_records(6))
    return writer(folder, f"base: {base}\nheads: {heads}\ndtype: float64\n", BODY)


@pytest.fixture
def write(tmp_path: Path, tiny_folder: Path, tiny_heads_folder: Path) -> Write:
    return writer_in(tmp_path, tiny_folder, tiny_heads_folder)


@pytest.fixture
def finished(write: Write, tmp_path: Path) -> Path:
    """The folder of the suite, and its document beside it."""
    run(write(), tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(scope="module")
def only_read(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_heads_folder: Path) -> Path:
    """The same once, for tests that change nothing in it."""
    folder = tmp_path_factory.mktemp("rules")
    run(writer_in(folder, tiny_folder, tiny_heads_folder)(), folder / "out")
    return folder / "out"


class TestRun:
    def test_each_rule_has_a_folder(self, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        out = tmp_path / "out"
        suite = run(write(), out)
        folders = ["runs/squad", "runs/squad-top-k-2", "runs/squad-temperature-2-top-p-0.9-seed-3"]
        assert [r.folder for r in suite.document.runs] == folders
        exact, lossy, sampled = (load_run(out / folder) for folder in folders)
        names = ["none", "context-ngram:none"]
        assert [(r.k, r.rescorer) for r in exact] == [(k, n) for k in (4, 2) for n in (*names, "lookup", "oracle")]
        assert [(r.k, r.rescorer) for r in lossy] == [(k, name + LOSSY) for k in (4, 2) for name in names]
        assert [(r.k, r.rescorer) for r in sampled] == [(k, f"draws{SAMPLED}") for k in (4, 2)]
        assert suite.document.results == [r for each in (exact, lossy, sampled) for r in each]
        assert [r.config.acceptance for r in (exact, lossy, sampled)] == [
            "greedy", "top-k:2", "temperature 2, top-p 0.9"
        ]  # fmt: skip
        assert all(r.identical.identical == r.identical.n == 4 for r in exact)
        assert lossy.config.lossy and not exact.config.lossy and sampled.config.sampling_seed == 3
        plan = json.loads((out / "plan.json").read_text())["rescorers"]
        assert [each["acceptance"] for each in plan["none"]["rules"]] == ["greedy", "top-k:2"]
        assert "rules" not in plan["lookup"], "as in folders from before there were rules"
        monkeypatch.setattr(lm.base.catalog, "load_base", lambda *_, **__: pytest.fail("the base LM was loaded"))
        monkeypatch.setattr(suite_module, "evaluate", lambda *_, **__: pytest.fail("evaluated again"))
        assert run(tmp_path / "table.yaml", out).document.results == suite.document.results

    def test_gains_are_over_the_unrescored_drafts_by_the_same_rule(self, finished: Path):
        runs = [load_run(folder) for folder in sorted((finished / "runs").iterdir())]
        for found in (found for found in runs if not found.config.sampled):
            mark = LOSSY if found.config.lossy else ""
            for k in (4, 2):
                none = found.result(f"none{mark}", k=k)
                other = found.result(f"context-ngram:none{mark}", k=k)
                assert none.gain is None and none.is_unrescored
                assert other.gain == pytest.approx(other.block_efficiency / none.block_efficiency - 1)
        assert all(r.gain is None for found in runs if found.config.sampled for r in found)

    def test_its_tables(self, finished: Path):
        page = (finished / "table.md").read_text()
        assert "greedy or [lossy: top-k:2] or [sampled: temperature 2, top-p 0.9]" in page.replace("\\", "")
        titles = [line for line in page.splitlines() if line.startswith("## ")]
        assert titles == [
            "## Speed-up over greedy decoding",
            "## LOSSY, top-k:2 acceptance: speed-up over greedy decoding",
            "## Sampled, temperature 2, top-p 0.9: speed-up over drawing without drafts",
            "## All runs",
        ]
        rows = list(csv.DictReader((finished / "table.csv").open()))
        assert {row["rescorer"] for row in rows if row["quality_without_drafts"]} >= {f"none{LOSSY}", "none"}

    def test_another_rule_is_another_suite(self, write: Write, finished: Path):
        refused(lambda: run(write(("top-k:2", "top-k:3")), finished), "rescorers.none.rules: ")

    def test_peers_stand_beside_the_greedy_runs(self, write: Write, tmp_path: Path):
        body = BODY[: BODY.index("rescorers")] + "rescorers: none\npeers: transformers\n"
        suite = run(write(("k: [4, 2]", "k: 4"), body=body), tmp_path / "out")
        assert [r.rescorer for r in suite.document.results] == ["none", "transformers", f"none{LOSSY}"]


class TestReaders:
    """Whatever reads the folder of a suite keeps its rules apart."""

    @pytest.fixture
    def finished(self, only_read: Path) -> Path:
        return only_read

    def test_compare(self, finished: Path):
        both = Selection(a_rescorer="none", b_rescorer=f"none{LOSSY}")
        found = compare_folders(finished, selection=both)
        assert [(row.a.rescorer, row.b.rescorer, row.a.k) for row in found.rows] == [
            ("none", f"none{LOSSY}", 4), ("none", f"none{LOSSY}", 2)
        ]  # fmt: skip
        assert "squad: B is [lossy: top-k:2]: LOSSY, its outputs are not the base's; the sides decode other texts" in (
            found.notices
        )
        assert not any("near-tie" in line for line in found.notices)
        same = Selection(a_rescorer=f"none{LOSSY}", b_rescorer=f"context-ngram:none{LOSSY}")
        assert len(compare_folders(finished, selection=same).rows) == 2
        exact = compare_folders(finished, selection=Selection(a_rescorer="none", b_rescorer="lookup"))
        assert len(exact.rows) == 2 and not exact.notices

    def test_folders_by_two_rules_have_nothing_in_common(self, finished: Path):
        folders = finished / "runs" / "squad", finished / "runs" / "squad-top-k-2"
        told = refused(lambda: compare_folders(*folders), "have nothing in common to compare")
        assert "squad with k = 4, h = 4 [lossy: top-k:2] is only in B" in told or "no k and h in common" in told
        named = Selection(a_rescorer="none", b_rescorer=f"none{LOSSY}")
        assert len(compare_folders(*folders, selection=named).rows) == 2

    def test_inspect_asks_which_rule(self, finished: Path):
        refused(
            lambda: inspect_example(finished, k=4), "has several acceptance rules of squad (greedy, [lossy: top-k:2]"
        )
        lossy = inspect_example(finished, k=4, rescorers=(Spec(f"none{LOSSY}"),))
        assert [decode.rescorer for decode in lossy.decodes] == [f"none{LOSSY}"]
        exact = inspect_example(finished, k=4, rescorers=(Spec("none"), Spec("lookup")))
        assert [decode.rescorer for decode in exact.decodes] == ["none", "lookup"]

    def test_the_command_takes_the_label(self, finished: Path, rescore: Command):
        label = f"draws{SAMPLED}"  # with a comma in it
        shown = rescore("inspect", finished, "--k", 4, "--rescorer", label, "--json")
        assert [decode["rescorer"] for decode in shown.document["decodes"]] == [label]

    def test_analyse(self, finished: Path):
        found = analyse_folders(results=[finished])
        assert [(len(run.rescorers), run.k) for run in found.runs] == [(4, 4), (4, 2), (2, 4), (2, 2), (1, 4), (1, 2)]
        rows = {(row.rescorer, row.k): row for row in found.table.rows}
        assert rows["none", 4].cells[0].gain is None and rows[f"context-ngram:none{LOSSY}", 4].mean_gain is not None
        text = str(found)
        assert "without drafts" in text and "F1" in text

    def test_report(self, finished: Path, tmp_path: Path):
        written = report([finished], tmp_path / "r.html", examples=1)
        page, text = written.html.read_text(), written.markdown.read_text().replace("\\", "")
        assert "LOSSY, [lossy: top-k:2]: the outputs are not the base model's." in text
        of_exact = text[: text.index("LOSSY, [lossy: top-k:2]")]
        assert "the fastest was" in of_exact and "lossy" not in of_exact, "no rule is compared with another"
        row = next(line for line in text.splitlines() if line.startswith("| none [lossy: top-k:2] | 1 |"))
        assert "quality" in row and "without drafts" in row
        assert "F1, without drafts" in page and "drawn" in text
        assert not any("not run there" in line for line in written.missing)

    def test_cost_and_export(self, finished: Path, rescore: Command):
        refused(lambda: run_of_task(finished, "squad"), "several runs of squad; give the folder of one")
        rescore("export", finished, "--to", "sglang", "--rescorer", f"none{LOSSY}", "--k", 4).refused("not the base's")
        sampled = ("export", finished, "--to", "speculation-profile", "--unstable", "--rescorer", f"draws{SAMPLED}")
        assert "temperature 2, top-p 0.9: draws" in rescore(*sampled, "--k", 4).out


class TestPlan:
    def rules(self, write: Write, *changes: tuple[str, str]) -> dict[str, tuple[Acceptance, ...]]:
        return {r.name: r.rules for r in read_plan(write(*changes)).rescorers}

    def test_what_a_rescorer_says_itself_goes_before(self, write: Write):
        greedy, lossy = Acceptance(), Acceptance(Spec("top-k:2"))
        drawn = Acceptance(temperature=2.0, top_p=0.9, sampling_seed=3)
        assert self.rules(write) == {
            "none": (greedy, lossy), "context-ngram:none": (greedy, lossy), "lookup": (greedy,), "draws": (drawn,),
            "oracle": (greedy,),
        }  # fmt: skip
        change = ('acceptance: [greedy, "top-k:2"]', "temperature: [0, 0.5]\ntop_k: 5")
        found = self.rules(write, change)
        assert found["none"] == (greedy, Acceptance(temperature=0.5, top_k=5))
        assert found["lookup"] == (greedy,)
        assert found["draws"] == (Acceptance(temperature=2.0, top_k=5, top_p=0.9, sampling_seed=3),)

    @pytest.mark.parametrize(
        ("old", "new", "told"),
        [
            ('"top-k:2"', '"top-k:0"', "line 9: acceptance[2]: top-k acceptance: give k and least of 1 or more"),
            ('"top-k:2"', '"topk:2"', "line 9: acceptance[2]: unknown acceptance rule 'topk'; did you mean top-k?"),
            ("mode: live\n", "", "line 8: acceptance[2]: what is not greedy leaves a trace"),
            ("temperature: 2", "temperature: -2", "temperature: --temperature -2; sampling needs one above 0"),
            ("    temperature: 2\n", "", "top_p: it is for sampling; drop it, or add temperature"),
            ("device: cpu\n", "device: cpu\ntemperature: 1\n", "acceptance: it draws nothing; drop it, or let"),
            ("top_p: 0.9", "top_p: 2", "temperature: --top-p 2; give a share above 0"),
            ('[greedy, "top-k:2"]', '"top-k:2"', "the oracle knows greedy decoding's output; drop it"),
            ("- oracle", "- oracle\npeers: transformers\nseed: x", "seed: text ('x') stands where a whole number"),
        ],
    )
    def test_what_makes_no_sense_is_refused_with_its_line(self, write: Write, old: str, new: str, told: str):
        refused(lambda: read_plan(write((old, new))), told, InvalidDataError)

    def test_peers_need_greedy_runs(self, write: Write):
        changes = (('[greedy, "top-k:2"]', '"top-k:2"'), ("  - oracle\n", "peers: transformers\n"))
        body = BODY.replace("  - name: lookup\n    acceptance: greedy\n", "")
        told = "peers: peers are timed decoding greedily; drop them, or let acceptance have greedy"
        refused(lambda: read_plan(write(*changes, body=body)), told)

    def test_a_rescorer_that_a_rule_cannot_judge_is_refused_before_anything_runs(
        self, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(suite_module, "evaluate", lambda *_, **__: pytest.fail("something ran"))
        path = write(("    temperature: 2\n    top_p: 0.9\n    sampling_seed: 3\n", ""))
        refused(lambda: run(path, tmp_path / "out"), "draws draws its drafts, which is for sampled output only")
        assert not (tmp_path / "out").exists()


def live(rescorer: str, speedup: float, **changes: Any) -> Result:
    fields: dict[str, Any] = {
        "quality": {"F1": 0.25}, "autoregressive_quality": {"F1": 0.5}, "cut_at_limit": 0.5, "divergence": [],
        "identical": Identical(n=2, identical=1), "oracle_block_efficiency": None, "peer": False,
    }  # fmt: skip
    latency = made_latency(speedup=speedup, speedup_ci95=None)
    return made_result(rescorer=rescorer, latency=latency, **fields | changes)


class TestTables:
    def test_the_speed_of_each_rule_is_a_table(self):
        results = [live("none", 0.5), live("joint", 1.5), live(f"none{LOSSY}", 2.0), live(f"joint{LOSSY}", 3.0)]
        exact, lossy, every = suite_tables(results)
        assert exact.cells() == [["squad", "50.0", "0.50x", "1.50x*"], ["mean", "-", "0.50x", "1.50x*"]]
        assert [column.heading for column in lossy.columns] == [
            "task", "greedy tok/s", "without drafts", "none", "quality", "joint", "quality"
        ]  # fmt: skip
        scores = ["0.500 F1", "2.00x", "0.250 F1", "3.00x*", "0.250 F1"]
        assert lossy.cells() == [
            ["squad", "50.0", *scores], ["mean", "-", "-", "2.00x", "-", "3.00x*", "-"]
        ]  # fmt: skip
        assert lossy.title.startswith("LOSSY, top-k:2 acceptance") and "not the base's" in lossy.note
        assert "0.250 F1" in every.text() and "50%" in every.text() and "[lossy: ...]" in every.note

    def test_where_nothing_is_lossy_nothing_is_said_of_it(self):
        assert "quality" not in suite_table([live("none", 1.0)]).text()
        assert "quality" not in speed_table([live("none", 1.0)]).text()

    def test_outputs_that_a_rule_makes_differ_are_no_near_ties(self):
        differs = [Divergence(id="a", position=7, margin=2.5)]
        tables = suite_tables([live(f"none{LOSSY}", 1.0, divergence=differs)])
        assert len(tables) == 2 and "margin" not in "".join(table.text() for table in tables)
