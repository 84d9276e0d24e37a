"""The figures that were measured, from the documents of the runs in docs/evidence, and how they are written."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
EVIDENCE = DOCS / "evidence"

PAPER = ("squad", "xsum", "samsum", "gsm8k")
OTHERS = ("cnn_dailymail", "multi_news", "lambada", "mt_bench", "translation", "summarization", "qa", "rag")
TASKS = ("squad", "samsum", "xsum", "cnn_dailymail", "multi_news", "lambada", "gsm8k", *OTHERS[3:])
OF_REPLAY = (
    "task", "rescorer", "k", "p", "h", "alpha", "n", "groups", "block_efficiency", "block_efficiency_ci95",
    "oracle_block_efficiency", "gain", "gain_ci95", "against_unrescored", "cut_at_limit",
)  # fmt: skip
Results = dict[tuple[str, str], dict[str, Any]]  # by task and rescorer


def results(name: str, **chosen: int) -> Results:
    """Of a suite, those with some p and h."""
    found = [each for each in document(name)["results"] if all(each[key] == value for key, value in chosen.items())]
    return {(each["task"], each["rescorer"]): each for each in found}


@functools.cache
def document(name: str) -> dict[str, Any]:
    """What is kept of a run; not to be changed."""
    kept: dict[str, Any] = json.loads((EVIDENCE / f"{name}.json").read_text())
    return kept


def mean(rescorer: str, p: int, tasks: Sequence[str], *, h: int = 9) -> float:
    """Block efficiency, mean of tasks."""
    found = results("evidence", p=p, h=h)
    return sum(found[task, rescorer]["block_efficiency"] for task in tasks) / len(tasks)


def percent(values: Sequence[float], *, digits: int = 0) -> str:
    """The smallest and the largest of shares, in words."""
    low, high = (f"{100 * value:.{digits}f}" for value in (min(values), max(values)))
    return f"{low} to {high} %"


def gains(rescorer: str, p: int, tasks: Sequence[str], *, over: str = "none") -> str:
    """The smallest and the largest gain over one draft of another rescorer, in words."""
    ours, theirs = results("evidence", p=p, h=9), results("evidence", p=1, h=9)
    values = [ours[t, rescorer]["block_efficiency"] / theirs[t, over]["block_efficiency"] - 1 for t in tasks]
    return percent(values)


def of_small(name: str) -> str:
    """The gains of a small LM, in words."""
    found = results("neural", p=1, h=9)
    return percent([each["gain"] for (_, rescorer), each in found.items() if rescorer == name])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def times(value: float) -> str:
    return f"{value:.2f}x"


def interval(value: float, bounds: Sequence[float], unit: str = "") -> str:
    low, high = bounds
    return f"{value:.2f}{unit} ({low:.2f} to {high:.2f})"


def interval_of(entry: dict[str, Any]) -> str:
    """Block efficiency with its interval."""
    return "{:.3f} ({:.3f} to {:.3f})".format(entry["block_efficiency"], *entry["block_efficiency_ci95"])


def efficiency(entry: dict[str, Any], *, gain: bool = True) -> str:
    """Block efficiency, with the interval of its gain over the unrescored draft."""
    value = f"{entry['block_efficiency']:.3f}"
    if not gain or entry["gain_ci95"] is None:
        return value
    low, high = (f"{100 * bound:+.1f}" for bound in entry["gain_ci95"])
    return f"{value} ({low} to {high} %)"


def take(name: str, path: Path) -> None:
    """Keeps a run's document; not its plan, which names folders."""
    if name not in ("live", "evidence", "neural", "analysis", "draft-model", "costs"):
        sys.exit(f"{name} is no document of these pages")
    run = json.loads(path.read_text())
    kept = {key: value for key, value in run.items() if key not in ("plan", "runs")}
    if name == "analysis":
        kept = of_analysis(run)
    elif name != "live" and "results" in run:
        kept = {key: run[key] for key in ("schema", "source", "versions", "git_revision") if key in run}
        kept["results"] = [{key: each[key] for key in OF_REPLAY} for each in run["results"]]
    (EVIDENCE / f"{name}.json").write_text(json.dumps(kept, ensure_ascii=False) + "\n")


def of_analysis(found: dict[str, Any]) -> dict[str, Any]:
    """Of an analysis of all tasks, what the pages tell; with h = 9."""
    tasks = {}
    for run in found["runs"]:
        if run["h"] == 9:
            outcomes = {each["rescorer"]: each["outcomes"] for each in run["rescorers"] if each["p"] == 1}
            kept = ("won", "repair_share", "fewer_repeats_share")
            tasks[run["task"]] = {
                "repeating_pairs": run["trace"]["repetition"]["decode"]["share"],
                "in_output": run["trace"]["repetition"]["output"]["share"],
                "h_max": run["trace"]["entropy"]["h_max"],
                "wins": {
                    name: {key: outcomes[name][key] for key in kept} for name in ("ngram", "context-ngram", "joint")
                },
            }
    return {"tasks": tasks}
