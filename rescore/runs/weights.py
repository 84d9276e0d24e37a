"""The weight (alpha) of each run: given, the rescorer's own, or what `rescore tune` kept on this machine; and fitting
rescorers to a base LM."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lattices.errors import InvalidDataError, RescoreError
from lm.keys import cache_entry
from lm.records import read_record
from rescore.checks import MAX_ALPHA
from rescore.costs.kept import costs_for
from rescore.drafters import HEADS
from rescore.drafters.asked import fit_drafter
from rescore.options import written
from rescore.rescorers import Target
from rescore.runs.inputs import Inputs
from rescore.runs.recording import Recording
from rescore.runs.records import Alpha, RunRecord, Tuned
from rescore.runs.run import Choosing, Run, name_of
from rescore.tracing import Trace

if TYPE_CHECKING:
    from lm.base.model import BaseLM
    from lm.heads.block_heads import BlockHeads

    LoadedModels = Callable[[], tuple[BaseLM, BlockHeads | None]]
    from rescore.costs.table import Costs

LEAST_COVERAGE = 0.1


def target_before(recording: Recording) -> Target:
    """The base LM of a recording, before anything is decoded; of a given trace as far as that tells."""
    if recording.given:
        return target_of(recording.given)
    base = recording.settings["base"]
    return Target.of(base, base["vocab_size"])


def fit_with_costs(
    recording: Recording, choosing: Mapping[str, Choosing], costs: Costs | str | None = None
) -> tuple[dict[str, Choosing], Costs | None]:
    """Rescorers and drafters fitted before anything is decoded, when what they score with has its whole `identity`; and
    the table of `costs` (as `costs_for` takes them) that they draft and are predicted by.

    Raises as `Rescorer.fit`: for one that was made for another tokenizer, or has no weights for this base LM; and as
    `costs_for`.
    """
    target = target_before(recording)
    table = costs_for(recording, target, choosing, costs)
    return fitted_to(dataclasses.replace(target, costs=table), choosing), table


def identities_of(choosing: Choosing) -> tuple[str, list[str]]:
    """What a fitted rescorer scores with, and its drafters draft with (none: heads alone)."""
    rescorer, drafters = choosing
    names = [drafter.identity for drafter in drafters]
    return rescorer.identity, [] if names == [HEADS] else names


def alpha_of(recording: Recording, run: Run, choosing: Choosing) -> Alpha | None:
    """The weight of a run on a task; None for a rescorer (fitted) that has none.

    Raises `RescoreError` with the command to run if a tuned weight is asked for and none is kept on this machine.
    """
    rescorer, _ = choosing
    if rescorer.alpha is None:
        return None
    if run.alpha is None:
        return Alpha(alpha=rescorer.alpha, source="default")
    if isinstance(run.alpha, Alpha):
        return run.alpha
    if not isinstance(run.alpha, str):
        return Alpha(alpha=float(run.alpha), source="option")
    command = _tune_command(recording.inputs, run)
    path = tuned_path(recording, choosing, k=run.k, p=run.p)
    if not path.is_file():
        raise RescoreError(
            f"no weight of {run.label} is tuned on this machine for {recording.name}, this base, heads, k = {run.k} "
            f"and p = {run.p}; run: {command} (or give --alpha NUMBER)"
        )
    tuned = read_record(path, Tuned, missing=f"can't use the tuned weight in {path}", advice=f"run: {command}")
    if not 0 <= tuned.alpha <= MAX_ALPHA:
        raise InvalidDataError(f"{path} holds no tuned weight; run: {command}")
    # What it was tuned by goes into the results, which another machine can then make again.
    return tuned.as_alpha(data_sha256=recording.data_sha256)


def _tune_command(inputs: Inputs, run: Run) -> str:
    names = ("h", "base", "heads", "data", "leave_out", "max_new_tokens", "max_prompt_tokens", "dtype")
    changed = {name: value for name in names if (value := getattr(inputs, name)) != getattr(Inputs, name)}
    spec = run.rescorer if isinstance(run.rescorer, str) else run.label
    drafters = ",".join(map(name_of, run.drafters)) or None
    given = {"task": inputs.task, "trace": inputs.trace, "rescorer": spec, "drafter": drafters, "k": run.k, "p": run.p}
    return written("tune", given | changed)


def alpha_notices(runs: Sequence[RunRecord], recording: Recording) -> list[str]:
    """What the user should know of these weights: a line for each rescorer, or one for each p if they differ."""
    ps_of: dict[tuple[str, str], list[int]] = {}
    for run in runs:
        if run.alpha and (fact := _alpha_fact(run.alpha, recording)):
            ps = ps_of.setdefault((run.rescorer, fact), [])
            if run.p not in ps:
                ps.append(run.p)
    return [
        f"{rescorer} on {recording.name}, p = {' and '.join(map(str, ps))}: {fact}"
        for (rescorer, fact), ps in ps_of.items()
    ]


def _alpha_fact(chosen: Alpha, recording: Recording) -> str | None:
    if chosen.source == "default":
        advice = "rescore tune with the same task, rescorer, k, p and h finds the best, and --alpha tuned takes it"
        return f"alpha {chosen.alpha:g} by default; {advice}"
    held_out, facts = chosen.held_out, []
    if chosen.source == "tuned" and chosen.alpha == 0:
        facts.append(f"alpha 0 was best on {len(held_out)} held-out examples: its drafts are the unrescored ones")
    if chosen.other_data:
        facts.append(f"alpha {chosen.alpha:g} was tuned on other data of this task")
    elif shared := len(set(recording.ids) & set(held_out)):
        facts.append(f"alpha was tuned on {shared} of these {len(recording.ids)} examples")
    groups = set(chosen.held_out_groups)
    if near := sum(g in groups and i not in held_out for i, g in zip(recording.ids, recording.groups, strict=True)):
        facts.append(f"alpha was tuned on examples that share their source with {near} of these {len(recording.ids)}")
    return "; ".join(facts) or None


def target_of(
    trace: Trace,
    *,
    device: str = "cpu",
    shared: BaseLM | None = None,
    models: LoadedModels | None = None,
    costs: Costs | None = None,
) -> Target:
    """The base LM that a trace was recorded with, as far as the trace tells; for work on `device`.

    shared: it, where it is loaded; models: gives it with its heads (`Recording.loads`); costs: of its steps.
    """
    header, settings = trace.header, trace.header.settings
    target = Target.of(settings.get("base"), header.vocab_size, header.eos_token_ids, device=device, shared=shared)
    return dataclasses.replace(target, traced=str(settings.get("drafter", "")), models=models, costs=costs)


def fitted_to(target: Target, choosing: Mapping[str, Choosing]) -> dict[str, Choosing]:
    """Rescorers and drafters fitted to a base LM. Raises as their `fit`."""
    fitted = {drafter: fit_drafter(drafter, target) for _, drafters in choosing.values() for drafter in drafters}
    return {
        label: (
            rescorer.fit(dataclasses.replace(target, sources=tuple(fitted[drafter].source for drafter in drafters))),
            tuple(fitted[drafter] for drafter in drafters),
        )
        for label, (rescorer, drafters) in choosing.items()
    }


def coverage_notices(trace: Trace, fitted: Mapping[str, Choosing], k: int) -> list[str]:
    """A line for each fitted rescorer that knows less than `LEAST_COVERAGE` of the lattices' tokens."""
    if not trace.examples:
        return []
    tokens = np.concatenate([e.lattice.token_ids[:, :, :k].ravel() for e in trace.examples[:32]])
    lines = []
    for label, (rescorer, _) in fitted.items():
        if (share := rescorer.coverage(tokens)) < LEAST_COVERAGE:
            lines.append(f"{label} knows only {share:.1%} of the lattices' tokens; was it built for this tokenizer?")
    return lines


def tuned_path(recording: Recording, choosing: Choosing, *, k: int, p: int) -> Path:
    """Where the tuned weight of a rescorer on a task is kept: one file per task (its template, its definition), base,
    heads (of a trace of another drafter: that), rescorer, drafters, h, k and p.

    Raises `RescoreError` for a rescorer without identity.
    """
    rescorer, _ = choosing
    _, drafters = identities_of(choosing)
    if not rescorer.identity:
        raise RescoreError(
            f"a tuned weight of {type(rescorer).__name__} would not be known again: set its `identity`, a hash of what "
            "it scores with"
        )
    settings = recording.settings
    ours = "heads_sha256" in settings  # a trace made elsewhere goes by all that it says of itself
    decides = {
        "task": recording.name,
        **{name: settings.get(name) for name in ("template", "chat_template", "definition")},
        "base": settings["base"] if ours else settings,
        "heads": settings.get("heads_sha256"),
        "h": recording.h,
        "rescorer": rescorer.identity,
        **({"drafters": drafters} if drafters else {}),
        **({"traced": settings["drafter"]} if "drafter" in settings else {}),
        "k": k,
        "p": p,
    }
    return cache_entry("tuned", recording.name, decides, suffix=".json")
