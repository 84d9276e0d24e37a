"""The page of a suite: a Markdown table to keep beside its YAML, and how it was made."""

from __future__ import annotations

from collections.abc import Sequence

from rescore.runs.records import Result
from rescore.runs.tables import suite_table
from rescore.suites.plan import Plan
from rescore.table import escaped
from rescore.tasks.leave_out import SHIPPED
from rescore.terminal import printable


def suite_page(results: Sequence[Result], plan: Plan, source: str) -> str:
    """A Markdown page: how it was made, and a line for each task, rescorer and p."""
    made = (
        f"Made by `rescore suite {printable(source).replace('`', '')} --out DIR`"
        if source
        else "Made by `rescore suite`"
    )
    return f"{_caption(results, plan)} {made}.\n\n{suite_table(results).markdown()}\n"


def _caption(results: Sequence[Result], plan: Plan) -> str:
    way = "Live" if plan.mode == "live" else "Replayed"
    ks, hs = _values(results, "k"), _values(results, "h")
    facts = [f"{way} decode of {plan.base} in {plan.dtype}", f"h = {hs}", f"k = {ks}"]
    facts += [f"up to {plan.max_new_tokens} new tokens"] if plan.max_new_tokens else []
    facts += [f"prompts cut to {plan.max_prompt_tokens} tokens"] if plan.max_prompt_tokens else []
    facts += [f"{_values(results, 'n')} examples of a task"]
    weighted = {r.rescorer for r in results if r.alpha is not None}
    if limits := sorted({tuning.limit for name in weighted if (tuning := plan.tuning(name))}):
        facts.append(f"alpha tuned on {' or '.join(map(str, limits))} examples of the last groups of the data")
    facts += ["examples that share text with training corpora left out"] if plan.leave_out == SHIPPED else []
    predicted = ""
    if any(r.predicted_speedup for r in results):
        predicted = "; predicted: the speed-up over greedy decoding by the costs of a step (rescore bench costs)"
    return (
        f"{', '.join(map(escaped, facts))}. Block efficiency and its gain over `none` with p = 1 have 95 % intervals "
        "(studentised bootstrap by group: examples of one source), those of gains paired; won, tied, lost: steps that "
        "accepted more, as many, fewer tokens than the unrescored draft would have there; oracle: the best path of "
        f"what the run's drafters propose{predicted}."
    )


def _values(results: Sequence[Result], name: str) -> str:
    return " or ".join(map(str, sorted({getattr(r, name) for r in results})))
