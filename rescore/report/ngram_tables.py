"""Plain-text tables of n-gram models: mixtures, the sweep of their weights, and the comparison of corpora."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lm.ngram.mix import SHIPPED
from rescore.report.tables import file_sizes, table

if TYPE_CHECKING:
    from lm.ngram.mix import MixedNgram
    from rescore.studies.ngram_comparison import ComparedNgram, NgramComparison
    from rescore.studies.ngram_mixing import TunedMixture


def comparison_table(found: NgramComparison) -> str:
    """A row for every corpus, order and p, the best of each p marked; the unrescored drafts first."""
    header = ["corpus", "tokens", "n-grams", "order", "p", "alpha", "block eff.", "95 %", "gain", "95 %"]
    rows = [
        [
            "none",
            "-",
            "-",
            "-",
            str(r.p),
            "-",
            f"{r.block_efficiency:.3f} ",
            _interval(r.block_efficiency_ci95),
            "-",
            "-",
        ]
        for r in found.unrescored
    ]
    best: dict[int, ComparedNgram] = {}
    for r in found.ngrams:
        if r.p not in best or r.block_efficiency > best[r.p].block_efficiency:
            best[r.p] = r
    for r in found.ngrams:
        mark = "*" if r is best[r.p] else " "
        rows.append([
            r.corpus, f"{r.tokens:,}", f"{r.ngrams:,}", str(r.order), str(r.p), f"{r.alpha:g}",
            f"{r.block_efficiency:.3f}{mark}", _interval(r.block_efficiency_ci95), f"{r.gain:+.1%}",
            _interval(r.gain_ci95, percent=True),
        ])  # fmt: skip
    note = (
        "gain over the unrescored drafts (none) at the same p, with a paired interval by group;\n"
        "* best of its p. To use it:"
    )
    used = [f"  p = {p}: --rescorer {_rescorer(r)} --alpha {r.alpha:g}" for p, r in best.items()]
    examples = (
        f"{len(found.examples)} examples ({found.groups} groups) replayed, alpha tuned on {len(found.held_out)} others"
    )
    return "\n".join([f"{found.task}, k = {found.k}: {examples}", "", table(header, rows), note, *used])


def _rescorer(r: ComparedNgram) -> str:
    return "ngram" if r.source == SHIPPED else f"ngram:{r.path}"


def _interval(interval: tuple[float, float] | None, *, percent: bool = False) -> str:
    if interval is None:
        return "-"
    return "{:+.1%} to {:+.1%}".format(*interval) if percent else "{:.3f}-{:.3f}".format(*interval)


def mixture_tuning_table(found: TunedMixture) -> str:
    """Block efficiency by weights, the best mixture marked."""
    rows = [
        [*(f"{weight:g}" for weight in weights), f"{efficiency:.3f}{'*' if weights == found.weights else ' '}"]
        for weights, efficiency in zip(found.curve, found.block_efficiency, strict=True)
    ]
    note = (
        f"by weight of each model, on {len(found.held_out)} held-out examples at k = {found.k}, p = 1, alpha = "
        f"{found.alpha:g}; * the best mixture."
    )
    return table([*(Path(part).name for part in found.parts), "block eff. "], rows, text_columns=0) + "\n" + note


def mixture_table(mixed: MixedNgram) -> str:
    """What was mixed with which weight, n-grams by order, and the files written."""
    rows = [[part, f"{weight:.3f}"] for part, weight in zip(mixed.parts, mixed.weights, strict=True)]
    counts = ", ".join(f"{count:,} of order {n}" for n, count in enumerate(mixed.ngrams, start=1))
    files = file_sizes(sorted(Path(mixed.path).iterdir()))
    return "\n".join([f"{mixed.path}: n-grams: {counts}", "", table(["model", "weight"], rows), "", f"files: {files}"])
