"""Analyses as tables: one for each, with a line that says how to read it."""

from __future__ import annotations

from collections.abc import Sequence

from rescore.acceptance.rules import mark_of
from rescore.runs.tables import OF_SOURCES, PREDICTED, QUALITIES, SOURCES
from rescore.studies.analysis.collect import Findings
from rescore.studies.analysis.curves import OracleCurves, PCurve
from rescore.studies.analysis.drafts import TraceRepetition
from rescore.studies.analysis.heads import Entropies, HeadAcceptance, HeadCalibration, Ranks
from rescore.studies.analysis.runs import Contrast, EfficiencyTable, RescorerAnalysis, RunAnalysis, TableCell
from rescore.studies.analysis.traces import HmaxCorrelation, TraceAnalysis
from rescore.table import (
    ALPHA,
    COUNT,
    EFFICIENCY,
    EXAMPLES,
    GAIN,
    GAINS,
    GROUPS,
    NUMBER,
    RESCORER,
    SHARE,
    TASK,
    TIMES,
    Column,
    Format,
    H,
    K,
    P,
    Table,
    fixed,
    percent,
)  # fmt: skip
from rescore.terminal import printable

HUNDREDTHS = fixed(2)
POSITIONS = Column("positions", COUNT)
REPETITION = (
    Column("drafts", COUNT), Column("equal neighbours", SHARE, field="share"),
    Column("drafts with any", SHARE, field="repeating"), Column("longest run", HUNDREDTHS, field="mean_longest_run"),
)  # fmt: skip


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
    return [
        Table((), (), title=f"{of}{printable(found.name)}: {facts}"),
        *([_trace_repetition(found.repetition)] if found.repetition else []),
        *([_entropy(found.entropy)] if found.entropy else []),
        *(_oracle(found.oracle) if found.oracle else []),
        *([_by_p([found.p_curve])] if found.p_curve else []),
        *([_ranks(found.ranks)] if found.ranks else []),
        *([_acceptance(found.acceptance)] if found.acceptance else []),
        *([_calibration(found.calibration)] if found.calibration else []),
    ]


def _examples(found: TraceAnalysis | RunAnalysis) -> str:
    return f"{found.examples} examples ({found.groups} groups)"


def run_tables(found: RunAnalysis) -> list[Table]:
    """All analyses of one task of a run."""
    title = f"{printable(found.task)}: {_examples(found)}, {found.mode}, h = {found.h}, k = {found.k}"
    tables = [Table((), (), title=title), _outcomes(found.rescorers), _before_after(found.rescorers)]
    if found.by_p:
        tables.append(_by_p(found.by_p))
    tables += [_sources(found.rescorers), _times(found.rescorers)]
    if found.trace:
        tables += trace_tables(found.trace, of="trace of ")
    else:
        tables.append(Table((), (), title="the trace is gone: analyses that read it are left out"))
    return [table for table in tables if table.rows or not table.columns]


def efficiency_by_task(found: EfficiencyTable) -> Table:
    """Rescorers x tasks: block efficiency, gain and weight."""
    columns = [
        RESCORER, H, K, P, *(Column(task, Format(_cell), field=f"cells.{i}") for i, task in enumerate(found.tasks)),
        Column("mean gain", GAIN),
    ]  # fmt: skip
    note = "block efficiency, gain over the unrescored draft, alpha and where it came from."
    return Table.of(columns, found.rows, note=note)


def _cell(cell: TableCell) -> str:
    gain = "" if cell.gain is None else f" {GAIN.show(cell.gain)}"
    alpha = "" if cell.alpha is None else f" a {cell.alpha:g} ({cell.alpha_source})"
    return f"{NUMBER.show(cell.block_efficiency)}{gain}{alpha}"


def h_max(found: HmaxCorrelation) -> Table:
    """h_max and block efficiency by task, and their correlation."""
    r = "too few tasks, or one never varies" if found.pearson is None else HUNDREDTHS.show(found.pearson)
    columns = [Column("task", field="name"), Column("h_max", COUNT), EFFICIENCY[0]]
    return Table.of(columns, found.points, note=f"Pearson's R of h_max and block efficiency, h = {found.h}: {r}")


def contrasts(found: Sequence[Contrast]) -> Table:
    """Rescorers against others, paired by example."""
    other = Column("other's", NUMBER, field="against_block_efficiency")
    return Table.of([TASK, RESCORER, Column("against"), P, EXAMPLES, GROUPS, EFFICIENCY[0], other, *GAINS], found)


def _trace_repetition(found: TraceRepetition) -> Table:
    kinds = {
        "unrescored, at its steps": found.decode,
        "unrescored, every position": found.every_position,
        "output, every position": found.output,
    }
    rows = [[kind, *(column.value(of) for column in REPETITION)] for kind, of in kinds.items()]
    return Table([Column("repetition"), *REPETITION], rows)


def _before_after(rescorers: Sequence[RescorerAnalysis]) -> Table:
    rows: list[list[object]] = []
    for r in rescorers:
        if r.repetition:
            before, after = r.repetition.before, r.repetition.after
            rows.append([r.rescorer, str(r.p), "before", *(column.value(before) for column in REPETITION)])
            rows.append(["", "", "after", *(column.value(after) for column in REPETITION)])
    note = "before: the unrescored drafts at the rescorer's steps; after: the drafts that won."
    columns = [Column("repetition"), Column("p", Format(str)), Column("", Format(str)), *REPETITION]
    return Table(columns, rows, note=note)


