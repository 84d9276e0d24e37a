"""The speed-up over greedy decoding that a decode's steps would give, by a table of costs.

A step takes what its call does, by its tokens and the context before it, and what asking heads and choosing drafts add;
one that needs no call takes nothing. Greedy decoding makes the same output with a call of one token for each but the
last. What a decode does to its steps is the same live and in replay, and so is the prediction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from rescore.costs.kept import COMMAND
from rescore.costs.table import Costs
from rescore.runs.records import ExampleRecord, is_oracle
from rescore.runs.run import Run


def predicted_speedup(
    records: Sequence[ExampleRecord],
    costs: Costs,
    choice_ms: float,
    *,
    verify: str = "tree",
    vocabulary: int | None = None,
) -> float | None:
    """Of the decodes in some records of one run; choice_ms: what its drafting and rescoring take in a step, the heads
    apart; vocabulary: tokens that heads draft from (None: all). None where no step needs a call."""
    greedy, steps = 0.0, 0.0
    for record in records:
        accepted = np.array(record.accepted)
        contexts = record.prompt_tokens + np.cumsum(accepted) - accepted  # before each step
        tokens, drafts, asked = np.array(record.calls, dtype=np.int64).T
        made = tokens > 0
        times = costs.steps(contexts, tokens) + choice_ms
        if costs.tree_ms is not None and verify == "tree":
            times += np.where(drafts > 1, costs.tree_ms, 0.0)
        if costs.heads is not None:
            times += np.where(asked > 0, costs.heads.of(vocabulary), 0.0)
        steps += float(times[made].sum())
        singles = record.prompt_tokens + np.arange(len(record.output_ids) - 1)
        greedy += float(costs.steps(singles, np.ones_like(singles)).sum())
    return greedy / steps if steps else None


def not_measured(costs: Costs, runs: Iterable[Run]) -> str | None:
    """A line about runs whose drafting or rescoring a table has no time of, so that no speed-up is predicted; None
    without any. An oracle takes no time that could be measured."""
    lacking = [run for run in runs if not is_oracle(run.label) and costs.choice_ms(run.chooses, run.k, run.p) is None]
    if not lacking:
        return None
    names = ", ".join(dict.fromkeys(f"{run.label} (k = {run.k}, p = {run.p})" for run in lacking))
    return (
        f"no predicted speed-up of {names}: the costs lack the time of its drafting and rescoring; {COMMAND} with "
        "--rescorer, --k and --p as here measures it"
    )
