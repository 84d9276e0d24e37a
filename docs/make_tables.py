"""Writes the tables of measured figures in README.md and docs/ from the documents of the runs.

    python docs/make_tables.py                            # from docs/evidence
    python docs/make_tables.py live=RUN/suite.json        # a new run: what `rescore suite docs/suites/live.yaml` left
    python docs/make_tables.py evidence=RUN/suite.json neural=RUN/suite.json    # the other suites
    python docs/make_tables.py analysis=FILE      # `rescore analyse --results RUN --only repetition,entropy --json`
    python docs/make_tables.py draft-model=RUN/results.json    # an evaluation: docs/results.md has the command
    python docs/make_tables.py costs=FILE                 # what `rescore bench costs --out` wrote before it

A table stands between `<!-- table NAME -->` and `<!-- end -->`, and is replaced as a whole. A test compares the pages
with what this would write, so that no figure in them can be another than was measured.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the test that runs this does not look here
from measured import (
    DOCS,
    OTHERS,
    PAPER,
    TASKS,
    document,
    efficiency,
    gains,
    interval,
    interval_of,
    markdown,
    mean,
    of_small,
    percent,
    results,
    take,
    times,
)

CARDS = DOCS.parent / "lm" / "weights" / "smollm2-135m"
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md")), *sorted(CARDS.glob("*/README.md"))]
BLOCK = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.S)
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
    table = document("costs")
    contexts, nodes, step_ms = (table[name] for name in ("contexts", "nodes", "step_ms"))
    middle = step_ms[len(contexts) // 2]
    rows = [
        [str(count), *(f"{row[place]:.1f}" for row in step_ms), times(middle[place] / middle[0])]
        for place, count in enumerate(nodes)
        if count in (1, 3, 5, 8, 10, 16, 24, 32, 64, 144)
    ]
    first, *others = map(str, contexts)
    return markdown(["tokens of a step", f"{first} cached, ms", *others, "against 1"], rows)


def table_of(columns: Sequence[tuple[str, str, int, bool]], *, tasks: Sequence[str] = TASKS, h: int = 9) -> str:
    """Tasks x columns of the evidence: a title, a rescorer, its p, and whether its gain is shown."""
    of_p = {p: results("evidence", p=p, h=h) for p in (1, 16)}
    rows = [
        [task, *(efficiency(of_p[p][task, rescorer], gain=gain) for _, rescorer, p, gain in columns)] for task in tasks
    ]
    return markdown(["task", *(title for title, *_ in columns)], rows)


def main_table() -> str:
    """The README's."""
    return table_of([
        ("heads", "none", 1, False),
        ("`context-ngram`", "context-ngram", 1, True),
        ("lookup", "lookup", 1, True),
        ("`joint`", "joint", 1, True),
        ("16 drafts: heads", "none", 16, False),
        ("`context-ngram`", "context-ngram", 16, True),
        ("`joint`", "joint", 16, True),
        ("oracle of the heads", "oracle", 1, False),
        ("of heads and lookup", "oracle:drafters=heads+lookup", 1, False),
    ])  # fmt: skip


def heads() -> str:
    """The card of the shipped heads."""
    found = results("evidence", p=1, h=9)
    rows = [[task, *(interval_of(found[task, rescorer]) for rescorer in ("none", "oracle"))] for task in TASKS]
    return markdown(["task", "unrescored", "oracle of the top 16"], rows)


def ngrams() -> str:
    """n-gram rescorers by what they were estimated from."""
    names = {"ngram": "own output (shipped)", "ngram:c4-4gram": "general (C4)", "ngram:in-domain-4gram": "in-domain"}
    return table_of([
        *((f"{title}, p = {p}", name, p, True) for p in (1, 16) for name, title in names.items()),
        ("learned bigram, p = 1", "learned-bigram", 1, True),
        ("p = 16", "learned-bigram", 16, True),
    ])  # fmt: skip


def drafters() -> str:
    """What is proposed, and what chooses."""
    joined = "context-ngram:drafters=heads+lookup"
    return table_of([
        ("lookup, 8 tokens", "lookup:tokens=8", 1, False),
        ("16 tokens", "lookup", 1, False),
        ("heads and lookup by `context-ngram`", joined, 1, False),
        ("by `joint`", "joint", 1, False),
        ("16 drafts: lookup, 16 tokens", "lookup", 16, False),
        ("heads and lookup by `context-ngram`", joined, 16, False),
        ("by `joint`", "joint", 16, False),
    ])  # fmt: skip


