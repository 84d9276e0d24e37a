"""A comparison as a plain table for the terminal."""

from __future__ import annotations

from rescore.report.tables import table
from rescore.studies.comparison import ComparedRow, Comparison, SideResult
from rescore.terminal import printable

NOTE = (
    "difference = block eff. of B less that of A, gain = B over A, on the examples that both have, with paired 95 %\n"
    "intervals (studentised bootstrap by group: examples of one source); won, tied, lost: examples that B decodes\n"
    "with more, as many, fewer tokens a step."
)


def comparison_table(comparison: Comparison) -> str:
    """A line for each row of the comparison."""
    header = [
        "task", "A", "B", "examples", "groups", "block eff. A", "B", "difference", "95 %", "gain", "95 %",
        "won", "tied", "lost",
    ]  # fmt: skip
    rows = [_row(row, _same_k(comparison)) for row in comparison.rows]
    lines = [f"A = {comparison.a}", f"B = {comparison.b}"]
    return "\n".join([*map(printable, lines), "", table(header, rows, text_columns=3), NOTE])


def _same_k(comparison: Comparison) -> bool:
    return len({side.k for row in comparison.rows for side in (row.a, row.b)}) == 1


def _row(row: ComparedRow, same_k: bool) -> list[str]:
    d = row.difference
    interval = "{:+.3f} to {:+.3f}".format(*d.difference_ci95) if d.difference_ci95 else "-"
    gains = "{:+.1%} to {:+.1%}".format(*d.gain_ci95) if d.gain_ci95 else "-"
    return [
        row.task, _side(row.a, same_k), _side(row.b, same_k), str(row.n), str(row.groups),
        f"{row.a.block_efficiency:.3f}", f"{row.b.block_efficiency:.3f}",
        f"{d.difference:+.3f}", interval, f"{d.gain:+.1%}", gains, str(d.won),
        str(d.tied), str(d.lost),
    ]  # fmt: skip


def _side(side: SideResult, same_k: bool) -> str:
    facts = [] if same_k else [f"k={side.k}"]
    facts += [f"p={side.p}"]
    facts += [] if side.alpha is None else [f"alpha={side.alpha:g}"]
    return f"{side.rescorer} {' '.join(facts)}"
