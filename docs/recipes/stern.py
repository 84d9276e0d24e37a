"""What `stern_translation.py` and `stern_images.py`, the experiments of Stern et al. (2018), share."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from rescore.acceptance.rules import unmarked

BLOCKS = (2, 4, 6, 8, 10)  # k of [B], h here


def run(*command: Any) -> None:
    """Runs a command, or a script of Python."""
    words = [str(word) for word in command]
    print("+", shlex.join(words), file=sys.stderr, flush=True)
    subprocess.run([sys.executable, *words] if words[0].endswith(".py") else words, check=True)


def rescore(*command: Any) -> None:
    run(Path(sys.executable).with_name("rescore"), *command)


def write(path: Path, records: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def of_paper(base: Path, corpus: Path, held_out: Path, h: int, width: int) -> list[Any]:
    """Options of `train-heads` for the heads of [B]: a layer that all share, one head's loss a step, no teacher.

    width: inner size of that layer, times k: the base's d_model ([B]: its feed-forward layers' inner size).
    """
    return [
        "--base", base, "--corpus", corpus, "--held-out-corpus", held_out, "--h", h, "--architecture", "shared",
        "--token-size", 0, "--inner-size", width * h, "--heads-per-step", 1, "--soft", 0, "--vocabulary", 0,
    ]  # fmt: skip


def is_done(results: Path) -> bool:
    return (results / "done").exists()


def evaluate(results: Path, *options: Any) -> None:
    """`rescore eval` into a folder, unless it is done."""
    if not is_done(results):
        rescore("eval", *options, "--out", results)
        (results / "done").touch()


def named(rule: str) -> str:
    """An acceptance rule as a part of a folder's name."""
    return rule.replace(":", "-")


def results_of(results: Path) -> dict[str, dict[str, Any]]:
    """By rescorer, without what a label says of its model and the acceptance rule."""
    document = json.loads((results / "results.json").read_text())
    return {unmarked(each["rescorer"]).split(":")[0]: each for each in document["results"]}


def outputs_of(results: Path) -> dict[str, list[int]]:
    """What was written without a rescorer, by example."""
    lines = [json.loads(line) for line in (results / "examples.jsonl").open()]
    return {line["id"]: line["output_ids"] for line in lines if unmarked(line["rescorer"]) == "none"}


def row(*cells: Any) -> None:
    """A line of a table in Markdown."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def heading(*cells: Any) -> None:
    """The first two lines of one."""
    row(*cells)
    row(*["---"] * len(cells))
