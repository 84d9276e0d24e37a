"""Analyses as tables: one for each, with a line that says how to read it."""

from __future__ import annotations

from collections.abc import Sequence

from rescore.studies.analysis.collect import Findings
from rescore.studies.analysis.records import (
    Contrast,
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
)  # fmt: skip
from rescore.table import (
    COUNT,
    GAIN,
    GAIN_INTERVAL,
    NUMBER,
    NUMBER_INTERVAL,
    PLAIN,
    SHARE,
    TIMES,
    Column,
    Format,
    Table,
    fixed,
    percent,
)  # fmt: skip
from rescore.terminal import printable

HUNDREDTHS = fixed(2)
NUMERAL = Format(str)
EFFICIENCY = (Column("block eff.", NUMBER), Column("95 %", NUMBER_INTERVAL))


def findings_tables(found: Findings) -> list[Table]:
    """Everything that was found in the folders."""
    tables = [table for trace in found.traces for table in trace_tables(trace)]
    tables += [table for run in found.runs for table in run_tables(run)]
    if found.table:
        tables.append(efficiency_by_task(found.table))
    if found.contrasts:
        tables.append(contrasts(found.contrasts))
    if len(found.h_max.points) > 1:
        tables.append(h_max(found.h_max))
    return tables


def trace_tables(found: TraceAnalysis, *, of: str = "") -> list[Table]:
    """All analyses of a trace that there are; the first has its facts as its title."""
    facts = f"{_examples(found)}, {found.positions} positions, h = {found.h}, K = {found.entries}"
    tables = [
        *([_trace_repetition(found.repetition)] if found.repetition else []),
        *([_entropy(found.entropy)] if found.entropy else []),
        *(_oracle(found.oracle) if found.oracle else []),
        *([_by_p([found.p_curve])] if found.p_curve else []),
        *([_ranks(found.ranks)] if found.ranks else []),
        *([_acceptance(found.acceptance)] if found.acceptance else []),
        *([_calibration(found.calibration)] if found.calibration else []),
    ]
    return [Table((), (), title=f"{of}{printable(found.name)}: {facts}"), *tables]


def _examples(found: TraceAnalysis | RunAnalysis) -> str:
    return f"{found.examples} examples ({found.groups} groups)"


def run_tables(found: RunAnalysis) -> list[Table]:
    """All analyses of one task of a run."""
    title = f"{printable(found.task)}: {_examples(found)}, {found.mode}, h = {found.h}, k = {found.k}"
    tables = [Table((), (), title=title), _outcomes(found.rescorers), _before_after(found.rescorers)]
    if found.by_p:
        tables.append(_by_p(found.by_p))
    tables.append(_times(found.rescorers))
    if found.trace:
        tables += trace_tables(found.trace, of="trace of ")
    else:
        tables.append(Table((), (), title="the trace is gone: analyses that read it are left out"))
    return [table for table in tables if table.rows or not table.columns]


def efficiency_by_task(found: EfficiencyTable) -> Table:
    """Rescorers x tasks: block efficiency, gain and weight."""
    rows = []
    for row in found.rows:
        cells = []
        for cell in row.cells:
            gain = "" if cell is None or cell.gain is None else f" {GAIN.show(cell.gain)}"
            alpha = "" if cell is None or cell.alpha is None else f" a {cell.alpha:g} ({cell.alpha_source})"
            cells.append(None if cell is None else f"{NUMBER.show(cell.block_efficiency)}{gain}{alpha}")
        rows.append([row.rescorer, row.h, row.k, row.p, *cells, row.mean_gain])
    columns = [
        Column("rescorer"), Column("h", COUNT), Column("k", COUNT), Column("p", COUNT),
        *(Column(task, NUMERAL) for task in found.tasks), Column("mean gain", GAIN),
    ]  # fmt: skip
    return Table(columns, rows, note="block efficiency, gain over the unrescored draft, alpha and where it came from.")


