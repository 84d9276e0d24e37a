"""The commands that train rescorers, end to end on the tiny base: what they print, leave and refuse."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Command, once, write_lines

from lm.locks import writing_to

CPU = ["--device", "cpu"]
QUICK_RESCORER = [
    *CPU,
    "--steps",
    2,
    "--positions",
    300,
    "--micro-batch",
    200,
    "--vocabulary",
    0,
    "--evaluate-every",
    1,
]
QUICK_BIGRAM = [*CPU, "--steps", 2, "--rank", 4, "--k", 4, "--rows", 40, "--batch", 8]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of a prompt and an answer."""
    pairs = [{"prompt": "p" * (1 + i % 4), "response": "the cat sat on the mat. " * (1 + i % 2)} for i in range(20)]
    return write_lines(tmp_path_factory.mktemp("corpus") / "pairs.jsonl", pairs)


class TestTrainHeads:
    @pytest.mark.parametrize("architecture", ["sequential", "medusa"])
    def test_an_architecture_from_training_to_drafts(
        self,
        rescore: Command,
        tiny_folder: Path,
        squad_file: Path,
        corpus: Path,
        tmp_path: Path,
        architecture: str,
    ):
        run = rescore(
            "train-heads", "--base", tiny_folder, "--corpus", corpus, "--out", tmp_path / "heads", *CPU, "--h", 4,
            "--architecture", architecture, "--token-size", 4, "--steps", 2, "--positions", 60, "--heads-per-step", 0,
            "--head-weights", "1,0.5,0.25",
        )  # fmt: skip
        assert run.code == 0, run
        assert json.loads((tmp_path / "heads" / "config.json").read_text())["architecture"] == architecture
        drafts = rescore(
            "eval", "--base", tiny_folder, "--heads", tmp_path / "heads", "--data", squad_file, *CPU, "--limit", 2,
            "--max-new-tokens", 8, "--k", 4, "--mode", "live", "--json",
        )  # fmt: skip
        assert drafts.code == 0, drafts
        assert drafts.document["results"][0]["identical"] == {"n": 2, "identical": 2}

    def test_a_tuned_base_is_evaluated_with_its_own_heads(
        self,
        rescore: Command,
        tiny_folder: Path,
        squad_file: Path,
        corpus: Path,
        tmp_path: Path,
    ):
        out = tmp_path / "out"
        apart = write_lines(tmp_path / "apart.jsonl", [{"prompt": "Which one?", "response": "This one, it said."}])
        run = rescore(
            "train-heads", "--base", tiny_folder, "--corpus", corpus, "--out", out, *CPU, "--h", 3,
            "--inner-size", 6, "--tune", "lora", "--lora-rank", 2, "--steps", 2, "--positions", 60,
            "--held-out-corpus", apart,
        )  # fmt: skip
        assert run.code == 0, run
        assert json.loads((out / "training.json").read_text())["measured_on"]["source"] == "apart.jsonl"
        drafts = rescore(
            "eval", "--base", out, "--data", squad_file, *CPU, "--limit", 2, "--max-new-tokens", 8, "--k", 4, "--json"
        )
        assert drafts.code == 0, drafts
        assert len(drafts.document["results"][0]["marginal"]) == 3


