"""The table of a suite: as Markdown to keep beside its YAML, as CSV with all digits, and as text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rescore.report.csv_table import csv_document
from rescore.report.markdown import escaped, markdown_table
from rescore.report.tables import OUTCOMES, table
from rescore.runs.leave_out import SHIPPED
from rescore.runs.records import Result
from rescore.runs.suite_plan import Plan
from rescore.terminal import printable

COLUMNS = (
    "task", "k", "h", "rescorer", "p", "alpha", "examples", "groups", "steps", "tokens", "block_efficiency",
    "block_efficiency_low", "block_efficiency_high", "block_efficiency_macro", "gain", "gain_low", "gain_high", "won",
    "tied", "lost", "oracle_block_efficiency", "tokens_per_second", "speedup", "quality", "cut_at_limit",
)  # fmt: skip


def suite_page(results: Sequence[Result], plan: Plan, source: str) -> str:
    """A Markdown page: how it was made, and a line for each task, rescorer and p."""
    head, *rows = _cells(results)
    made = (
        f"Made by `rescore suite {printable(source).replace('`', '')} --out DIR`"
        if source
        else "Made by `rescore suite`"
    )
    return f"{_caption(results, plan)} {made}.\n\n{markdown_table(head, rows)}\n"


def text_table(results: Sequence[Result]) -> str:
    """The same lines for the terminal."""
    head, *rows = _cells(results)
    return table(head, rows, text_columns=3)


def csv_table(results: Sequence[Result]) -> str:
    """One line for each task, k, h, rescorer and p, numbers as they are, empty where there is none."""
    rows = []
    for r in results:
        none = (None, None)
        against, latency = r.against_unrescored, r.latency
        rows.append([
            r.task, r.k, r.h, r.rescorer, r.p, r.alpha, r.n, r.groups, r.steps, r.tokens,
            r.block_efficiency, *(r.block_efficiency_ci95 or none), r.block_efficiency_macro, r.gain,
            *(r.gain_ci95 or none), *(getattr(against, name, None) for name in OUTCOMES), r.oracle_block_efficiency,
            latency and latency.tokens_per_second, latency and latency.speedup,
            "; ".join(f"{name} {value:.4f}" for name, value in r.quality.items()), r.cut_at_limit,
        ])  # fmt: skip
    return csv_document(COLUMNS, rows)


def _caption(results: Sequence[Result], plan: Plan) -> str:
    way = "Live" if plan.mode == "live" else "Replayed"
    ks, hs = _values(results, "k"), _values(results, "h")
    facts = [f"{way} decode of {plan.base} in {plan.dtype}", f"h = {hs}", f"k = {ks}"]
    facts += [f"up to {plan.max_new_tokens} new tokens"] if plan.max_new_tokens else []
    facts += [f"prompts cut to {plan.max_prompt_tokens} tokens"] if plan.max_prompt_tokens else []
    facts += [f"{_values(results, 'n')} examples of a task"]
    if limits := sorted({tuning.limit for _, tuning in plan.tuned}):
        facts.append(f"alpha tuned on {' or '.join(map(str, limits))} examples of the last groups of the data")
    facts += ["examples that share text with training corpora left out"] if plan.leave_out == SHIPPED else []
    return (
        f"{', '.join(map(escaped, facts))}. Block efficiency and its gain over `none` with p = 1 have 95 % intervals "
        "(studentised bootstrap by group: examples of one source), those of gains paired; won, tied, lost: steps that "
        "accepted more, as many, fewer tokens than the unrescored draft would have there; oracle: the best path of the "
        "lattice."
    )


def _values(results: Sequence[Result], name: str) -> str:
    return " or ".join(map(str, sorted({getattr(r, name) for r in results})))


def _cells(results: Sequence[Result]) -> list[list[str]]:
    """Header and rows; k, h and speed only where they say something."""
    several = [name for name in ("k", "h") if len({getattr(r, name) for r in results}) > 1]
    live = any(r.latency for r in results)
    head = [
        "task",
        "examples (groups)",
        "rescorer (p)",
        *several,
        "alpha",
        "block efficiency (95 %)",
        "gain (95 %)",
        "won / tied / lost",
    ]
    rows = [[*head, "oracle", *(["speed-up"] if live else [])]]
    for r in results:
        ci, gain_ci, against = r.block_efficiency_ci95, r.gain_ci95, r.against_unrescored
        efficiency, gain = f"{r.block_efficiency:.3f}", "" if r.gain is None else f"{r.gain:+.1%}"
        if ci:
            efficiency = "{} ({:.3f} to {:.3f})".format(efficiency, *ci)
        if gain_ci:
            gain = "{} ({:+.1%} to {:+.1%})".format(gain, *gain_ci)
        plain = r.rescorer == "none" and r.p == 1
        outcomes = " / ".join(f"{getattr(against, name):.1%}" for name in OUTCOMES) if against and not plain else ""
        rows.append([
            r.task, f"{r.n} ({r.groups})", f"{r.rescorer} ({r.p})", *(str(getattr(r, name)) for name in several),
            "-" if r.alpha is None else f"{r.alpha:g}", efficiency, gain, outcomes,
            f"{r.oracle_block_efficiency:.3f}", *([f"{r.latency.speedup:.2f}x"] if r.latency else []),
        ])  # fmt: skip
    return rows
