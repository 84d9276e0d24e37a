"""What studies and trainings found, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rescore.bootstrap import LEAST_GROUPS
from rescore.table import (
    COUNT,
    DIFFERENCE,
    DIFFERENCE_INTERVAL,
    EFFICIENCY,
    EXAMPLES,
    GAIN,
    GAIN_INTERVAL,
    GROUPS,
    MILLISECONDS,
    NUMBER,
    PLAIN,
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
)  # fmt: skip
from rescore.terminal import printable

if TYPE_CHECKING:
    from lm.draft_vocabulary import DraftVocabularySummary
    from lm.lookup_index import LookupSummary
    from lm.ngram.build import NgramSummary
    from lm.ngram.score import NgramScore
    from lm.training.heads import HeldOutAccuracy
    from rescore.costs.measuring import VerifyCurve
    from rescore.costs.table import Costs
    from rescore.studies.block_length import BlockLengths
    from rescore.studies.comparison import Comparison, SideResult
    from rescore.studies.cost.model import CostTable, Decoder
    from rescore.studies.draft_vocabulary import VocabularySize
    from rescore.studies.ngram_mixing import MixedModels

ALL = "all"
FEW_POSITIONS = 1000  # held out: fewer tell little apart
WHOLE_STEP = "="  # stands for a change that is not known, where a whole step is shown
CHANGE = Format(lambda value: value if value == WHOLE_STEP else GAIN.show(value))


def accuracy_table(accuracy: HeldOutAccuracy) -> Table:
    """Held-out accuracy of block heads 2..h (head 1 is the base LM itself)."""
    h = len(next(iter(accuracy.top.values())))
    rows = [[f"top-{n}", *values[1:]] for n, values in accuracy.top.items()]
    note = (
        f"accepted at every position, token 1 counted as right: {accuracy.accepted:.3f} arg-max, "
        f"{accuracy.accepted_16:.3f} best of top 16;\n"
        f"measured on {accuracy.positions} positions of {accuracy.segments} held-out texts"
    )
    if accuracy.positions < FEW_POSITIONS:
        note += ": too few to compare trainings by (--held-out-corpus takes a corpus to measure on)"
    return Table([Column("head"), *(Column(str(i), NUMBER) for i in range(2, h + 1))], rows, note=note)


def verify_curve_table(curve: VerifyCurve) -> Table:
    """Time of a verify call by its size."""
    rows = [
        [n, ms, ms / curve.milliseconds[0], gb, n / ms * 1e3]
        for n, ms, gb in zip(curve.tokens, curve.milliseconds, curve.gb_per_second, strict=True)
    ]
    columns = [
        Column("tokens", COUNT), Column("ms", MILLISECONDS), Column("against 1", TIMES), Column("GB/s", fixed(1)),
        Column("tok/s", fixed(0)),
    ]  # fmt: skip
    note = f"{curve.base}, {curve.dtype}, {curve.device}: forward of n tokens on {curve.cached} cached ones"
    return Table(columns, rows, note=note)


def costs_tables(costs: Costs) -> list[Table]:
    """Milliseconds of a step, by tokens and context, and of choosing its drafts."""
    columns = [
        Column("tokens", COUNT),
        *(Column(f"{c} cached", MILLISECONDS) for c in costs.contexts),
        Column("against 1", TIMES),
    ]
    first = costs.step_ms[0][0]
    rows = [
        [n, *(row[place] for row in costs.step_ms), costs.step_ms[0][place] / first]
        for place, n in enumerate(costs.nodes)
    ]
    facts = ["no tree mask" if costs.tree_ms is None else f"several drafts as a tree {costs.tree_ms:.1f} ms more"]
    heads = costs.heads
    facts += [f"heads (h = {heads.h}) {heads.ms:.1f} ms more" if heads else "no heads"]
    fewer = [f"{size:,}: {ms:.1f}" for size, ms in sorted(heads.vocabulary_ms.items())] if heads else []
    facts += [f"from a draft vocabulary of {', '.join(fewer)} ms"] if fewer else []
    note = (
        f"{costs.base} in {costs.dtype} on {printable(str(costs.machine))}:\n"
        f"median ms of a step that verifies one draft of so many tokens; {', '.join(facts)}."
    )
    chosen = Table.of(
        [RESCORER, K, P, Column("ms", fixed(2))],
        costs.choices,
        note="ms of drafting and rescoring in a step, the heads apart.",
    )
    return [Table(columns, rows, note=note), *([chosen] if costs.choices else [])]


def draft_vocabulary_table(summary: DraftVocabularySummary) -> Table:
    """What share of what was counted the most frequent tokens are."""
    columns = [Column("most frequent", COUNT), Column("of the text", SHARE)]
    counted = f"{summary.tokens:,} tokens, {summary.distinct_tokens:,} of them distinct"
    note = f"{summary.path}: {counted}; next:\n{summary.use()}"
    return Table(columns, list(summary.coverage.items()), note=note)


def vocabulary_sizes_table(sizes: Sequence[VocabularySize]) -> Table:
    """What drafting from fewer tokens costs in block efficiency."""
    columns = [
        TASK, RESCORER, *([K] if len({size.k for size in sizes}) > 1 else []), P,
        Column("tokens", Format(lambda n: f"{n:,}" if n else ALL), field=lambda size: size.vocabulary or 0),
        Column("block eff.", NUMBER, "block_efficiency"), Column("change", GAIN),
        Column("95 %", GAIN_INTERVAL, "change", "change_ci95"),
    ]  # fmt: skip
    note = "tokens = of which heads 2 to h draft, beside those of the prompt; change against all tokens, paired."
    return Table.of(columns, sizes, note=note)


def block_length_table(study: BlockLengths) -> Table:
    """What each block length accepts, costs and saves; the fastest marked."""
    columns = [
        H, *EFFICIENCY, Column("verify ms", MILLISECONDS), Column("heads ms", MILLISECONDS),
        Column("rescoring ms", fixed(2)), Column("speed-up", TIMES, "speedup"),
    ]  # fmt: skip
    of = study.rescorer + ("" if study.alpha is None else f", alpha {study.alpha:g}")
    note = (
        f"{study.base} on {study.examples} examples ({study.groups} groups) of {study.task or 'a trace'}, {of}, "
        f"k = {study.k}, {study.dtype},\n{study.device}, {study.cached} cached tokens; greedy decoding takes "
        f"{study.greedy_ms:.1f} ms a token. Times are medians, the speed-up (* the best)\nis foreseen from them; eval "
        f"--mode live measures it. No interval for fewer than {LEAST_GROUPS} groups."
    )
    best = [(study.lengths.index(study.best), "speed-up")]
    return Table.of(columns, study.lengths, note=note, best=best)


def comparison_table(comparison: Comparison) -> Table:
    """A line for each row of a comparison of two results."""
    same_k = len({side.k for row in comparison.rows for side in (row.a, row.b)}) == 1

    def side(result: SideResult) -> str:
        facts = [] if same_k else [f"k={result.k}"]
        facts += [f"p={result.p}"]
        facts += [] if result.alpha is None else [f"alpha={result.alpha:g}"]
        return f"{result.rescorer} {' '.join(facts)}"

    columns = [
        TASK, Column("A", Format(side, left=True), "a"), Column("B", Format(side, left=True), "b"), EXAMPLES, GROUPS,
        Column("block eff. A", NUMBER, field="a.block_efficiency"), Column("B", NUMBER, field="b.block_efficiency"),
        *(
            Column(heading, form, field=f"difference.{field}")
            for heading, form, field in (
                ("difference", DIFFERENCE, "difference"), ("95 %", DIFFERENCE_INTERVAL, "difference_ci95"),
                ("gain", GAIN, "gain"), ("95 %", GAIN_INTERVAL, "gain_ci95"), ("won", COUNT, "won"),
                ("tied", COUNT, "tied"), ("lost", COUNT, "lost"),
            )
        ),
    ]  # fmt: skip
    note = (
        "difference = block eff. of B less that of A, gain = B over A, on the examples that both have, with paired\n"
        "95 % intervals (studentised bootstrap by group: examples of one source; - for fewer than "
        f"{LEAST_GROUPS} groups);\nwon, tied, lost: examples that B decodes with more, as many, fewer tokens a step."
    )
    title = f"A = {printable(comparison.a)}\nB = {printable(comparison.b)}\n"
    return Table.of(columns, comparison.rows, title=title, note=note)


def built_ngram_table(built: NgramSummary) -> Table:
    """N-grams and discounts of each order of a model, and the files that it is made of."""
    width = max(map(len, built.discounts))
    names = ["D1", "D2", "D3+"] if width == 3 else [f"d{i + 1}" for i in range(width)]  # Kneser-Ney or Katz
    rows = []
    for n, (count, discounts) in enumerate(zip(built.ngrams, built.discounts, strict=True), start=1):
        origin = "fallback" if n in built.fallback_orders else "corpus"
        rows.append([str(n), count, *discounts, *[None] * (width - len(discounts)), origin])
    columns = [
        Column("order"), Column("n-grams", COUNT), *(Column(name, fixed(4)) for name in names),
        Column("from", Format(str)),
    ]  # fmt: skip
    made = (
        f"{built.path}: {sum(built.ngrams):,} n-grams from {built.tokens:,} tokens in {built.documents:,} documents\n"
    )
    return Table(columns, rows, title=made, note=f"\nfiles: {file_sizes(sorted(Path(built.path).iterdir()))}")


def built_lookup_table(built: LookupSummary) -> Table:
    """What a lookup index holds, and its files."""
    rows = [
        ["documents", f"{built.documents:,}"],
        ["tokens", f"{built.tokens:,}"],
        ["distinct tokens", f"{built.distinct_tokens:,}"],
        ["tokens of the longest document", f"{built.longest_document:,}"],
    ]
    note = f"\nfiles: {file_sizes(sorted(Path(built.path).iterdir()))}"
    return Table([Column("lookup index"), Column(built.path, Format(str))], rows, note=note)


def ngram_score_table(score: NgramScore, text: str) -> Table:
    """Perplexity and counts of a scored text; `text` is its name."""
    rows = [
        ["documents", f"{score.sentences:,}"],
        ["tokens, ends of documents included", f"{score.tokens:,}"],
        ["unknown tokens", f"{score.unknown:,} ({score.unknown_share:.2%})"],
        ["log10 probability", f"{score.log10p:.2f}"],
        ["perplexity", f"{score.perplexity:.2f}"],
        ["perplexity without unknown tokens", f"{score.perplexity_known:.2f}"],
        *([f"scored by {n}-grams", f"{count:,}"] for n, count in enumerate(score.hits or (), start=1)),
    ]
    return Table([Column("text"), Column(text, Format(str))], rows)


def mixing_tables(of: MixedModels) -> list[Table]:
    """Block efficiency by weights, the best mixture marked, where they were not given; then what was mixed with which
    weight, n-grams by order, and the files written."""
    tables = []
    if study := of.tuned:
        note = (
            f"by weight of each model, on {len(study.held_out)} held-out examples at k = {study.k}, p = 1, alpha = "
            f"{study.alpha:g}; * the best mixture."
        )
        columns = [*(Column(Path(part).name, PLAIN) for part in study.parts), Column("block eff.", NUMBER)]
        curve = [
            [*weights, efficiency] for weights, efficiency in zip(study.curve, study.block_efficiency, strict=True)
        ]
        best = [(place, "block eff.") for place, weights in enumerate(study.curve) if weights == study.weights]
        tables.append(Table(columns, curve, note=note, best=best))
    mixed = of.mixed
    counts = ", ".join(f"{count:,} of order {n}" for n, count in enumerate(mixed.ngrams, start=1))
    rows = list(zip(mixed.parts, mixed.weights, strict=True))
    title, note = f"{mixed.path}: n-grams: {counts}\n", f"\nfiles: {file_sizes(sorted(Path(mixed.path).iterdir()))}"
    return [*tables, Table([Column("model"), Column("weight", NUMBER)], rows, title=title, note=note)]


def file_sizes(paths: Sequence[Path]) -> str:
    """Names of files with their sizes, on one line."""
    sizes = [(path.name, path.stat().st_size) for path in paths]
    return ", ".join(f"{name} ({size / 1e6:.1f} MB)" if size > 1e5 else f"{name} ({size:,} B)" for name, size in sizes)


def cost_table(study: CostTable) -> Table:
    """Per decoded token and method at every context: weights and cache read, FLOPs, and their change."""
    heads = f"heads 2..{study.h}: {study.heads.parameters:,} parameters"
    if study.heads.projection_reads > 1:
        heads += f", the vocabulary projection read {study.heads.projection_reads} times"
    lines = [f"{study.dtype}, h = {study.h}, drafts verified as a {study.verify}; {heads}", _shape(study.base)]
    if study.neural:
        lines.append(_shape(study.neural))
    amounts = {"weights GB": ("weight_bytes", 3, 1e9), "KV MB": ("kv_bytes", 2, 1e6), "GFLOPs": ("flops", 2, 1e9)}
    columns = [Column("method"), P, Column("context", COUNT), EFFICIENCY[0]]
    for heading, (_, digits, _) in amounts.items():
        columns += [Column(heading, fixed(digits)), Column("", CHANGE, f"{heading} change")]
    rows = []
    for cost in study.costs:
        row = [cost.method, cost.p, cost.context, cost.block_efficiency]
        for name, _, unit in amounts.values():
            of_token, change = getattr(cost, name), getattr(cost, f"{name}_change")
            shown = getattr(cost, f"step_{name}") if of_token is None else of_token
            row += [shown / unit, WHOLE_STEP if change is None else change]
        rows.append(row)
    note = (
        "per decoded token, and the change against autoregressive decoding; methods whose block efficiency is not\n"
        "known show a whole step (=)."
    )
    return Table(columns, rows, title="\n".join([*lines, ""]), note=note)


def _shape(decoder: Decoder) -> str:
    line = f"{decoder.name}: {decoder.parameters:,} parameters, {len(decoder.layers)} layers"
    return f"{line} (ASSUMED: {decoder.assumption})" if decoder.assumption else line
