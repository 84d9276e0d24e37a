"""The command `rescore` end to end on the tiny model: documents on stdout, one line per mistake, exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, files_of_at_most, make_heads, once, save_tiny_base, squad_records, write_lines

import cli
import cli_options
from lm.base.model import BaseLM
from rescore import tracing
from rescore.runs import evaluation
from rescore.tasks import data as data_module
from rescore.tasks import task_names

SETTINGS = {"MALLOC_TRIM_THRESHOLD_": "4294967296", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "true"}


@dataclass(frozen=True)
class Run:
    """What a run of the command left."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.out)

    def refused(self, message: str, code: int = 2) -> None:
        """One line on stderr that says `message`, nothing on stdout, no traceback."""
        assert (self.code, self.out) == (code, ""), self
        assert re.fullmatch(r"rescore: [^\n]+\n", self.err), self.err
        assert re.search(message, self.err), self.err


Command = Callable[..., Run]


@pytest.fixture
def rescore(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process, with this process's stdout and stderr down to the file descriptors."""
    for name, value in SETTINGS.items():  # with the first of them set, the command does not start itself anew
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["rescore", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capfd.readouterr()
        return Run(int(exit_.value.code or 0), out, err)

    return run


@pytest.fixture
def model(tiny_folder: Path, tiny_heads_folder: Path, squad_file: Path) -> list[object]:
    """Options for the tiny model (h = 4) and six examples."""
    return [
        "--base", tiny_folder, "--heads", tiny_heads_folder, "--data", squad_file, "--dtype", "float64",
        "--device", "cpu", "--max-new-tokens", 12,
    ]  # fmt: skip


class TestEval:
    @pytest.mark.parametrize("p", [1, 4])
    def test_the_document(self, rescore: Command, model: list[object], p: int):
        asked = ["eval", "--task", "squad", "--k", 16, "--rescorer", "none", "--rescorer", "oracle", "--p", p, "--json"]
        replayed = rescore(*asked, *model)
        live = [rescore(*asked, *model, "--mode", "live", "--verify", verify) for verify in ("tree", "batch")]
        for run in [replayed, *live]:
            assert run.code == 0 and run.err == "" and run.out.count("\n") == 1
            assert list(run.document) == ["schema", "config", "results"]
            assert [(r["task"], r["rescorer"]) for r in run.document["results"]] == [
                ("squad", "none"),
                ("squad", "oracle"),
            ]
            for r in run.document["results"]:
                drafts = 1 if r["rescorer"] == "oracle" else p  # the oracle verifies one, whatever p is
                assert (r["k"], r["p"], r["alpha"], r["n"]) == (16, drafts, None, 6)
                assert len(r["accepted_histogram"]) == 5 and len(r["marginal"]) == len(r["conditional"]) == 4
                assert sum(r["accepted_histogram"]) == r["steps"]
                assert sum(i * n for i, n in enumerate(r["accepted_histogram"])) == r["tokens"]
                assert sum(r["marginal"]) == pytest.approx(r["block_efficiency"])
        for run in live:
            for r, other in zip(run.document["results"], replayed.document["results"], strict=True):
                assert r["identical"] == {"n": 6, "identical": 6} and r["latency"]["verify_ms"] > 0
                assert {**r, "identical": None, "divergence": None, "latency": None} == other

    def test_the_table(self, rescore: Command, model: list[object]):
        run = rescore("eval", *model, "--rescorer", "none", "--rescorer", "oracle", "--mode", "live", "--limit", 2)
        assert (run.code, run.err) == (0, "")
        assert re.search(r"\nsquad: 2 examples of 2 groups, oracle 1\.\d{3}\n\n", run.out)
        assert re.search(r"\nsquad +none +16 +1 +1\.\d{3} .* \d\.\d\dx\n", run.out)
        assert len(re.findall(r"^task ", run.out, re.M)) == 1 and "--details shows more" in run.out
        assert max(map(len, run.out.splitlines())) <= 120

    def test_the_details(self, rescore: Command, model: list[object]):
        run = rescore(
            "eval", *model, "--rescorer", "none", "--rescorer", "oracle", "--mode", "live", "--limit", 2, "--details"
        )
        assert (run.code, run.err) == (0, "")
        assert re.search(r"\nsquad +none +16 +1 +2 +2 +\d+ +24 +1\.\d{3} ", run.out)
        assert re.search(r"\nsquad +oracle +16 +1 +2/2 +\d", run.out)
        assert re.search(r"\nsquad +all +\S+ exact match, \S+ F1 +\d+%\n", run.out)
        assert "steps that accepted" in run.out and "--details" not in run.out
        assert max(map(len, run.out.splitlines())) <= 120

    def test_several_p_in_one_table(self, rescore: Command, model: list[object]):
        asked = ["eval", *model, "--rescorer", "none", "--rescorer", "oracle", "--p", "1,4"]
        run = rescore(*asked)
        assert (run.code, run.err) == (0, "")
        label, interval = r"squad +{} +16 +{} +", r"[+-]\d+\.\d% to [+-]\d+\.\d%"
        for rescorer, p in (("none", 1), ("none", 4), ("oracle", 1)):
            assert re.search(rf"\n{label.format(rescorer, p)}\d\.\d{{3}} +\d\.\d{{3}} to \d\.\d{{3}} ", run.out)
        assert "\nsquad: 6 examples of 6 groups, oracle " in run.out
        assert re.search(r"\ntask +rescorer +k +p +block eff. +95 % +gain +95 % +of the gap +won +lost\n", run.out)
        for rescorer, p in (("none", 4), ("oracle", 1)):
            line = rf"\n{label.format(rescorer, p)}\d.* [+-]\d+\.\d% +{interval} +-?\d+% +\d+\.\d% "
            assert re.search(line, run.out)
        document = rescore(*asked, "--json").document
        assert document["config"]["options"]["p"] == [1, 4]
        assert [(r["rescorer"], r["p"]) for r in document["results"]] == [("none", 1), ("none", 4), ("oracle", 1)]
        assert [r["gain"] is None for r in document["results"]] == [True, False, False]

    def test_k_h_limit_and_tasks(self, rescore: Command, model: list[object], tmp_path: Path):
        data = write_lines(tmp_path / "both.jsonl", [r | {"answer": "42"} for r in squad_records(3)])
        run = rescore(
            *once("eval", *model, "--data", data), "--task", "gsm8k", "--task", "squad", "--k", 40, "--h", 3,
            "--limit", 2, "--json",
        )  # fmt: skip
        assert [(r["task"], r["k"], r["n"]) for r in run.document["results"]] == [("gsm8k", 40, 2), ("squad", 40, 2)]
        assert all(len(r["marginal"]) == 3 for r in run.document["results"])
        assert [inputs["h"] for inputs in run.document["config"]["inputs"].values()] == [3, 3]

    def test_out_holds_the_same_document(self, rescore: Command, model: list[object], tmp_path: Path):
        run = rescore("eval", *model, "--out", tmp_path / "run", "--json")
        assert json.loads((tmp_path / "run" / "results.json").read_text()) == run.document
        again = rescore("eval", *model, "--out", tmp_path / "run", "--json")
        assert again.document == run.document
        rescore("eval", *model, "--out", tmp_path / "run", "--p", 2).refused(
            r"another configuration \(runs.squad: .*p = 1.* -> .*p = 2.*; use another --out"
        )

    def test_a_trace_gives_the_same_numbers(self, rescore: Command, model: list[object], tmp_path: Path):
        made = rescore("trace", *model, "--task", "squad", "--out", tmp_path / "trace")
        assert made == Run(0, f"{tmp_path / 'trace'}: 6 examples, 72 positions, h = 4, K = 32\n", "")
        for options in (["--k", 8], ["--k", 32, "--p", 3], ["--h", 2], ["--limit", 3]):
            direct = rescore("eval", *model, "--rescorer", "none", "--rescorer", "oracle", *options, "--json")
            given = rescore(
                "eval", "--trace", tmp_path / "trace", "--rescorer", "none", "--rescorer", "oracle", *options, "--json"
            )
            assert given.document["results"] == direct.document["results"]
        longer = write_lines(tmp_path / "more.jsonl", squad_records(8))
        rescore(*once("trace", *model, "--data", longer), "--out", tmp_path / "trace").refused(
            r"other settings \(settings.data_sha256: .* -> .*\); use another --out"
        )

    def test_a_longer_limit_extends_a_trace(self, rescore: Command, model: list[object], tmp_path: Path):
        for limit in (2, 5):
            made = rescore("trace", *model, "--k", 8, "--limit", limit, "--out", tmp_path / "trace")
            assert made.out == f"{tmp_path / 'trace'}: {limit} examples, {12 * limit} positions, h = 4, K = 8\n"
        rescore("eval", "--trace", tmp_path / "trace", "--k", 16).refused("k = 16, but the trace holds the top 8")

    def test_the_sample_stands_in_where_the_hub_can_not_be_reached(
        self, rescore: Command, model: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(data_module, "_hub_trouble", lambda hub: "the hub can't be reached")
        where = model.index("--data")
        options = [*model[:where], *model[where + 2 :], "--limit", 2, "--max-prompt-tokens", 100]
        run = rescore("eval", *options, "--json")
        assert re.fullmatch(
            r"rescore: the hub can't be reached and rajpurkar/squad is not in the local cache; using 2 examples of the "
            r"sample embedded for task squad, whose numbers do not compare .*\n",
            run.err,
        )
        assert run.document["config"]["data"]["squad"]["kind"] == "sample"
        assert run.err.removeprefix("rescore: ").strip() in run.document["config"]["notices"]
        assert rescore("oracle", *options).err == run.err
        assert rescore("trace", *options, "--out", tmp_path).err == run.err

    def test_notices_do_not_wait_for_the_results(self, rescore: Command, model: list[object], monkeypatch):
        monkeypatch.setattr("lm.base.probe.Probe._follows_tree", lambda *_: False)
        monkeypatch.setattr(evaluation, "decode", lambda *_, **__: 1 / 0)
        run = rescore("eval", *model, "--mode", "live", "--p", 4)
        first, second = run.err.splitlines()
        assert first.endswith("takes no tree mask; its 4 drafts a step are verified as a batch")
        assert second.startswith("rescore: ZeroDivisionError") and run.out == ""


class TestOracle:
    def test_by_k(self, rescore: Command, model: list[object]):
        run = rescore("oracle", *model, "--k", "1,2,4", "--json")
        assert (run.code, run.err) == (0, "")
        found = run.document["results"]
        assert [(r["rescorer"], r["k"]) for r in found] == [("oracle", 1), ("oracle", 2), ("oracle", 4)]
        for r in found:
            alone = rescore("eval", *model, "--rescorer", "oracle", "--k", r["k"], "--json")
            assert alone.document["results"] == [r]
        table = rescore("oracle", *model, "--k", "1,2,4").out
        assert re.search(r"\nsquad: 6 examples of 6 groups\n\ntask +rescorer +k +p +block eff. +95 % ", table)
        assert re.search(r"\nsquad +oracle +2 +1 +\d\.\d{3} +\d\.\d{3} to ", table)
        details = rescore("oracle", *model, "--k", "1,2,4", "--details").out
        assert re.search(r"\nsquad +oracle +2 +1 +6 +6 ", details) and "steps that accepted" in details

    @pytest.mark.parametrize("k", ["1;2", ",", "1,two", "1,,2"])
    def test_a_list_that_is_none_is_refused(self, rescore: Command, k: str):
        rescore("oracle", "--k", k).refused(f"--k {re.escape(k)}: give whole numbers with commas between them")


class TestTune:
    def test_eval_uses_the_weight_of_each_p(self, rescore: Command, model: list[object], tmp_path: Path):
        (tmp_path / "text.txt").write_text("In 1900 the bridge was built of stone.\n" * 30)
        ngram = ["--tokenizer", model[1], "--order", 2, "--discount-fallback", "--out", tmp_path / "ngram"]
        assert rescore("build-ngram", tmp_path / "text.txt", *ngram).code == 0
        typed = f"ngram:{tmp_path / 'ngram'}"
        before = rescore("eval", *model, "--rescorer", typed, "--p", "1,4", "--json")
        assert before.err.startswith(f"rescore: {typed} on squad, p = 1 and 4: alpha 0.5 by default; rescore tune")
        missing = rescore("eval", *model, "--rescorer", typed, "--p", "1,4", "--alpha", "tuned")
        missing.refused("no weight of .* is tuned on this machine for squad")
        command = shlex.split(re.search(r"run: rescore (.*) \(or", missing.err)[1])
        assert command[0] == "tune" and command[command.index("--rescorer") + 1] == typed
        told = rescore(*command, "--alphas", "0.1,3", "--device", "cpu")
        assert told.code == 0 and "rescore eval --alpha tuned" in told.err
        tuned = rescore("tune", *model, "--rescorer", typed, "--p", "1,4", "--alphas", "0.1,3", "--json").document
        assert [(t["p"], t["alphas"]) for t in tuned] == [(1, [0.0, 0.1, 3.0]), (4, [0.0, 0.1, 3.0])]
        assert rescore("eval", *model, "--rescorer", typed, "--p", "1,4", "--json").document == before.document
        after = rescore("eval", *model, "--rescorer", typed, "--p", "1,4", "--alpha", "tuned", "--json")
        assert "default" not in after.err and after.err.endswith("alpha was tuned on 3 of these 6 examples\n")
        assert [(r["p"], r["alpha"]) for r in after.document["results"]] == [(t["p"], t["alpha"]) for t in tuned]
        alphas = after.document["config"]["alphas"]["squad"][typed]
        assert {p: chosen["from"] for p, chosen in alphas.items()} == {"1": "tuned", "4": "tuned"}


class TestOtherCommands:
    def test_from_prompts_to_heads_to_numbers(self, rescore: Command, model: list[object], tmp_path: Path):
        base, prompts = model[:2], write_lines(tmp_path / "prompts.jsonl", [{"prompt": "x" * n} for n in range(1, 13)])
        made = rescore(
            "generate-corpus", *base, "--prompts", prompts, "--out", tmp_path / "own", "--max-new-tokens", 12,
            "--device", "cpu",
        )  # fmt: skip
        assert made.code == 0 and re.search(
            r"own/corpus.jsonl: 12 examples \(12 new, 0 duplicates\), 144 output tokens\n"
            r"\d+ output tokens a second: \d+% of the float32 FLOPs and \d+% of the memory bandwidth that this machine "
            r"reaches at best\n",
            made.out,
        )
        trained = rescore(
            "train-heads", *base, "--corpus", tmp_path / "own", "--out", tmp_path / "heads", "--h", 3, "--steps", 2,
            "--positions", 16, "--heads-per-step", 2, "--inner-size", 8, "--vocabulary", 0, "--device", "cpu",
            "--evaluate-every", 1,
        )  # fmt: skip
        assert trained.code == 0 and re.match(r"head +2 +3\n", trained.out), trained
        accuracy = r"accepted \d\.\d{3} \(best of top 16: \d\.\d{3}\)\n"
        assert re.fullmatch(f"rescore: step 1 of 2, {accuracy}rescore: step 2 of 2, {accuracy}", trained.err)
        run = rescore(*once("eval", *model, "--heads", tmp_path / "heads"), "--json")
        assert len(run.document["results"][0]["marginal"]) == 3

    def test_verify_curve(self, rescore: Command, model: list[object]):
        command = ["bench", "verify-curve", *model[:2], "--cached", 16, "--repeats", 1, "--device", "cpu"]
        run = rescore(*command, "--json")
        assert run.code == 0 and run.out.count("\n") == 1
        curve = run.document
        assert curve["tokens"] == [1, 2, 4, 9, 16, 32, 64, 144] and curve["cached"] == 16
        assert all(value > 0 for value in curve["milliseconds"] + curve["gb_per_second"])
        out = rescore(*command).out
        assert re.match(r"tokens +ms +against 1 +GB/s +tok/s\n", out), "the table, and then one JSON line"
        assert json.loads(out.splitlines()[-1]).keys() == curve.keys()
        rescore(*once(*command, "--repeats", 0)).refused("at least 1")
        rescore(*once(*command, "--cached", 500)).refused("500 cached tokens do not fit into the context of 512")

    def test_block_length(self, rescore: Command, model: list[object], tiny_base: BaseLM, tmp_path: Path):
        assert rescore("trace", *model, "--out", tmp_path / "trace", "--limit", 3).code == 0
        quick = ["--cached", 16, "--repeats", 1, "--device", "cpu", "--limit", 2, "--k", 4]
        command = ["bench", "block-length", "--trace", tmp_path / "trace", *model[:4], *quick]
        run = rescore(*command, "--json", "--rescorer", "context-ngram:none", "--alpha", 1)
        found = run.document
        assert (found["examples"], found["alpha"], found["rescorer"]) == (2, 1, "context-ngram:none")
        assert [length["h"] for length in found["lengths"]] == [2, 3, 4] and found["best_h"] in (2, 3, 4)
        for length in found["lengths"]:
            step = length["verify_ms"] + length["heads_ms"] + length["rescoring_ms"]
            foreseen = length["block_efficiency"] * found["greedy_ms"] / step
            assert length["speedup"] == pytest.approx(foreseen)
            assert length["heads_ms"] > 0 and length["rescoring_ms"] > 0
        replayed = rescore("eval", "--trace", tmp_path / "trace", "--h", 3, "--limit", 2, "--k", 4, "--json")
        efficiency = replayed.document["results"][0]["block_efficiency"]
        plain = rescore(*command)
        assert re.match(r"h +block eff. +95 % +verify ms", plain.out) and plain.out.count("*") == 2
        assert json.loads(plain.out.splitlines()[-1])["lengths"][1]["block_efficiency"] == pytest.approx(efficiency)
        make_heads(tiny_base, seed=3).save(tmp_path / "other")
        rescore(*once(*command, "--heads", tmp_path / "other")).refused("recorded with other heads than those in")
        rescore(*command, "--alpha", 1).refused("none has no weight")
        rescore(*once(*command, "--limit", 0)).refused("--limit 0")
        rescore(*once(*command, "--k", 99)).refused("the trace holds the top")
        rescore(*once(*command, "--repeats", 0)).refused("at least 1")


@pytest.mark.parametrize(("rank", "lines"), [("0", ["rescore: work: 1 of 2", "rescore: work: 2 of 2"]), ("1", [])])
def test_progress_without_a_terminal_is_a_line_a_minute(monkeypatch, capsys, rank, lines):
    monkeypatch.setenv("RANK", rank)
    with cli_options.progress_bar() as progress:
        progress("work", 1, 2)  # within the first minute
        monkeypatch.setattr(cli_options, "LINE_EVERY", 0.0)
        progress("work", 1, 2)
        progress("work", 2, 2)
    assert capsys.readouterr().err.splitlines() == lines


def refusals(tiny: Path, heads: Path, data: Path, folder: Path) -> Iterator[tuple[str, list[object], str]]:
    """(what is wrong, arguments, what the one line says)."""
    model = ["--base", tiny, "--heads", heads, "--dtype", "float64", "--max-new-tokens", 8]
    given = [*model, "--data", data]
    yield "no such model", ["eval", "--base", "smollm2-135n"], r"unknown model .*did you mean smollm2-135m or"
    yield "no such model folder", ["eval", "--base", folder / "none"], "none"
    yield "no such task", ["eval", *given, "--task", "squat"], r"unknown task 'squat'; did you mean squad or qa\?"
    yield (
        "no such rescorer",
        ["eval", *given, "--rescorer", "orcale"],
        r"unknown rescorer 'orcale'; did you mean oracle",
    )
    yield "text for none", ["eval", *given, "--rescorer", "none:foo"], "the rescorer none takes no text"
    yield "no such mode", ["eval", *given, "--mode", "life"], r"unknown mode 'life'; did you mean live\?"
    yield "no such verify", ["eval", *given, "--verify", "three"], r"unknown verify mode 'three'; did you mean tree\?"
    yield "no such dtype", ["eval", *given, "--dtype", "float31"], r"unknown dtype 'float31'; did you mean float32"
    yield "no such device", ["eval", *given, "--device", "foo"], r"unknown device 'foo'; known: auto, cpu, cuda\n"
    yield "no data file", ["eval", *model, "--data", folder / "none.jsonl"], "no such file: .*none.jsonl"
    yield "a folder as data", ["eval", *model, "--data", folder], "not a file: "
    yield "no such option", ["eval", "--retcorer", "none"], r"No such option.*--retcorer.*--rescorer"
    yield "no number", ["eval", "--k", "many"], "'--k'.*give a whole number"
    yield "no such command", ["evaluate"], "No such command 'evaluate'"
    yield "no output folder", ["trace"], "Missing option '--out'"
    yield "no command of bench", ["bench"], "Missing command"
    yield "a word too many", ["eval", "squad"], r"unexpected extra argument.*squad"
    yield "p below 1", ["eval", *given, "--p", 0], r"p = 0; at least one draft must be verified \(--p 1\)"
    yield "one p below 1", ["eval", *given, "--p", "1,0"], "p = 0; at least one draft"
    yield "no list of p", ["eval", *given, "--p", "1;16"], "--p 1;16: give whole numbers with commas"
    yield "k below 1", ["eval", *given, "--k", 0], "k = 0"
    yield "k above the vocabulary", ["eval", *given, "--k", 258], "k = 258 is outside 1 to the vocabulary's 257"
    yield "k of a trace above it", ["trace", *given, "--k", 258, "--out", folder / "t"], "k = 258 is outside"
    yield "h above the heads'", ["eval", *given, "--h", 9], "h = 9, but these heads propose blocks of 4"
    yield "limit below 1", ["eval", *given, "--limit", 0], "--limit 0; at least one example"
    yield "no heads there", ["eval", *given, "--heads", folder], "no block heads in "
    yield "no trace there", ["eval", "--trace", folder / "none"], "no trace in .*none: can't read trace.json"
    yield "live from a trace", ["eval", "--trace", folder, "--mode", "live"], "drop --trace or --mode live"
    yield "out is a file", ["eval", *given, "--out", data], "can't write .*squad.jsonl: it is a file, and a folder"
    yield "out below a file", ["trace", *given, "--out", data / "x"], "can't write .*squad.jsonl/x: Not a directory"
    yield "trace to a file", ["trace", *given, "--out", data], "can't write .*squad.jsonl: it is a file, and a folder"
    lines = {
        "empty": ("", "empty.jsonl is empty; task squad needs the fields context, question, answers"),
        "blank": ("\n \n", "is empty"),
        "no JSON": (json.dumps(squad_records(1)[0]) + "\n{oops}\n", "line 2 is not valid JSON"),
        "no object": ("[1, 2]\n", "row 1 is not a JSON object"),
        "no field": ('\n{"question": "q", "answers": ["a"]}\n', "line 2: no field 'context'"),
        "no text": (
            '{"question": 3, "context": "c", "answers": ["a"]}\n',
            "line 1: the field 'question' holds a number",
        ),
        "long": (
            json.dumps(squad_records(1)[0] | {"context": "x" * 600}),
            r"a prompt of \d+ tokens and 8 new ones do n",
        ),
    }
    for what, (text, message) in lines.items():
        path = folder / f"{what}.jsonl"
        path.write_text(text)
        yield f"data: {what}", ["eval", *model, "--data", path], message


def test_every_mistake_is_one_line(rescore, tiny_folder, tiny_heads_folder, squad_file, tmp_path):
    for what, arguments, message in refusals(tiny_folder, tiny_heads_folder, squad_file, tmp_path):
        try:
            rescore(*once(*arguments)).refused(message)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from error
    assert not (tmp_path / "t").exists()


class TestMistakes:
    def test_heads_of_another_base(self, rescore: Command, model: list[object], tiny_base, tmp_path: Path):
        wide = save_tiny_base(tmp_path / "wide", hidden_size=48)
        rescore(*once("eval", *model, "--base", wide)).refused(
            "hidden_size is 32, the base's is 48; give other --heads"
        )
        folder = tmp_path / "heads"
        make_heads(tiny_base).save(folder, dtype=torch.float32)
        config = json.loads((folder / "config.json").read_text())
        for field, value in (("vocab_size", 300), ("tokenizer_sha256", "0" * 64)):
            (folder / "config.json").write_text(json.dumps(config | {field: value}))
            rescore(*once("eval", *model, "--heads", folder)).refused(
                f"{field} is {value}, the base's is .*; give other --heads"
            )

    def test_a_model_that_is_broken(self, rescore: Command, model: list[object], tmp_path: Path):
        folder = save_tiny_base(tmp_path / "broken")
        (folder / "model.safetensors").write_bytes(b"not weights")
        rescore(*once("eval", *model, "--base", folder)).refused("can't load the model .*broken: ")
        (folder / "config.json").unlink()
        rescore(*once("eval", *model, "--base", folder)).refused(
            "has no config.json; a model folder is what save_pretrained"
        )
        byte_tokenizer().save_pretrained(tmp_path / "no-weights")
        rescore(*once("eval", *model, "--base", tmp_path / "no-weights")).refused("no-weights has no config.json")

    def test_a_trace_that_is_broken(self, rescore: Command, model: list[object], tmp_path: Path):
        rescore("trace", *model, "--out", tmp_path)
        header = json.loads((tmp_path / "trace.json").read_text())
        for changed, message in (
            ({"schema": "rescore.trace/0"}, "schema 'rescore.trace/0'; this version reads 'rescore.trace/1'"),
            ({"parts": ["part-00007"]}, "can't read the trace part .*part-00007"),
            ({"k": 31}, r"'q0' has \d+ values in 'token_ids'; .* need"),
            ({"vocab_size": 40}, "outside the vocabulary"),
        ):
            (tmp_path / "trace.json").write_text(json.dumps(header | changed))
            rescore("eval", "--trace", tmp_path).refused(message)

    def test_a_full_disk(self, rescore: Command, model: list[object], tmp_path: Path):
        command = ["eval", *model, "--rescorer", "none", "--rescorer", "oracle", "--out"]
        whole = rescore(*command, tmp_path / "whole", "--json")
        lines = (tmp_path / "whole" / "examples.jsonl").read_text().splitlines(keepends=True)
        room = sum(map(len, lines[:9]))
        assert room > (tmp_path / "whole" / "config.json").stat().st_size
        with files_of_at_most(room + 5):
            rescore(*command, tmp_path / "run").refused("can't write .*examples.jsonl: .*; what was written before is")
        assert (tmp_path / "run" / "examples.jsonl").read_text() == "".join(lines[:9]) + lines[9][:5]
        assert not (tmp_path / "run" / "results.json").exists()
        assert rescore(*command, tmp_path / "run", "--json").document["results"] == whole.document["results"]
        assert (tmp_path / "run" / "examples.jsonl").read_text() == "".join(lines)

    def test_debug_shows_where(self, rescore: Command, model: list[object]):
        for arguments in (["--debug", "eval", "--task", "squat"], ["eval", "--task", "squat", "--debug"]):
            run = rescore(*arguments)
            assert (run.code, run.out) == (2, "")
            assert run.err.startswith("Traceback") and "UnknownNameError" in run.err
            assert run.err.endswith("did you mean squad or qa? (a task of your own is a YAML file, like ./mine.yaml)\n")

    def test_an_unforeseen_error_is_one_line_too(self, rescore: Command, model: list[object], monkeypatch):
        def fail(*_: object, **__: object) -> None:
            raise ZeroDivisionError("one\nby zero")

        monkeypatch.setattr(evaluation, "replay", fail)
        rescore("eval", *model).refused(r"ZeroDivisionError: one by zero \(--debug shows where\)", code=1)
        run = rescore("eval", *model, "--debug")
        assert run.code == 1 and run.err.startswith("Traceback")


class TestInterruption:
    def test_what_is_finished_is_shown_and_kept(
        self, rescore: Command, model: list[object], tmp_path: Path, monkeypatch
    ):
        monkeypatch.setattr(evaluation, "REPLAY_EXAMPLES", 2)
        true_replay, calls = evaluation.replay_steps, []

        def interrupted_replay(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:  # once for each pair of examples
                signal.raise_signal(signal.SIGINT)
            return true_replay(*arguments, **options)

        monkeypatch.setattr(evaluation, "replay_steps", interrupted_replay)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            run = rescore("eval", *model, "--out", tmp_path / "run")
            calls.clear()
            alone = rescore("eval", *model)
        finally:
            signal.signal(signal.SIGINT, before)
        assert run.code == alone.code == 130
        assert run.err == (
            f"rescore: interrupted; the finished examples are shown and kept in {tmp_path / 'run'}: "
            "the same command goes on\n"
        )
        assert alone.err == "rescore: interrupted; the finished examples are shown (--out DIR would keep them)\n"
        assert "\nsquad: 4 examples of 4 groups, " in run.out and run.out == alone.out
        whole = rescore("eval", *model, "--out", tmp_path / "run", "--json")
        assert whole.code == 0
        assert whole.document["results"] == rescore("eval", *model, "--json").document["results"]

    def test_a_recording_goes_on(self, rescore: Command, model: list[object], tmp_path: Path, monkeypatch):
        monkeypatch.setattr(tracing, "PART_EXAMPLES", 4)
        row, calls = tracing._row, []

        def interrupted_row(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return row(*arguments)

        monkeypatch.setattr(tracing, "_row", interrupted_row)
        run = rescore("trace", *model, "--out", tmp_path)
        assert run == Run(130, "", "rescore: interrupted; what is finished is kept, the same command goes on\n")
        assert rescore("trace", *model, "--out", tmp_path).out.endswith("6 examples, 72 positions, h = 4, K = 32\n")
        assert len(calls) == 8, "the last two of the six are recorded by the second run"

    def test_a_real_ctrl_c_of_the_real_command(self, rescore: Command, model: list[object], tmp_path: Path):
        data = write_lines(tmp_path / "squad.jsonl", squad_records(30))
        options = [*once(*model, "--data", data), "--rescorer", "none", "--k", 4]
        live = ["eval", *options, "--mode", "live", "--out", tmp_path / "run"]
        process = subprocess.Popen(
            [sys.executable, "-m", "rescore", *map(str, live)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # even where the tests run without it
        )
        log = tmp_path / "run" / "examples.jsonl"
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 2):
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert err.count("\n") == 1 and "interrupted; the finished examples are shown and kept in" in err
        finished = len(log.read_text().splitlines())
        assert 2 <= finished < 30 and f"\nsquad: {finished} examples of {finished} groups, " in out
        whole = rescore(*live, "--json").document["results"]
        replayed = rescore("eval", *options, "--json").document["results"]
        assert [{**r, "identical": None, "divergence": None, "latency": None} for r in whole] == replayed
        assert whole[0]["identical"] == {"n": 30, "identical": 30}


COMMANDS = [
    [], ["eval"], ["oracle"], ["trace"], ["generate-corpus"], ["train-heads"], ["bench"], ["bench", "verify-curve"],
]  # fmt: skip


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
    def test_every_command_has_help(self, rescore: Command, command: list[str]):
        run = rescore(*command, "--help")
        assert (run.code, run.err) == (0, "") and run.out.startswith(f"Usage: {' '.join(['rescore', *command])} ")
        assert re.search(r"--help +Show this message and exit.", run.out)

    def test_no_command_shows_help(self, rescore: Command):
        assert rescore() == rescore("--help")

    def test_the_help_of_tasks_names_them_all(self, rescore: Command):
        for command in ("eval", "oracle", "trace"):
            text = " ".join(rescore(command, "--help").out.split())
            assert all(name in text for name in task_names()), command

    def test_version(self, rescore: Command):
        run = rescore("--version")
        assert (run.code, run.err) == (0, "")
        names = [line.split()[0] for line in run.out.splitlines()]
        assert names == ["rescore", "torch", "transformers", "numpy", "numba", "datasets"]
        assert all(re.fullmatch(r"\S+ \d+\.\S+", line) for line in run.out.splitlines())

    def test_every_module_of_the_command_is_packaged_and_checked(self):
        root = Path(cli.__file__).parent
        settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]
        modules = {path.stem for path in root.glob("*.py")}
        assert {f"{name}.py" for name in modules} <= set(settings["hatch"]["build"]["targets"]["wheel"]["only-include"])
        assert {f"{name}.py" for name in modules} <= set(settings["mypy"]["files"])

    def test_help_imports_no_heavy_library(self):
        program = f"""
import contextlib, io, sys
import cli
for command in {COMMANDS!r}:
    sys.argv = ["rescore", *command, "--help"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        cli.main()
sys.argv = ["rescore", "--version"]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    cli.main()
print(sorted({{"torch", "transformers", "datasets", "numba", "numpy", "pyarrow"}} & set(sys.modules)))
"""
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert found.stdout == "[]\n"

    def test_the_command_starts_itself_anew_with_its_settings(self):
        environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        found = subprocess.run(
            [sys.executable, "-m", "rescore", "eval", "--k", "x"], capture_output=True, text=True, env=environment
        )
        assert found.returncode == 2 and re.fullmatch(r"rescore: Invalid value for '--k': .*\n", found.stderr)
