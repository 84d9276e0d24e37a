"""The first table of a report, rescorers x tasks, and the sentences that say what is in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rescore.report.sources import TaskView
from rescore.runs.records import Result


@dataclass(frozen=True)
class Cell:
    """One decode of one task: `share` of the oracle's gap recovered = (block efficiency - unrescored) / (oracle -
    unrescored), None without the unrescored drafts or a gap; `speedup` over autoregressive decoding, live only; `best`:
    of several rescorers with this p the one with the most on the task (`none` and `oracle` apart); `sure`: the interval
    of its gain lies above zero."""

    result: Result
    share: float | None
    speedup: float | None
    best: bool
    sure: bool


@dataclass(frozen=True)
class Row:
    """A rescorer at one p; `cells[i]` of the i-th view, None where it was not run."""

    rescorer: str
    p: int
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Headline:
    """Rows by p, the oracle above all and `none` first of each p; `sentences`: what they say."""

    rows: tuple[Row, ...]
    sentences: tuple[str, ...]


def make_headline(views: Sequence[TaskView]) -> Headline:
    """The table and its sentences."""
    keys = dict.fromkeys((r.rescorer, r.p) for view in views for r in view.results)
    place = {rescorer: i for i, rescorer in enumerate(dict.fromkeys(rescorer for rescorer, _ in keys))}

    def order(key: tuple[str, int]) -> tuple[bool, int, bool, int]:
        rescorer, p = key
        return rescorer != "oracle", p, rescorer != "none", place[rescorer]

    rows = []
    for rescorer, p in sorted(keys, key=order):
        rows.append(Row(rescorer, p, tuple(_cell(view, rescorer, p) for view in views)))
    return Headline(tuple(rows), tuple(_sentences(views, rows)))


def _cell(view: TaskView, rescorer: str, p: int) -> Cell | None:
    result = next((r for r in view.results if r.rescorer == rescorer and r.p == p), None)
    if result is None:
        return None
    rivals = [r for r in view.results if r.p == p and r.rescorer not in ("none", "oracle")]
    most = max((r.block_efficiency for r in rivals), default=None)
    plain = next((r.block_efficiency for r in view.results if r.p == p and r.rescorer == "none"), 0.0)
    best = len(rivals) > 1 and result in rivals and result.block_efficiency == most and most > plain
    sure = rescorer not in ("none", "oracle") and result.gain_ci95 is not None and result.gain_ci95[0] > 0
    latency = result.latency
    speedup = float(latency.speedup) if latency else None
    return Cell(result, result.gap_share(view.unrescored), speedup, best, sure)


def _sentences(views: Sequence[TaskView], rows: Sequence[Row]) -> list[str]:
    lines = []
    unit = "tasks" if len({view.task for view in views}) == len(views) else "columns"  # of one task, several runs
    plain = [view.unrescored.block_efficiency for view in views if view.unrescored]
    ceiling = [view.results[0].oracle_block_efficiency for view in views]
    if plain:
        lines.append(
            f"A step of the unrescored drafts accepts {_range(plain)} tokens; a perfect choice from the same lattices "
            f"would get {_range(ceiling)}."
        )
    else:
        lines.append(f"A perfect choice from the lattices would get {_range(ceiling)} tokens out of a step.")
    for p in sorted({row.p for row in rows}):
        if said := _best_of(rows, p, unit):
            lines.append(said)
    lines.append(_time(views, rows))
    return lines


def _best_of(rows: Sequence[Row], p: int, unit: str) -> str | None:
    """Which rescorer is best at this p: the one with the highest mean gain over the tasks that all of them have."""
    gains = {}
    for row in rows:
        if row.p == p and row.rescorer not in ("none", "oracle"):
            cells = [(cell, cell.result.gain) for cell in row.cells if cell and cell.result.gain is not None]
            if cells:
                gains[row.rescorer] = cells
    most = max((len(cells) for cells in gains.values()), default=0)
    whole = {name: cells for name, cells in gains.items() if len(cells) == most}
    drafts = "one draft" if p == 1 else f"{p} drafts"
    alone = next((row for row in rows if row.p == p and row.rescorer == "none" and p > 1), None)
    unrescored = [c.result.gain for c in alone.cells if c and c.result.gain is not None] if alone else []
    if not whole:
        return f"With {drafts} a step and no rescoring the gain is {_percents(unrescored)}." if unrescored else None
    best = max(whole, key=lambda name: fmean(gain for _, gain in whole[name]))
    rated, found = [cell for cell, _ in whole[best]], [gain for _, gain in whole[best]]
    if fmean(found) <= 0:
        return f"With {drafts} a step no rescorer gains anything on average; {best} comes nearest ({_percents(found)})."
    shares = [cell.share for cell in rated if cell.share is not None]
    part = f", {_shares(shares)} of the way to the oracle" if shares else ""
    among = f"the best of {len(whole)} rescorers is" if len(whole) > 1 else "the only rescorer is"
    beside = f"; {p} drafts without rescoring bring {_percents(unrescored)}" if unrescored else ""
    line = f"With {drafts} a step {among} {best}, with {_percents(found)} tokens a step{part}{beside}."
    surely = sum(1 for cell in rated if cell.result.gain_ci95 and cell.result.gain_ci95[0] > 0)
    known = sum(1 for cell in rated if cell.result.gain_ci95)
    if known and surely < known:
        where = f"On {known - surely} of {known} {unit} its" if known > 1 else "Its"
        line += f" {where} gain is not certain: the interval includes zero."
    return line


def _time(views: Sequence[TaskView], rows: Sequence[Row]) -> str:
    timed = [(cell.speedup, row.rescorer, row.p) for row in rows for cell in row.cells if cell and cell.speedup]
    if not timed:
        return (
            "These results were replayed, so no time was measured: rescore eval --mode live with the same task and "
            "rescorers shows whether one is worth its time."
        )
    speed, rescorer, p = max(timed)
    drafts = "one draft" if p == 1 else f"{p} drafts"
    verdict = "faster than" if speed > 1 else "slower than"
    return (
        f"Measured live, the fastest was {rescorer} with {drafts} a step, at {speed:.2f} times the speed of "
        f"autoregressive decoding ({verdict} plain greedy decoding on that machine)."
    )


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _percents(values: Sequence[float]) -> str:
    low, high = f"{min(values):+.1%}", f"{max(values):+.1%}"
    return low if low == high else f"{low} to {high}"


def _shares(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0%}", f"{max(values):.0%}"
    return low if low == high else f"{low} to {high}"