def draft_model() -> str:
    """A small LM as one of the drafters of `joint`."""
    of_p = {p: results("draft-model", p=p, h=9) for p in (1, 16)}
    joined = "joint:drafters=heads+lookup+draft-model:neural-61m"
    ways = [
        ("`draft-model:neural-61m` alone", "draft-model:neural-61m", 1),
        ("heads and lookup, `joint`", "joint", 1),
        ("heads, lookup and `draft-model:neural-61m`, `joint`", joined, 1),
        ("16 drafts: `draft-model:neural-61m` alone", "draft-model:neural-61m", 16),
        ("heads and lookup, `joint`", "joint", 16),
        ("heads, lookup and `draft-model:neural-61m`, `joint`", joined, 16),
        ("oracle of these three", joined.replace("joint", "oracle", 1), 1),
    ]
    rows = []
    for title, name, p in ways:
        each = [of_p[p][task, name] for task in PAPER]
        middle = sum(one["block_efficiency"] for one in each) / len(each)
        rows.append([title, *map(interval_of, each), f"{middle:.2f}"])
    return markdown(["drafts", *PAPER, "mean"], rows)


def blocks() -> str:
    """Block efficiency by h."""
    rows = []
    for task in TASKS:
        cells = []
        for rescorer, p in (("none", 1), ("context-ngram", 1), ("joint", 1), ("joint", 16), ("oracle", 1)):
            cells.append(" / ".join(
                f"{results('evidence', p=p, h=h)[task, rescorer]['block_efficiency']:.2f}" for h in (3, 6, 9)
            ))  # fmt: skip
        rows.append([task, *cells])
    return markdown(["task", "heads", "`context-ngram`", "`joint`", "`joint`, 16 drafts", "oracle of the heads"], rows)


def everything() -> str:
    """Every run with h = 9 of both suites."""
    rows = []
    for name in ("evidence", "neural"):
        for entry in document(name)["results"]:
            if entry["h"] != 9 or (name == "neural" and not entry["rescorer"].startswith(("neural", "ngram-neural"))):
                continue
            outcome = entry["against_unrescored"]
            rows.append([
                entry["task"],
                f"{entry['rescorer']} ({entry['p']})",
                "-" if entry["alpha"] is None else f"{entry['alpha']:g}",
                str(entry["groups"]),
                interval_of(entry),
                "" if entry["gain"] is None else "{:+.1f} % ({:+.1f} to {:+.1f})".format(
                    *(100 * value for value in (entry["gain"], *entry["gain_ci95"]))
                ),
                " / ".join(f"{100 * outcome[key]:.1f}" for key in ("won", "tied", "lost")) if outcome else "",
                f"{entry['oracle_block_efficiency']:.3f}",
            ])  # fmt: skip
    rows.sort(key=lambda row: TASKS.index(row[0]))
    head = ["task", "rescorer (p)", "alpha", "groups", "block efficiency (95 %)", "gain (95 %)"]
    return markdown([*head, "won / tied / lost, %", "oracle"], rows)