class TestTrainRescorer:
    def test_from_the_base_to_drafts(
        self,
        rescore: Command,
        tiny_folder: Path,
        tiny_heads_folder: Path,
        squad_file: Path,
        corpus: Path,
        tmp_path: Path,
    ):
        out = tmp_path / "out"
        command = ["train-rescorer", "neural-32m", "--tokenizer", tiny_folder, "--corpus", corpus, "--out", out]
        run = rescore(*command, *QUICK_RESCORER)
        assert run.code == 0, run
        told = r"held-out perplexity \d+\.\d{3} \(the base's own:? \d+\.\d{3}\)"
        assert re.fullmatch(rf"{out}: {told}, \d+\.\d% of \d+ tokens are its first choice\n", run.out)
        assert re.fullmatch(rf"rescore: step 1 of 2, {told}\nrescore: step 2 of 2, {told}\n", run.err)
        config = json.loads((out / "config.json").read_text())
        assert (config["kind"], config["size"], config["layers"]) == ("delta", "neural-32m", [0])
        again = rescore(*command, *QUICK_RESCORER)
        assert (again.code, again.out, again.err) == (0, run.out, "")  # it was finished
        rescore(*command, *QUICK_RESCORER, "--soft", 0.1).refused(
            r"holds a training with other settings \(options.soft: 0.5 -> 0.1\); use another --out"
        )
        drafts = rescore(
            "eval", "--base", tiny_folder, "--heads", tiny_heads_folder, "--data", squad_file, *CPU, "--limit", 2,
            "--max-new-tokens", 8, "--k", 4, "--rescorer", f"neural:{out}", "--json",
        )  # fmt: skip
        assert drafts.code == 0, drafts
        assert drafts.document["results"][0]["rescorer"] == f"neural:{out}"

    def test_two_corpora_one_of_them_the_bases_own_output(
        self,
        rescore: Command,
        tiny_folder: Path,
        corpus: Path,
        tmp_path: Path,
    ):
        prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "x" * n} for n in range(1, 6)])
        base = ["--base", tiny_folder, *CPU]
        own = ["--prompts", prompts, "--out", tmp_path / "own", "--max-new-tokens", 8]
        assert rescore("generate-corpus", *base, *own).code == 0
        both = ["--corpus", corpus, "--corpus", tmp_path / "own", "--out", tmp_path / "out", "--max-tokens", 200]
        run = rescore("train-rescorer", "neural-32m", "--base", tiny_folder, *both, *QUICK_RESCORER)
        assert run.code == 0, run
        data = json.loads((tmp_path / "out" / "training.json").read_text())["data"]
        assert [d["source"] for d in data] == ["pairs.jsonl", "own"] and data[0]["tokens"] <= 200
        assert data[1]["tokens"] == 40


class TestTrainBigram:
    def test_to_drafts(
        self,
        rescore: Command,
        tiny_folder: Path,
        tiny_heads_folder: Path,
        squad_file: Path,
        corpus: Path,
        tmp_path: Path,
    ):
        out = tmp_path / "out"
        model = ["--base", tiny_folder, "--heads", tiny_heads_folder]
        command = ["train-bigram", *model, "--corpus", corpus, "--out", out, *QUICK_BIGRAM]
        run = rescore(*command)
        assert (run.code, run.err) == (0, ""), run
        number = r"\d+\.\d{4}"
        assert re.fullmatch(rf"{out}: {number} nats a held-out lattice, {number} without it \(3 lattices\)\n", run.out)
        assert rescore(*command).out == run.out
        rescore(*once(*command, "--rank", 5)).refused(r"other settings \(options.rank: 4 -> 5\); use another --out")
        drafts = rescore(
            "eval", *model, "--data", squad_file, *CPU, "--limit", 2, "--max-new-tokens", 8, "--k", 4,
            "--rescorer", f"learned-bigram:{out}", "--json",
        )  # fmt: skip
        assert drafts.code == 0, drafts


