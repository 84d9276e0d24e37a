"""What was evaluated, as tables: one that says it all at a glance, and the details."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence

from rescore.bootstrap import LEAST_GROUPS
from rescore.runs.records import Result, ResultsDocument, Tuned
from rescore.table import (
    COUNT,
    GAIN,
    GAIN_INTERVAL,
    MILLISECONDS,
    NUMBER,
    NUMBER_INTERVAL,
    PLAIN,
    SHARE,
    TEXT,
    TIMES,
    Column,
    Format,
    Table,
    fixed,
    percent,
)  # fmt: skip
from rescore.terminal import printable

LABEL = (Column("task"), Column("rescorer"), Column("k", COUNT), Column("p", COUNT))
ALPHA = Column("alpha", PLAIN)
EFFICIENCY = (
    Column("block eff.", NUMBER, "block_efficiency"), Column("95 %", NUMBER_INTERVAL, "block_efficiency")
)  # fmt: skip
GAINS = (Column("gain", GAIN), Column("95 %", GAIN_INTERVAL, "gain"))
OUTCOMES = ("won", "tied", "lost")  # of a step against the unrescored draft
PLAIN_COUNT = Format(str)
NOTE_WIDTH = 110


def results_tables(document: ResultsDocument, *, details: bool = False) -> list[Table]:
    """The table of all results; with `details` also what else there is: quality, acceptance by position, times."""
    results = document.results
    overview = _overview(document, more=not details)
    if not details or not results:
        return [overview]
    found = [overview, _efficiency(results), _quality(results), _acceptance(results)]
    if any(r.latency for r in results):
        found += [_speed(results), _times(results), _divergence(results)]
    return [table for table in found if table.rows]


def _label(r: Result) -> list[str | int]:
    return [r.task, r.rescorer, r.k, r.p]


def unrescored_of(results: Sequence[Result], r: Result) -> Result | None:
    """What the gain of a result is over."""
    return next((o for o in results if o.is_unrescored and (o.task, o.k, o.h) == (r.task, r.k, r.h)), None)


def _overview(document: ResultsDocument, *, more: bool) -> Table:
    """A line for each result, with the columns that hold anything; `more`: there are details to ask for."""
    results = document.results
    if not results:
        return Table((), (), title="no finished examples")
    weighted = any(r.alpha is not None for r in results)
    gains = any(r.gain is not None for r in results)
    shares = {id(r): r.gap_share(unrescored_of(results, r)) for r in results}
    gap = any(share is not None for share in shares.values())
    against = {id(r): None if r.is_unrescored else r.against_unrescored for r in results}
    outcomes = any(against.values())
    live = any(r.latency for r in results)
    apart = _apart(results)
    columns = [
        *LABEL, *(Column(heading, format) for heading, format in apart.values()), *([ALPHA] if weighted else []),
        *EFFICIENCY, *(GAINS if gains else []), *([Column("of the gap", percent(0))] if gap else []),
        *([Column("won", SHARE), Column("lost", SHARE)] if outcomes else []),
        *([Column("speed-up", TIMES)] if live else []),
    ]  # fmt: skip
    rows = [
        [*_label(r), *(getattr(r, name) for name in apart), *([r.alpha] if weighted else []),
         r.block_efficiency, r.block_efficiency_ci95, *([r.gain, r.gain_ci95] if gains else []),
         *([shares[id(r)]] if gap else []),
         *([getattr(against[id(r)], name, None) for name in ("won", "lost")] if outcomes else []),
         *([r.latency and r.latency.speedup] if live else [])]
        for r in results
    ]  # fmt: skip
    told = [
        "block eff. = tokens / steps (1 = no gain, h = ceiling)",
        *(["gain over none with p = 1 in this run"] if gains else []),
        *(["of the gap = share of the way from there to the oracle"] if gap else []),
        *(["won, lost: steps that accepted more, fewer tokens than the unrescored draft would have there"]
          if outcomes else []),
        f"95 % = studentised bootstrap by group (examples of one source; - for fewer than {LEAST_GROUPS} groups)"
        + (", gains paired" if gains else ""),
        *(["speed-up = tokens a second over those of greedy decoding in the same run"] if live else []),
    ]  # fmt: skip
    note = "; ".join(told) + "." + (" --details shows more." if more else "")
    return Table(columns, rows, title=_caption(document, apart), note=textwrap.fill(note, NOTE_WIDTH))


def _apart(results: Sequence[Result]) -> dict[str, tuple[str, Format]]:
    """Heading and format of what the results of one task differ in, so that the caption can't say it."""
    facts = {
        "n": ("examples", PLAIN_COUNT), "groups": ("groups", PLAIN_COUNT), "oracle_block_efficiency": ("oracle", NUMBER)
    }  # fmt: skip
    tasks = {r.task for r in results}
    found = {
        name: fact for name, fact in facts.items() if len({(r.task, getattr(r, name)) for r in results}) > len(tasks)
    }
    if all(r.rescorer == "oracle" for r in results):
        found.pop("oracle_block_efficiency", None)  # it is their block efficiency
    return found