def _entropy(found: Entropies) -> Table:
    levels = (
        Column(percent(0).show(level), HUNDREDTHS, field=f"quantiles.{i}") for i, level in enumerate(found.levels)
    )
    columns = [
        Column("entropy of head", field="head"), Column("mean", HUNDREDTHS), Column("std", HUNDREDTHS), *levels
    ]  # fmt: skip
    note = f"entropy in nats over {found.positions} positions; h_max = {found.h_max or '-'}"
    return Table.of(columns, found.heads, note=note)


def _oracle(found: OracleCurves) -> list[Table]:
    heads = range(len(found.by_heads_unrescored))
    plain = found.unrescored.block_efficiency
    rows = [
        [str(k), e.block_efficiency, e.block_efficiency_ci95, gains[-1], *refined]
        for k, e, refined, gains in zip(found.ks, found.by_k, found.by_refined, found.gain_by_refined, strict=True)
    ]
    columns = [
        Column("oracle, k"), *EFFICIENCY, Column("gain", GAIN), *(Column(f"{m} refined", NUMBER) for m in heads)
    ]  # fmt: skip
    note = (
        "m refined: the oracle chooses in slots 2..m+1, the rest is arg-max; unrescored "
        f"{'-' if plain is None else NUMBER.show(plain)}"
    )
    lengths = [["unrescored", *found.by_heads_unrescored]]
    lengths += [[f"k = {k}", *row] for k, row in zip(found.ks, found.by_heads_oracle, strict=True)]
    by_length = [Column("oracle by block length"), *(Column(str(head + 1), NUMBER) for head in heads)]
    return [Table(columns, rows, note=note), Table(by_length, lengths)]


def _by_p(curves: Sequence[PCurve]) -> Table:
    rows = [
        [curve.rescorer, p, alpha, e.block_efficiency, e.block_efficiency_ci95]
        for curve in curves
        for p, alpha, e in zip(curve.ps, curve.alphas, curve.points, strict=True)
    ]
    return Table([Column(f"p best drafts, k = {curves[0].k}"), P, ALPHA, *EFFICIENCY], rows)


def _ranks(found: Ranks) -> Table:
    columns = [
        Column("recall of head", field="head"), POSITIONS,
        *(Column(f"@{k}", NUMBER, field=f"recall.{i}") for i, k in enumerate(found.ks)),
        Column("1 / rank", NUMBER, field="mean_reciprocal_rank"),
    ]  # fmt: skip
    note = "share of positions with the base LM's choice among the first k of the head"
    return Table.of(columns, found.heads, note=note)


def _acceptance(found: Sequence[HeadAcceptance]) -> Table:
    columns = [
        Column("acceptance of head", field="head"), POSITIONS, Column("right", NUMBER, field="unconditional"),
        Column("reached", COUNT), Column("right if reached", NUMBER, field="conditional"),
        Column("steps with it", NUMBER, field="marginal"), Column("given before", NUMBER, field="conditional_decode"),
    ]  # fmt: skip
    note = "right, reached: every position; the last two: steps of the unrescored decode"
    return Table.of(columns, found, note=note)


def _calibration(found: Sequence[HeadCalibration]) -> Table:
    columns = [
        Column("calibration of head", field="head"), POSITIONS, Column("confidence", NUMBER),
        Column("accuracy", NUMBER), Column("ECE", NUMBER), Column("Brier", NUMBER),
    ]  # fmt: skip
    note = f"{len(found[0].bins)} bins (--json has them); head 1 is right by definition"
    return Table.of(columns, found, note=note)


def _outcomes(rescorers: Sequence[RescorerAnalysis]) -> Table:
    def steps(name: str) -> Column:
        def share(r: RescorerAnalysis) -> float | None:
            of = r.outcomes
            return getattr(of, name) / of.steps if of and of.steps else None

        return Column(name, SHARE, field=share)

    causes = {
        "repair": "repair_share", "regress": "regress_share", "fewer rep.": "fewer_repeats_share",
        "more rep.": "more_repeats_share",
    }  # fmt: skip
    columns = [
        RESCORER, P, ALPHA, *(Column(c.heading, c.format, field=f"efficiency.{c.field or c.name}") for c in EFFICIENCY),
        GAINS[0], *map(steps, ("won", "tied", "lost")),
        *(Column(heading, SHARE, field=f"outcomes.{name}") for heading, name in causes.items()),
    ]  # fmt: skip
    note = (
        "won, tied, lost: steps against the unrescored draft there; repair: wins where its first wrong token repeats\n"
        "the one before; regress: losses where the rescored draft's does; fewer, more rep.: of wins and losses, those\n"
        "whose draft has fewer, more equal neighbours."
    )
    return Table.of(columns, rescorers, note=note)


def _sources(rescorers: Sequence[RescorerAnalysis]) -> Table:
    rows = [[r.rescorer, r.p, *(column.value(share) for column in SOURCES)] for r in rescorers for share in r.sources]
    return Table([RESCORER, P, *SOURCES], rows, title="where accepted tokens came from", note=OF_SOURCES)


def _times(rescorers: Sequence[RescorerAnalysis]) -> Table:
    milliseconds = {
        "greedy token": "autoregressive_ms", "verify": "verify_ms", "draft": "draft_ms", "rescore": "rescore_ms",
        "p50": "rescore_p50_ms", "p95": "rescore_p95_ms",
    }  # fmt: skip
    columns = [
        Column("ms", field="rescorer"), P,
        *(Column(heading, HUNDREDTHS, field=f"wallclock.{name}") for heading, name in milliseconds.items()),
        Column("speed-up", TIMES, field="wallclock.speedup"),
        PREDICTED, *(QUALITIES if any(mark_of(r.rescorer) for r in rescorers) else ()),
    ]  # fmt: skip
    return Table.of(columns, [r for r in rescorers if r.wallclock or r.predicted_speedup])
