"""Evaluates rescorers on tasks: by replay from a trace (recorded if need be) or by live decoding, with wall-clock.

The command line only parses, calls `evaluate`, `oracle_by_k` or `trace_task`, and prints. Results: `rescore.results`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lm.catalog import choose_device
from rescore.accounting import account
from rescore.decoding import decode, first_difference, margin_at, usable_verify
from rescore.inputs import EvalOptions, Models, Progress, TaskInput, prepare, resolve
from rescore.replay import replay, unrescored_at
from rescore.rescorers import Rescorer, load_rescorer
from rescore.results import ExampleLog, Result, ResultsDocument, environment
from rescore.tasks import Metric
from rescore.tracing import Trace, TracedExample
from rescore.weights import alpha_notices, choose_alphas, coverage_notices, fit_to, with_alphas

__all__ = ["EvalOptions", "Evaluation", "evaluate", "oracle_by_k", "trace_task"]

REPLAY_EXAMPLES = 64  # replayed side by side; Ctrl-C loses what of these is not finished

Notify = Callable[[str], None]  # takes a line for the user, before the work that it is about


@dataclass
class Evaluation:
    """What `evaluate` gives: the document, notices for the user, and whether Ctrl-C cut it short."""

    document: ResultsDocument
    interrupted: bool = False

    @property
    def notices(self) -> list[str]:
        """What the user should know of how the numbers came about; part of the document."""
        notices: list[str] = self.document.config["notices"]
        return notices

    def notice(self, line: str, notify: Notify | None) -> None:
        """Adds a notice, and tells it."""
        self.notices.append(line)
        if notify:
            notify(line)


def evaluate(
    options: EvalOptions,
    *,
    out: Path | None = None,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> Evaluation:
    """Runs every rescorer on every task and accounts for it.

    `out`: a folder for `examples.jsonl` (one line per finished example, resumable) and `results.json` (last).
    `notify` gets each of the notices once, before the work that it is about. Ctrl-C keeps what is finished and returns
    it with `interrupted` set. Raises `RescoreError` for what can't be done.
    """
    options = resolve(options)
    rescorers = {name: load_rescorer(name) for name in options.rescorers}
    models = Models(options)
    inputs = prepare(options, models)
    evaluation = _new_evaluation(options, inputs, notify)
    config = evaluation.document.config
    config["alphas"] = {task.name: choose_alphas(options, task, rescorers) for task in inputs}
    for task in inputs:
        for line in alpha_notices(config["alphas"][task.name], task):
            evaluation.notice(line, notify)
    # Not in it: versions (a run may go on after an upgrade) and notices (why the hub did not serve, this time).
    with ExampleLog(out, {name: config[name] for name in ("options", "data", "traces", "alphas")}) as log:
        try:
            p = max(_drafts(typed, options.p) for typed in options.rescorers)
            if options.mode == "live" and usable_verify(models.base, options.verify, p) != options.verify:
                line = f"{options.base} takes no tree mask; its {p} drafts a step are verified as a batch"
                evaluation.notice(line, notify)
            for task in inputs:
                weighted = with_alphas(task, rescorers, config["alphas"][task.name])
                _run(options, task, models, weighted, log, progress, lambda line: evaluation.notice(line, notify))
        except KeyboardInterrupt:
            evaluation.interrupted = True
        for task in inputs:
            for typed in options.rescorers:
                if records := log.records(task.name, typed, task.ids):
                    alpha = config["alphas"][task.name].get(typed, {}).get("alpha")
                    evaluation.document.results.append(_result(options, task, typed, records, alpha=alpha))
    if out is not None and not evaluation.interrupted:
        evaluation.document.save(out)
    return evaluation


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
        trace = first_heads(task.trace(models, progress=progress), options.h)
        for chosen in at_k:
            accepted = replay(trace.examples, load_rescorer("oracle"), k=chosen.k)
            records = [
                {
                    **_head(trace, task, "oracle", example),
                    "accepted": lengths,
                    "oracle_accepted": lengths,
                    "unrescored_accepted": unrescored_at(example, lengths),
                }
                for example, lengths in zip(trace.examples, accepted, strict=True)
            ]
            evaluation.document.results.append(_result(chosen, task, "oracle", records))
    return evaluation


def trace_task(
    options: EvalOptions, out: Path, *, progress: Progress | None = None, notify: Notify | None = None
) -> Trace:
    """Records the trace of the first task into `out`, with k = `options.k`; `notify` as for `evaluate`."""
    options = resolve(options)
    models = Models(options)
    task = prepare(options, models, k=options.k, out=out)[0]
    if notify and task.notice:
        notify(task.notice)
    return task.trace(models, progress=progress)


def _new_evaluation(options: EvalOptions, inputs: Sequence[TaskInput], notify: Notify | None) -> Evaluation:
    config = {
        "options": dataclasses.asdict(options),
        **environment(),
        "device": None if options.trace else choose_device(options.device),
        "threads": torch.get_num_threads(),
        "data": {task.name: task.source for task in inputs},
        "traces": {task.name: {"k": task.k, **task.settings} for task in inputs},
        "notices": [],
    }
    evaluation = Evaluation(ResultsDocument(config))
    for task in inputs:
        if task.notice:
            evaluation.notice(task.notice, notify)
    return evaluation


def _drafts(typed: str, p: int) -> int:
    """The p of a rescorer: the oracle knows which draft is best and puts up this one, whatever was asked for."""
    return 1 if typed == "oracle" else p


def _run(
    options: EvalOptions,
    task: TaskInput,
    models: Models,
    rescorers: dict[str, Rescorer],
    log: ExampleLog,
    progress: Progress | None,
    notify: Notify,
) -> None:
    """Finishes one task. Ctrl-C while its trace is recorded: what there is of it is replayed before it is passed on."""
    if options.mode == "live":
        trace = first_heads(task.trace(models, progress=progress), options.h)
        _decode_live(options, task, trace, models, _fitted(trace, rescorers, options.k, notify), log, progress)
        return
    try:
        trace = task.trace(models, progress=progress)
    except KeyboardInterrupt:
        if (held := task.held()) is not None:
            fitted = _fitted(held, rescorers, options.k, notify)
            _replay(options, task, first_heads(held, options.h), fitted, log, None)
        raise
    fitted = _fitted(trace, rescorers, options.k, notify)
    _replay(options, task, first_heads(trace, options.h), fitted, log, progress)


def _fitted(trace: Trace, rescorers: dict[str, Rescorer], k: int, notify: Notify) -> dict[str, Rescorer]:
    fitted = fit_to(trace, rescorers)
    for line in coverage_notices(trace, fitted, k):
        notify(line)
    return fitted


def first_heads(trace: Trace, h: int | None) -> Trace:
    if h is None or h == trace.header.h:
        return trace
    examples = tuple(
        dataclasses.replace(e, lattice=e.lattice.first_heads(h), entropies=e.entropies[:, :h]) for e in trace.examples
    )
    return Trace(dataclasses.replace(trace.header, h=h), examples)


def _replay(
    options: EvalOptions,
    task: TaskInput,
    trace: Trace,
    rescorers: dict[str, Rescorer],
    log: ExampleLog,
    progress: Progress | None,
) -> None:
    for start in range(0, len(trace.examples), REPLAY_EXAMPLES):
        examples = trace.examples[start : start + REPLAY_EXAMPLES]
        best = replay(examples, load_rescorer("oracle"), k=options.k)
        oracle = {example.id: lengths for example, lengths in zip(examples, best, strict=True)}
        for typed, rescorer in rescorers.items():
            missing = [e for e in examples if not log.has(task.name, typed, e.id)]
            accepted = replay(missing, rescorer, k=options.k, p=_drafts(typed, options.p))
            for example, lengths in zip(missing, accepted, strict=True):
                head = _head(trace, task, typed, example)
                log.add({
                    **head, "accepted": lengths, "oracle_accepted": oracle[example.id],
                    "unrescored_accepted": unrescored_at(example, lengths),
                    "output_ids": example.output_ids.tolist(),
                })  # fmt: skip
        if progress:
            progress(f"replay {task.name}", start + len(examples), len(trace.examples))


def _head(trace: Trace, task: TaskInput, typed: str, example: TracedExample) -> dict[str, Any]:
    """What every record of an example begins with."""
    return {
        "task": task.name, "rescorer": typed, "id": example.id, "h": trace.header.h,
        "quality": _score(task.metric, example.output, example),
    }  # fmt: skip


def _score(metric: Metric | None, output: str | None, example: TracedExample) -> float | None:
    """The task's metric of an output; None where the task has none or the text is not known."""
    if metric is None or output is None:
        return None
    return metric.score(output, example.references)


