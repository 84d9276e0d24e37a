"""The experiments of Stern et al. (2018) on translation, at a small scale: trains, decodes, prints the tables.

    python docs/recipes/stern_translation.py DATA OUT            # all of it; what is done is not done again
    python docs/recipes/stern_translation.py DATA OUT --tables   # only what the results in OUT say

DATA has multi30k_train.jsonl, multi30k_dev.jsonl and multi30k_test.jsonl, whose lines are
`{"source": ..., "reference": ...}`.
Every command is printed before it runs. The times in the last table are worth something on an idle machine only.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import sacrebleu
from stern import (
    BLOCKS,
    evaluate,
    heading,
    is_done,
    named,
    of_paper,
    outputs_of,
    rescore,
    results_of,
    row,
    run,
    write,
)
from train_translation import read, translate
from transformers import MarianMTModel, PreTrainedTokenizerFast

from rescore.tasks import load_task
from rescore.tasks.data import load_examples

SHARED = (8, "both")  # the model on which acceptance rules are tried
RULES = ("greedy", "top-k:2", "top-k:3", "top-k:5", "min-block:2", "min-block:3")
SETTINGS = {  # base, what is learned, whether the base learns as well
    "frozen": ("base", "gold", False),
    "fine-tuned": ("base", "gold", True),
    "distilled": ("base", "greedy", False),
    "both": ("base", "greedy", True),
    "beam": ("distilled", "beam", False),
    "beam, fine-tuned": ("distilled", "beam", True),
}
BEGUN_WITH = {"fine-tuned": "frozen", "both": "distilled", "beam, fine-tuned": "beam"}  # the heads of that
HEAD_STEPS, POSITIONS = 400, 4096
# Where the base learns as well: smaller steps and more of them, in whose loss the base's own token weighs twice as much
# as all heads together. One head a step, each as heavy, drew a base at k = 8 from 50 % to 42 % right; chosen on the
# held-out part.
TUNED_STEPS, TUNED_POSITIONS, TUNED_RATE, HEADS_SHARE = 800, 1024, 2e-4, 0.5
WIDTH = 256  # of the heads' layer
TIMED = 200  # examples
TRAINER = Path(__file__).with_name("train_translation.py")


def prepare(data: Path, out: Path) -> None:
    """The base, and its greedy translations of the training part."""
    train, dev = data / "multi30k_train.jsonl", data / "multi30k_dev.jsonl"
    if not (out / "base.done").exists():
        run(TRAINER, train, dev, out / "base", "--epochs", 28)
        (out / "base.done").touch()
    for name, path in (("gold", train), ("dev", dev)):
        write(out / f"{name}.jsonl", [{"prompt": source, "response": text} for source, text in read(path)])
    write(out / "prompts.jsonl", [{"prompt": source} for source, _ in read(train)])
    rescore(
        "generate-corpus", "--base", out / "base", "--prompts", out / "prompts.jsonl", "--out", out / "greedy",
        "--max-new-tokens", 80, "--batch-size", 128,
    )  # fmt: skip


def prepare_beams(data: Path, out: Path) -> None:
    """The base's translations by beam search, and the base that learned from them."""
    train, dev = data / "multi30k_train.jsonl", data / "multi30k_dev.jsonl"
    if not (out / "beam.jsonl").exists():
        model, sources = MarianMTModel.from_pretrained(out / "base").eval(), [source for source, _ in read(train)]
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "base")
        texts = translate(model, tokenizer, tokenizer(sources, truncation=True)["input_ids"], beams=4)
        pairs = list(zip(sources, texts, strict=True))
        write(out / "beam_pairs.jsonl", [{"source": source, "reference": text} for source, text in pairs])
        write(out / "beam.jsonl", [{"prompt": source, "response": text} for source, text in pairs])
    run(TRAINER, out / "beam_pairs.jsonl", dev, out / "distilled", "--initial", out / "base", "--epochs", 4)


def name_of(setting: str, h: int) -> str:
    return f"{setting.replace(', ', '-')}-{h}"