def h_max(found: HmaxCorrelation) -> Table:
    """h_max and block efficiency by task, and their correlation."""
    r = "too few tasks, or one never varies" if found.pearson is None else f"{found.pearson:.2f}"
    columns = [Column("task"), Column("h_max", COUNT), Column("block eff.", NUMBER)]
    rows = [[p.name, p.h_max, p.block_efficiency] for p in found.points]
    return Table(columns, rows, note=f"Pearson's R of h_max and block efficiency, h = {found.h}: {r}")


def contrasts(found: Sequence[Contrast]) -> Table:
    """Rescorers against others, paired by example."""
    columns = [
        Column("task"), Column("rescorer"), Column("against"), Column("p", COUNT), Column("examples", COUNT),
        Column("groups", COUNT), Column("block eff.", NUMBER), Column("other's", NUMBER), Column("gain", GAIN),
        Column("95 %", GAIN_INTERVAL),
    ]  # fmt: skip
    rows = [
        [c.task, c.rescorer, c.against, c.p, c.n, c.groups, c.block_efficiency, c.against_block_efficiency, c.gain,
         c.gain_ci95]
        for c in found
    ]  # fmt: skip
    return Table(columns, rows)


def _heads(h: int) -> list[Column]:
    return [Column(str(head), NUMBER) for head in range(1, h + 1)]


REPETITION = (
    Column("drafts", NUMERAL), Column("equal neighbours", SHARE), Column("drafts with any", SHARE),
    Column("longest run", HUNDREDTHS),
)  # fmt: skip


def _repetition_row(found: Repetition) -> list[float | None]:
    return [found.drafts, found.share, found.repeating, found.mean_longest_run]


def _trace_repetition(found: TraceRepetition) -> Table:
    rows = [
        ["unrescored, at its steps", *_repetition_row(found.decode)],
        ["unrescored, every position", *_repetition_row(found.every_position)],
        ["output, every position", *_repetition_row(found.output)],
    ]
    return Table([Column("repetition"), *REPETITION], rows)


def _before_after(rescorers: Sequence[RescorerAnalysis]) -> Table:
    rows: list[list[object]] = []
    for r in rescorers:
        if r.repetition:
            rows.append([r.rescorer, str(r.p), "before", *_repetition_row(r.repetition.before)])
            rows.append(["", "", "after", *_repetition_row(r.repetition.after)])
    note = "before: the unrescored drafts at the rescorer's steps; after: the drafts that won."
    return Table([Column("repetition"), Column("p", NUMERAL), Column("", NUMERAL), *REPETITION], rows, note=note)


def _entropy(found: Entropies) -> Table:
    rows = [
        [str(e.head), e.mean, e.std, *(e.quantiles or [None] * len(found.levels))] for e in found.heads
    ]  # fmt: skip
    columns = [
        Column("entropy of head"), Column("mean", HUNDREDTHS), Column("std", HUNDREDTHS),
        *(Column(percent(0).show(level), HUNDREDTHS) for level in found.levels),
    ]  # fmt: skip
    note = f"entropy in nats over {found.positions} positions; h_max = {found.h_max or '-'}"
    return Table(columns, rows, note=note)


def _oracle(found: OracleCurves) -> list[Table]:
    h = len(found.by_heads_unrescored)
    plain = found.unrescored.block_efficiency
    rows = [
        [str(k), e.block_efficiency, e.block_efficiency_ci95, row[-1], *refined]
        for k, e, refined, row in zip(found.ks, found.by_k, found.by_refined, found.gain_by_refined, strict=True)
    ]
    columns = [
        Column("oracle, k"), *EFFICIENCY, Column("gain", GAIN), *(Column(f"{m} refined", NUMBER) for m in range(h))
    ]  # fmt: skip
    note = (
        "m refined: the oracle chooses in slots 2..m+1, the rest is arg-max; unrescored "
        f"{'-' if plain is None else NUMBER.show(plain)}"
    )
    heads = [["unrescored", *found.by_heads_unrescored]]
    heads += [[f"k = {k}", *row] for k, row in zip(found.ks, found.by_heads_oracle, strict=True)]
    return [Table(columns, rows, note=note), Table([Column("oracle by block length"), *_heads(h)], heads)]


