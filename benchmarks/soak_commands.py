"""The commands of soak.py and fuzz.py, with what they need: a tiny model of random weights, heads, data and text."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from rescore.runs.evaluated import load_run
from rescore.tracing import read_trace

COMMAND = [sys.executable, "-m", "rescore"]
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Job:
    """A command: its arguments before `--out`, whether it has that, and what of its result must be the reference's."""

    name: str
    arguments: Sequence[object]
    result: Callable[[Path, str], Any]  # of its folder and its stdout
    has_out: bool = True


def jobs(inputs: Path) -> list[Job]:
    """The commands, which end in some seconds each."""
    base = ["--base", inputs / "base", "--device", "cpu"]
    decoding = [*base, "--heads", inputs / "heads", "--dtype", "float64", "--max-new-tokens", 16]
    context, ngram = (f"{name}:{inputs / 'ngram'}" for name in ("context-ngram", "ngram"))
    task = ["--task", "squad", "--data", inputs / "data" / "squad.jsonl"]
    learning = ["--steps", 6, "--evaluate-every", 2, "--positions", 256, "--precision", "float32"]
    return [
        Job("eval", ["eval", *decoding, *task, "--rescorer", f"none,lookup,{context},{ngram}", "--p", "1,4"], results),
        Job("live", ["eval", *decoding, *task, "--mode", "live", "--rescorer", "none,lookup"], outputs),
        Job("trace", ["trace", *decoding, *task, "--k", 8], traced),
        Job("suite", ["suite", inputs / "suite.yaml", "--data", inputs / "data"], suite_results),
        Job("tune", ["tune", *decoding, *task, "--rescorer", context, "--held-out", 6, "--json"], said, False),
        Job("generate", ["generate", *decoding, "--prompts", inputs / "prompts.jsonl", "--json"], generated, False),
        Job(
            "generate-corpus",
            ["generate-corpus", *base, "--prompts", inputs / "prompts.jsonl", "--max-new-tokens", 24],
            files("corpus.jsonl", "hidden.f16"),
        ),
        Job("train-heads", ["train-heads", *base, "--corpus", inputs / "corpus", *learning, "--h", 4], files(WEIGHTS)),
        Job(
            "train-rescorer",
            ["train-rescorer", "neural-32m", *base, "--corpus", inputs / "corpus", *learning, "--tuned-layers", 1],
            files(WEIGHTS),
        ),
        Job(
            "build-ngram",
            ["build-ngram", inputs / "text.txt", "--tokenizer", "words", "--order", 4, "--discount-fallback"],
            arpa,
        ),
    ]


def results(out: Path, _: str) -> Any:
    """An evaluation's results and its finished examples, in the order of their names."""
    run = load_run(out)
    document = json.loads((out / "results.json").read_text())
    return [document["results"], sorted(repr(example) for example in run.examples)]


def outputs(out: Path, _: str) -> Any:
    """Of a live evaluation all but the seconds."""
    return sorted((e.rescorer, e.id, tuple(e.accepted), tuple(e.output_ids)) for e in load_run(out).examples)


def suite_results(out: Path, _: str) -> Any:
    manifest = json.loads((out / "suite.json").read_text())
    return [manifest["results"], (out / "table.csv").read_text()]


def traced(out: Path, _: str) -> Any:
    return [
        (e.id, e.output_ids.tolist(), e.lattice.token_ids.tolist(), e.lattice.logps.tolist())
        for e in read_trace(out).examples
    ]


def generated(_: Path, out: str) -> Any:
    """What was said, without the seconds."""
    return [(row["id"], row["text"]) for row in map(json.loads, out.splitlines())]


def said(_: Path, out: str) -> Any:
    return json.loads(out)


def files(*names: str) -> Callable[[Path, str], Any]:
    """The sha256 of some files of a folder."""
    return lambda out, _: [hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names]


def arpa(out: Path, _: str) -> Any:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("model.*")}


def save_base(folder: Path) -> None:
    """A random two-layer Llama over bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.6, tie_word_embeddings=True,
        eos_token_id=fast.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    disable_progress_bar()
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def prepare(inputs: Path) -> None:
    """Data, prompts, a corpus and heads for the tiny model."""
    (inputs / "data").mkdir()
    rows: list[dict[str, Any]] = [
        {
            "id": f"q{i}",
            "context": f"In {1900 + i} the bridge was built" + " of stone" * (i % 3) + ".",
            "question": f"When was bridge {i} built?",
            "answers": {"text": [str(1900 + i)], "answer_start": [3]},
        }
        for i in range(24)
    ]
    lines(inputs / "data" / "squad.jsonl", rows)
    lines(inputs / "prompts.jsonl", [{"id": i, "prompt": f"Bridge {i} was built in {1900 + i}"} for i in range(24)])
    draws = random.Random(0)
    words = [f"w{i}" for i in range(200)]
    text = "\n".join(" ".join(draws.choices(words, range(200, 0, -1), k=12)) for _ in range(4000))
    (inputs / "text.txt").write_text(text + "\n")
    (inputs / "suite.yaml").write_text(
        f"base: {inputs / 'base'}\nheads: {inputs / 'heads'}\ndtype: float64\ndevice: cpu\nmax_new_tokens: 16\n"
        f"limit: 12\ntasks: [squad]\nh: [2, 4]\np: [1, 4]\n"
        f"rescorers: [none, context-ngram:{inputs / 'ngram'}, lookup]\n"
    )
    base = ["--base", str(inputs / "base"), "--device", "cpu"]
    environment = {**os.environ, "RESCORE_CACHE": str(inputs / "cache"), "OMP_NUM_THREADS": "1"}
    for command in (
        ["generate-corpus", *base, "--prompts", str(inputs / "prompts.jsonl"), "--out", str(inputs / "corpus")],
        ["train-heads", *base, "--corpus", str(inputs / "corpus"), "--out", str(inputs / "heads"), "--h", "4",
         "--steps", "20", "--precision", "float32"],
        ["build-ngram", str(inputs / "text.txt"), "--tokenizer", str(inputs / "base"), "--order", "3",
         "--discount-fallback", "--out", str(inputs / "ngram")],
    ):  # fmt: skip
        subprocess.run([*COMMAND, *command], check=True, env=environment, stdout=subprocess.DEVNULL)


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