def _decode_live(
    options: EvalOptions,
    task: TaskInput,
    trace: Trace,
    models: Models,
    rescorers: dict[str, Rescorer],
    log: ExampleLog,
    progress: Progress | None,
) -> None:
    """Decodes every example that is not finished: greedily as the baseline, then with each rescorer, in turns."""
    base, heads = models.base, models.heads if options.h is None else models.heads.first(options.h)
    warm = False
    for place, example in enumerate(trace.examples):
        missing = {typed: r for typed, r in rescorers.items() if not log.has(task.name, typed, example.id)}
        if missing:
            prompt = example.prompt_ids.tolist()
            oracle = replay([example], load_rescorer("oracle"), k=options.k)[0]
            if not warm:  # the first calls of a process allocate and compile
                decode(base, None, prompt, max_new_tokens=4)
            baseline = decode(base, None, prompt, max_new_tokens=options.max_new_tokens)
            for typed, rescorer in missing.items():
                request: dict[str, Any] = {
                    "rescorer": rescorer, "k": options.k, "p": _drafts(typed, options.p), "verify": options.verify,
                    "future": np.asarray(baseline.output_ids),
                }  # fmt: skip
                if not warm:
                    decode(base, heads, prompt, max_new_tokens=min(2 * heads.h, options.max_new_tokens), **request)
                decoded = decode(base, heads, prompt, max_new_tokens=options.max_new_tokens, **request)
                differs = first_difference(decoded.output_ids, baseline.output_ids)
                margin = None if differs is None else margin_at(base, prompt, baseline.output_ids, differs)
                # Where the output is the trace's, so are the lattices that the steps began with.
                traced = first_difference(decoded.output_ids, example.output_ids.tolist()) is None
                against = {"unrescored_accepted": unrescored_at(example, decoded.accepted)} if traced else {}
                log.add({
                    **against,
                    **_head(trace, task, typed, example), "accepted": decoded.accepted, "oracle_accepted": oracle,
                    "quality": _score(task.metric, base.decode_text(decoded.output_ids), example),
                    "output_ids": decoded.output_ids,
                    "first_difference": differs, "margin": margin, "verify": decoded.verify,
                    "seconds": dataclasses.asdict(decoded.seconds), "rescore_seconds": decoded.rescore_seconds,
                    "autoregressive_tokens": len(baseline.output_ids),
                    "autoregressive_seconds": dataclasses.asdict(baseline.seconds),
                })  # fmt: skip
            warm = True
        if progress:
            progress(f"decode {task.name}", place + 1, len(trace.examples))


