"""The first table of a report, rescorers x tasks, and the sentences that say what is in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rescore.acceptance.rules import is_lossy, mark_of, unmarked
from rescore.reports.sources import TaskView
from rescore.runs.records import Result, is_oracle
from rescore.runs.run import NONE, is_drafter
from rescore.runs.tables import QUALITIES
from rescore.table import GAIN, Format, fixed, percent


@dataclass(frozen=True)
class Cell:
    """One decode of one task.

    share: of the gap to the oracle of the same drafters recovered (None without the unrescored drafts or a gap).
    speedup: over autoregressive decoding, live only; predicted: by the costs of a step, where there are some.
    scores: of outputs that are not greedy decoding's, which every speed stands beside (empty: of those that are).
    best: of several rescorers with this p the one with the most on the task (`none` and oracles apart).
    sure: the interval of its gain lies above zero.
    """

    result: Result
    share: float | None
    speedup: float | None
    predicted: float | None
    scores: str
    best: bool
    sure: bool


@dataclass(frozen=True)
class Row:
    """A rescorer at one p; `cells[i]` of the i-th view, None where it was not run."""

    rescorer: str
    p: int
    cells: tuple[Cell | None, ...]

    @property
    def is_oracle(self) -> bool:
        """Whether it is a ceiling."""
        return is_oracle(self.rescorer)

    @property
    def is_plain(self) -> bool:
        """Whether it is the drafts as they come, by whatever rule they are accepted."""
        return unmarked(self.rescorer) == NONE

    @property
    def is_peer(self) -> bool:
        """Whether it is another library's decoder."""
        return any(cell and cell.result.is_peer for cell in self.cells)


@dataclass(frozen=True)
class Headline:
    """Rows by p, the oracles above all and `none` first of each p; `sentences`: what they say, of each acceptance rule
    apart."""

    rows: tuple[Row, ...]
    sentences: tuple[str, ...]


def make_headline(views: Sequence[TaskView]) -> Headline:
    """The table and its sentences."""
    decodes = [(r.rescorer, r.p) for view in views for r in view.results]
    names = ["oracle", *(name for name, _ in decodes if unmarked(name) == NONE), *(name for name, _ in decodes)]
    rows = [
        Row(rescorer, p, tuple(_cell(view, rescorer, p) for view in views))
        for rescorer, p in sorted(
            dict.fromkeys(decodes), key=lambda decode: (not is_oracle(decode[0]), decode[1], names.index(decode[0]))
        )
    ]
    lines: list[str] = []
    for mark in dict.fromkeys(view.mark for view in views):
        of_rule = _sentences([v for v in views if v.mark == mark], [r for r in rows if mark_of(r.rescorer) == mark])
        outputs = "the outputs are not the base model's" if is_lossy(mark) else "the outputs are drawn"
        lines += [f"{'LOSSY,' if is_lossy(mark) else 'Sampled,'}{mark}: {outputs}."] if mark else []
        lines += of_rule
    return Headline(tuple(rows), tuple(lines))


def _cell(view: TaskView, rescorer: str, p: int) -> Cell | None:
    result = next((r for r in view.results if (r.rescorer, r.p) == (rescorer, p)), None)
    if result is None:
        return None
    own = _contends(result)
    rivals = [r.block_efficiency for r in view.results if r.p == p and _contends(r)]
    plain = next((r.block_efficiency for r in view.results if (unmarked(r.rescorer), r.p) == (NONE, p)), 0.0)
    best = own and len(rivals) > 1 and plain < result.block_efficiency == max(rivals)
    sure = own and result.gain_ci95 is not None and result.gain_ci95[0] > 0
    speedup = result.latency.speedup if result.latency else None
    known = [column for column in QUALITIES if result.mark and column.value(result) is not None]
    scores = ", ".join(f"{column.heading} {column.format.show(column.value(result))}" for column in known)
    return Cell(result, result.gap_share(view.unrescored), speedup, result.predicted_speedup, scores, best, sure)


def _sentences(views: Sequence[TaskView], rows: Sequence[Row]) -> list[str]:
    plain = [view.unrescored.block_efficiency for view in views if view.unrescored]
    first = [(view, (view.unrescored or view.results[0]).oracle_block_efficiency) for view in views]
    # There is none of what is not greedy, or of peers alone.
    known = [oracle or view.oracles[0] for view, oracle in first if oracle or view.oracles]
    ceiling = _range(fixed(2), known)
    lines = [
        f"A step of the unrescored drafts accepts {_range(fixed(2), plain)} tokens; a perfect choice from the same "
        f"lattices would get {ceiling}."
        if plain
        else f"A perfect choice from the lattices would get {ceiling} tokens out of a step."
    ]
    lines = lines if known else []
    joined = [[r.oracle_block_efficiency or 0.0 for r in view.results if r.sources] for view in views]
    if any(joined):
        widest = _range(fixed(2), [max(oracles) for oracles in joined if oracles])
        lines.append(f"From what several drafters propose together a perfect choice would get {widest}.")
    unit = "tasks" if len({view.task for view in views}) == len(views) else "columns"  # of one task, several runs
    lines += [line for p in sorted({row.p for row in rows}) if (line := _best_of(rows, p, unit))]
    return [*lines, _time(rows)]


