"""Writes the tables of measured figures in README.md and docs/ from the documents of the runs.

    python docs/make_tables.py                            # from docs/evidence
    python docs/make_tables.py live=RUN/suite.json        # a new run: what `rescore suite docs/suites/live.yaml` left
    python docs/make_tables.py costs=FILE                 # what `rescore bench costs --out` wrote before it

A table stands between `<!-- table NAME -->` and `<!-- end -->`, and is replaced as a whole. A test compares the pages
with what this would write, so that no figure in them can be another than was measured.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
EVIDENCE = DOCS / "evidence"
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.S)

PAPER = ("squad", "xsum", "samsum", "gsm8k")
OTHERS = ("cnn_dailymail", "multi_news", "lambada", "mt_bench", "translation", "summarization", "qa", "rag")
TREES = "joint:nodes=auto,drafters=heads:vocabulary=8192+lookup"
WAYS = {
    "none": "heads, unrescored",
    "lookup:tokens=8": "lookup, 8 tokens",
    "lookup:tokens=16": "lookup, 16 tokens",
    "joint": "heads and lookup, `joint`, one draft",
    "joint:nodes=auto": "the same, `--nodes auto`: heads and tree by what they cost here",
    TREES: "the same, heads of 8,192 tokens",
    "transformers": "transformers, greedy",
    "transformers:lookup=10": "transformers, prompt lookup, 10 tokens",
    "transformers:lookup=3": "transformers, prompt lookup, 3 tokens",
}
Results = dict[tuple[str, str], dict[str, Any]]  # by task and rescorer


def results(name: str) -> Results:
    """Of a suite with one k and p."""
    document = json.loads((EVIDENCE / f"{name}.json").read_text())
    return {(each["task"], each["rescorer"]): each for each in document["results"]}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def times(value: float) -> str:
    return f"{value:.2f}x"


def interval(value: float, bounds: Sequence[float], unit: str = "") -> str:
    low, high = bounds
    return f"{value:.2f}{unit} ({low:.2f} to {high:.2f})"


def live_speedups(tasks: Sequence[str], *, mean: bool) -> str:
    """Speed-ups by way of drafting, the best of each task in bold."""
    live = results("live")
    rows = []
    for way, title in WAYS.items():
        values = [live[task, way]["latency"]["speedup"] for task in tasks]
        best = [max(live[task, other]["latency"]["speedup"] for other in WAYS) for task in tasks]
        cells = [f"**{times(v)}**" if v == b else times(v) for v, b in zip(values, best, strict=True)]
        rows.append([title, *cells, *([times(sum(values) / len(values))] if mean else [])])
    greedy = [1000 / live[task, "none"]["latency"]["autoregressive_ms"] for task in tasks]
    rows.append(["our greedy, tokens a second", *(f"{each:.1f}" for each in greedy), *([""] if mean else [])])
    return markdown(["drafts", *tasks, *(["mean"] if mean else [])], rows)


def live_trees() -> str:
    """Trees by cost with their intervals, and what the costs predict for them and for others."""
    live = results("live")
    rows = []
    for task in (*PAPER, *OTHERS):
        trees = live[task, TREES]
        rows.append([
            task,
            interval(trees["block_efficiency"], trees["block_efficiency_ci95"]),
            interval(trees["latency"]["speedup"], trees["latency"]["speedup_ci95"], unit="x"),
            times(trees["predicted_speedup"]),
            *(
                times(value)
                for way in ("lookup:tokens=8", "joint")
                for value in (live[task, way]["latency"]["speedup"], live[task, way]["predicted_speedup"])
            ),
        ])  # fmt: skip
    head = ["task", "block efficiency (95 %)", "speed-up (95 %)", "predicted", "lookup, 8 tokens", "predicted"]
    return markdown([*head, "`joint`", "predicted"], rows)


def costs() -> str:
    """What steps of some numbers of tokens take."""
    table = json.loads((EVIDENCE / "costs.json").read_text())
    contexts, nodes, step_ms = (table[name] for name in ("contexts", "nodes", "step_ms"))
    middle = step_ms[len(contexts) // 2]
    rows = [
        [str(count), *(f"{row[place]:.1f}" for row in step_ms), times(middle[place] / middle[0])]
        for place, count in enumerate(nodes)
        if count in (1, 3, 5, 8, 10, 16, 24, 32, 64, 144)
    ]
    first, *others = map(str, contexts)
    return markdown(["tokens of a step", f"{first} cached, ms", *others, "against 1"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "live-speedups": lambda: live_speedups(PAPER, mean=True),
    "live-speedups-others": lambda: live_speedups(OTHERS, mean=False),
    "live-trees": live_trees,
    "costs": costs,
}


def page(text: str) -> str:
    """A page with its tables as they are measured."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", text)


def take(name: str, path: Path) -> None:
    """Keeps a run's document; not its plan, which names folders."""
    document = json.loads(path.read_text())
    kept = {key: value for key, value in document.items() if key not in ("plan", "runs")}
    (EVIDENCE / f"{name}.json").write_text(json.dumps(kept, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    for given in sys.argv[1:]:
        name, _, document = given.partition("=")
        take(name, Path(document))
    for path in PAGES:
        path.write_text(page(path.read_text()))
