"""Decoding with other rules than the greedy one, from the command and from Python; its law: `test_sampling_law`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluating import Options, evaluated

import rescore as api
from lm.base.model import BaseLM
from lm.heads.block_heads import load_heads
from rescore.acceptance import load_rule
from rescore.acceptance.sampling import Sampling
from rescore.decoding import decode
from rescore.drafters.drafting import HEADS_ALONE
from rescore.generation.live import Generator
from rescore.rescorers import load_rescorer
from rescore.runs.run import Run
from tests.conftest import Command, refused

PROMPT = list(b"the bridge was built in the bridge was")


def test_a_seed_and_a_prompt_decide_the_output(tiny_base: BaseLM, tiny_heads_folder: Path):
    heads = load_heads(tiny_base, str(tiny_heads_folder))
    asked: dict[str, Any] = {"rescorer": Run("none", k=4), "temperature": 2.0, "max_new_tokens": 24, "chat": False}
    one, again, other = (api.generate(tiny_base, heads, "a bridge", seed=seed, **asked) for seed in (1, 1, 2))
    assert one.token_ids == again.token_ids != other.token_ids
    assert one.acceptance == "temperature 2" and not one.lossy and "(drawn: temperature 2)" in one.line()
    greedy = api.generate(tiny_base, heads, "a bridge", rescorer=Run("none", k=4), max_new_tokens=24, chat=False)
    assert greedy.acceptance == "greedy" and greedy.token_ids != one.token_ids


def test_a_lossy_rule_keeps_longer_drafts_and_says_so(tiny_base: BaseLM, tiny_heads_folder: Path):
    heads = load_heads(tiny_base, str(tiny_heads_folder))
    how: dict[str, Any] = {"rescorer": load_rescorer("none"), "k": 4, "max_new_tokens": 24}
    exact = decode(tiny_base, heads, PROMPT, drafters=HEADS_ALONE, **how)
    lossy = decode(tiny_base, heads, PROMPT, drafters=HEADS_ALONE, **how, rule=load_rule("min-block:4"))
    assert set(lossy.accepted[:-1]) == {4} and len(lossy.accepted) < len(exact.accepted)
    assert lossy.output_ids != exact.output_ids
    same = decode(tiny_base, heads, PROMPT, drafters=HEADS_ALONE, **how, rule=load_rule("top-k:1"))
    assert (same.output_ids, same.accepted) == (exact.output_ids, exact.accepted)
    out = api.generate(tiny_base, heads, "a bridge", rescorer=Run("none", k=4), acceptance="min-block:4", chat=False)
    assert out.lossy and "(lossy acceptance: min-block:4; the text is not the base's own, and" in out.line()


class TestCommand:
    @pytest.fixture
    def model(self, tiny_folder: Path, tiny_heads_folder: Path, squad_file: Path) -> list[object]:
        return [
            "--base", tiny_folder, "--heads", tiny_heads_folder, "--data", squad_file, "--dtype", "float64", "--k", 4,
            "--limit", 2, "--max-new-tokens", 12, "--device", "cpu",
        ]  # fmt: skip

    def test_sampled(self, rescore: Command, model: list[object], tmp_path: Path):
        asked = ["eval", *model, "--mode", "live", "--rescorer", "none,draws", "--temperature", 3, "--top-p", 0.9]
        runs, outputs = [], []
        for place, seed in enumerate((0, 0, 1)):
            out = tmp_path / str(place)
            runs.append(rescore(*asked, "--json", "--sampling-seed", seed, "--out", out))
            lines = (out / "examples.jsonl").read_text().splitlines()
            outputs.append([json.loads(line)["output_ids"] for line in lines])
        assert outputs[0] == outputs[1] != outputs[2]
        assert all(r["identical"] is None and r["oracle_block_efficiency"] is None for r in runs[0].document["results"])
        assert runs[0].document["config"]["sampled"] is True
        labels = [r["rescorer"] for r in runs[0].document["results"]]
        assert labels == [f"{name} [sampled: temperature 3, top-p 0.9]" for name in ("none", "draws")]
        text = rescore(*asked, "--details").out
        assert "sampled (temperature 3, top-p 0.9, seed 0)" in text and "drawing token by token" in text

    def test_lossy_numbers_are_called_so_wherever_they_stand(
        self, rescore: Command, model: list[object], tmp_path: Path
    ):
        out = tmp_path / "run"
        run = rescore(
            "eval", *model, "--mode", "live", "--rescorer", "none", "--acceptance", "top-k:2", "--out", out, "--details"
        )
        assert run.code == 0 and run.out.startswith("LOSSY live decode"), run.err
        assert "none [lossy: top-k:2]" in run.out
        assert run.out.count("without drafts") == 2, "wherever there is a speed-up: at a glance, and among the details"
        report = rescore("report", out, "--out", tmp_path / "r.html")
        assert report.code == 0 and "[lossy: top-k:2]" in (tmp_path / "r.html").read_text()
        rescore("eval", *model, "--mode", "live", "--rescorer", "none", "--out", out).refused("acceptance")
        rescore("export", out, "--to", "acceptance-histogram").refused("whose outputs are not the base's")

    @pytest.mark.parametrize(
        ("asked", "told"),
        [
            (["--temperature", 1], "leaves a trace at its first token"),
            (["--acceptance", "typical"], "goes by the base's whole distribution"),
            (["--temperature", -1, "--mode", "live"], "sampling needs one above 0"),
            (["--temperature", 1, "--acceptance", "typical", "--mode", "live"], "draws nothing; drop it"),
            (["--top-p", 0.5], "--top-p is for sampling"),
            (["--temperature", 1, "--top-p", 0, "--mode", "live"], "--top-p 0"),
            (["--temperature", 1, "--mode", "live", "--rescorer", "oracle"], "the oracle knows greedy"),
            (["--mode", "live", "--rescorer", "draws"], "draws its drafts, which is for sampled output only"),
            (["--acceptance", "top", "--mode", "live"], "unknown acceptance rule"),
            (["--temperature", 1, "--mode", "live", "--peer", "transformers"], "peers are timed decoding greedily"),
        ],
    )
    def test_what_makes_no_sense_is_refused(
        self, rescore: Command, model: list[object], asked: list[object], told: str
    ):
        rescore("eval", *model, *asked).refused(told)


def test_a_rule_is_named_with_all_its_digits():
    """Results by another temperature are other results."""
    names = [Sampling(temperature, top_p=0.87654321).name for temperature in (1.0, 0.12345678)]
    assert names == ["temperature 1, top-p 0.87654321", "temperature 0.12345678, top-p 0.87654321"]


class TestWeights:
    """A weight for all runs need not be used by each of them, whatever their labels say besides."""

    @pytest.fixture
    def asked(self, options: Options) -> Options:
        return options | {"k": 4, "limit": 1, "max_new_tokens": 4, "mode": "live", "alpha": 0.5}

    def test_by_a_lossy_rule(self, asked: Options):
        rule = load_rule("top-k:2")
        run = evaluated(asked | {"rescorers": ("none", "context-ngram:none")}, rule=rule)
        assert [(r.rescorer, r.alpha) for r in run] == [
            ("none [lossy: top-k:2]", None), ("context-ngram:none [lossy: top-k:2]", 0.5)
        ]  # fmt: skip
        assert run.results[1].gain == run.results[1].block_efficiency / run.results[0].block_efficiency - 1
        message = "no weight is used by --rescorer none; drop --alpha"
        refused(lambda: evaluated(asked | {"rescorers": ("none",)}, rule=rule), message)

    @pytest.mark.parametrize("drafted", [("lookup",), ("none:drafters=heads+lookup",), ("none:drafters=lookup",)])
    def test_of_other_drafters(self, asked: Options, drafted: tuple[str, ...]):
        run = evaluated(asked | {"rescorers": (*drafted, "context-ngram:none"), "mode": "replay"})
        assert [r.alpha for r in run] == [None, 0.5]
        told = f"no weight is used by --rescorer {drafted[0]}; drop --alpha"
        refused(lambda: evaluated(asked | {"rescorers": drafted, "mode": "replay"}), told)

    def test_of_its_own_it_must_be_used(self, asked: Options):
        own = asked | {"rescorers": ("none:alpha=2", "context-ngram:none")}
        refused(lambda: evaluated(own, rule=load_rule("top-k:2")), "no weight is used by --rescorer none:alpha=2; drop")


def test_draws_need_one_drafter_with_slots(tiny_base: BaseLM, tiny_heads_folder: Path):
    heads = load_heads(tiny_base, str(tiny_heads_folder))
    run = Run("draws", k=4, drafters=("heads", "lookup"))
    refused(lambda: Generator.of(tiny_base, heads, run, rule=Sampling()), "draws from the slots of one drafter")
