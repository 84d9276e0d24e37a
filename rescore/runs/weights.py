"""The weight (alpha) of each rescorer: given, its default or, where that is asked for, what `rescore.runs.tuning`
kept on this machine; fitting to a base LM."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lattices.errors import InvalidDataError, RescoreError
from lm.base.model import BaseIdentity, BaseLM
from lm.keys import cache_entry
from lm.records import read_record
from rescore.rescorers import Rescorer, Target
from rescore.runs.inputs import TaskInput
from rescore.runs.options import DEFAULT_NEW_TOKENS, MAX_ALPHA, TUNED, EvalOptions, Run
from rescore.runs.records import Alpha, Alphas, Tuned
from rescore.tasks import is_task_file, load_task
from rescore.tracing import Trace

LEAST_COVERAGE = 0.1


def check_tokenizers(task: TaskInput, rescorers: Mapping[str, Rescorer]) -> None:
    """Before anything is decoded: raises `IncompatibleError` if a rescorer was made for another tokenizer."""
    if task.given is not None:  # a trace made elsewhere need not say what its base is; `fit_to` goes by what it says
        return
    base = task.settings["base"]
    for rescorer in rescorers.values():
        if rescorer.alpha is not None:
            rescorer.fit(Target(base["vocab_size"], (), base["tokenizer_sha256"], BaseIdentity(**base)))


def choose_alphas(options: EvalOptions, task: TaskInput, rescorers: Mapping[str, Rescorer]) -> Alphas:
    """The weights on a task of all the rescorers that have one, for every p that they are run with.

    Raises `RescoreError` with the command to run if a tuned weight is asked for and none is kept on this machine.
    """
    return {
        typed: {p: _alpha(options, task, typed, rescorer, p) for p in options.ps_of(typed)}
        for typed, rescorer in rescorers.items()
        if rescorer.alpha is not None
    }


def _alpha(options: EvalOptions, task: TaskInput, typed: str, rescorer: Rescorer, p: int) -> Alpha:
    if options.alpha is None:
        assert rescorer.alpha is not None, "a rescorer without weight has none"
        return Alpha(alpha=rescorer.alpha, source="default")
    if options.alpha != TUNED:
        return Alpha(alpha=float(options.alpha), source="option")
    command = _tune_command(options, task, typed, p)
    path = tuned_path(options, task, rescorer, p)
    if not path.is_file():
        raise RescoreError(
            f"no weight of {typed} is tuned on this machine for {task.name}, this base, heads, k = {options.k} and "
            f"p = {p}; run: {command} (or give --alpha NUMBER)"
        )
    tuned = read_record(path, Tuned, missing=f"can't use the tuned weight in {path}", advice=f"run: {command}")
    if not 0 <= tuned.alpha <= MAX_ALPHA:
        raise InvalidDataError(f"{path} holds no tuned weight; run: {command}")
    # What it was tuned by goes into the results, which another machine can then make again.
    return Alpha(
        alpha=tuned.alpha, source="tuned", held_out=tuned.held_out, held_out_groups=tuned.held_out_groups,
        swept=tuned.alphas, data_sha256=tuned.data_sha256,
        other_data=tuned.data_sha256 != task.settings.get("data_sha256"),
    )  # fmt: skip


def _tune_command(options: EvalOptions, task: TaskInput, typed: str, p: int) -> str:
    """The command that tunes the weight which `_alpha` looks for."""
    names = [name for name in options.tasks if is_task_file(name) and load_task(name).name == task.name]
    arguments: dict[str, Any] = {
        "task": names[0] if names else task.name, "trace": options.trace, "rescorer": typed, "k": options.k,
        "p": p, "h": options.h, "base": options.base, "heads": options.heads, "data": options.data,
        "max-new-tokens": options.max_new_tokens, "max-prompt-tokens": options.max_prompt_tokens,
        "dtype": options.dtype,
    }  # fmt: skip
    usual = {"base": EvalOptions.base, "dtype": EvalOptions.dtype, "max-new-tokens": DEFAULT_NEW_TOKENS}
    arguments |= {name: None for name, value in usual.items() if options.trace or arguments[name] == value}
    words = [f"--{name} {shlex.quote(str(value))}" for name, value in arguments.items() if value is not None]
    return " ".join(["rescore tune", *words])


def alpha_notices(alphas: Alphas, task: TaskInput) -> list[str]:
    """What the user should know of these weights: a line for each rescorer, or one for each p if they differ."""
    ps_of: dict[tuple[str, str], list[int]] = {}
    for typed, by_p in alphas.items():
        for p, chosen in by_p.items():
            if fact := _alpha_fact(chosen, task):
                ps_of.setdefault((typed, fact), []).append(p)
    return [f"{typed} on {task.name}, p = {' and '.join(map(str, ps))}: {fact}" for (typed, fact), ps in ps_of.items()]


def _alpha_fact(chosen: Alpha, task: TaskInput) -> str | None:
    if chosen.source == "default":
        advice = "rescore tune with the same task, rescorer, k, p and h finds the best, and --alpha tuned takes it"
        return f"alpha {chosen.alpha:g} by default; {advice}"
    held_out, facts = chosen.held_out, []
    if chosen.source == "tuned" and chosen.alpha == 0:
        facts.append(f"alpha 0 was best on {len(held_out)} held-out examples: its drafts are the unrescored ones")
    if chosen.other_data:
        facts.append(f"alpha {chosen.alpha:g} was tuned on other data of this task")
    elif shared := len(set(task.ids) & set(held_out)):
        facts.append(f"alpha was tuned on {shared} of these {len(task.ids)} examples")
    groups = set(chosen.held_out_groups)
    if near := sum(g in groups and name not in held_out for name, g in zip(task.ids, task.groups, strict=True)):
        facts.append(f"alpha was tuned on examples that share their source with {near} of these {len(task.ids)}")
    return "; ".join(facts) or None


def with_alphas(runs: Sequence[Run], rescorers: Mapping[str, Rescorer], alphas: Alphas) -> dict[Run, Rescorer]:
    """The rescorer of each run, with its weight for that p."""
    ready: dict[Run, Rescorer] = {}
    for typed, p in runs:
        rescorer = rescorers[typed]
        if rescorer.alpha is not None:
            rescorer = rescorer.weighted(alphas[typed][p].alpha)
        ready[typed, p] = rescorer
    return ready


def target_of(trace: Trace, *, device: str = "cpu", shared: BaseLM | None = None) -> Target:
    """The base LM that a trace was recorded with, as far as the trace tells; for work on `device`."""
    base = trace.header.settings.get("base")
    tokenizer = base.get("tokenizer_sha256") if isinstance(base, dict) else None
    identity = None
    if isinstance(base, dict) and base.keys() >= {field.name for field in dataclasses.fields(BaseIdentity)}:
        identity = BaseIdentity(**{field.name: base[field.name] for field in dataclasses.fields(BaseIdentity)})
    return Target(trace.header.vocab_size, tuple(trace.header.eos_token_ids), tokenizer, identity, device, shared)


def fit_to(
    trace: Trace, rescorers: Mapping[str, Rescorer], *, device: str = "cpu", shared: BaseLM | None = None
) -> dict[str, Rescorer]:
    """The rescorers fitted to a trace's base LM, which is `shared` where it is loaded."""
    target = target_of(trace, device=device, shared=shared)
    return {typed: rescorer.fit(target) for typed, rescorer in rescorers.items()}