def _by_p(curves: Sequence[PCurve]) -> Table:
    rows = [
        [curve.rescorer, p, alpha, e.block_efficiency, e.block_efficiency_ci95]
        for curve in curves
        for p, alpha, e in zip(curve.ps, curve.alphas, curve.points, strict=True)
    ]
    title = f"p best drafts, k = {curves[0].k}"
    return Table([Column(title), Column("p", COUNT), Column("alpha", PLAIN), *EFFICIENCY], rows)


def _ranks(found: Ranks) -> Table:
    rows = [[str(r.head), r.positions, *r.recall, r.mean_reciprocal_rank] for r in found.heads]
    columns = [
        Column("recall of head"), Column("positions", NUMERAL), *(Column(f"@{k}", NUMBER) for k in found.ks),
        Column("1 / rank", NUMBER),
    ]  # fmt: skip
    note = "share of positions with the base LM's choice among the first k of the head"
    return Table(columns, rows, note=note)


def _acceptance(found: Sequence[HeadAcceptance]) -> Table:
    rows = [
        [str(a.head), a.positions, a.unconditional, a.reached, a.conditional, a.marginal, a.conditional_decode]
        for a in found
    ]
    columns = [
        Column("acceptance of head"), Column("positions", NUMERAL), Column("right", NUMBER), Column("reached", NUMERAL),
        Column("right if reached", NUMBER), Column("steps with it", NUMBER), Column("given before", NUMBER),
    ]  # fmt: skip
    note = "right, reached: every position; the last two: steps of the unrescored decode"
    return Table(columns, rows, note=note)


def _calibration(found: Sequence[HeadCalibration]) -> Table:
    rows = [[str(c.head), c.positions, c.confidence, c.accuracy, c.ece, c.brier] for c in found]
    columns = [
        Column("calibration of head"), Column("positions", NUMERAL), Column("confidence", NUMBER),
        Column("accuracy", NUMBER), Column("ECE", NUMBER), Column("Brier", NUMBER),
    ]  # fmt: skip
    return Table(columns, rows, note=f"{len(found[0].bins)} bins (--json has them); head 1 is right by definition")


def _outcomes(rescorers: Sequence[RescorerAnalysis]) -> Table:
    rows = []
    for r in rescorers:
        row = [
            r.rescorer, r.p, r.alpha, r.efficiency.block_efficiency, r.efficiency.block_efficiency_ci95, r.gain
        ]  # fmt: skip
        o = r.outcomes
        if o is None:
            rows.append([*row, *[None] * 7])
            continue
        shares = [n / o.steps if o.steps else None for n in (o.won, o.tied, o.lost)]
        rows.append([
            *row, *shares, o.repair_share, o.regress_share, o.fewer_repeats_share, o.more_repeats_share
        ])  # fmt: skip
    shares_of = ("won", "tied", "lost", "repair", "regress", "fewer rep.", "more rep.")
    columns = [
        Column("rescorer"), Column("p", COUNT), Column("alpha", PLAIN), *EFFICIENCY, Column("gain", GAIN),
        *(Column(name, SHARE) for name in shares_of),
    ]  # fmt: skip
    note = (
        "won, tied, lost: steps against the unrescored draft there; repair: wins where its first wrong token repeats\n"
        "the one before; regress: losses where the rescored draft's does; fewer, more rep.: of wins and losses, those\n"
        "whose draft has fewer, more equal neighbours."
    )
    return Table(columns, rows, note=note)


def _times(rescorers: Sequence[RescorerAnalysis]) -> Table:
    rows = [
        [r.rescorer, r.p, t.autoregressive_ms, t.verify_ms, t.heads_ms, t.rescore_ms, t.rescore_p50_ms,
         t.rescore_p95_ms, t.speedup, t.predicted_speedup]
        for r in rescorers if (t := r.wallclock)
    ]  # fmt: skip
    columns = [
        Column("ms"), Column("p", COUNT),
        *(Column(name, HUNDREDTHS) for name in ("greedy token", "verify", "heads", "rescore", "p50", "p95")),
        Column("speed-up", TIMES), Column("predicted", TIMES),
    ]  # fmt: skip
    return Table(columns, rows)
