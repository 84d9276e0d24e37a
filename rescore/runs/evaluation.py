"""Evaluates rescorers on tasks: by replay from a trace (recorded if need be) or by live decoding, with wall-clock.

The command line only parses, calls `evaluate`, `oracle_by_k` or `trace_task`, and prints. Finished examples become
results in `rescore.runs.summary`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from lattices.paths import encodable
from lm.base.catalog import choose_device
from rescore.decoding import decode, first_difference, margin_at, usable_verify
from rescore.replay import Steps, replay, replay_steps, unrescored_at
from rescore.rescorers import Rescorer, load_rescorer
from rescore.runs.environment import environment
from rescore.runs.inputs import Models, TaskInput, prepare
from rescore.runs.options import EvalOptions, Progress, Run, resolve
from rescore.runs.records import Alpha, Alphas, ExampleRecord, LiveExample, Result, ResultsDocument, RunConfig
from rescore.runs.results import ExampleLog, save_results
from rescore.runs.summary import is_cut, summarize
from rescore.runs.weights import (
    alpha_notices,
    check_tokenizers,
    choose_alphas,
    coverage_notices,
    fit_to,
    with_alphas,
)
from rescore.tracing import Trace, TracedExample

__all__ = ["EvalOptions", "Evaluation", "evaluate", "oracle_by_k", "trace_task"]

if TYPE_CHECKING:
    from lm.base.model import BaseLM

REPLAY_EXAMPLES = 64  # replayed side by side, at most; a kill loses what of these is not finished
FIRST_EXAMPLES = 4  # of these, before it is known how long they take
REPLAY_SECONDS = 20.0  # where a rescorer took longer, half as many follow side by side, else twice

Notify = Callable[[str], None]  # takes a line for the user, before the work that it is about


class Ready(Protocol):
    """Gives the rescorer of each of the options' runs, for a trace; live, beside the base LM."""

    def __call__(self, trace: Trace, shared: BaseLM | None = None) -> dict[Run, Rescorer]: ...


@dataclass
class Evaluation:
    """What `evaluate` gives: the document, notices for the user, and whether Ctrl-C cut it short."""

    document: ResultsDocument
    interrupted: bool = False

    @property
    def notices(self) -> list[str]:
        """What the user should know of how the numbers came about; part of the document."""
        return self.document.config.notices

    def notice(self, line: str, notify: Notify | None) -> None:
        """Adds a notice, and tells it; one that is about several tasks once."""
        if line in self.notices:
            return
        self.notices.append(line)
        if notify:
            notify(line)


