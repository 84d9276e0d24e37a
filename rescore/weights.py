"""The weight (alpha) of each rescorer: given, tuned before (`rescore.tuning`) or its default; fitting to a base LM."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lm.files import cache_directory, read_json_object
from rescore.inputs import EvalOptions, TaskInput
from rescore.rescorers import Rescorer, Target, WeightedRescorer
from rescore.tracing import Trace

LEAST_COVERAGE = 0.1


def choose_alphas(
    options: EvalOptions, task: TaskInput, rescorers: Mapping[str, Rescorer]
) -> dict[str, dict[str, Any]]:
    """By rescorer as typed: `alpha`, `from` (option, tuned or default) and, if tuned, `held_out` (ids of examples).

    Only for rescorers that have a weight. Raises `IncompatibleError` if one was made for another tokenizer.
    """
    chosen: dict[str, dict[str, Any]] = {}
    for typed, rescorer in rescorers.items():
        if not isinstance(rescorer, WeightedRescorer):
            continue
        if task.given is None:  # before anything is decoded; a trace made elsewhere need not say what its base is
            base = task.settings["base"]
            rescorer.fit(Target(base["vocab_size"], (), base["tokenizer_sha256"]))
        path = tuned_path(options, task, rescorer)
        if options.alpha is not None:
            chosen[typed] = {"alpha": options.alpha, "from": "option"}
        elif path.is_file():
            tuned = read_json_object(path, missing=f"can't use the tuned weight in {path}")
            chosen[typed] = {"alpha": float(tuned["alpha"]), "from": "tuned", "held_out": tuned["held_out"]}
        else:
            chosen[typed] = {"alpha": rescorer.alpha, "from": "default"}
    return chosen


def alpha_notices(alphas: Mapping[str, Mapping[str, Any]], task: TaskInput) -> list[str]:
    """What the user should know of these weights."""
    lines = []
    for typed, chosen in alphas.items():
        if chosen["from"] == "default":
            advice = "rescore tune with the same task, rescorer, k, p and h finds the best"
            lines.append(f"{typed} on {task.name}: alpha {chosen['alpha']:g} by default; {advice}")
        elif shared := len(set(task.ids) & set(chosen.get("held_out", ()))):
            lines.append(f"{typed} on {task.name}: alpha was tuned on {shared} of these {len(task.ids)} examples")
    return lines


def with_alphas(
    task: TaskInput, rescorers: Mapping[str, Rescorer], alphas: Mapping[str, Mapping[str, Any]]
) -> dict[str, Rescorer]:
    """The rescorers with their weights."""
    return {
        typed: rescorer.weighted(alphas[typed]["alpha"]) if isinstance(rescorer, WeightedRescorer) else rescorer
        for typed, rescorer in rescorers.items()
    }


def target_of(trace: Trace) -> Target:
    """The base LM that a trace was recorded with."""
    base = trace.header.settings.get("base")
    tokenizer = base.get("tokenizer_sha256") if isinstance(base, dict) else None
    return Target(trace.header.vocab_size, tuple(trace.header.eos_token_ids), tokenizer)


def fit_to(trace: Trace, rescorers: Mapping[str, Rescorer]) -> dict[str, Rescorer]:
    """The rescorers fitted to a trace's base LM."""
    target = target_of(trace)
    return {
        typed: rescorer.fit(target) if isinstance(rescorer, WeightedRescorer) else rescorer
        for typed, rescorer in rescorers.items()
    }


def coverage_notices(trace: Trace, rescorers: Mapping[str, Rescorer], k: int) -> list[str]:
    """A line for each fitted rescorer that knows less than `LEAST_COVERAGE` of the lattices' tokens."""
    if not trace.examples:
        return []
    tokens = np.concatenate([e.lattice.token_ids[:, :, :k].ravel() for e in trace.examples[:32]])
    lines = []
    for typed, rescorer in rescorers.items():
        if isinstance(rescorer, WeightedRescorer) and (share := rescorer.coverage(tokens)) < LEAST_COVERAGE:
            lines.append(f"{typed} knows only {share:.1%} of the lattices' tokens; was it built for this tokenizer?")
    return lines


def tuned_path(options: EvalOptions, task: TaskInput, rescorer: WeightedRescorer) -> Path:
    """Where the tuned weight of a rescorer on a task is kept: one file per base, heads, rescorer, h, k and p."""
    ours = "heads_sha256" in task.settings  # a trace made elsewhere goes by all that it says of itself
    made_of = {
        "task": task.name,
        "base": task.settings["base"] if ours else task.settings,
        "heads": task.settings.get("heads_sha256"),
        "h": options.h or task.settings.get("h"),
        "rescorer": rescorer.identity,
        "k": options.k,
        "p": options.p,
    }
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:24]
    return cache_directory() / "tuned" / f"{task.name}-{key}.json"