def _caption(document: ResultsDocument, apart: Collection[str]) -> str:
    results, config = document.results, document.config
    most = max(results, key=lambda r: r.p)
    way = f"live decode (p drafts as {most.latency.verify})" if most.latency else "replayed decode"
    h = max(r.h for r in results)
    inputs = config.inputs[results[0].task]
    if inputs.trace:
        made = f"the trace {printable(inputs.trace)}, h = {h}"
    else:
        limits = " or ".join(str(n) for n in sorted({config.traces[r.task]["max_new_tokens"] for r in results}))
        made = f"{printable(inputs.base)} in {inputs.dtype}, h = {h}, up to {limits} new tokens"
    several_k = len({r.k for r in results}) > 1
    lines = {}
    for r in results:
        facts = [] if "n" in apart or "groups" in apart else [f"{r.n} examples of {r.groups} groups"]
        if "oracle_block_efficiency" not in apart and not several_k:
            facts.append(f"oracle {r.oracle_block_efficiency:.3f}")
        lines[r.task] = f"{printable(r.task)}: {', '.join(facts)}" if facts else ""
    return "\n".join([f"{way} of {made}", *filter(None, lines.values()), ""])


def _efficiency(results: Sequence[Result]) -> Table:
    rows = [
        [*_label(r), r.n, r.groups, r.steps, r.tokens, r.block_efficiency_macro, r.oracle_block_efficiency,
         *(getattr(None if r.is_unrescored else r.against_unrescored, name, None) for name in OUTCOMES)]
        for r in results
    ]  # fmt: skip
    columns = [
        *LABEL, Column("examples", PLAIN_COUNT), Column("groups", PLAIN_COUNT), Column("steps", PLAIN_COUNT),
        Column("tokens", PLAIN_COUNT), Column("macro", NUMBER), Column("oracle", NUMBER),
        *(Column(name, SHARE) for name in OUTCOMES),
    ]  # fmt: skip
    note = "macro = mean block efficiency over examples; oracle = that of the best path of the top-k lattice."
    return Table(columns, rows, note=note)


def _quality(results: Sequence[Result]) -> Table:
    """The scores of the outputs beside the share of them that was cut; one line for a task where all have the same."""
    rows = []
    for task in dict.fromkeys(r.task for r in results):
        of_task = [r for r in results if r.task == task and r.quality]
        same = all((r.quality, r.cut_at_limit) == (of_task[0].quality, of_task[0].cut_at_limit) for r in of_task)
        for r in of_task[:1] if same else of_task:
            scores = ", ".join(f"{value:.3f} {metric}" for metric, value in r.quality.items())
            label = [task, "all"] if same and len(of_task) > 1 else [task, f"{r.rescorer}, p = {r.p}"]
            rows.append([*label, scores, r.cut_at_limit])
    note = "cut at limit = outputs that did not come to their end: a score of cut outputs says little about the model."
    columns = [Column("task"), Column("rescorer"), Column("quality of the output"), Column("cut at limit", percent(0))]
    return Table(columns, rows, note=note)


