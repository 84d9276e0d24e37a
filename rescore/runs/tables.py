"""What was evaluated, as tables: one that says it all at a glance, and the details."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from rescore.bootstrap import LEAST_GROUPS
from rescore.runs.records import Result, ResultsDocument, SourceShare, Tuned
from rescore.table import (
    ALPHA,
    COUNT,
    EFFICIENCY,
    EXAMPLES,
    GAIN,
    GAINS,
    GROUPS,
    MILLISECONDS,
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
    interval,
    percent,
)  # fmt: skip
from rescore.terminal import printable

if TYPE_CHECKING:
    from rescore.rescorers.joint_weights import JointFit

LABEL = (TASK, RESCORER, K, P)
ORACLE = Column("oracle", NUMBER, "oracle_block_efficiency")
TOKENS_PER_SECOND = Column("tok/s", fixed(1), field="latency.tokens_per_second")
GREEDY = Column("greedy tok/s", fixed(1), field="latency.autoregressive_tokens_per_second")
SPEEDUP = Column("speed-up", TIMES, "speedup", "latency.speedup")
SPEEDUPS = (SPEEDUP, Column("95 %", interval(TIMES), "speedup", "latency.speedup_ci95"))
IDENTICAL = Column("identical", Format(lambda i: f"{i.identical}/{i.n}"))
PREDICTED = Column("predicted", TIMES, "predicted_speedup")
CUT = Column("cut at limit", percent(0))
QUALITIES = (  # beside every number of outputs that are not greedy decoding's
    Column("quality", Format(str), field=lambda r: _scores(r.quality)),
    Column("without drafts", Format(str), field=lambda r: _scores(r.autoregressive_quality)),
    CUT,
)
OUTCOMES = ("won", "tied", "lost")  # of a step against the unrescored draft
SOURCES = (Column("source"), Column("proposed", SHARE), Column("only it", SHARE, "only"), Column("alone", NUMBER))
OF_SOURCES = (
    "proposed: of the accepted drafted tokens (all but each step's first), those that the source had proposed; only\n"
    "it: that no other one had; alone: block efficiency of the source's own best draft where this run's steps began."
)
NOTE_WIDTH = 110


def results_tables(document: ResultsDocument, *, details: bool = False) -> list[Table]:
    """The table of all results; with `details` also what else there is: quality, acceptance by position, times."""
    results = document.results
    overview = _overview(document, more=not details)
    if not details or not results:
        return [overview]
    tables = [overview, _efficiency(results), _sources(results), _quality(results), _acceptance(results)]
    if any(r.latency for r in results):
        tables += [_speed(results), _times(results), divergence_table(results)]
    return [table for table in tables if table.rows]


def unrescored_of(results: Sequence[Result], r: Result) -> Result | None:
    """What the gain of a result is over."""
    same = (r.task, r.k, r.h, r.mark)
    return next((o for o in results if o.is_unrescored and (o.task, o.k, o.h, o.mark) == same), None)


def _gap_share(results: Sequence[Result]) -> Column:
    return Column("of the gap", percent(0), field=lambda r: r.gap_share(unrescored_of(results, r)))


def outcome(name: str) -> Column:
    """A share of the steps; None for the unrescored drafts themselves."""
    return Column(name, SHARE, field=lambda r: getattr(None if r.is_unrescored else r.against_unrescored, name, None))


def _overview(document: ResultsDocument, *, more: bool) -> Table:
    """A line for each result, with the columns that hold anything; `more`: there are details to ask for."""
    results = document.results
    if not results:
        return Table((), (), title="no finished examples")

    def filled(*columns: Column) -> Sequence[Column]:
        return columns if any(columns[0].value(r) is not None for r in results) else ()

    apart = _apart(results)
    columns = [
        *LABEL, *apart, *filled(ALPHA), *EFFICIENCY, *filled(*GAINS), *filled(_gap_share(results)),
        *filled(outcome("won"), outcome("lost")), *filled(SPEEDUP),
        *filled(PREDICTED), *(QUALITIES if document.config.acceptance != "greedy" else ()),
    ]  # fmt: skip
    shown = {column.heading for column in columns}
    live = [r.identical for r in results if r.identical]
    same, outputs = (sum(getattr(each, name) for each in live) for name in ("identical", "n"))
    notes = {
        "block eff.": f"block eff. = tokens / steps (1 = no gain, {_ceiling(results)})",
        "gain": "gain over none with p = 1 in this run",
        "of the gap": f"of the gap = share of the way from there to the oracle{_of_drafters(results)}",
        "won": "won, lost: steps that accepted more, fewer tokens than the unrescored draft would have there",
        "95 %": f"95 % = studentised bootstrap by group (examples of one source; - for fewer than {LEAST_GROUPS} "
        "groups)" + (", gains paired" if "gain" in shown else ""),
        "speed-up": f"speed-up = tokens a second over those of {_baseline(document)} in the same run"
        + (f", to which {same} of {outputs} outputs are identical" if outputs else ""),
        "quality": f"quality = mean scores of the outputs, and of those of {_baseline(document)}; cut at limit = "
        "outputs that did not come to their end",
        "predicted": f"predicted = that speed-up by the costs of a step {_costs_of(document)}",
    }
    note = "; ".join(notes[name] for name in notes if name in shown) + "." + (" --details shows more." if more else "")
    return Table.of(
        columns, results, title=_caption(document, apart), note=textwrap.fill(note, NOTE_WIDTH, break_on_hyphens=False)
    )


def _baseline(document: ResultsDocument) -> str:
    return "drawing token by token" if document.config.sampled else "greedy decoding"


def _scores(quality: Mapping[str, float] | None) -> str | None:
    return ", ".join(f"{NUMBER.show(value)} {metric}" for metric, value in quality.items()) if quality else None


def _costs_of(document: ResultsDocument) -> str:
    """What the speed-ups are predicted for, and by what time of the rescorers that were not measured they are not."""
    lacking = any(r.predicted_speedup is None for r in document.results)
    of = "; ".join(dict.fromkeys(f"in {costs.dtype} on {costs.machine}" for costs in document.config.costs.values()))
    return printable(of) + (" (- where these lack the time of the rescorer)" if lacking else "")


def _ceiling(results: Sequence[Result]) -> str:
    """What block efficiencies can't be above: h, where no drafts are longer than the heads' blocks."""
    beyond: dict[int, list[str]] = {}
    for r in results:
        if r.longest not in (1, r.h) and r.rescorer not in (of := beyond.setdefault(r.longest, [])):
            of.append(r.rescorer)
    if not beyond:
        return "h = ceiling"
    by_h = any(r.longest == r.h > 1 for r in results)
    if len(beyond) == 1 and not by_h:
        return f"ceiling: {next(iter(beyond))}"
    others = ", ".join(f"{longest} of {', '.join(of)}" for longest, of in beyond.items())
    return f"ceiling: h, but {others}" if by_h else f"ceiling: {others}"


def _of_drafters(results: Sequence[Result]) -> str:
    """Which oracle is meant, where runs choose among what different drafters propose."""
    oracles = {(r.task, r.k, r.h, r.oracle_block_efficiency) for r in results if not r.is_peer}
    return " of the run's own drafters" if len(oracles) > len({key[:3] for key in oracles}) else ""


def _apart(results: Sequence[Result]) -> list[Column]:
    """What the results of one task differ in, so that the caption can't say it."""
    tasks = {r.task for r in results}
    columns = [EXAMPLES, GROUPS]
    if not all(r.is_oracle for r in results):  # else it is their block efficiency
        columns.append(ORACLE)

    def differing(column: Column) -> bool:
        known = {(r.task, column.value(r)) for r in results if column != ORACLE or not r.is_peer}
        return len(known) > len(tasks)

    return [column for column in columns if differing(column)]