def paper() -> str:
    """What Kim et al. found beside what was seen here."""
    analysis = document("analysis")["tasks"]
    of_tasks = {task: analysis[task] for task in TASKS}
    news = of_tasks["multi_news"]["wins"]
    small = results("neural", p=1, h=9)
    neural_tasks = list(dict.fromkeys(task for task, _ in small))

    def gain(rescorer: str) -> str:
        return percent([small[task, rescorer]["gain"] for task in neural_tasks], digits=1)

    found = results("evidence", p=1, h=9)
    first, general = (
        {task: found[task, name][key] for task in TASKS[:7]}
        for name, key in (("none", "block_efficiency"), ("ngram:c4-4gram", "gain"))
    )
    high = ("lambada", "cnn_dailymail")  # there; the others start low
    low = [task for task in TASKS[:7] if task not in high]
    fewer, repaired = (
        {name: f"{100 * news[name][key]:.0f}" for name in ("context-ngram", "ngram")}
        for key in ("fewer_repeats_share", "repair_share")
    )
    unrescored = [found[task, "none"]["block_efficiency"] for task in TASKS]
    depths = [float(each["h_max"]) for each in of_tasks.values()]
    usual = statistics.mode(depths)
    deepest = TASKS[depths.index(max(depths))]
    starts = f"{first['lambada']:.2f} and {first['cnn_dailymail']:.2f}"
    sixteen = [mean(name, 16, TASKS[:7]) for name in ("ngram", "none", "context-ngram")]
    own = [task for task in TASKS[:7] if task not in ("squad", "lambada")]  # whose texts the in-domain model is of
    # What the last column says; a new run that says otherwise ends here.
    assert all(each["repeating_pairs"] < 0.2 for each in of_tasks.values())
    assert all(float(each) > 50 for each in fewer.values()) and all(float(each) < 20 for each in repaired.values())
    assert depths.count(usual) == len(TASKS) - 1 and unrescored[TASKS.index(deepest)] == max(unrescored)
    assert min(small[task, "neural-61m"]["gain"] for task in neural_tasks) > 0
    assert max(general.values()) < 0.03 and sixteen[0] > sixteen[1]
    ahead = [
        {task for task in own if of[task, "ngram:in-domain-4gram"]["gain"] > of[task, "ngram:c4-4gram"]["gain"]}
        for of in (found, results("evidence", p=16, h=9))
    ]
    assert len(ahead[1]) == len(own)
    rows = [
        (
            "Neighbouring tokens of unrescored drafts repeat, 20 to 75 % by task",
            f"{percent([each['repeating_pairs'] for each in of_tasks.values()])} of the pairs, where the output has "
            f"{percent([each['in_output'] for each in of_tasks.values()])}",
            "partly: they repeat, less",
        ),
        (
            "66 % of the drafts of MultiNews that got better had repeats repaired",
            f"{fewer['context-ngram']} % of `context-ngram`'s won steps had fewer repeats than before, "
            f"{fewer['ngram']} % of `ngram`'s; a repeat stood where the draft had stopped in "
            f"{repaired['context-ngram']} and {repaired['ngram']} %",
            "partly: fewer repeats, but they are seldom what stopped a draft",
        ),
        (
            "h_max goes with block efficiency over tasks, R = 0.77",
            f"R = {statistics.correlation(depths, unrescored):.2f} over {len(TASKS)} tasks: h_max is {usual:.0f} on "
            f"{depths.count(usual)} of them, and {max(depths):.0f} on {deepest}, where heads are best",
            "in the number, but it rests on one task",
        ),
        (
            "Neural rescorers of 61M and 94M gain up to 19 % (NewsRoom)",
            f"61M {gain('neural-61m')}, 94M {gain('neural-94m')} on {', '.join(neural_tasks)}",
            "in size, on other tasks, by models of another making",
        ),
        (
            "Tasks that start high (LAMBADA, CNN/DailyMail) gain nothing, those that start low do",
            f"C4's 4-gram gains {percent([general[task] for task in high], digits=1)} on these two, which start at "
            f"{starts}, and {percent([general[task] for task in low], digits=1)} on five others; neural ones were not "
            "run on these two",
            "not seen: CNN/DailyMail does not start high here, and a 4-gram alone gains little anywhere",
        ),
        (
            "In-domain n-gram models are no better than C4's",
            f"of the texts of {len(own)} tasks (1.7 million tokens; C4's has 0.4) "
            f"{gains('ngram:in-domain-4gram', 1, own)} on these with one draft, against "
            f"{gains('ngram:c4-4gram', 1, own)}, and {gains('ngram', 1, own)} for the base's own output; "
            f"ahead of C4's on {len(ahead[0])} of {len(own)} with one draft, on {len(ahead[1])} with 16",
            "with one draft; with 16 in-domain is ahead, of four times the text",
        ),
        (
            "More drafts help: 16-best of a 4-gram is ahead of 16-best without it",
            f"{sixteen[0]:.2f} against {sixteen[1]:.2f} tokens a step on average over seven tasks, and "
            f"{sixteen[2]:.2f} by the n-grams of the text",
            "yes",
        ),
    ]
    return markdown(["Kim et al. 2024", "here", "reproduced?"], rows)


