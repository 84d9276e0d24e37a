"""Analyses as plain text for the terminal: one titled table each, with a line that says how to read it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rescore.report.tables import table
from rescore.studies.analysis.collect import Findings
from rescore.studies.analysis.records import (
    Contrast,
    Efficiency,
    EfficiencyTable,
    Entropies,
    HeadAcceptance,
    HeadCalibration,
    HmaxCorrelation,
    OracleCurves,
    PCurve,
    Ranks,
    Repetition,
    RescorerAnalysis,
    RunAnalysis,
    TraceAnalysis,
    TraceRepetition,
)
from rescore.terminal import printable


def findings_text(found: Findings) -> str:
    """Everything that was found in the folders."""
    parts = [*map(trace_text, found.traces), *map(run_text, found.runs)]
    if found.table:
        parts.append(table_text(found.table))
    if found.contrasts:
        parts.append(contrast_text(found.contrasts))
    if len(found.h_max.points) > 1:
        parts.append(h_max_text(found.h_max))
    return "\n\n".join(parts)


def trace_text(found: TraceAnalysis) -> str:
    """All analyses of a trace that there are."""
    facts = f"{_examples(found)}, {found.positions} positions, h = {found.h}, K = {found.entries}"
    title = f"{printable(found.name)}: {facts}"
    parts = [title]
    if found.repetition:
        parts.append(_trace_repetition(found.repetition))
    if found.entropy:
        parts.append(_entropy(found.entropy))
    if found.oracle:
        parts.append(_oracle(found.oracle))
    if found.p_curve:
        parts.append(_by_p([found.p_curve]))
    if found.ranks:
        parts.append(_ranks(found.ranks))
    if found.acceptance:
        parts.append(_acceptance(found.acceptance))
    if found.calibration:
        parts.append(_calibration(found.calibration))
    return "\n\n".join(parts)


def _examples(found: TraceAnalysis | RunAnalysis) -> str:
    return f"{found.examples} examples ({found.groups} groups)"


def run_text(found: RunAnalysis) -> str:
    """All analyses of one task of a run."""
    parts = [f"{printable(found.task)}: {_examples(found)}, {found.mode}, h = {found.h}, k = {found.k}"]
    parts += [part for part in (_outcomes(found.rescorers), _before_after(found.rescorers)) if part]
    if found.by_p:
        parts.append(_by_p(found.by_p))
    if times := _times(found.rescorers):
        parts.append(times)
    if found.trace:
        parts.append("trace of " + trace_text(found.trace))
    else:
        parts.append("the trace is gone: analyses that read it are left out")
    return "\n\n".join(parts)


def table_text(found: EfficiencyTable) -> str:
    """Rescorers x tasks: block efficiency, gain and weight."""
    rows = []
    for row in found.rows:
        cells = []
        for cell in row.cells:
            gain = "" if cell is None or cell.gain is None else f" {cell.gain:+.1%}"
            alpha = "" if cell is None or cell.alpha is None else f" a {cell.alpha:g} ({cell.alpha_source})"
            cells.append("-" if cell is None else f"{cell.block_efficiency:.3f}{gain}{alpha}")
        rows.append([row.rescorer, str(row.h), str(row.k), str(row.p), *cells, _percent(row.mean_gain, sign=True)])
    note = "block efficiency, gain over the unrescored draft, alpha and where it came from."
    return table(["rescorer", "h", "k", "p", *found.tasks, "mean gain"], rows) + "\n" + note


def h_max_text(found: HmaxCorrelation) -> str:
    """h_max and block efficiency by task, and their correlation."""
    rows = [[p.name, str(p.h_max), f"{p.block_efficiency:.3f}"] for p in found.points]
    r = "too few tasks, or one never varies" if found.pearson is None else f"{found.pearson:.2f}"
    return (
        table(["task", "h_max", "block eff."], rows)
        + f"\nPearson's R of h_max and block efficiency, h = {found.h}: {r}"
    )


def contrast_text(found: Sequence[Contrast]) -> str:
    """Rescorers against others, paired by example."""
    rows = [
        [
            c.task, c.rescorer, c.against, str(c.p), str(c.n), str(c.groups), f"{c.block_efficiency:.3f}",
            f"{c.against_block_efficiency:.3f}", f"{c.gain:+.1%}",
            "-" if c.gain_ci95 is None else "{:+.1%} to {:+.1%}".format(*c.gain_ci95),
        ]
        for c in found
    ]  # fmt: skip
    header = ["task", "rescorer", "against", "p", "examples", "groups", "block eff.", "other's", "gain", "95 %"]
    return table(header, rows, text_columns=3)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None, *, sign: bool = False) -> str:
    return "-" if value is None else f"{value:{'+' if sign else ''}.1%}"


def _numbers(values: Iterable[float | None], digits: int = 3) -> list[str]:
    return [_number(value, digits) for value in values]


def _heads(h: int) -> list[str]:
    return [str(head) for head in range(1, h + 1)]


def _interval(found: Efficiency) -> str:
    interval = found.block_efficiency_ci95
    return "-" if interval is None else "{:.3f}-{:.3f}".format(*interval)


def _repetition_row(label: Sequence[str], found: Repetition) -> list[str]:
    run = _number(found.mean_longest_run, 2)
    return [*label, str(found.drafts), _percent(found.share), _percent(found.repeating), run]


REPETITION = ["drafts", "equal neighbours", "drafts with any", "longest run"]


def _trace_repetition(found: TraceRepetition) -> str:
    rows = [
        _repetition_row(["unrescored, at its steps"], found.decode),
        _repetition_row(["unrescored, every position"], found.every_position),
        _repetition_row(["output, every position"], found.output),
    ]
    return table(["repetition", *REPETITION], rows)


def _before_after(rescorers: Sequence[RescorerAnalysis]) -> str:
    rows = []
    for r in rescorers:
        if r.repetition:
            rows.append(_repetition_row([r.rescorer, str(r.p), "before"], r.repetition.before))
            rows.append(_repetition_row(["", "", "after"], r.repetition.after))
    if not rows:
        return ""
    note = "before: the unrescored drafts at the rescorer's steps; after: the drafts that won."
    return table(["repetition", "p", "", *REPETITION], rows) + "\n" + note


def _entropy(found: Entropies) -> str:
    levels = [f"{level:.0%}" for level in found.levels]
    rows = [
        [str(e.head), _number(e.mean, 2), _number(e.std, 2), *(_numbers(e.quantiles, 2) or ["-"] * len(levels))]
        for e in found.heads
    ]
    note = f"entropy in nats over {found.positions} positions; h_max = {found.h_max or '-'}"
    return table(["entropy of head", "mean", "std", *levels], rows) + "\n" + note


def _oracle(found: OracleCurves) -> str:
    h = len(found.by_heads_unrescored)
    plain = found.unrescored.block_efficiency
    rows = [
        [str(k), _number(e.block_efficiency), _interval(e), _percent(row[-1], sign=True), *_numbers(refined)]
        for k, e, refined, row in zip(found.ks, found.by_k, found.by_refined, found.gain_by_refined, strict=True)
    ]
    header = ["oracle, k", "block eff.", "95 %", "gain", *(f"{m} refined" for m in range(h))]
    heads = [["unrescored", *_numbers(found.by_heads_unrescored)]]
    heads += [[f"k = {k}", *_numbers(row)] for k, row in zip(found.ks, found.by_heads_oracle, strict=True)]
    note = f"m refined: the oracle chooses in slots 2..m+1, the rest is arg-max; unrescored {_number(plain)}"
    return table(header, rows) + "\n" + note + "\n\n" + table(["oracle by block length", *_heads(h)], heads)


def _by_p(curves: Sequence[PCurve]) -> str:
    rows = [
        [curve.rescorer, str(p), "-" if alpha is None else f"{alpha:g}", _number(e.block_efficiency), _interval(e)]
        for curve in curves
        for p, alpha, e in zip(curve.ps, curve.alphas, curve.points, strict=True)
    ]
    return table([f"p best drafts, k = {curves[0].k}", "p", "alpha", "block eff.", "95 %"], rows)


def _ranks(found: Ranks) -> str:
    rows = [[str(r.head), str(r.positions), *_numbers(r.recall), _number(r.mean_reciprocal_rank)] for r in found.heads]
    header = ["recall of head", "positions", *(f"@{k}" for k in found.ks), "1 / rank"]
    return table(header, rows) + "\nshare of positions with the base LM's choice among the first k of the head"


def _acceptance(found: Sequence[HeadAcceptance]) -> str:
    rows = [
        [
            str(a.head), str(a.positions), _number(a.unconditional), str(a.reached), _number(a.conditional),
            _number(a.marginal), _number(a.conditional_decode),
        ]
        for a in found
    ]  # fmt: skip
    header = [
        "acceptance of head",
        "positions",
        "right",
        "reached",
        "right if reached",
        "steps with it",
        "given before",
    ]
    return table(header, rows) + "\nright, reached: every position; the last two: steps of the unrescored decode"


def _calibration(found: Sequence[HeadCalibration]) -> str:
    rows = [[str(c.head), str(c.positions), *_numbers((c.confidence, c.accuracy, c.ece, c.brier))] for c in found]
    header = ["calibration of head", "positions", "confidence", "accuracy", "ECE", "Brier"]
    bins = len(found[0].bins)
    return table(header, rows) + f"\n{bins} bins (--json has them); head 1 is right by definition"


def _outcomes(rescorers: Sequence[RescorerAnalysis]) -> str:
    rows = []
    for r in rescorers:
        gain, alpha = _percent(r.gain, sign=True), "-" if r.alpha is None else f"{r.alpha:g}"
        row = [r.rescorer, str(r.p), alpha, _number(r.efficiency.block_efficiency), _interval(r.efficiency), gain]
        o = r.outcomes
        if o is None:
            rows.append([*row, *["-"] * 7])
            continue
        shares = [_percent(n / o.steps if o.steps else None) for n in (o.won, o.tied, o.lost)]
        causes = (o.repair_share, o.regress_share, o.fewer_repeats_share, o.more_repeats_share)
        rows.append([*row, *shares, *(_percent(s) for s in causes)])
    header = [
        "rescorer", "p", "alpha", "block eff.", "95 %", "gain", "won", "tied", "lost", "repair", "regress",
        "fewer rep.", "more rep.",
    ]  # fmt: skip
    note = (
        "won, tied, lost: steps against the unrescored draft there; repair: wins where its first wrong token repeats\n"
        "the one before; regress: losses where the rescored draft's does; fewer, more rep.: of wins and losses, those\n"
        "whose draft has fewer, more equal neighbours."
    )
    return table(header, rows) + "\n" + note


def _times(rescorers: Sequence[RescorerAnalysis]) -> str:
    rows = []
    for r in rescorers:
        if (t := r.wallclock) is None:
            continue
        steps = (t.autoregressive_ms, t.verify_ms, t.heads_ms, t.rescore_ms, t.rescore_p50_ms, t.rescore_p95_ms)
        speed = "-" if t.predicted_speedup is None else f"{t.predicted_speedup:.2f}x"
        rows.append([r.rescorer, str(r.p), *_numbers(steps, 2), f"{t.speedup:.2f}x", speed])
    if not rows:
        return ""
    header = ["ms", "p", "greedy token", "verify", "heads", "rescore", "p50", "p95", "speed-up", "predicted"]
    return table(header, rows)