def _acceptance(results: Sequence[Result]) -> Table:
    h = max(r.h for r in results)
    rows: list[list[object]] = []
    for r in results:
        pad, below = [None] * (h - r.h), ["", "", None, None]
        given = ["-" if c is None else NUMBER.show(c) for c in r.conditional]
        rows += [
            [*_label(r), "exactly i (count)", *map(str, r.accepted_histogram[1:]), *pad],
            [*below, "at least i (share)", *map(NUMBER.show, r.marginal), *pad],
            [*below, "i, given i - 1", *given, *pad],
        ]
    columns = [*LABEL, Column("steps that accepted", Format(str)), *(Column(str(i + 1), Format(str)) for i in range(h))]
    return Table(columns, rows, none="")


def _speed(results: Sequence[Result]) -> Table:
    rows = []
    for r in results:
        if (t := r.latency) and r.identical:
            identical = f"{r.identical.identical}/{r.identical.n}"
            rows.append([
                *_label(r), identical, t.tokens_per_second, t.autoregressive_tokens_per_second, t.speedup,
                t.predicted_speedup,
            ])  # fmt: skip
    columns = [
        *LABEL, Column("identical", Format(str)), Column("tok/s", fixed(1)), Column("greedy tok/s", fixed(1)),
        Column("speed-up", TIMES), Column("predicted", TIMES),
    ]  # fmt: skip
    note = (
        "greedy = autoregressive decoding in the same run; identical = outputs equal to it; prefill is apart;\n"
        "predicted = block eff. x greedy ms / (verify + heads + rescore ms)."
    )
    return Table(columns, rows, note=note)


def _times(results: Sequence[Result]) -> Table:
    rows = [
        [*_label(r), t.autoregressive_ms, t.verify_ms, t.heads_ms, t.rescore_ms, t.rescore_p50_ms, t.rescore_p95_ms,
         t.glue_share, t.prefill_ms]
        for r in results if (t := r.latency)
    ]  # fmt: skip
    columns = [
        *LABEL, Column("greedy ms", MILLISECONDS), Column("verify ms", MILLISECONDS), Column("heads ms", MILLISECONDS),
        Column("rescore ms", fixed(2)), Column("p50", fixed(2)), Column("p95", fixed(2)), Column("glue", SHARE),
        Column("prefill ms", fixed(0)),
    ]  # fmt: skip
    note = (
        "ms per step (greedy: per token; prefill: per example); p50 and p95 are of rescore;\n"
        "glue = share of a step that is none of these."
    )
    return Table(columns, rows, note=note)


def _divergence(results: Sequence[Result]) -> Table:
    rows = []
    for r in results:
        if r.divergence:
            earliest = min(r.divergence, key=lambda d: d.position)
            largest = max(d.margin for d in r.divergence)
            differ = f"{len(r.divergence)}/{r.n}"
            rows.append([*_label(r), differ, earliest.position, earliest.margin, largest])
    columns = [
        *LABEL, Column("differ", Format(str)), Column("earliest at", COUNT), Column("margin there", fixed(4)),
        Column("largest margin", fixed(4)),
    ]  # fmt: skip
    note = (
        "outputs that differ from greedy decoding's, the first token that does (from 0), and the greedy logit margin\n"
        "over the runner-up there: near-ties are decided differently in half precision, and hardly ever in float32."
    )
    return Table(columns, rows, note=note)


