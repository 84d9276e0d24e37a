"""Results on disk: a log that survives kills and full disks, a summary that is whole or not there, and the tables."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import files_of_at_most
from made_records import made_latency, made_result, run_config

from lattices.errors import IncompatibleError, InvalidDataError, OutputError
from lm import environment as environment_module
from lm.environment import environment, versions
from lm.records import plain
from rescore.accounting import account
from rescore.calls import Call
from rescore.runs.inputs import Inputs
from rescore.runs.log import ExampleLog, save_results
from rescore.runs.records import (
    Divergence,
    ExampleRecord,
    Identical,
    Outcomes,
    Result,
    ResultsDocument,
)
from rescore.runs.tables import results_tables
from rescore.table import joined

CONFIG = {"options": {"k": 16, "p": 1}, "traces": {"squad": {"base": {"weights_sha256": "abc"}}}}


def record(example: str, rescorer: str = "none", p: int = 1, task: str = "squad") -> ExampleRecord:
    return ExampleRecord(
        task=task, rescorer=rescorer, k=16, p=p, id=example, group=example, h=2, accepted=[1, 2], cut=False,
        drafts=[[3, 4], [5, 6]], calls=[Call(2, 1, True)] * 2, oracle_accepted=[2, 1], output_ids=[3, 5, 6],
        quality={"F1": 0.5}, prompt_tokens=9,
    )  # fmt: skip


def written(*args: Any, **changes: Any) -> dict[str, Any]:
    """A line of `examples.jsonl`."""
    fields: dict[str, Any] = plain(record(*args))
    return fields | changes


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]


class TestExampleLog:
    def test_finished_examples_are_on_disk_at_once_and_there_the_next_time(self, tmp_path: Path):
        with ExampleLog(tmp_path / "run", CONFIG) as log:
            log.add(record("a"))
            assert lines(tmp_path / "run") == [written("a")]
            log.add(record("a", "oracle"))
        with ExampleLog(tmp_path / "run", CONFIG) as log:
            assert log.has(("squad", "none", 1, 16), "a") and log.has(("squad", "oracle", 1, 16), "a")
            assert not log.has(("squad", "none", 1, 16), "b") and not log.has(("xsum", "none", 1, 16), "a")
            log.add(record("b"))
        assert lines(tmp_path / "run") == [written("a"), written("a", "oracle"), written("b")]

    def test_every_p_is_finished_by_itself(self, tmp_path: Path):
        with ExampleLog(tmp_path, CONFIG) as log:
            log.add(record("a", p=16))
        with ExampleLog(tmp_path, CONFIG) as log:
            assert log.has(("squad", "none", 16, 16), "a") and not log.has(("squad", "none", 1, 16), "a")
            log.add(record("a", p=1))
            assert log.records(("squad", "none", 16, 16), ["a"]) == [record("a", p=16)]
        assert lines(tmp_path) == [written("a", "none", 16), written("a", "none", 1)]

    def test_without_a_folder_it_remembers(self):
        with ExampleLog(None, CONFIG) as log:
            log.add(record("a"))
            assert log.records(("squad", "none", 1, 16), ["a"]) == [record("a")]

    def test_records_come_in_the_order_asked_for_not_of_finishing(self):
        with ExampleLog(None, CONFIG) as log:
            for name in "cab":
                log.add(record(name))
            log.add(record("d", task="xsum"))
        assert [r.id for r in log.records(("squad", "none", 1, 16), ["a", "b", "z", "c"])] == ["a", "b", "c"]

    @pytest.mark.parametrize("torn", ['{"task": "squ', '{"task": "squad"}', "\x00\x00"])
    def test_a_torn_last_line_is_cut_off(self, tmp_path: Path, torn: str):
        with ExampleLog(tmp_path, CONFIG) as log:
            log.add(record("a"))
        with (tmp_path / "examples.jsonl").open("a") as stream:
            stream.write(torn)
        with ExampleLog(tmp_path, CONFIG) as log:
            log.add(record("b"))
        assert lines(tmp_path) == [written("a"), written("b")]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{broken", "line 2 is not valid JSON"),
            ("[1]", "line 2 is not a JSON object"),
            ('{"task": "squad"}', r"line 2 is not a finished example: .*field `rescorer`; use another --out$"),
            (
                json.dumps(written("b", accepted=3)),
                r"line 2 is not a finished example: .*`accepted`; use another --out$",
            ),
            (json.dumps(written("b", p=None)), "line 2 is not a finished example: .*`p`"),
            (json.dumps(written("b", quality=0.5)), "line 2 is not a finished example: .*`quality`"),
            (json.dumps(written("b", seconds={})), "line 2 is not a finished example: .*`seconds`"),  # of schema 4
            (json.dumps(written("b", live={})), "line 2 is not a finished example: .*`first_difference`.*`live`"),
        ],
    )
    def test_a_broken_line_is_refused_by_number(self, tmp_path: Path, line: str, message: str):
        with ExampleLog(tmp_path, CONFIG) as log:
            log.add(record("a"))
        with (tmp_path / "examples.jsonl").open("a") as stream:
            stream.write(line + "\n")
        with pytest.raises(InvalidDataError, match=message):
            ExampleLog(tmp_path, CONFIG)

    def test_another_configuration_is_refused_with_the_difference(self, tmp_path: Path):
        with ExampleLog(tmp_path, CONFIG):
            pass
        other = {"options": {"k": 8, "p": 1}, "traces": {"squad": {"base": {"weights_sha256": "def"}}}}
        difference = r"\(options.k: 16 -> 8; traces.squad.base.weights_sha256: abc -> def\); use another --out"
        with pytest.raises(IncompatibleError, match=difference):
            ExampleLog(tmp_path, other)
        assert json.loads((tmp_path / "config.json").read_text()) == CONFIG

    def test_a_folder_of_something_else_is_refused(self, tmp_path: Path):
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(InvalidDataError, match=r"config.json is not valid JSON"):
            ExampleLog(tmp_path, CONFIG)
        (tmp_path / "config.json").write_text("[]")
        with pytest.raises(InvalidDataError, match=r"config.json is not a JSON object; use another --out"):
            ExampleLog(tmp_path, CONFIG)
        (tmp_path / "config.json").unlink()
        (tmp_path / "examples.jsonl").write_text("{}\n")
        with pytest.raises(IncompatibleError, match=r"examples of a run without its config.json; use another --out"):
            ExampleLog(tmp_path, CONFIG)

    def test_a_file_in_the_way_is_told(self, tmp_path: Path):
        (tmp_path / "file").write_text("")
        with pytest.raises(
            OutputError,
            match=r"can't write .*file: it is a file, and a folder is to be made there; choose another --out",
        ):
            ExampleLog(tmp_path / "file", CONFIG)
        with pytest.raises(OutputError, match=r"can't write .*file.*Not a directory"):
            ExampleLog(tmp_path / "file" / "run", CONFIG)

    def test_a_full_disk_is_told_and_keeps_what_was_finished(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
        full = pytest.raises(OutputError, match=r"can't write .*examples.jsonl: .*; what was written before is kept")
        with files_of_at_most(len(json.dumps(written("0"))) * 4), full, ExampleLog(tmp_path, CONFIG) as log:
            for number in range(5):
                log.add(record(str(number)))
        with ExampleLog(tmp_path, CONFIG) as log:
            assert [number for number in range(5) if log.has(("squad", "none", 1, 16), str(number))] == [0, 1, 2]
            log.add(record("3"))
        assert lines(tmp_path) == [written(str(number)) for number in range(4)]
        assert capfd.readouterr().err == ""


def result(**changes: Any) -> Result:
    return made_result(**vars(account([[1, 2, 3], [3, 1]], 3)) | changes)


LATENCY = made_latency()


def document(found: Sequence[Result] = (), *, seed: int = 0, trace: str | None = None) -> ResultsDocument:
    tasks = {"squad", *(r.task for r in found)}
    config = run_config(
        inputs={task: Inputs(task=task, base="tiny", trace=trace) for task in tasks}, seed=seed,
        traces={task: {"k": 16, "max_new_tokens": 64} for task in tasks},
    )  # fmt: skip
    return ResultsDocument(config=config, results=list(found))


class TestDocument:
    def test_it_is_schema_config_and_results(self):
        made = document([result()], seed=7)
        fields = plain(made)
        assert list(fields) == ["schema", "config", "results"]
        assert fields["schema"] == "rescore.results/8" and fields["config"]["seed"] == 7
        assert fields["config"] == plain(made.config)
        (found,) = fields["results"]
        assert {
            "task", "rescorer", "k", "p", "h", "alpha", "block_efficiency", "block_efficiency_ci95",
            "block_efficiency_macro", "oracle_block_efficiency", "gain", "gain_ci95",
            "against_unrescored", "steps", "tokens", "accepted_histogram", "marginal",
            "conditional", "quality", "identical", "divergence", "latency",
        } <= set(found)  # fmt: skip
        assert json.loads(json.dumps(fields))["results"][0]["accepted_histogram"] == [0, 2, 1, 2]

    def test_it_is_written_whole_or_not_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        save_results(document(seed=1), tmp_path)
        with files_of_at_most(10), pytest.raises(OutputError, match=r"can't write .*results.json"):
            save_results(document(seed=2), tmp_path)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OutputError, match=r"can't write .*results.json: No space left on device"):
            save_results(document(seed=3), tmp_path)
        assert [f.name for f in tmp_path.iterdir()] == ["results.json"]
        assert json.loads((tmp_path / "results.json").read_text())["config"]["seed"] == 1

    def test_the_environment_names_versions_and_revision(self, monkeypatch: pytest.MonkeyPatch):
        assert {"rescore", "torch", "transformers", "numpy", "numba", "datasets"} <= set(versions())
        assert environment()["versions"] == versions()
        revision = environment()["git_revision"]
        assert revision is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", revision)
        monkeypatch.setattr(environment_module, "LIBRARIES", ("no-such-library",))
        assert versions()["no-such-library"] == "not installed"

    def test_without_git_there_is_no_revision(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("PATH", "/nowhere")
        assert environment()["git_revision"] is None


def shown(made: ResultsDocument, *, details: bool = True) -> str:
    return joined(results_tables(made, details=details))


class TestTables:
    def test_it_says_what_was_run_and_what_came_of_it(self):
        accepted = [[1, 2, 3], [3, 1], [2, 2], [1, 1, 1], [3, 3]]
        quality = {"exact match": 0.5, "F1": 0.25}
        found = result(**vars(account(accepted, 3)), n=5, quality=quality, cut_at_limit=0.832)
        text = shown(document([found]))
        assert text.startswith("replayed decode of tiny in float32, h = 3, up to 64 new tokens\n")
        low, high = account(accepted, 3).block_efficiency_ci95 or (0, 0)
        assert "\nsquad: 5 examples of 5 groups, oracle 2.500\n" in text
        assert re.search(rf"\nsquad +none +16 +1 +1.917 +{low:.3f} to {high:.3f}\n", text)
        assert re.search(r"\nsquad +none +16 +1 +5 +5 +12 +23 +2.000 +2.500 ", text)
        assert re.search("quality of the output +cut at limit\n", text)
        assert re.search(r"\nsquad +none, p = 1 +0.500 exact match, 0.250 F1 +83%\n", text)
        assert re.search(r"exactly i \(count\) +5 +3 +4\n", text)
        assert re.search(r"at least i \(share\) +1.000 +0.583 +0.333\n", text)
        assert re.search(r"i, given i - 1 +1.000 +0.583 +0.571(\n|$)", text)
        assert "tok/s" not in text

    def test_what_nothing_reached_has_no_share(self):
        found = result(**vars(account([[1, 1]], 3)))
        text = shown(document([found]))
        assert re.search(r"i, given i - 1 +1.000 +0.000 +-(\n|$)", text)
        assert re.search(r"\nsquad +none +16 +1 +1.000 +-\n", text), "one example has no interval"
        assert "quality" not in text, "this task has no metric"

    def test_quality_stands_once_where_all_have_the_same(self):
        same = {"quality": {"F1": 0.5}, "cut_at_limit": 1.0}
        results = [result(**same), result(rescorer="oracle", **same), result(task="xsum", quality={"F1": 0.25})]
        text = shown(document(results))
        assert re.search(r"\nsquad +all +0.500 F1 +100%\nxsum +none, p = 1 +0.250 F1 +-\n", text)
        other = result(rescorer="oracle", quality={"F1": 0.5}, cut_at_limit=0.5)
        text = shown(document([results[0], other]))
        assert re.search(r"\nsquad +none, p = 1 +0.500 F1 +100%\nsquad +oracle, p = 1 +0.500 F1 +50%\n", text)

    def test_gains_are_shown_with_their_interval(self):
        shares = Outcomes(won=0.5, tied=0.25, lost=0.25)
        results = [
            result(),
            result(rescorer="ngram", p=16, alpha=0.5, gain=0.25, gain_ci95=(-0.1, 0.5), against_unrescored=shares),
            result(rescorer="oracle", gain=1.5, gain_ci95=None),
            result(rescorer="context-ngram", against_unrescored=shares),
        ]
        text = shown(document(results), details=False)
        assert re.search(r"\ntask +rescorer +k +p +alpha +block eff. +95 % +gain +95 % +of the gap +won +lost\n", text)
        assert re.search(r"\nsquad +none +16 +1 +- +2.000 +\S+ +- +- +- +- +-\n", text), "it has no gain over itself"
        assert re.search(r"\nsquad +ngram +16 +16 +0.5 .* \+25.0% +-10.0% to \+50.0% +0% +50.0% +25.0%\n", text)
        assert re.search(r"\nsquad +oracle +16 +1 +- .* \+150.0% +- +0% +- +-\n", text)
        assert re.search(r"\nsquad +context-ngram +16 +1 +- .* - +- +0% +50.0% +25.0%\n", text)
        assert re.search(r"\nsquad +ngram .* 50.0% +25.0% +25.0%\n", shown(document(results))), "won, tied, lost"

    def test_the_share_of_the_oracle_s_gap(self):
        plain, other = result(block_efficiency=1.5), result(rescorer="ngram", block_efficiency=1.9, gain=0.27)
        text = shown(document([plain, other]), details=False)
        assert re.search(r"of the gap\n", text) and re.search(r"\nsquad +ngram .* \+27.0% +- +40%\n", text)
        assert "of the gap" not in shown(document([other]), details=False), "nothing to be over"

    def test_columns_and_words_for_what_there_is(self):
        """Without gains, weights, wins or times there is neither a column nor a word of them."""
        text = shown(document([result(against_unrescored=Outcomes(won=0.0, tied=1.0, lost=0.0))]), details=False)
        assert re.search(r"\ntask +rescorer +k +p +block eff. +95 %\n", text)
        for word in ("gain over", "of the gap", "won", "speed-up", "alpha", "paired"):
            assert word not in text
        assert text.endswith("--details shows more.") and "--details" not in shown(document([result()]))

    def test_one_table_unless_details_are_asked_for(self):
        made = document([result(quality={"F1": 0.5}), result(rescorer="oracle")])
        assert [len(results_tables(made, details=details)) for details in (False, True)] == [1, 4]

    def test_what_the_results_of_a_task_differ_in_is_a_column(self):
        """The caption says it of all; of an interrupted run, or of several k, each line says its own."""
        whole = shown(document([result(), result(task="xsum", n=9, oracle_block_efficiency=3.0)]), details=False)
        assert "\nsquad: 2 examples of 2 groups, oracle 2.500\nxsum: 9 examples of 2 groups, oracle 3.000\n\n" in whole
        cut = shown(document([result(n=5), result(rescorer="ngram", n=3, groups=1)]), details=False)
        assert re.search(r"\nsquad: oracle 2.500\n\ntask +rescorer +k +p +examples +groups +block eff.", cut)
        assert re.search(r"\nsquad +ngram +16 +1 +3 +1 +2.000", cut)
        other = shown(document([result(), result(rescorer="ngram", oracle_block_efficiency=2.25)]), details=False)
        assert re.search(r"\nsquad +ngram +16 +1 +2.250 +2.000", other) and "groups, oracle" not in other
        by_k = [result(rescorer="oracle", k=k, oracle_block_efficiency=k / 2) for k in (2, 4)]
        text = shown(document(by_k), details=False)
        assert text.count("squad: ") == 1 and "\nsquad: 2 examples of 2 groups\n" in text
        assert re.search(r"\ntask +rescorer +k +p +block eff. +95 %\n", text)

    def test_times_are_shown_in_live_mode(self):
        live = result(identical=Identical(n=2, identical=1), latency=LATENCY)
        oracle = result(rescorer="oracle", identical=live.identical, latency=LATENCY)
        text = shown(document([live, oracle]))
        assert text.startswith("live decode (p drafts as tree) of tiny") and "predicted" not in text
        assert re.search(r"\nsquad +none +16 +1 +2.000 .* 1.75x\nsquad +oracle ", text), "in the first table too"
        assert re.search(r"squad +none +16 +1 +1/2 +87.6 +50.0 +1.75x +1.50x to 2.00x\n", text)
        assert re.search(r"squad +none +16 +1 +20.0 +21.0 +1.5 +0.25 +0.20 +0.40 +3.1% +123\n", text)

    def test_how_drafts_were_verified_is_what_was_done(self):
        """Not what was asked for; and of one draft there is nothing to tell."""
        batch = result(
            p=16, identical=Identical(n=2, identical=2), latency=dataclasses.replace(LATENCY, verify="batch")
        )
        oracle = result(rescorer="oracle", identical=Identical(n=2, identical=2), latency=LATENCY)
        text = shown(document([oracle, batch]))
        assert text.startswith("live decode (p drafts as batch) of tiny")

    def test_outputs_that_differ_are_shown(self):
        live = {"identical": Identical(n=2, identical=2), "latency": LATENCY}
        same = result(divergence=[], **live)
        assert "differ" not in shown(document([same]))
        places = [
            Divergence(id="a", position=30, margin=0.125),
            Divergence(id="b", position=7, margin=0.0625),
        ]
        other = result(rescorer="oracle", divergence=places, **live)
        text = shown(document([same, other]))
        assert re.search(r"differ +earliest at +margin there +largest margin\n", text)
        assert re.search(r"\nsquad +oracle +16 +1 +2/2 +7 +0.0625 +0.1250\n", text)

    def test_a_given_trace_is_named(self):
        text = shown(document([result()], trace="medusa"))
        assert text.startswith("replayed decode of the trace medusa, h = 3\nsquad: ")

    def test_what_tasks_differ_in_stands_with_each(self):
        both = document([result(), result(task="gsm8k")])
        both.config.inputs["gsm8k"] = dataclasses.replace(both.config.inputs["squad"], base=None, trace="medusa")
        made = "tiny in float32, h = 3, up to 64 new tokens"
        assert shown(both).startswith(f"replayed decode\nsquad: {made}, 2 examples")
        assert "\ngsm8k: the trace medusa, h = 3, 2 examples" in shown(both)

    def test_nothing_finished_is_said(self):
        assert shown(document()) == shown(document(), details=False) == "no finished examples"

    def test_it_fits_into_120_columns(self):
        wide = account([[9] * 900, [9] * 9000], 9)
        fields = {
            "task": "cnn_dailymail", "rescorer": "context-ngram", "p": 16, "quality": {"ROUGE-L": 1.0},
            "alpha": 0.125, "gain": 1.25, "gain_ci95": (1.0, 1.5),
            "against_unrescored": Outcomes(won=1.0, tied=0.0, lost=0.0),
        }  # fmt: skip
        live = {"identical": Identical(n=1000, identical=1000), "latency": LATENCY}
        text = shown(document([result(**{**vars(wide), **fields, **live})]))
        assert max(map(len, text.splitlines())) <= 120
