"""Plain-text tables for the terminal: aligned columns, numbers to the right, no colour, safe to paste."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rescore.bootstrap import LEAST_GROUPS
from rescore.runs.records import Result, ResultsDocument, Tuned
from rescore.terminal import printable

if TYPE_CHECKING:
    from lm.ngram.build import NgramSummary
    from lm.ngram.score import NgramScore
    from lm.training.heads import HeldOutAccuracy
    from rescore.studies.block_length import BlockLengths
    from rescore.studies.verify_curve import VerifyCurve

FEW_POSITIONS = 1000  # held out: fewer tell little apart
LABEL = ("task", "rescorer", "k", "p")  # the first columns of every table of results
OUTCOMES = ("won", "tied", "lost")  # of a step against the unrescored draft


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> str:
    """Aligned text; the first `text_columns` columns to the left, the rest to the right. No cell can control a
    terminal."""
    shown = [[printable(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if place < text_columns else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(shown[0]), "  ".join("-" * w for w in widths), *map(line, shown[1:])])


def results_table(document: ResultsDocument) -> str:
    """All results of a run: what was run, block efficiency, acceptance by position, and in live mode times."""
    if not document.results:
        return "no finished examples"
    parts = [_caption(document), _efficiency(document.results)]
    if quality := _quality(document.results):
        parts.append(quality)
    if gains := _gains(document.results):
        parts.append(gains)
    parts.append(_acceptance(document.results))
    if any(r.latency for r in document.results):
        parts += [_speed(document.results), _times(document.results)]
    if any(r.divergence for r in document.results):
        parts.append(_divergence(document.results))
    return "\n\n".join(parts)


def _caption(document: ResultsDocument) -> str:
    options, h = document.config.options, document.results[0].h
    most = max(document.results, key=lambda r: r.p)
    way = f"live decode (p drafts as {most.latency.verify})" if most.latency else "replayed decode"
    if options.trace:
        return f"{way} of the trace {printable(options.trace)}, h = {h}"
    made = f"{printable(options.base)} in {options.dtype}, h = {h}, up to {options.max_new_tokens} new tokens"
    return f"{way} of {made}"


def _label(r: Result) -> list[str]:
    return [r.task, r.rescorer, str(r.k), str(r.p)]


def _efficiency(results: Sequence[Result]) -> str:
    header = ["examples", "groups", "steps", "tokens", "block eff.", "95 %", "macro", "oracle"]
    rows = []
    for r in results:
        interval = "{:.3f}-{:.3f}".format(*r.block_efficiency_ci95) if r.block_efficiency_ci95 else "-"
        rows.append([
            *_label(r), str(r.n), str(r.groups), str(r.steps), str(r.tokens), f"{r.block_efficiency:.3f}", interval,
            f"{r.block_efficiency_macro:.3f}", f"{r.oracle_block_efficiency:.3f}",
        ])  # fmt: skip
    note = (
        "block eff. = tokens / steps, pooled (1 = no gain, h = ceiling); 95 % = its interval (studentised bootstrap\n"
        f"by group: examples of one source; - for fewer than {LEAST_GROUPS} groups); macro = mean over examples;\n"
        "oracle = block eff. of the best path of the top-k lattice."
    )
    return table([*LABEL, *header], rows, text_columns=2) + "\n" + note


def _quality(results: Sequence[Result]) -> str:
    """The scores of the outputs beside the share of them that was cut; one line for a task where all have the same."""
    rows = []
    for task in dict.fromkeys(r.task for r in results):
        of_task = [r for r in results if r.task == task and r.quality]
        same = all((r.quality, r.cut_at_limit) == (of_task[0].quality, of_task[0].cut_at_limit) for r in of_task)
        for r in of_task[:1] if same else of_task:
            label = [task, "all", "", ""] if same and len(of_task) > 1 else _label(r)
            scores = ", ".join(f"{value:.3f} {metric}" for metric, value in r.quality.items())
            cut = "-" if r.cut_at_limit is None else f"{r.cut_at_limit:.0%}"
            rows.append([*label, scores, cut])
    if not rows:
        return ""
    note = "cut at limit = outputs that did not come to their end: a score of cut outputs says little about the model."
    return table([*LABEL, "quality of the output", "cut at limit"], rows, text_columns=2) + "\n" + note


def _gains(results: Sequence[Result]) -> str:
    rows = []
    for r in results:
        if (r.rescorer == "none" and r.p == 1) or (r.gain is None and r.against_unrescored is None):
            continue
        alpha = "-" if r.alpha is None else f"{r.alpha:g}"
        gain = "-" if r.gain is None else f"{r.gain:+.1%}"
        interval = "{:+.1%} to {:+.1%}".format(*r.gain_ci95) if r.gain_ci95 else "-"
        shares = [f"{getattr(r.against_unrescored, name):.1%}" if r.against_unrescored else "-" for name in OUTCOMES]
        rows.append([*_label(r), alpha, gain, interval, *shares])
    if not rows:
        return ""
    note = (
        "alpha = weight of the rescorer; gain of block eff. over none at p = 1 where that was run too, with a paired\n"
        "interval by group; won, tied, lost: steps that accepted more, as many, fewer tokens than the unrescored\n"
        "draft would have there."
    )
    return table([*LABEL, "alpha", "gain", "95 %", *OUTCOMES], rows, text_columns=2) + "\n" + note


def _acceptance(results: Sequence[Result]) -> str:
    h = max(r.h for r in results)
    header = ["steps that accepted", *(str(i) for i in range(1, h + 1))]
    rows = []
    for r in results:
        pad, below = [""] * (h - r.h), [""] * len(LABEL)
        given = ["-" if c is None else f"{c:.3f}" for c in r.conditional]
        rows.append([*_label(r), "exactly i (count)", *map(str, r.accepted_histogram[1:]), *pad])
        rows.append([*below, "at least i (share)", *(f"{m:.3f}" for m in r.marginal), *pad])
        rows.append([*below, "i, given i - 1", *given, *pad])
    return table([*LABEL, *header], rows, text_columns=2)


def _speed(results: Sequence[Result]) -> str:
    header = ["identical", "tok/s", "greedy tok/s", "speed-up", "predicted"]
    rows = []
    for r in results:
        if (t := r.latency) is None or r.identical is None:
            continue
        rows.append([
            *_label(r), f"{r.identical.identical}/{r.identical.n}", f"{t.tokens_per_second:.1f}",
            f"{t.autoregressive_tokens_per_second:.1f}", f"{t.speedup:.2f}x",
            "-" if t.predicted_speedup is None else f"{t.predicted_speedup:.2f}x",
        ])  # fmt: skip
    note = (
        "greedy = autoregressive decoding in the same run; identical = outputs equal to it; prefill is apart;\n"
        "speed-up = tok/s / greedy tok/s; predicted = block eff. x greedy ms / (verify + heads + rescore ms)."
    )
    return table([*LABEL, *header], rows, text_columns=2) + "\n" + note


def _times(results: Sequence[Result]) -> str:
    header = ["greedy ms", "verify ms", "heads ms", "rescore ms", "p50", "p95", "glue", "prefill ms"]
    rows = []
    for r in results:
        if (t := r.latency) is None:
            continue
        rows.append([
            *_label(r), f"{t.autoregressive_ms:.1f}", f"{t.verify_ms:.1f}", f"{t.heads_ms:.1f}",
            f"{t.rescore_ms:.2f}", f"{t.rescore_p50_ms:.2f}", f"{t.rescore_p95_ms:.2f}",
            f"{t.glue_share:.1%}", f"{t.prefill_ms:.0f}",
        ])  # fmt: skip
    note = (
        "ms per step (greedy: per token; prefill: per example); p50 and p95 are of rescore;\n"
        "glue = share of a step that is none of these."
    )
    return table([*LABEL, *header], rows, text_columns=2) + "\n" + note


def _divergence(results: Sequence[Result]) -> str:
    header = ["differ", "earliest at", "margin there", "largest margin"]
    rows = []
    for r in results:
        if r.divergence:
            earliest = min(r.divergence, key=lambda d: d.position)
            largest = max(d.margin for d in r.divergence)
            differ = f"{len(r.divergence)}/{r.n}"
            rows.append([
                *_label(r), differ, str(earliest.position), f"{earliest.margin:.4f}", f"{largest:.4f}",
            ])  # fmt: skip
    note = (
        "outputs that differ from greedy decoding's, the first token that does (from 0), and the greedy logit margin\n"
        "over the runner-up there: near-ties are decided differently in half precision, and hardly ever in float32."
    )
    return table([*LABEL, *header], rows, text_columns=2) + "\n" + note


def tuning_table(found: Sequence[Tuned]) -> str:
    """Block efficiency by weight, the best one marked, and what it gains over weight 0."""
    alphas = sorted({alpha for tuned in found for alpha in tuned.alphas})
    rows = []
    for t in found:
        by_alpha = dict(zip(t.alphas, t.block_efficiency, strict=True))
        cells = [
            "" if alpha not in by_alpha else f"{by_alpha[alpha]:.3f}{'*' if alpha == t.alpha else ' '}"
            for alpha in alphas
        ]
        gain = by_alpha[t.alpha] / by_alpha[0.0] - 1.0
        rows.append([t.task, t.rescorer, str(t.k), str(t.p), str(len(t.held_out)), *cells, f"{gain:+.1%}"])
    header = ["task", "rescorer", "k", "p", "held out", *(f"{alpha:g} " for alpha in alphas), "gain"]
    note = (
        "block efficiency on the held-out examples by alpha; * the best, which rescore eval --alpha tuned uses;\n"
        "gain = of the best over alpha 0 (the unrescored drafts) at the same k and p."
    )
    return table(header, rows, text_columns=2) + "\n" + note


def accuracy_table(accuracy: HeldOutAccuracy) -> str:
    """Held-out accuracy of block heads 2..h (head 1 is the base LM itself)."""
    h = len(next(iter(accuracy.top.values())))
    rows = [[f"top-{n}", *(f"{value:.3f}" for value in values[1:])] for n, values in accuracy.top.items()]
    note = (
        f"accepted at every position, token 1 counted as right: {accuracy.accepted:.3f} arg-max, "
        f"{accuracy.accepted_16:.3f} best of top 16;\n"
        f"measured on {accuracy.positions} positions of {accuracy.segments} held-out texts"
    )
    if accuracy.positions < FEW_POSITIONS:
        note += ": too few to compare trainings by (--held-out takes a corpus to measure on)"
    return table(["head", *(str(i) for i in range(2, h + 1))], rows) + "\n" + note


def verify_curve_table(curve: VerifyCurve) -> str:
    """Time of a verify call by its size."""
    rows = [
        [str(n), f"{ms:.1f}", f"{ms / curve.milliseconds[0]:.2f}x", f"{gb:.1f}", f"{n / ms * 1e3:.0f}"]
        for n, ms, gb in zip(curve.tokens, curve.milliseconds, curve.gb_per_second, strict=True)
    ]
    note = f"{curve.base}, {curve.dtype}, {curve.device}: forward of n tokens on {curve.cached} cached ones"
    return table(["tokens", "ms", "against 1", "GB/s", "tok/s"], rows, text_columns=0) + "\n" + note


def block_length_table(found: BlockLengths) -> str:
    """What each block length accepts, costs and saves; the fastest marked."""
    rows = []
    for length in found.lengths:
        ci = length.block_efficiency_ci95
        mark = "*" if length is found.best else " "
        rows.append([
            str(length.h), f"{length.block_efficiency:.3f}", "-" if ci is None else "{:.3f}-{:.3f}".format(*ci),
            f"{length.verify_ms:.1f}", f"{length.heads_ms:.1f}", f"{length.rescoring_ms:.2f}",
            f"{length.speedup:.2f}x{mark}",
        ])  # fmt: skip
    of = found.rescorer + ("" if found.alpha is None else f", alpha {found.alpha:g}")
    note = (
        f"{found.base} on {found.examples} examples ({found.groups} groups) of {found.task or 'a trace'}, {of}, "
        f"k = {found.k}, {found.dtype}, "
        f"{found.device}, {found.cached} cached tokens; greedy decoding\ntakes {found.greedy_ms:.1f} ms a token. "
        "Times are medians, the speed-up (* the best) is foreseen from them; eval --mode live measures it."
    )
    header = ["h", "block eff.", "95 %", "verify ms", "heads ms", "rescoring ms", "speed-up "]
    return table(header, rows, text_columns=0) + "\n" + note


def built_ngram_table(built: NgramSummary) -> str:
    """N-grams and discounts of each order of a model, and the files that it is made of."""
    width = max(map(len, built.discounts))
    names = ["D1", "D2", "D3+"] if width == 3 else [f"d{i + 1}" for i in range(width)]  # Kneser-Ney or Katz
    origins = ["fallback" if n in built.fallback_orders else "corpus" for n in range(1, built.order + 1)]
    rows = []
    for n, (count, found, origin) in enumerate(zip(built.ngrams, built.discounts, origins, strict=True), start=1):
        shown = [f"{discount:.4f}" for discount in found] + ["-"] * (width - len(found))
        rows.append([str(n), f"{count:,}", *shown, origin])
    lines = [
        f"{built.path}: {sum(built.ngrams):,} n-grams from {built.tokens:,} tokens in {built.documents:,} documents",
        "",
        table(["order", "n-grams", *names, "from"], rows),
        "",
        f"files: {file_sizes(sorted(Path(built.path).iterdir()))}",
    ]
    return "\n".join(lines)


def ngram_score_table(score: NgramScore, text: str) -> str:
    """Perplexity and counts of a scored text; `text` is its name."""
    rows = [
        ["documents", f"{score.sentences:,}"],
        ["tokens, ends of documents included", f"{score.tokens:,}"],
        ["unknown tokens", f"{score.unknown:,} ({score.unknown_share:.2%})"],
        ["log10 probability", f"{score.log10p:.2f}"],
        ["perplexity", f"{score.perplexity:.2f}"],
        ["perplexity without unknown tokens", f"{score.perplexity_known:.2f}"],
    ]
    rows += [[f"scored by {n}-grams", f"{count:,}"] for n, count in enumerate(score.hits or (), start=1)]
    return table(["text", text], rows)


def file_sizes(paths: Sequence[Path]) -> str:
    """Names of files with their sizes, on one line."""
    sizes = [(path.name, path.stat().st_size) for path in paths]
    return ", ".join(f"{name} ({size / 1e6:.1f} MB)" if size > 1e5 else f"{name} ({size:,} B)" for name, size in sizes)