def tuning_table(sweeps: Sequence[Tuned]) -> Table:
    """Block efficiency by weight, the best one marked, and what it gains over weight 0."""
    alphas = sorted({alpha for tuned in sweeps for alpha in tuned.alphas})
    rows, best = [], []
    for place, t in enumerate(sweeps):
        by_alpha = dict(zip(t.alphas, t.block_efficiency, strict=True))
        gain = by_alpha[t.alpha] / by_alpha[0.0] - 1.0
        groups = len(t.held_out_groups)
        rows.append([t.task, t.rescorer, t.k, t.p, len(t.held_out), groups, *map(by_alpha.get, alphas), gain])
        best.append((place, f"{t.alpha:g}"))
    columns = [
        *LABEL, Column("held out", COUNT), Column("groups", COUNT), *(Column(f"{alpha:g}", NUMBER) for alpha in alphas),
        Column("gain", GAIN),
    ]  # fmt: skip
    note = (
        "block efficiency on the held-out examples by alpha; * the best, which rescore eval --alpha tuned uses;\n"
        "gain = of the best over alpha 0 (the unrescored drafts) at the same k and p."
    )
    return Table(columns, rows, note=note, best=best, none="")


def suite_table(results: Sequence[Result]) -> Table:
    """A line for each task, rescorer and p of a suite; k, h and speed only where they say something."""
    several = [name for name in ("k", "h") if len({getattr(r, name) for r in results}) > 1]
    live = any(r.latency for r in results)
    rows = []
    for r in results:
        against = None if r.is_unrescored else r.against_unrescored
        rows.append([
            r.task, r.rescorer, *(getattr(r, name) for name in several), r.p, r.n, r.groups, r.alpha,
            r.block_efficiency, r.block_efficiency_ci95, r.gain, r.gain_ci95,
            *(getattr(against, name, None) for name in OUTCOMES), r.oracle_block_efficiency,
            *([r.latency and r.latency.speedup] if live else []),
        ])  # fmt: skip
    columns = [
        Column("task"), Column("rescorer"), *(Column(name, COUNT) for name in several), Column("p", COUNT),
        Column("examples", PLAIN_COUNT), Column("groups", PLAIN_COUNT), ALPHA, *EFFICIENCY, *GAINS,
        *(Column(name, SHARE) for name in OUTCOMES), Column("oracle", NUMBER, "oracle_block_efficiency"),
        *([Column("speed-up", TIMES, "speedup")] if live else []),
    ]  # fmt: skip
    return Table(columns, rows)


def results_csv(results: Sequence[Result], *, task: str | None = None, **facts: object) -> Table:
    """Everything that the results of a run say, a line each, for CSV; numbers with all digits.

    `task`: what it is called (default: its name); `facts`: further columns, the same for all.
    """
    h = max(r.h for r in results)
    rows = []
    for r in results:
        quality = "; ".join(f"{name} {value:.4f}" for name, value in r.quality.items())
        t, against = r.latency, r.against_unrescored
        times = ("verify_ms", "heads_ms", "rescore_ms", "autoregressive_ms", "tokens_per_second", "speedup")
        rows.append([
            task or r.task, *map(str, facts.values()), r.rescorer, r.p, r.k, r.h, r.alpha, r.n, r.groups, r.steps,
            r.tokens, r.block_efficiency,
            r.block_efficiency_ci95, r.block_efficiency_macro, r.oracle_block_efficiency, r.gain, r.gain_ci95,
            r.gap_share(unrescored_of(results, r)), *(getattr(against, name, None) for name in OUTCOMES), quality,
            r.cut_at_limit, *(getattr(t, name, None) for name in times), *r.marginal, *[None] * (h - r.h),
        ])  # fmt: skip
    names = (
        "task", *facts, "rescorer", "p", "k", "h", "alpha", "examples", "groups", "steps", "tokens", "block_efficiency",
        "block_efficiency", "block_efficiency_macro", "oracle_block_efficiency", "gain", "gain",
        "oracle_gap_recovered", *OUTCOMES, "quality", "cut_at_limit", "verify_ms", "heads_ms", "rescore_ms",
        "autoregressive_ms", "tokens_per_second", "speedup", *(f"marginal_{i}" for i in range(1, h + 1)),
    )  # fmt: skip
    return Table([Column(name, TEXT, name) for name in names], rows)