def _caption(document: ResultsDocument, apart: Collection[Column]) -> str:
    results = document.results
    most = max(results, key=lambda r: r.p)
    way = f"live decode (p drafts as {most.latency.verify})" if most.latency else "replayed decode"
    config = document.config
    if config.lossy:
        way = f"LOSSY {way}, {config.acceptance} acceptance: the outputs are not the base's;"
    elif config.sampled:
        way = f"{way}, sampled ({config.acceptance}, seed {config.sampling_seed}),"
    made = {r.task: _made_of(document, r.task) for r in results}
    same = made[results[0].task] if len(set(made.values())) == 1 else ""
    several_k = len({r.k for r in results}) > 1
    lines = {}
    for r in (r for r in results if not r.is_peer):
        facts = [] if same else [made[r.task]]
        facts += [] if {EXAMPLES, GROUPS} & set(apart) else [f"{r.n} examples of {r.groups} groups"]
        if ORACLE not in apart and not several_k and r.oracle_block_efficiency is not None:
            facts.append(f"oracle {NUMBER.show(r.oracle_block_efficiency)}")
        lines[r.task] = f"{printable(r.task)}: {', '.join(facts)}" if facts else ""
    return "\n".join([f"{way} of {same}" if same else way, *filter(None, lines.values()), ""])


def _made_of(document: ResultsDocument, task: str) -> str:
    """What the results of a task were decoded with: models and limits, or a trace."""
    inputs = document.config.inputs[task]
    most = max(r.h for r in document.results if r.task == task)
    h = f"h = {most}" if most > 1 else "without block heads"
    if inputs.trace:
        return f"the trace {printable(inputs.trace)}, {h}"
    limit = document.config.traces[task]["max_new_tokens"]
    return f"{printable(inputs.base)} in {inputs.dtype}, {h}, up to {limit} new tokens"