def evaluate(
    options: EvalOptions,
    *,
    out: Path | None = None,
    weights: Mapping[Run, Alpha] | None = None,
    trace_k: int | None = None,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> Evaluation:
    """Runs every rescorer on every task, with every p, and accounts for it.

    `out`: a folder for `examples.jsonl` (one line per finished example, resumable) and `results.json` (last).
    `weights`: for runs whose weight the caller knows, as in `rescore.runs.weights.Alphas`; `trace_k`: entries per
    slot of a trace that is recorded (default: what these options need).
    `notify` gets each of the notices once, before the work that it is about. Ctrl-C keeps what is finished and returns
    it with `interrupted` set. Raises `RescoreError` for what can't be done.
    """
    options = resolve(options)
    rescorers = {name: load_rescorer(name) for name in options.rescorers}
    models = Models(options)
    inputs = prepare(options, models, k=trace_k)
    evaluation = _new_evaluation(options, inputs, notify)
    config = evaluation.document.config
    for task in inputs:
        check_tokenizers(task, rescorers)
    alphas = {task.name: choose_alphas(options, task, rescorers) for task in inputs}
    for (typed, p), chosen in (weights or {}).items():
        for by_name in alphas.values():
            by_name[typed][p] = chosen
    config.alphas = alphas
    for task in inputs:
        for line in alpha_notices(alphas[task.name], task):
            evaluation.notice(line, notify)
    config.rescorers = {name: r.identity for name, r in rescorers.items() if r.alpha is not None}
    # Not in it: all of the versions (those that the numbers follow from are the traces') and notices (why the hub did
    # not serve, this time).
    same = ("options", "data", "traces", "alphas", "rescorers")
    with ExampleLog(out, {name: getattr(config, name) for name in same}) as log:
        try:
            p = max(p for _, p in options.runs)
            if options.mode == "live" and usable_verify(models.base, options.verify, p) != options.verify:
                line = f"{options.base} takes no tree mask; its {p} drafts a step are verified as a batch"
                evaluation.notice(line, notify)
            for task in inputs:
                tell = partial(evaluation.notice, notify=notify)
                ready = partial(_ready, options, rescorers, alphas[task.name], tell)
                _run(options, task, models, ready, log, progress)
        except KeyboardInterrupt:
            evaluation.interrupted = True
        for task in inputs:
            evaluation.document.results += _results(options, task, log, alphas[task.name])
        if out is not None and not evaluation.interrupted:
            save_results(evaluation.document, out)
    return evaluation


def _results(options: EvalOptions, task: TaskInput, log: ExampleLog, alphas: Alphas) -> list[Result]:
    """What there is of a task, in the order of the options' runs."""
    unrescored = log.records(task.name, "none", 1, task.ids)
    results = []
    for typed, p in options.runs:
        if records := log.records(task.name, typed, p, task.ids):
            alpha = alphas[typed][p].alpha if typed in alphas else None
            results.append(summarize(records, k=options.k, seed=options.seed, alpha=alpha, unrescored=unrescored))
    return results


def oracle_by_k(
    options: EvalOptions, ks: Sequence[int], *, progress: Progress | None = None, notify: Notify | None = None
) -> Evaluation:
    """Oracle block efficiency of each task for each k: one result per task and k, `rescorer` = oracle."""
    options = resolve(dataclasses.replace(options, rescorers=("oracle",), k=max(ks), mode="replay"))
    at_k = [resolve(dataclasses.replace(options, k=k)) for k in ks]
    models = Models(options)
    inputs = prepare(options, models)
    evaluation = _new_evaluation(options, inputs, notify)
    for task in inputs:
        trace = task.trace(models, progress=progress).first_heads(options.h)
        quality = [_quality(task, example.output, example) for example in trace.examples]
        for chosen in at_k:
            accepted = replay(trace.examples, load_rescorer("oracle"), k=chosen.k)
            records = [
                replayed_record(trace, task, ("oracle", 1), example, Steps(lengths, []), lengths, scores)
                for example, lengths, scores in zip(trace.examples, accepted, quality, strict=True)
            ]
            found = summarize(records, k=chosen.k, seed=options.seed)
            evaluation.document.results.append(found)
    return evaluation


def trace_task(
    options: EvalOptions, out: Path, *, progress: Progress | None = None, notify: Notify | None = None
) -> Trace:
    """Records the trace of the first task into `out`, with k = `options.k`; `notify` as for `evaluate`."""
    options = resolve(options)
    models = Models(options)
    task = prepare(options, models, k=options.k, out=encodable(out, "--out"))[0]
    task.tell(notify)
    return task.trace(models, progress=progress)


def _new_evaluation(options: EvalOptions, inputs: Sequence[TaskInput], notify: Notify | None) -> Evaluation:
    config = RunConfig(
        options=options,
        **environment(),
        device=choose_device(options.device),
        threads=torch.get_num_threads(),
        data={task.name: task.source for task in inputs},
        traces={task.name: {"k": task.k, **task.settings} for task in inputs},
    )
    evaluation = Evaluation(ResultsDocument(config=config))
    for task in inputs:
        task.tell(partial(evaluation.notice, notify=notify))
    return evaluation


def _run(
    options: EvalOptions,
    task: TaskInput,
    models: Models,
    ready: Ready,
    log: ExampleLog,
    progress: Progress | None,
) -> None:
    """Finishes one task. Ctrl-C while its trace is recorded: what there is of it is replayed before it is passed on."""
    if options.mode == "live":
        trace = task.trace(models, progress=progress).first_heads(options.h)
        _decode_live(options, task, trace, models, ready(trace, shared=models.base), log, progress)
        return
    try:
        trace = task.trace(models, progress=progress)
    except KeyboardInterrupt:
        if (held := task.held()) is not None:
            _replay(options, task, held.first_heads(options.h), ready(held), log, None)
        raise
    _replay(options, task, trace.first_heads(options.h), ready(trace), log, progress)


def _ready(
    options: EvalOptions,
    rescorers: dict[str, Rescorer],
    alphas: Alphas,
    notify: Notify,
    trace: Trace,
    shared: BaseLM | None = None,
) -> dict[Run, Rescorer]:
    """The rescorers fitted to a trace, with the weight of each run."""
    fitted = fit_to(trace, rescorers, device=choose_device(options.device), shared=shared)
    for line in coverage_notices(trace, fitted, options.k):
        notify(line)
    return with_alphas(options.runs, fitted, alphas)


def _replay(
    options: EvalOptions,
    task: TaskInput,
    trace: Trace,
    rescorers: dict[Run, Rescorer],
    log: ExampleLog,
    progress: Progress | None,
) -> None:
    start, side_by_side = 0, min(FIRST_EXAMPLES, REPLAY_EXAMPLES)
    while examples := trace.examples[start : start + side_by_side]:
        slowest = 0.0
        best = replay(examples, load_rescorer("oracle"), k=options.k)
        oracle = {example.id: lengths for example, lengths in zip(examples, best, strict=True)}
        quality = {example.id: _quality(task, example.output, example) for example in examples}
        for (typed, p), rescorer in rescorers.items():
            missing = [e for e in examples if not log.has(task.name, typed, p, e.id)]
            began = time.monotonic()
            replayed = replay_steps(missing, rescorer, k=options.k, p=p)
            slowest = max(slowest, time.monotonic() - began)
            for example, steps in zip(missing, replayed, strict=True):
                log.add(
                    replayed_record(trace, task, (typed, p), example, steps, oracle[example.id], quality[example.id])
                )
        if progress:
            progress(f"replay {task.name}", start + len(examples), len(trace.examples))
        start += len(examples)
        side_by_side = min(REPLAY_EXAMPLES, 2 * side_by_side) if slowest < REPLAY_SECONDS else max(1, side_by_side // 2)


def replayed_record(
    trace: Trace,
    task: TaskInput,
    run: Run,
    example: TracedExample,
    steps: Steps,
    oracle: list[int],
    quality: dict[str, float],
) -> ExampleRecord:
    """What replay leaves of an example; `oracle`: accepted lengths of the oracle's decode."""
    return ExampleRecord(
        task=task.name, rescorer=run[0], p=run[1], id=example.id, group=example.group, h=trace.header.h,
        quality=quality, cut=is_cut(example.output_ids, trace.header.eos_token_ids), accepted=steps.accepted,
        drafts=steps.drafts, oracle_accepted=oracle, unrescored_accepted=unrescored_at(example, steps.accepted),
        output_ids=example.output_ids.tolist(),
    )  # fmt: skip


def _quality(task: TaskInput, output: str | None, example: TracedExample) -> dict[str, float]:
    """The task's metrics of an output by name; none where its text is not known or nothing is there to compare with."""
    if output is None or not example.references:
        return {}
    return {metric.name: metric.score(output, example.references) for metric in task.metrics}


def _decode_live(
    options: EvalOptions,
    task: TaskInput,
    trace: Trace,
    models: Models,
    rescorers: dict[Run, Rescorer],
    log: ExampleLog,
    progress: Progress | None,
) -> None:
    """Decodes every example that is not finished: greedily as the baseline, then with each rescorer and p, in turns."""
    base, heads = models.base, models.heads if options.h is None else models.heads.first(options.h)
    limit = task.settings["max_new_tokens"]
    warm = False
    for place, example in enumerate(trace.examples):
        missing = {run: r for run, r in rescorers.items() if not log.has(task.name, *run, example.id)}
        if missing:
            prompt = example.prompt_ids.tolist()
            oracle = replay([example], load_rescorer("oracle"), k=options.k)[0]
            if not warm:  # the first calls of a process allocate and compile
                decode(base, None, prompt, max_new_tokens=4)
            baseline = decode(base, None, prompt, max_new_tokens=limit)
            for run, rescorer in missing.items():
                request: dict[str, Any] = {
                    "rescorer": rescorer, "k": options.k, "p": run[1], "verify": options.verify,
                    "future": np.asarray(baseline.output_ids),
                }  # fmt: skip
                if not warm:
                    decode(base, heads, prompt, max_new_tokens=min(2 * heads.h, limit), **request)
                decoded = decode(base, heads, prompt, max_new_tokens=limit, **request)
                differs = first_difference(decoded.output_ids, baseline.output_ids)
                margin = None if differs is None else margin_at(base, prompt, baseline.output_ids, differs)
                # Where the output is the trace's, so are the lattices that the steps began with.
                traced = first_difference(decoded.output_ids, example.output_ids.tolist()) is None
                log.add(ExampleRecord(
                    task=task.name, rescorer=run[0], p=run[1], id=example.id, group=example.group, h=trace.header.h,
                    quality=_quality(task, base.decode_text(decoded.output_ids), example),
                    cut=is_cut(decoded.output_ids, base.eos_token_ids), accepted=decoded.accepted,
                    drafts=decoded.drafts, oracle_accepted=oracle,
                    unrescored_accepted=unrescored_at(example, decoded.accepted) if traced else None,
                    output_ids=decoded.output_ids,
                    live=LiveExample(
                        first_difference=differs, margin=margin, verify=decoded.verify, seconds=decoded.seconds,
                        rescore_seconds=decoded.rescore_seconds, autoregressive_tokens=len(baseline.output_ids),
                        autoregressive_seconds=baseline.seconds,
                    ),
                ))  # fmt: skip
            warm = True
        if progress:
            progress(f"decode {task.name}", place + 1, len(trace.examples))
