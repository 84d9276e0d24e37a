"""The page of a suite: Markdown tables to keep beside its YAML, and how they were made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rescore.acceptance.rules import unmarked
from rescore.costs.table import Costs
from rescore.runs.records import Result, RunConfig
from rescore.studies.tables import costs_tables
from rescore.suites.plan import Plan
from rescore.suites.tables import suite_tables
from rescore.table import Table, escaped
from rescore.tasks.leave_out import SHIPPED
from rescore.terminal import printable

OF_REPLAY = (
    "Block efficiency and its gain over `none` with p = 1 have 95 % intervals (studentised bootstrap by group: "
    "examples of one source), those of gains paired; won, tied, lost: steps that accepted more, as many, fewer tokens "
    "than the unrescored draft would have there; oracle: the best path of what the run's drafters propose."
)
OF_LIVE = (
    "The decodes of an example took turns, greedy decoding first; peers (`transformers`) are other libraries' own "
    "decoders, with the model as they load it."
)


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
    made = (
        f"Made by `rescore suite {printable(source).replace('`', '')} --out DIR`"
        if source
        else "Made by `rescore suite`"
    )
    tables = suite_tables(results)
    if costs is not None:
        steps, *choices = costs_tables(costs)
        tables += [dataclasses.replace(steps, title="What a step costs there"), *choices]
    return "\n\n".join([f"{_caption(results, plan, configs)} {made}.", *map(_section, tables)]) + "\n"


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