def _result(
    options: EvalOptions, task: TaskInput, typed: str, records: list[dict[str, Any]], *, alpha: float | None = None
) -> Result:
    h = records[0]["h"]
    accounting = account([r["accepted"] for r in records], h, seed=options.seed)
    oracle = account([r["oracle_accepted"] for r in records], h, seed=options.seed)
    scores = [r["quality"] for r in records if r["quality"] is not None]
    quality = {"metric": task.metric.name, "value": float(np.mean(scores))} if task.metric and scores else None
    identical = divergence = times = None
    if options.mode == "live":
        identical = {"n": len(records), "identical": sum(r["first_difference"] is None for r in records)}
        divergence = [
            {"id": r["id"], "position": r["first_difference"], "margin": r["margin"]}
            for r in records
            if r["first_difference"] is not None
        ]
        times = latency(records, accounting.block_efficiency)
    return Result(
        task=task.name,
        rescorer=typed,
        k=options.k,
        p=_drafts(typed, options.p),
        alpha=alpha,
        n=len(records),
        against_unrescored=_against_unrescored(records),
        oracle_block_efficiency=oracle.block_efficiency,
        **dataclasses.asdict(accounting),
        quality=quality,
        identical=identical,
        divergence=divergence,
        latency=times,
    )


def _against_unrescored(records: list[dict[str, Any]]) -> dict[str, float] | None:
    """Shares of steps that accepted more (`won`), as many (`tied`) or fewer tokens than the unrescored draft there."""
    if not all("unrescored_accepted" in r for r in records):
        return None
    pairs = [(n, plain) for r in records for n, plain in zip(r["accepted"], r["unrescored_accepted"], strict=True)]
    won, lost = sum(n > plain for n, plain in pairs), sum(n < plain for n, plain in pairs)
    total = len(pairs)
    return {"won": won / total, "tied": (total - won - lost) / total, "lost": lost / total}


def latency(records: list[dict[str, Any]], block_efficiency: float) -> dict[str, Any]:
    """Times of live records, prefill apart, and `verify`: how drafts were verified (tree or batch).

    `verify_ms`, `heads_ms`, `rescore_ms` (and its `p50`, `p95`): per step; `glue_share` of a step's time that is none
    of these; `autoregressive_ms` per token; `prefill_ms` per example; tokens per second of both decoders and their
    ratio, `speedup`; `predicted_speedup` = block efficiency x autoregressive / (verify + heads + rescore), None where
    no step needed a call.
    """
    steps = sum(len(r["accepted"]) for r in records)
    tokens = sum(len(r["output_ids"]) for r in records)
    greedy_tokens = sum(r["autoregressive_tokens"] for r in records)

    def total(name: str, of: str = "seconds") -> float:
        return float(sum(r[of][name] for r in records))

    spent = total("total")
    rescoring = np.array([s for r in records for s in r["rescore_seconds"]] or [0.0]) * 1e3
    autoregressive = total("total", "autoregressive_seconds")
    parts = {part: total(part) / steps * 1e3 for part in ("verify", "heads", "rescore")}
    known = sum(parts.values())
    return {
        "verify": records[0]["verify"],
        "prefill_ms": total("prefill") / len(records) * 1e3,
        "autoregressive_ms": autoregressive / greedy_tokens * 1e3,
        "verify_ms": parts["verify"],
        "heads_ms": parts["heads"],
        "rescore_ms": parts["rescore"],
        "rescore_p50_ms": float(np.quantile(rescoring, 0.5)),
        "rescore_p95_ms": float(np.quantile(rescoring, 0.95)),
        "glue_share": 1.0 - known / (spent / steps * 1e3),
        "tokens_per_second": tokens / spent,
        "autoregressive_tokens_per_second": greedy_tokens / autoregressive,
        "speedup": (tokens / spent) / (greedy_tokens / autoregressive),
        "predicted_speedup": block_efficiency * (autoregressive / greedy_tokens * 1e3) / known if known else None,
    }