def _efficiency(results: Sequence[Result]) -> Table:
    columns = [
        *LABEL, EXAMPLES, GROUPS, Column("steps", COUNT), Column("tokens", COUNT),
        Column("macro", NUMBER, field="block_efficiency_macro"), ORACLE, *map(outcome, OUTCOMES),
    ]  # fmt: skip
    note = (
        "macro = mean block efficiency over examples; oracle = that of the best path of what the run's drafters\n"
        "propose (of heads: of the top-k lattice)."
    )
    return Table.of(columns, results, note=note)


def _sources(results: Sequence[Result]) -> Table:
    rows = [
        [r.task, r.rescorer, r.k, r.p, *(column.value(share) for column in SOURCES)]
        for r in results
        for share in r.sources
    ]
    return Table([*LABEL, *SOURCES], rows, title="where accepted tokens came from", note=OF_SOURCES)


def _quality(results: Sequence[Result]) -> Table:
    """The scores of the outputs beside the share of them that was cut; one line for a task where all have the same."""
    rows = []
    for task in dict.fromkeys(r.task for r in results):
        of_task = [r for r in results if r.task == task and r.quality]
        same = all((r.quality, r.cut_at_limit) == (of_task[0].quality, of_task[0].cut_at_limit) for r in of_task)
        for r in of_task[:1] if same else of_task:
            label = [task, "all"] if same and len(of_task) > 1 else [task, f"{r.rescorer}, p = {r.p}"]
            rows.append([*label, _scores(r.quality), r.cut_at_limit])
    note = "cut at limit = outputs that did not come to their end: a score of cut outputs says little about the model."
    return Table([TASK, RESCORER, Column("quality of the output"), CUT], rows, note=note)


def _acceptance(results: Sequence[Result]) -> Table:
    h = max(len(r.marginal) for r in results)
    rows: list[list[object]] = []
    for r in results:
        pad, below = [None] * (h - len(r.marginal)), ["", "", None, None]
        given = ["-" if c is None else NUMBER.show(c) for c in r.conditional]
        rows += [
            [r.task, r.rescorer, r.k, r.p, "exactly i (count)", *map(str, r.accepted_histogram[1:]), *pad],
            [*below, "at least i (share)", *map(NUMBER.show, r.marginal), *pad],
            [*below, "i, given i - 1", *given, *pad],
        ]
    columns = [*LABEL, Column("steps that accepted", Format(str)), *(Column(str(i + 1), Format(str)) for i in range(h))]
    return Table(columns, rows, none="")


def _speed(results: Sequence[Result]) -> Table:
    qualities = QUALITIES if any(r.mark for r in results) else ()
    columns = [*LABEL, IDENTICAL, TOKENS_PER_SECOND, GREEDY, *SPEEDUPS, *qualities]
    note = (
        "greedy = autoregressive decoding in the same run (drawn, where the runs are); identical = outputs equal to\n"
        "it; prefill is apart; 95 % = paired, by group."
    )
    return Table.of(columns, [r for r in results if r.latency], note=note)


def _times(results: Sequence[Result]) -> Table:
    columns = [
        *LABEL,
        *(
            Column(heading, form, field=f"latency.{field}")
            for heading, form, field in (
                ("greedy ms", MILLISECONDS, "autoregressive_ms"), ("verify ms", MILLISECONDS, "verify_ms"),
                ("draft ms", MILLISECONDS, "draft_ms"), ("rescore ms", fixed(2), "rescore_ms"),
                ("p50", fixed(2), "rescore_p50_ms"), ("p95", fixed(2), "rescore_p95_ms"), ("glue", SHARE, "glue_share"),
                ("prefill ms", fixed(0), "prefill_ms"),
            )
        ),
    ]  # fmt: skip
    peers = any(r.is_peer for r in results)
    note = (
        "ms per step (greedy: per token; prefill: per example); p50 and p95 are of rescore;\n"
        "glue = share of a step that is none of these" + (", of peers all but the base's calls." if peers else ".")
    )
    return Table.of(columns, [r for r in results if r.latency], note=note)