def coverage_notices(trace: Trace, rescorers: Mapping[str, Rescorer], k: int) -> list[str]:
    """A line for each fitted rescorer that knows less than `LEAST_COVERAGE` of the lattices' tokens."""
    if not trace.examples:
        return []
    tokens = np.concatenate([e.lattice.token_ids[:, :, :k].ravel() for e in trace.examples[:32]])
    lines = []
    for typed, rescorer in rescorers.items():
        if (share := rescorer.coverage(tokens)) < LEAST_COVERAGE:
            lines.append(f"{typed} knows only {share:.1%} of the lattices' tokens; was it built for this tokenizer?")
    return lines


def tuned_path(options: EvalOptions, task: TaskInput, rescorer: Rescorer, p: int) -> Path:
    """Where the tuned weight of a rescorer on a task is kept: one file per task (its template, its definition), base,
    heads, rescorer, h, k and p."""
    ours = "heads_sha256" in task.settings  # a trace made elsewhere goes by all that it says of itself
    made_of = {
        "task": task.name,
        **{name: task.settings.get(name) for name in ("template", "chat_template", "definition")},
        "base": task.settings["base"] if ours else task.settings,
        "heads": task.settings.get("heads_sha256"),
        "h": options.h or task.settings.get("h"),
        "rescorer": rescorer.identity,
        "k": options.k,
        "p": p,
    }
    return cache_entry("tuned", task.name, made_of, suffix=".json")
