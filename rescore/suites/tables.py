"""The tables of a suite: every run, and of live decoding the speed of each by task; what is not greedy is apart. And
its page: the same in Markdown, to keep beside its YAML, with how they were made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rescore.acceptance.rules import MARK, unmarked
from rescore.costs.table import Costs
from rescore.runs.records import Result, RunConfig
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
from rescore.studies.tables import costs_tables
from rescore.suites.plan import Plan
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
    escaped,
)  # fmt: skip
from rescore.tasks.leave_out import SHIPPED
from rescore.terminal import printable

QUALITY, WITHOUT_DRAFTS, _ = QUALITIES
OF_REPLAY = (
    "Block efficiency and its gain over `none` with p = 1 have 95 % intervals (studentised bootstrap by group: "
    "examples of one source), those of gains paired; won, tied, lost: steps that accepted more, as many, fewer tokens "
    "than the unrescored draft would have there; oracle: the best path of what the run's drafters propose."
)
OF_LIVE = (
    "The decodes of an example took turns, greedy decoding first; peers (`transformers`) are other libraries' own "
    "decoders, with the model as they load it."
)


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


def suite_page(
    results: Sequence[Result],
    plan: Plan,
    source: str,
    *,
    configs: Sequence[RunConfig] = (),
    costs: Costs | None = None,
) -> str:
    """A Markdown page: how it was made, and the tables of a suite.

    configs: of its evaluations, which say where live decoding was measured; costs: what a step costs there.
    """
    of = f" {printable(source).replace('`', '')} --out DIR" if source else ""
    tables = suite_tables(results)
    if costs is not None:
        steps, *choices = costs_tables(costs)
        tables += [dataclasses.replace(steps, title="What a step costs there"), *choices]
    caption = f"{_caption(results, plan, configs)} Made by `rescore suite{of}`."
    return "\n\n".join([caption, *map(_section, tables)]) + "\n"


def _section(table: Table) -> str:
    """A table under its title, with what its note says."""
    note = escaped(table.note)
    return "\n\n".join(part for part in (table.title and f"## {table.title}", table.markdown(), note) if part)


def _caption(results: Sequence[Result], plan: Plan, configs: Sequence[RunConfig]) -> str:
    live = plan.mode == "live"
    ks, hs = _values(results, "k"), _values(results, "h")
    facts = [f"{'Live' if live else 'Replayed'} decode of {plan.base} in {plan.dtype}", f"h = {hs}", f"k = {ks}"]
    facts += [f"up to {plan.max_new_tokens} new tokens"] if plan.max_new_tokens else []
    facts += [f"prompts cut to {plan.max_prompt_tokens} tokens"] if plan.max_prompt_tokens else []
    facts += [f"{_values(results, 'n')} examples of a task"]
    marks = dict.fromkeys(r.mark for r in results)
    facts += [" or".join(mark or " greedy" for mark in marks).strip()] if any(marks) else []
    weighted = {unmarked(r.rescorer) for r in results if r.alpha is not None}
    if limits := sorted({tuning.limit for name in weighted if (tuning := plan.tuning(name))}):
        facts.append(f"alpha tuned on {' or '.join(map(str, limits))} examples of the last groups of the data")
    facts += ["examples that share text with training corpora left out"] if plan.leave_out == SHIPPED else []
    machines = dict.fromkeys(map(_machine, configs if live else ()))
    facts += [f"on {' and '.join(machines)}"] if machines else []
    predicted = " predicted: the speed-up over greedy decoding by the costs of a step (rescore bench costs)."
    shown = predicted if any(r.predicted_speedup for r in results) else ""
    return f"{', '.join(map(escaped, facts))}. {OF_LIVE if live else OF_REPLAY}{shown}"


def _machine(config: RunConfig) -> str:
    libraries = " and ".join(f"{name} {config.versions.get(name)}" for name in ("torch", "transformers"))
    return f"{config.device} with {config.threads} threads, {libraries}"


def _values(results: Sequence[Result], name: str) -> str:
    return " or ".join(map(str, sorted({getattr(r, name) for r in results})))
