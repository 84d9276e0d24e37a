"""Evaluations as tests ask for them: one dictionary of what is evaluated and how."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rescore.runs.evaluated import Evaluation
from rescore.runs.evaluation import evaluate
from rescore.runs.inputs import Inputs
from rescore.runs.recording import Recording, open_recording, open_recordings
from rescore.runs.records import Tuned
from rescore.runs.run import runs_of
from rescore.runs.tuning import tune
from rescore.tracing import Trace

HOW = ("tasks", "rescorers", "k", "p", "alpha", "mode", "verify", "seed")
Options = dict[str, Any]  # of HOW, and fields of `Inputs`


def inputs_of(options: Options) -> Inputs:
    """What is evaluated; of a given trace without what says how one is recorded."""
    recording = ("base", "dtype", "max_new_tokens", "max_prompt_tokens") if options.get("trace") else ()
    return Inputs(**{name: value for name, value in options.items() if name not in (*HOW, *recording)})


def all_of(value: Any) -> Sequence[Any]:
    """A value alone, or several."""
    return value if isinstance(value, tuple | list) else (value,)


def opened(
    options: Options, *, k: int | None = None, out: Path | None = None, heads_needed: bool = True
) -> list[Recording]:
    """The recordings of the tasks."""
    if out is not None:
        (task,) = options.get("tasks") or (None,)
        inputs = inputs_of(options | {"task": task} if task else options)
        return [open_recording(inputs, k=k or options.get("k", 16), out=out)]
    k = k or max(all_of(options.get("k", 16)))
    return open_recordings(options.get("tasks", ()), inputs_of(options), k=k, heads_needed=heads_needed)


def evaluated(options: Options, *, trace_k: int | None = None, **how: Any) -> Evaluation:
    """Every rescorer with each p and k on every task; further arguments are those of `evaluate`."""
    runs = runs_of(
        options.get("rescorers", ("none",)), ks=all_of(options.get("k", ())), ps=all_of(options.get("p", ())),
        alpha=options.get("alpha"),
    )  # fmt: skip
    chosen = {name: options[name] for name in ("verify", "seed") if name in options}
    live = options.get("mode") == "live"
    return evaluate(opened(options, k=trace_k), runs, live=live, **chosen, **how)


def recorded_trace(options: Options, out: Path, *, progress: Any = None, notify: Any = None) -> Trace:
    """The trace of the only task, in a folder."""
    (recording,) = opened(options, out=out)
    if notify:
        for line in recording.notices:
            notify(line)
    return recording.trace(progress=progress)


def swept(options: Options, *, trace_k: int | None = None, **how: Any) -> list[Tuned]:
    """The sweeps of all rescorers; a limit is of held-out examples. Further arguments are those of `tune`."""
    whole = {name: value for name, value in options.items() if name != "limit"}
    limit = {"held_out": options["limit"]} if options.get("limit") else {}
    k = trace_k or max(how.get("ks", (16,)))
    return tune(opened(whole, k=k), list(options["rescorers"]), **limit, **how)