def train(out: Path, setting: str, h: int) -> tuple[Path, Path]:
    """Trains heads, with a base of their own where it learns as well; the folders of both."""
    base, corpus, tuned = SETTINGS[setting]
    heads = out / "heads" / name_of(setting, h)
    path = out / corpus if corpus == "greedy" else out / f"{corpus}.jsonl"
    common = of_paper(out / base, path, out / "dev.jsonl", h, WIDTH)
    untuned = BEGUN_WITH.get(setting)
    if not (heads / "trained").exists():
        if untuned is None:
            rescore(
                "train-heads", *common, "--out", heads, "--positions", POSITIONS, "--steps", HEAD_STEPS,
                "--evaluate-every", HEAD_STEPS // 2,
            )  # fmt: skip
        else:
            initial, _ = train(out, untuned, h)
            rescore(
                "train-heads", *common, "--initial", initial, "--tune", "full", "--base-learning-rate", TUNED_RATE,
                "--head-weights", ",".join([f"{HEADS_SHARE / (h - 1):.3g}"] * (h - 1)), "--out", heads,
                "--positions", TUNED_POSITIONS, "--steps", TUNED_STEPS, "--evaluate-every", TUNED_STEPS // 4,
            )  # fmt: skip
        (heads / "trained").touch()
    return (heads / "heads", heads) if tuned else (heads, out / base)


def decode(data: Path, out: Path, setting: str, h: int, *how: Any, name: str) -> None:
    heads, base = train(out, setting, h)
    evaluate(
        out / "results" / name, "--base", base, "--heads", heads, "--task", "translation", "--data",
        data / "multi30k_test.jsonl", "--max-new-tokens", 80, *how,
    )  # fmt: skip


def bleu_of(results: Path, base: Path, data: Path) -> float:
    """Of the whole corpus, as sacrebleu has it."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    outputs = outputs_of(results)
    examples = load_examples(load_task("translation"), data=data / "multi30k_test.jsonl").examples
    texts = [tokenizer.decode(outputs[example.id], skip_special_tokens=True).strip() for example in examples]
    return float(sacrebleu.corpus_bleu(texts, [[example.references[0] for example in examples]]).score)


def block(results: Path) -> str:
    """The mean accepted block."""
    return f"{results_of(results)['none']['block_efficiency']:.2f}"


def tables(data: Path, out: Path) -> None:
    def cell(setting: str, h: int) -> str:
        results = out / "results" / name_of(setting, h)
        if not is_done(results):
            return "-"
        _, base = train(out, setting, h)
        return f"{block(results)} / {bleu_of(results, base, data):.1f}"

    heading("k", *SETTINGS)
    for h in BLOCKS:
        row(h, *(cell(setting, h) for setting in SETTINGS))
    print()
    heading("rule", "block", "BLEU")
    for rule in RULES:
        results = out / "results" / f"rule-{named(rule)}"
        if is_done(results):
            _, base = train(out, SHARED[1], SHARED[0])
            row(rule, block(results), f"{bleu_of(results, base, data):.1f}")
    print()
    heading("k", "block", "speed-up")
    for h in BLOCKS:
        results = out / "results" / f"timed-{h}"
        if is_done(results):
            row(h, block(results), f"{results_of(results)['none']['latency']['speedup']:.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tables", action="store_true")
    given = parser.parse_args()
    data, out = given.data, given.out
    if not given.tables:
        out.mkdir(parents=True, exist_ok=True)
        prepare(data, out)
        for setting, (base, _, _) in SETTINGS.items():
            if base != "base":
                prepare_beams(data, out)
            for h in BLOCKS if base == "base" else (SHARED[0],):
                decode(data, out, setting, h, "--rescorer", "none,oracle", name=name_of(setting, h))
        h, setting = SHARED
        for rule in RULES:
            how = ["--mode", "live", "--rescorer", "none", "--acceptance", rule]
            decode(data, out, setting, h, *how, name=f"rule-{named(rule)}")
        for h in BLOCKS:
            decode(data, out, "both", h, "--mode", "live", "--rescorer", "none", "--limit", TIMED, name=f"timed-{h}")
    tables(data, out)


if __name__ == "__main__":
    main()