def divergence_table(results: Sequence[Result]) -> Table:
    """A line for each result of which outputs differ from greedy decoding's and should not."""

    def earliest(field: str) -> Callable[[Any], Any]:
        return lambda r: getattr(min(r.divergence, key=attrgetter("position")), field)

    columns = [
        *LABEL, Column("differ", Format(str), field=lambda r: f"{len(r.divergence)}/{r.n}"),
        Column("earliest at", COUNT, field=earliest("position")),
        Column("margin there", fixed(4), field=earliest("margin")),
        Column("largest margin", fixed(4), field=lambda r: max(d.margin for d in r.divergence)),
    ]  # fmt: skip
    note = (
        "the first token that differs (from 0), and the greedy logit margin over the runner-up there: near-ties are\n"
        "decided differently in half precision, and hardly ever in float32."
    )
    title = "Outputs that differ from greedy decoding's"
    return Table.of(columns, [r for r in results if r.divergence and not r.mark], title=title, note=note)


def tuning_table(sweeps: Sequence[Tuned]) -> Table:
    """Block efficiency by weight, the best one marked, and what it gains over weight 0."""

    def at(alpha: float) -> Callable[[Tuned], Any]:
        return lambda t: dict(zip(t.alphas, t.block_efficiency, strict=True)).get(alpha)

    columns = [
        *LABEL, Column("held out", COUNT, field=lambda t: len(t.held_out)),
        Column("groups", COUNT, field=lambda t: len(t.held_out_groups)),
        *(Column(f"{alpha:g}", NUMBER, field=at(alpha)) for alpha in sorted({a for t in sweeps for a in t.alphas})),
        Column("gain", GAIN, field=lambda t: at(t.alpha)(t) / at(0.0)(t) - 1.0),
    ]  # fmt: skip
    note = (
        "block efficiency on the held-out examples by alpha; * the best, which rescore eval --alpha tuned uses;\n"
        "gain = of the best over alpha 0 (the unrescored drafts) at the same k and p."
    )
    best = [(row, f"{t.alpha:g}") for row, t in enumerate(sweeps)]
    return Table.of(columns, sweeps, note=note, best=best, none="")


def joint_fit_table(fit: JointFit) -> Table:
    """The reliability diagram of fitted weights as a table: how often candidates of a probability were right."""
    rows = [
        [f"{place / len(fit.counts):.1f} to {(place + 1) / len(fit.counts):.1f}", *cells]
        for place, cells in enumerate(zip(fit.counts, fit.confidences, fit.accuracies, strict=True))
    ]
    columns = [Column("probability"), Column("candidates", COUNT), Column("mean", SHARE), Column("right", SHARE)]
    facts = f"{fit.examples} examples of {fit.groups} groups, {fit.prefixes:,} prefixes"
    if fit.log_loss is not None and fit.calibration_error is not None:
        facts += f"; log-loss {fit.log_loss:.3f} nats a prefix, calibration error {fit.calibration_error:.4f}"
    note = "measured on each half of the groups with weights fitted on the other; those written are fitted on all."
    return Table(columns, rows, title=f"weights of joint: {facts}", note=note)


def results_csv(results: Sequence[Result], *, task: str | None = None, **facts: object) -> Table:
    """Everything that the results of a run say, a line each, for CSV; numbers with all digits.

    `task`: what it is called (default: its name); `facts`: further columns, the same for all.
    """

    def fact(value: object) -> Callable[[Result], str]:
        return lambda r: str(value)

    times = ("verify_ms", "draft_ms", "rescore_ms", "autoregressive_ms", "tokens_per_second", "speedup")
    columns = [
        Column("task", field=fact(task) if task else None), *(Column(name, field=fact(facts[name])) for name in facts),
        RESCORER, P, K, H, ALPHA, EXAMPLES, GROUPS, Column("steps"), Column("tokens"), *EFFICIENCY,
        Column("block_efficiency_macro"), ORACLE, *GAINS,
        Column("oracle_gap_recovered", field=_gap_share(results).field), Column("longest"),
        *(Column(name, field=f"against_unrescored.{name}") for name in OUTCOMES),
        Column("sources", field=lambda r: "; ".join(_source_facts(share) for share in r.sources)),
        Column("quality", field=lambda r: _scores_in_full(r.quality)),
        Column("quality_without_drafts", field=lambda r: _scores_in_full(r.autoregressive_quality)),
        Column("cut_at_limit"), PREDICTED, *(Column(name, field=f"latency.{name}") for name in times),
        *(Column(f"marginal_{i + 1}", field=f"marginal.{i}") for i in range(max(len(r.marginal) for r in results))),
    ]  # fmt: skip
    return Table.of(columns, results)


def _scores_in_full(quality: Mapping[str, float] | None) -> str | None:
    return None if quality is None else "; ".join(f"{name} {value:.4f}" for name, value in quality.items())


def _source_facts(share: SourceShare) -> str:
    named = {"proposed": share.proposed, "only": share.only, "alone": share.alone}
    facts = [f"{name} {value:.4f}" for name, value in named.items() if value is not None]
    return f"{share.source} ({', '.join(facts)})"