def _contends(side: Row | Result) -> bool:
    """Whether it may be the best: it is no ceiling, not what all are compared with, and of this project."""
    return unmarked(side.rescorer) != NONE and not side.is_oracle and not side.is_peer


def _gains(row: Row) -> list[tuple[Cell, float]]:
    return [(cell, cell.result.gain) for cell in row.cells if cell and cell.result.gain is not None]


def _best_of(rows: Sequence[Row], p: int, unit: str) -> str | None:
    """Which rescorer is best at this p: the one with the highest mean gain over the tasks that all of them have."""
    gains = {row.rescorer: _gains(row) for row in rows if row.p == p and _contends(row)}
    most = max(map(len, gains.values()), default=0)
    whole = {name: cells for name, cells in gains.items() if cells and len(cells) == most}
    unrescored = [gain for row in rows if row.is_plain and row.p == p > 1 for _, gain in _gains(row)]
    if not whole:
        gain = _range(GAIN, unrescored) if unrescored else None
        return gain and f"With {_drafts(p)} a step and no rescoring the gain is {gain}."
    best = max(whole, key=lambda name: fmean(gain for _, gain in whole[name]))
    kind = "rescorer or drafter" if any(map(is_drafter, whole)) else "rescorer"
    cells, best_gains = zip(*whole[best], strict=True)
    if fmean(best_gains) <= 0:
        return (
            f"With {_drafts(p)} a step no {kind} gains anything on average; {best} comes nearest "
            f"({_range(GAIN, best_gains)})."
        )
    shares = [cell.share for cell in cells if cell.share is not None]
    of_its = " of its drafters" if any(cell.result.sources for cell in cells) else ""
    part = f", {_range(percent(0), shares)} of the way to the oracle{of_its}" if shares else ""
    kinds = kind.replace("r or", "rs and") + "s"
    among = f"the best of {len(whole)} {kinds} is" if len(whole) > 1 else f"the only {kind.split()[-1]} is"
    beside = f"; {_drafts(p)} without rescoring bring {_range(GAIN, unrescored)}" if unrescored else ""
    line = f"With {_drafts(p)} a step {among} {best}, with {_range(GAIN, best_gains)} tokens a step{part}{beside}."
    intervals = [cell.result.gain_ci95 for cell in cells if cell.result.gain_ci95]
    for count, finding in (
        (sum(low <= 0 <= high for low, high in intervals), "gain is not certain: the interval includes zero"),
        (sum(high < 0 for _, high in intervals), "drafts are surely worse: the interval of their gain is below zero"),
    ):
        if count:
            where = f"On {count} of {len(intervals)} {unit} its" if len(intervals) > 1 else "Its"
            line += f" {where} {finding}."
    return line


def _time(rows: Sequence[Row]) -> str:
    timed = [(cell.speedup, row.rescorer, row.p) for row in rows for cell in row.cells if cell and cell.speedup]
    if not timed:
        untimed = (
            "These results were replayed, so no time was measured: rescore eval --mode live with the same task and "
            "rescorers shows whether one is worth its time."
        )
        predicted = [(c.predicted, row.rescorer, row.p) for row in rows for c in row.cells if c and c.predicted]
        if not predicted:
            return untimed
        speed, rescorer, p = max(predicted)
        return (
            f"{untimed} By the costs of a step the fastest would be {rescorer} with {_drafts(p)} a step, at "
            f"{speed:.2f} times the speed of autoregressive decoding."
        )
    speed, rescorer, p = max(timed)
    return (
        f"Measured live, the fastest was {rescorer} with {_drafts(p)} a step, at {speed:.2f} times the speed of "
        f"autoregressive decoding ({'faster' if speed > 1 else 'slower'} than plain greedy decoding on that machine)."
    )


def _drafts(p: int) -> str:
    return "one draft" if p == 1 else f"{p} drafts"


def _range(format: Format, values: Sequence[float]) -> str:
    """From the lowest to the highest, or the one number that both are shown as; - for none."""
    if not values:
        return "-"
    low, high = format.show(min(values)), format.show(max(values))
    return low if low == high else f"{low} to {high}"
