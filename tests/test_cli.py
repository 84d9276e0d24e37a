"""The command `rescore` end to end on the tiny model: documents on stdout, one line per mistake, exit codes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import (
    Command,
    Run,
    make_heads,
    once,
    squad_records,
    write_lines,
)

from lm.base.model import BaseLM
from rescore.runs import evaluation
from rescore.tasks import data as data_module


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
                assert {
                    **r,
                    "identical": None,
                    "divergence": None,
                    "latency": None,
                    "autoregressive_quality": None,
                } == other

    def test_the_table(self, rescore: Command, model: list[object]):
        run = rescore("eval", *model, "--rescorer", "none", "--rescorer", "oracle", "--mode", "live", "--limit", 2)
        assert (run.code, run.err) == (0, "")
        assert re.search(r"\nsquad: 2 examples of 2 groups, oracle 1\.\d{3}\n\n", run.out)
        assert re.search(r"\nsquad +none +16 +1 +1\.\d{3} .* \d\.\d\dx\n", run.out)
        assert len(re.findall(r"^task ", run.out, re.M)) == 1 and "--details shows more" in run.out
        # The first line holds the model's path.
        assert max(map(len, run.out.splitlines()[1:])) <= 120

    def test_the_details(self, rescore: Command, model: list[object]):
        run = rescore(
            "eval", *model, "--rescorer", "none", "--rescorer", "oracle", "--mode", "live", "--limit", 2, "--details"
        )
        assert (run.code, run.err) == (0, "")
        assert re.search(r"\nsquad +none +16 +1 +2 +2 +\d+ +24 +1\.\d{3} ", run.out)
        assert re.search(r"\nsquad +oracle +16 +1 +2/2 +\d", run.out)
        assert re.search(r"\nsquad +all +\S+ exact match, \S+ F1 +\d+%\n", run.out)
        assert "steps that accepted" in run.out and "--details" not in run.out
        # The first line holds the model's path.
        assert max(map(len, run.out.splitlines()[1:])) <= 120

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
        assert [(run["rescorer"], run["p"]) for run in document["config"]["runs"]["squad"]] == [
            ("none", 1),
            ("none", 4),
            ("oracle", 1),
        ]
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
        live = rescore("eval", "--trace", tmp_path / "trace", "--mode", "live")
        live.refused("a given trace can be replayed, not decoded live; drop --trace or --mode live")
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
        runs = after.document["config"]["runs"]["squad"]
        assert [(run["p"], run["alpha"]["from"]) for run in runs] == [(1, "tuned"), (4, "tuned")]


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
        assert curve["tokens"] == [1, 2, 4, 5, 9, 16, 32, 64, 144] and curve["cached"] == 16
        assert all(value > 0 for value in curve["milliseconds"] + curve["gb_per_second"])
        out = rescore(*command).out
        assert re.match(r"tokens +ms +against 1 +GB/s +tok/s\n", out) and "{" not in out, "the table alone"
        rescore(*once(*command, "--repeats", 0)).refused("at least 1")
        rescore(*once(*command, "--cached", 500)).refused(
            "500 cached tokens do not fit into the context of 512 with a call of 144; lower --cached"
        )

    def test_costs(self, rescore: Command, model: list[object], tmp_path: Path):
        """Measured, kept, and what speed-ups are predicted by."""
        table, own = tmp_path / "costs.json", [*model[:4], *model[6:10]]
        command = ["bench", "costs", *own, "--cached", "8,16", "--repeats", 1, "--k", 4, "--out", table]
        run = rescore(*command, "--rescorer", "none,lookup,context-ngram:none", "--p", "1,2")
        assert run.code == 0, run
        assert re.match(r"tokens +8 cached +16 cached +against 1\n", run.out) and "heads (h = 4) " in run.out
        assert re.search(r"\nrescorer +k +p +ms\n.*\nnone +4 +1 +\d\.\d\d\nnone +4 +2 +", run.out)
        found = rescore(*command, "--h", 2, "--json").document
        assert (found["schema"], found["contexts"], found["nodes"][:3]) == ("rescore.costs/3", [8, 16], [1, 2, 3])
        assert found["heads"]["h"] == 2 and found["heads"]["ms"] > 0 and found["machine"]["threads"] == 1
        measured = {(c["rescorer"], c["p"]) for c in found["choices"]}
        assert measured == {("none", 1), ("lookup", 1)}, "what is not shipped for a base is passed over"
        ask = ["eval", *model, "--k", 4, "--limit", 2, "--json", "--rescorer", "none,lookup,oracle", "--costs"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["costs.json"], "the rest is in the cache"
        predicted = [r["predicted_speedup"] for r in rescore(*ask, "here").document["results"]]
        assert all(predicted[:2]) and predicted[2] is None
        rescore(*ask, table).refused("measured with h = 2 heads, and squad is decoded with others, h = 4")
        by_file = rescore(*ask, table, "--h", 2).document
        assert by_file["config"]["costs"]["squad"] == found and by_file["results"][0]["predicted_speedup"]
        rescore(*ask, tmp_path / "none.json").refused("no costs in .*none.json; measure them: rescore bench costs")
        of_room = ["bench", "costs", *own, "--repeats", 1, "--k", 4, "--rescorer", "none", "--json"]
        assert rescore(*of_room).document["contexts"] == [64, 256], "640 are more than its 512"
        rescore(*command, "--rescorer", "joint").refused("was made for another tokenizer than the base LM's")
        rescore(*once(*command, "--repeats", 0)).refused("--repeats 0; it must be at least 1")
        rescore(*once(*command, "--cached", 500)).refused(
            "500 cached tokens do not fit into the context of 512 with a call of 144; lower --cached"
        )

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
        assert "{" not in plain.out, "the table alone"
        unrescored = rescore(*command, "--json").document
        assert unrescored["lengths"][1]["block_efficiency"] == pytest.approx(efficiency)
        make_heads(tiny_base, seed=3).save(tmp_path / "other")
        rescore(*once(*command, "--heads", tmp_path / "other")).refused("recorded with other heads than those in")
        rescore(*command, "--alpha", 1).refused("none has no weight")
        rescore(*once(*command, "--limit", 0)).refused("--limit 0")
        rescore(*once(*command, "--k", 99)).refused("the trace holds the top")
        rescore(*once(*command, "--repeats", 0)).refused("at least 1")
