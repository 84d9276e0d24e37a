"""The experiments of Stern et al. (2018) on image super-resolution, at a small scale: trains, decodes, prints, draws.

    pip install scikit-image scikit-learn
    python docs/recipes/stern_images.py OUT            # all of it; what is done is not done again
    python docs/recipes/stern_images.py OUT --tables   # only what the results in OUT say, and OUT/images.png

Every command is printed before it runs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from rescore.acceptance.rules import unmarked

sys.path.insert(0, str(Path(__file__).parent))
from train_superresolution import LEVELS, LOW, SIZE, TRAIN, image, low_of, patches, shrunk, words

BLOCKS = (2, 4, 6, 8, 10)  # k of [B], h here
RULES = ("greedy", "distance:eps=1", "distance:eps=2", "distance:eps=4")
SETTINGS = ("frozen", "fine-tuned")
TAUGHT, SEED = 6000, 7  # patches that the heads learn from
HEAD_STEPS, POSITIONS = 300, 4096
TUNED_STEPS, TUNED_POSITIONS, TUNED_RATE, HEADS_SHARE = 400, 2048, 2e-4, 0.5  # as stern_translation.py has it
WIDTH = 128  # inner size of the heads' layer, times k: the base's d_model ([B]: its feed-forward layers' inner size)
DECODED = 30  # patches of the test part
PICTURED, RULE_PICTURED, BLOCK_PICTURED, ZOOM = 6, "distance:eps=2", 8, 6


def run(*command: Any) -> None:
    words_of = [str(word) for word in command]
    print("+", shlex.join(words_of), file=sys.stderr, flush=True)
    subprocess.run([sys.executable, *words_of] if words_of[0].endswith(".py") else words_of, check=True)


def rescore(*command: Any) -> None:
    run(Path(sys.executable).with_name("rescore"), *command)


def prepare(out: Path) -> None:
    """The base; pairs for its heads; pixels of the training images as text, for an n-gram."""
    if not (out / "base.done").exists():
        run(Path(__file__).with_name("train_superresolution.py"), out / "base")
        (out / "base.done").touch()
    found = [one for name in TRAIN for one in shrunk(image(name))]
    high = patches(found, TAUGHT, np.random.default_rng(SEED), flip=True)
    held_out = [json.loads(line) for line in (out / "base" / "dev.jsonl").open()]
    taught = zip(low_of(high), high, strict=True)
    pairs = {
        "pairs": [{"prompt": words(low), "response": words(patch)} for low, patch in taught],
        "dev": [{"prompt": each["low"], "response": each["high"]} for each in held_out],
    }
    for name, records in pairs.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (out / "pixels.txt").write_text("".join(words(patch) + "\n" for patch in high))
    if not (out / "ngram.done").exists():
        how = ["--base", out / "base", "--out", out / "ngram", "--discount-fallback"]  # no intensity is rare
        rescore("build-ngram", out / "pixels.txt", *how)
        (out / "ngram.done").touch()


def train(out: Path, setting: str, h: int) -> tuple[Path, Path]:
    """Trains heads, with a base of their own where it learns as well; the folders of both."""
    heads = out / "heads" / f"{setting}-{h}"
    common = [
        "--base", out / "base", "--corpus", out / "pairs.jsonl", "--held-out-corpus", out / "dev.jsonl", "--h", h,
        "--architecture", "shared", "--token-size", 0, "--inner-size", WIDTH * h, "--heads-per-step", 1, "--soft", 0,
        "--vocabulary", 0,
    ]  # fmt: skip
    tuned = setting == "fine-tuned"
    if not (heads / "trained").exists():
        if tuned:
            initial, _ = train(out, "frozen", h)
            rescore(
                "train-heads", *common, "--initial", initial, "--tune", "full", "--base-learning-rate", TUNED_RATE,
                "--head-weights", ",".join([f"{HEADS_SHARE / (h - 1):.3g}"] * (h - 1)), "--out", heads,
                "--positions", TUNED_POSITIONS, "--steps", TUNED_STEPS, "--evaluate-every", TUNED_STEPS // 4,
            )  # fmt: skip
        else:
            rescore(
                "train-heads", *common, "--out", heads, "--positions", POSITIONS, "--steps", HEAD_STEPS,
                "--evaluate-every", HEAD_STEPS // 2,
            )  # fmt: skip
        (heads / "trained").touch()
    return (heads / "heads", heads) if tuned else (heads, out / "base")


def evaluate(out: Path, setting: str, h: int, rule: str) -> Path:
    """Exact acceptance by replay, also of rescored drafts; others live."""
    heads, base = train(out, setting, h)
    results = out / "results" / f"{setting}-{h}-{rule.replace(':', '-')}"
    if not (results / "done").exists():
        ngram = out / "ngram"  # what is shipped is of other tokens
        replayed = ["--rescorer", f"none,context-ngram:{ngram},ngram:{ngram},oracle"]
        lossy = ["--mode", "live", "--acceptance", rule]
        rescore(
            "eval", "--base", base, "--heads", heads, "--task", "superresolution",
            "--data", out / "base" / "test.jsonl", "--limit", DECODED, "--max-new-tokens", SIZE * SIZE,
            *(replayed if rule == "greedy" else lossy), "--out", results,
        )  # fmt: skip
        (results / "done").touch()
    return results


def efficiencies(results: Path) -> dict[str, float]:
    """By rescorer, without the rule that a label names."""
    document = json.loads((results / "results.json").read_text())
    return {unmarked(each["rescorer"]).split(":")[0]: each["block_efficiency"] for each in document["results"]}


def pixels(results: Path, rescorer: str = "none") -> dict[str, np.ndarray]:
    """What was written, by example, int64 `[SIZE, SIZE]`; 0 for what is no pixel."""
    found = {}
    for line in map(json.loads, (results / "examples.jsonl").open()):
        if unmarked(line["rescorer"]) == rescorer:
            ids = np.zeros(SIZE * SIZE, dtype=np.int64)
            ids[: len(line["output_ids"])] = line["output_ids"]
            found[line["id"]] = np.where(ids < LEVELS, ids, 0).reshape(SIZE, SIZE)
    return found


def likeness(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> tuple[float, float]:
    """PSNR in dB of all pixels together, and the mean SSIM."""
    one, other = (np.stack([images[name] for name in some]).astype(np.uint8) for images in (some, others))
    ssim = [structural_similarity(a, b, data_range=LEVELS - 1) for a, b in zip(one, other, strict=True)]
    same = not (one != other).any()
    return (float("inf") if same else float(peak_signal_noise_ratio(other, one))), float(np.mean(ssim))


def truth(out: Path) -> dict[str, np.ndarray]:
    rows = [json.loads(line) for line in (out / "base" / "test.jsonl").open()]
    return {row["id"]: np.array(row["high"].split(), dtype=np.int64).reshape(SIZE, SIZE) for row in rows}


def row(*cells: Any) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def tables(out: Path) -> None:
    high = truth(out)

    def folder(setting: str, h: int, rule: str) -> Path:
        return out / "results" / f"{setting}-{h}-{rule.replace(':', '-')}"

    row("k", *(f"{setting}, {rule}" for setting in SETTINGS for rule in RULES))
    row(*["---"] * (1 + len(SETTINGS) * len(RULES)))
    for h in BLOCKS:
        found = [folder(setting, h, rule) for setting in SETTINGS for rule in RULES]
        row(h, *(f"{efficiencies(each)['none']:.2f}" if (each / "done").exists() else "-" for each in found))
    print()
    row("setting", "k", "rule", "PSNR", "SSIM", "PSNR to exact", "SSIM to exact")
    row(*["---"] * 7)
    for setting in SETTINGS:
        for h in BLOCKS:
            for rule in RULES:
                if (folder(setting, h, rule) / "done").exists():
                    made, exact = pixels(folder(setting, h, rule)), pixels(folder(setting, h, "greedy"))
                    of_truth, of_exact = likeness(made, high), likeness(made, exact)
                    row(setting, h, rule, *(f"{value:.2f}" for value in (*of_truth, *of_exact)))
    print()
    row("setting", "k", "none", "context-ngram", "ngram", "oracle")
    row(*["---"] * 6)
    for setting in SETTINGS:
        for h in BLOCKS:
            if (folder(setting, h, "greedy") / "done").exists():
                found = efficiencies(folder(setting, h, "greedy"))
                row(setting, h, *(f"{found[name]:.2f}" for name in ("none", "context-ngram", "ngram", "oracle")))


def picture(out: Path) -> None:
    """Writes OUT/images.png: a column for each patch."""
    setting, h = SETTINGS[1], BLOCK_PICTURED
    exact = pixels(out / "results" / f"{setting}-{h}-greedy")
    made = pixels(out / "results" / f"{setting}-{h}-{RULE_PICTURED.replace(':', '-')}")
    high = truth(out)
    names = sorted(exact, key=lambda name: -high[name].std())[:PICTURED]  # those with most to see
    lines = {
        f"{LOW} x {LOW} given": [low_of(high[name][None])[0] for name in names],
        "exact": [exact[name] for name in names],
        RULE_PICTURED: [made[name] for name in names],
        "difference x 8": [np.clip(8 * np.abs(made[name] - exact[name]), 0, LEVELS - 1) for name in names],
        "truth": [high[name] for name in names],
    }  # fmt: skip
    side, gap, left = ZOOM * SIZE, 8, 120
    sheet = Image.new("L", (left + len(names) * (side + gap), len(lines) * (side + gap)), LEVELS - 1)
    for line, (title, shown) in enumerate(lines.items()):
        ImageDraw.Draw(sheet).text((4, line * (side + gap) + side // 2 - 6), title, fill=0, font_size=13)
        for column, each in enumerate(shown):
            patch = Image.fromarray(each.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(patch, (left + column * (side + gap), line * (side + gap)))
    sheet.save(out / "images.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tables", action="store_true")
    given = parser.parse_args()
    out = given.out
    if not given.tables:
        out.mkdir(parents=True, exist_ok=True)
        prepare(out)
        for setting in SETTINGS:
            for h in BLOCKS:
                for rule in RULES:
                    evaluate(out, setting, h, rule)
    tables(out)
    picture(out)


if __name__ == "__main__":
    main()
