"""The experiments of Stern et al. (2018) on image super-resolution, at a small scale: trains, decodes, prints, draws.

    pip install scikit-image scikit-learn
    python docs/recipes/stern_images.py OUT            # all of it; what is done is not done again
    python docs/recipes/stern_images.py OUT --tables   # only what the results in OUT say, and OUT/images.png

Every command is printed before it runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
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
from train_superresolution import LEVELS, LOW, SIZE, TRAIN, image, low_of, patches, shrunk, words

RULES = ("greedy", "distance:eps=1", "distance:eps=2", "distance:eps=4")
SETTINGS = ("frozen", "fine-tuned")
TAUGHT, SEED = 6000, 7  # patches that the heads learn from
HEAD_STEPS, POSITIONS = 300, 4096
TUNED_STEPS, TUNED_POSITIONS, TUNED_RATE, HEADS_SHARE = 400, 2048, 2e-4, 0.5  # as stern_translation.py has it
WIDTH = 128  # of the heads' layer
DECODED = 30  # patches of the test part
PICTURED, RULE_PICTURED, BLOCK_PICTURED, ZOOM = 6, "distance:eps=2", 8, 6


def prepare(out: Path) -> None:
    """The base; pairs for its heads; pixels of the training images as text, for an n-gram."""
    if not (out / "base.done").exists():
        run(Path(__file__).with_name("train_superresolution.py"), out / "base")
        (out / "base.done").touch()
    found = [one for name in TRAIN for one in shrunk(image(name))]
    high = patches(found, TAUGHT, np.random.default_rng(SEED), flip=True)
    held_out = [json.loads(line) for line in (out / "base" / "dev.jsonl").open()]
    taught = zip(low_of(high), high, strict=True)
    write(out / "pairs.jsonl", [{"prompt": words(low), "response": words(patch)} for low, patch in taught])
    write(out / "dev.jsonl", [{"prompt": each["low"], "response": each["high"]} for each in held_out])
    (out / "pixels.txt").write_text("".join(words(patch) + "\n" for patch in high))
    if not (out / "ngram.done").exists():
        how = ["--base", out / "base", "--out", out / "ngram", "--discount-fallback"]  # no intensity is rare
        rescore("build-ngram", out / "pixels.txt", *how)
        (out / "ngram.done").touch()


def train(out: Path, setting: str, h: int) -> tuple[Path, Path]:
    """Trains heads, with a base of their own where it learns as well; the folders of both."""
    heads = out / "heads" / f"{setting}-{h}"
    common = of_paper(out / "base", out / "pairs.jsonl", out / "dev.jsonl", h, WIDTH)
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


def folder(out: Path, setting: str, h: int, rule: str) -> Path:
    """Of results."""
    return out / "results" / f"{setting}-{h}-{named(rule)}"


def decode(out: Path, setting: str, h: int, rule: str) -> None:
    """Exact acceptance by replay, also of rescored drafts; others live."""
    heads, base = train(out, setting, h)
    ngram = out / "ngram"  # what is shipped is of other tokens
    replayed = ["--rescorer", f"none,context-ngram:{ngram},ngram:{ngram},oracle"]
    lossy = ["--mode", "live", "--acceptance", rule]
    evaluate(
        folder(out, setting, h, rule), "--base", base, "--heads", heads, "--task", "superresolution", "--data",
        out / "base" / "test.jsonl", "--limit", DECODED, "--max-new-tokens", SIZE * SIZE,
        *(replayed if rule == "greedy" else lossy),
    )  # fmt: skip


def block(results: Path, rescorer: str = "none") -> str:
    """The mean accepted block; a dash where the results are not done."""
    return f"{results_of(results)[rescorer]['block_efficiency']:.2f}" if is_done(results) else "-"


def pixels(results: Path) -> dict[str, np.ndarray]:
    """What was written, by example, int64 `[SIZE, SIZE]`; 0 for what is no pixel."""
    found = {}
    for name, output in outputs_of(results).items():
        ids = np.zeros(SIZE * SIZE, dtype=np.int64)
        ids[: len(output)] = output
        found[name] = np.where(ids < LEVELS, ids, 0).reshape(SIZE, SIZE)
    return found


def likeness(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> tuple[float, float, float]:
    """Means over patches: PSNR in dB (infinite if one is the same), SSIM, and how far intensities are apart."""
    pairs = [(some[name].astype(np.uint8), others[name].astype(np.uint8)) for name in some]
    with np.errstate(divide="ignore"):
        psnr = np.mean([peak_signal_noise_ratio(other, one) for one, other in pairs])
    ssim = np.mean([structural_similarity(one, other, data_range=LEVELS - 1) for one, other in pairs])
    return float(psnr), float(ssim), float(np.mean([np.abs(some[name] - others[name]).mean() for name in some]))


def truth(out: Path) -> dict[str, np.ndarray]:
    rows = [json.loads(line) for line in (out / "base" / "test.jsonl").open()]
    return {row["id"]: np.array(row["high"].split(), dtype=np.int64).reshape(SIZE, SIZE) for row in rows}


def tables(out: Path) -> None:
    high = truth(out)
    heading("k", *(f"{setting}, {rule}" for setting in SETTINGS for rule in RULES))
    for h in BLOCKS:
        row(h, *(block(folder(out, setting, h, rule)) for setting in SETTINGS for rule in RULES))
    print()
    heading("setting", "k", "rule", "PSNR", "SSIM", "SSIM to exact", "intensities apart")
    for setting in SETTINGS:
        for h in BLOCKS:
            for rule in RULES:
                if is_done(folder(out, setting, h, rule)):
                    made, exact = (pixels(folder(out, setting, h, each)) for each in (rule, "greedy"))
                    psnr, ssim, _ = likeness(made, high)
                    _, same, apart = likeness(made, exact)
                    row(setting, h, rule, f"{psnr:.1f}", f"{ssim:.2f}", f"{same:.2f}", f"{apart:.1f}")
    names = list(high)[:DECODED]
    given = {name: np.kron(low_of(high[name][None])[0], np.ones((SIZE // LOW,) * 2, dtype=int)) for name in names}
    psnr, ssim, _ = likeness(given, high)
    row("the squares given", "", "", f"{psnr:.1f}", f"{ssim:.2f}", "", "")
    print()
    rescorers = ("none", "context-ngram", "ngram", "oracle")
    heading("setting", "k", *rescorers)
    for setting in SETTINGS:
        for h in BLOCKS:
            if is_done(results := folder(out, setting, h, "greedy")):
                row(setting, h, *(block(results, name) for name in rescorers))


def picture(out: Path) -> None:
    """Writes OUT/images.png: a column for each patch."""
    both = [folder(out, SETTINGS[1], BLOCK_PICTURED, rule) for rule in ("greedy", RULE_PICTURED)]
    if not all(map(is_done, both)):
        return
    exact, made = map(pixels, both)
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
                    decode(out, setting, h, rule)
    tables(out)
    picture(out)


if __name__ == "__main__":
    main()