def neural() -> str:
    """Small LMs as rescorers, one draft."""
    found = results("neural", p=1, h=9)
    names = ("neural-32m", "neural-61m", "neural-94m", "ngram-neural", "context-ngram")
    rows = []
    for task in dict.fromkeys(task for task, _ in found):
        cells = [f"{efficiency(found[task, name])}, {found[task, name]['alpha']:g}" for name in names]
        rows.append([task, efficiency(found[task, "none"]), *cells, efficiency(found[task, "oracle"], gain=False)])
    return markdown(["task", "heads", *(f"`{name}`" for name in names), "oracle"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "main": main_table,
    "heads": heads,
    "ngrams": ngrams,
    "drafters": drafters,
    "draft-model": draft_model,
    "blocks": blocks,
    "everything": everything,
    "neural": neural,
    "paper": paper,
    "live-speedups": lambda: live_speedups(PAPER, mean=True),
    "live-speedups-others": lambda: live_speedups(OTHERS, mean=False),
    "live-trees": live_trees,
    "costs": costs,
}


def claims() -> dict[str, list[str]]:
    """What pages say in words, by page: each must stand in it as it is here."""
    joined = "joint accepts {:.2f} tokens a step on average over these twelve tasks with one draft and {:.2f} with 16"
    both = joined.replace("joint", "`joint`", 1).format(mean("joint", 1, TASKS), mean("joint", 16, TASKS))
    alone = f"heads alone get {mean('none', 1, TASKS):.2f} and lookup alone {mean('lookup', 1, TASKS):.2f}"
    live = results("live")
    steps, faster = [], 0  # of transformers' lookup against its own greedy decoding
    for task in TASKS:
        theirs, looked = (live[task, f"transformers{way}"] for way in ("", ":lookup=10"))
        speedup = looked["latency"]["speedup"] / theirs["latency"]["speedup"]
        faster += speedup > 1
        steps.append(looked["block_efficiency"] / speedup)
        assert looked["latency"]["speedup"] < 1
    off = [
        sorted(
            100 * (live[task, way]["predicted_speedup"] / live[task, way]["latency"]["speedup"] - 1) for task in TASKS
        )
        for way in (TREES, "joint:nodes=auto", "joint", "lookup:tokens=8")
    ]
    predicted = f"{round(off[0][0])} to {off[0][-1]:.0f} % too high, {statistics.median(off[0]):.0f} % in the middle"
    others = (
        "; with all tokens {:.0f} to {:.0f} %, for one joint draft {:.0f} to {:.0f} %, for lookup {:.0f} to {:.0f} %"
    )
    others = others.format(*(each[place] for each in off[1:] for place in (0, -1)))
    slow = f"takes {min(steps):.1f} to {max(steps):.1f} times a step of its own greedy decoding"
    return {
        "README.md": [
            both,
            alone,
            predicted.replace("too high", "above what was measured"),
            f"`neural-61m` gains {of_small('neural-61m')}",
        ],
        "findings.md": [
            both,
            alone,
            f"`neural-61m`, nine layers, gains {of_small('neural-61m')}, "
            f"`neural-94m`, eighteen, {of_small('neural-94m')}",
            f"the oracle of the heads' top 16 is at {mean('oracle', 1, TASKS):.2f}",
            f"that of heads and lookup at {mean('oracle:drafters=heads+lookup', 1, TASKS):.2f}",
            f"`context-ngram` gains {gains('context-ngram', 1, TASKS)}",
            f"{slow}: with it it is faster than without on {faster} of the twelve tasks",
        ],
        "results.md": [
            f"`neural-61m` gains {of_small('neural-61m')}, `neural-94m` {of_small('neural-94m')}, `neural-32m` "
            f"{of_small('neural-32m')}, `ngram-neural` {of_small('ngram-neural')}",
            f"`context-ngram` gains {gains('context-ngram', 1, TASKS)} with one draft and "
            f"{gains('context-ngram', 16, TASKS)} with 16",
            f"the shipped 4-gram, of the base's own output, {gains('ngram', 1, TASKS)}",
            f"the general one {gains('ngram:c4-4gram', 1, TASKS)}",
            f"the in-domain one {gains('ngram:in-domain-4gram', 1, TASKS)}",
            f"the learned bigram gains {gains('learned-bigram', 1, TASKS)}",
            f"16 unrescored drafts accept {mean('none', 16, TASKS, h=3):.2f} tokens a step with h = 3, "
            f"{mean('none', 16, TASKS, h=6):.2f} with 6 and {mean('none', 16, TASKS):.2f} with 9",
            f"{mean('context-ngram', 16, TASKS, h=3):.2f}, {mean('context-ngram', 16, TASKS, h=6):.2f} and "
            f"{mean('context-ngram', 16, TASKS):.2f} by `context-ngram`",
            f"`joint` accepts {gains('joint', 1, TASKS, over='lookup')} more than lookup alone",
            predicted,
            others,
            slow,
        ],
    }  # fmt: skip


def page(text: str) -> str:
    """A page with its tables as they are measured."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", text)


def missing(name: str, said: Sequence[str]) -> list[str]:
    """Of what a page should say, what it does not."""
    (path,) = (path for path in PAGES if path.name == name and path.parent in (DOCS, DOCS.parent))
    text = " ".join(path.read_text().split())
    return [sentence for sentence in said if sentence not in text]


if __name__ == "__main__":
    for given in sys.argv[1:]:
        name, _, run = given.partition("=")
        take(name, Path(run))
    for path in PAGES:
        path.write_text(page(path.read_text()))
    for name, said in claims().items():
        for sentence in missing(name, said):
            print(f"{name} does not say: {sentence}")
