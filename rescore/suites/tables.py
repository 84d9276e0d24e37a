"""The tables of a suite: every run, and of live decoding the speed of each by task; what is not greedy is apart."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rescore.acceptance.rules import MARK, unmarked
from rescore.runs.records import Result
from rescore.runs.tables import (
    GREEDY,
    IDENTICAL,
    ORACLE,
    OUTCOMES,
    PREDICTED,
    QUALITIES,
    SPEEDUP,
    SPEEDUPS,
    TOKENS_PER_SECOND,
    divergence_table,
    outcome,
)
from rescore.table import (
    ALPHA,
    EFFICIENCY,
    EXAMPLES,
    GAINS,
    GROUPS,
    RESCORER,
    TASK,
    TIMES,
    Column,
    H,
    K,
    P,
    Table,
)  # fmt: skip

QUALITY, WITHOUT_DRAFTS, _ = QUALITIES


def suite_tables(results: Sequence[Result]) -> list[Table]:
    """All tables of a suite: of a replay one; of live decoding also one of speed alone for each acceptance rule, and of
    outputs that differ."""
    if not any(r.latency for r in results):
        return [suite_table(results)]
    marks = dict.fromkeys(r.mark for r in results)
    of_speed = [speed_table([r for r in results if r.mark == mark]) for mark in marks]
    tables = [*of_speed, suite_table(results), divergence_table(results)]
    return [table for table in tables if table.rows]


def suite_table(results: Sequence[Result]) -> Table:
    """A line for each task, rescorer and p of a suite; k, h and alpha only where they say something."""
    live, ruled = any(r.latency for r in results), any(r.mark for r in results)
    weighted = not live or any(r.alpha is not None for r in results)
    measured = (TOKENS_PER_SECOND, *SPEEDUPS, IDENTICAL) if live else (*GAINS, *map(outcome, OUTCOMES), ORACLE)
    columns = [
        TASK, RESCORER, *_several(results), P, EXAMPLES, GROUPS, *([ALPHA] if weighted else []), *EFFICIENCY, *measured,
        *(QUALITIES if ruled else ()), *([PREDICTED] if any(r.predicted_speedup for r in results) else []),
    ]  # fmt: skip
    note = (
        "block eff. = tokens / steps; tok/s: the prompt apart; speed-up: over our greedy decoding in the same run, to\n"
        "which so many outputs are identical; 95 % = studentised bootstrap by group (examples of one source), that of\n"
        "speed-ups paired."
    )
    if ruled:
        note += (
            "\n[lossy: ...]: the outputs are not the base's; [sampled: ...]: drawn, speed-up: over drawing without\n"
            "drafts; quality = mean scores of the outputs; cut at limit = outputs that did not come to their end."
        )
    return Table.of(columns, results, title="All runs" if live else "", note=note if live else "")


def speed_table(results: Sequence[Result]) -> Table:
    """Tasks x runs of one acceptance rule: the speed-up over greedy decoding, and its mean over the tasks; the fastest
    of each is marked. Beside those of a lossy rule stand the scores of the outputs."""
    several = _several(results)
    found = MARK.search(results[0].rescorer)
    kind, rule = found.groups() if found else ("", "")
    lossy = kind == "lossy"
    runs = dict.fromkeys((r.rescorer, r.p) for r in results)
    labels = [label for label, _ in runs]
    heads = [unmarked(label) + (f", p = {p}" if labels.count(label) > 1 else "") for label, p in runs]
    by_place: dict[tuple[Any, ...], dict[tuple[str, int], Result]] = {}
    for r in results:
        place = (r.task, *(column.value(r) for column in several))
        by_place.setdefault(place, {})[r.rescorer, r.p] = r
    alone = (GREEDY, WITHOUT_DRAFTS) if lossy else (GREEDY,)
    of_run = (SPEEDUP, QUALITY) if lossy else (SPEEDUP,)
    rows: list[list[Any]] = []
    for place, of_runs in by_place.items():
        baseline = [column.value(next(iter(of_runs.values()))) for column in alone]
        of_each = [column.value(of_runs[run]) if run in of_runs else None for run in runs for column in of_run]
        rows.append([*place, *baseline, *of_each])
    first = 1 + len(several) + len(alone)
    speeds = range(first, first + len(runs) * len(of_run), len(of_run))
    mean: list[Any] = ["mean", *[None] * (first + len(runs) * len(of_run) - 1)]
    for column in speeds:
        of_tasks = [row[column] for row in rows]
        mean[column] = None if None in of_tasks else fmean(of_tasks)
    rows.append(mean)
    columns = [TASK, *several, *alone]
    for head in heads:
        columns += [Column(head, TIMES), QUALITY] if lossy else [Column(head, TIMES)]
    best = [
        (place, columns[column].heading)
        for place, row in enumerate(rows)
        for column in speeds
        if row[column] is not None and row[column] == max(row[c] for c in speeds if row[c] is not None)
    ]
    note = "* the fastest of a task; mean: of the tasks' speed-ups."
    title = "Speed-up over greedy decoding"
    if lossy:
        title = f"LOSSY, {rule} acceptance: speed-up over greedy decoding"
        note += " The outputs are not the base's: quality = their scores, beside those of greedy decoding."
    elif kind:
        title = f"Sampled, {rule}: speed-up over drawing without drafts"
    return Table(columns, rows, title=title, note=note, best=best)


def _several(results: Sequence[Result]) -> list[Column]:
    """Of k and h those of which there are several."""
    return [column for column in (K, H) if len({column.value(r) for r in results}) > 1]