def refusals(tiny: Path, heads: Path, corpus: Path, folder: Path) -> Iterator[tuple[str, list[object], str]]:
    empty, bad = folder / "empty.txt", folder / "bad.jsonl"
    empty.write_text("")
    bad.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    one = folder / "one.jsonl"
    one.write_text('{"prompt": "a", "response": "b"}\n')
    base, out = ["--base", tiny, *CPU], ["--out", folder / "out"]
    for name, command, quick in (
        ("rescorer", ["train-rescorer", "neural-32m", *base], ["--steps", 1]),
        ("bigram", ["train-bigram", *base, "--heads", heads], ["--steps", 1]),
    ):
        yield f"{name}: no corpus given", [*command, *out], "Missing option.*--corpus"
        yield f"{name}: no place given", [*command, "--corpus", corpus], "Missing option.*--out"
        yield f"{name}: a missing corpus", [*command, *out, "--corpus", folder / "none"], "no corpus at .*none; give"
        yield f"{name}: an empty corpus", [*command, *out, "--corpus", empty], "the corpus .*empty.txt is empty"
        yield f"{name}: a bad line", [*command, *out, "--corpus", bad], "bad.jsonl line 2 has no text in .* 'response'"
        yield f"{name}: a folder of no corpus", [*command, *out, "--corpus", tiny], "not a folder made by generate-co"
        given = [*command, *out, "--corpus", corpus, *quick]
        yield f"{name}: no such base", [*given, "--base", "smollm-135m"], "unknown model 'smollm-135m'; did you mean"
        yield f"{name}: no such device", [*given, "--device", "gpu"], "unknown device 'gpu'"
        yield f"{name}: steps below 1", [*given, "--steps", 0], "steps = 0; it must be at least 1"
        yield f"{name}: a rate of 0", [*given, "--learning-rate", 0], "learning_rate = 0.0; it must be above 0"
        yield f"{name}: a file in the way", [*given, "--out", one / "out"], "can't write .*one.jsonl"
    rescorer = ["train-rescorer", "neural-32m", *base, *out, "--corpus", corpus]
    yield "no size", ["train-rescorer", *base, *out, "--corpus", corpus], "Missing argument"
    unknown = ["train-rescorer", "neural-60m", *rescorer[2:]]
    yield "an unknown size", unknown, "unknown rescorer size 'neural-60m'; did you mean neural-61m"
    yield (
        "a base too small",
        ["train-rescorer", "neural-61m", *rescorer[2:]],
        "has 2 layers, and layer 8 of it is asked for",
    )
    yield "an unknown start", [*rescorer, "--init", "none"], "unknown --init 'none'; known: base, scratch"
    yield "an unknown precision", [*rescorer, "--precision", "fp8"], "unknown --precision 'fp8'"
    yield "soft above 1", [*rescorer, "--soft", 2], "soft = 2.0; it is a share"
    yield "no patience", [*rescorer, "--patience", 0], "patience = 0"
    yield "one segment", [*rescorer[:-1], one], "fewer than two segments"
    bigram = ["train-bigram", *base, *out, "--corpus", corpus]
    yield "no heads", bigram, "heads"
    yield "heads of nothing", [*bigram, "--heads", folder / "none"], "none"
    yield "rank below 1", [*bigram, "--heads", heads, "--rank", 0], "rank = 0; it must be at least 1"
    yield "k below 2", [*bigram, "--heads", heads, "--k", 1], "k = 1; it must be at least 2"
    yield "k above the vocabulary", [*bigram, "--heads", heads, "--k", 300], "k = 300"
    yield "one row", [*bigram, "--heads", heads, "--rows", 1], "rows = 1; it must be at least 2"


def test_refusals(
    rescore: Command,
    tiny_folder: Path,
    tiny_heads_folder: Path,
    corpus: Path,
    tmp_path: Path,
):
    """One line that says what is wrong and exit code 2, and no result."""
    for what, arguments, message in refusals(tiny_folder, tiny_heads_folder, corpus, tmp_path):
        run = rescore(*once(*arguments))
        try:
            run.refused(message)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from error
        assert not (tmp_path / "out" / "model.safetensors").exists(), what


@pytest.mark.parametrize(
    "command",
    [["train-heads", "--h", 3, "--steps", 2], ["train-rescorer", "neural-32m"], ["train-bigram"]],
    ids=lambda command: command[0],
)
def test_a_second_training_in_one_folder_is_refused(
    rescore: Command,
    tiny_folder: Path,
    tiny_heads_folder: Path,
    corpus: Path,
    tmp_path: Path,
    command: list[object],
):
    """Before it writes the first state; the other training is a thread here, whose locks are its own."""
    heads = ["--heads", tiny_heads_folder] if command[0] == "train-bigram" else []
    begun, end = threading.Event(), threading.Event()

    def train() -> None:
        with writing_to(tmp_path / "out"):
            begun.set()
            end.wait(60)

    other = threading.Thread(target=train)
    other.start()
    try:
        assert begun.wait(60)
        run = rescore(*command, "--base", tiny_folder, *heads, "--corpus", corpus, "--out", tmp_path / "out", *CPU)
        run.refused("another rescore process is writing to .*out; wait for it, or use another --out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".rescore.lock"]
    finally:
        end.set()
        other.join()
