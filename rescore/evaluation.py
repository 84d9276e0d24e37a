"""Evaluates rescorers on tasks: by replay from a trace (recorded if need be) or by live decoding, with wall-clock.

One public function, `evaluate`; the command line only parses and prints. Results: `rescore.results`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lattices.errors import RescoreError, UnknownNameError
from lm.files import cache_directory
from rescore.accounting import account
from rescore.data import TaskData, load_examples
from rescore.decoding import VERIFY_MODES, decode, first_difference
from rescore.replay import check_k, replay
from rescore.rescorers import Rescorer, load_rescorer
from rescore.results import ExampleLog, Result, ResultsDocument, environment
from rescore.tasks import Task, load_task
from rescore.tracing import DEFAULT_K, HEADER_FILE, Trace, TracedExample, load_trace, read_header, record_trace, trace_key

if TYPE_CHECKING:
    from lm.base import BaseLM
    from lm.block_heads import BlockHeads

MODES = ("replay", "live")
Progress = Callable[[str, int, int], None]  # what is being done, done, total


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate. `h`: use the first h heads only; `heads`, `data`, `trace`: paths, None for the default;
    `trace` replays a trace made elsewhere; `max_prompt_tokens` cuts prompts; `verify` is `tree` or `batch`."""

    tasks: tuple[str, ...] = ("squad",)
    rescorers: tuple[str, ...] = ("none",)
    base: str = "smollm2-135m"
    heads: str | None = None
    h: int | None = None
    k: int = 16
    p: int = 1
    limit: int | None = None
    max_new_tokens: int = 64
    max_prompt_tokens: int | None = None
    mode: str = "replay"
    verify: str = "tree"
    data: str | None = None
    trace: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    seed: int = 0


@dataclass
class Evaluation:
    """What `evaluate` gives: the document, notices for the user, and whether Ctrl-C cut it short."""

    document: ResultsDocument
    notices: list[str] = field(default_factory=list)
    interrupted: bool = False


class Models:
    """The base LM and heads of a run, loaded when first needed: a replay from the cache needs neither."""

    def __init__(self, options: EvalOptions) -> None:
        self.options = options

    @cached_property
    def base(self) -> BaseLM:
        """The base LM."""
        from lm.catalog import load_base

        return load_base(self.options.base, dtype=self.options.dtype, device=self.options.device)

    @cached_property
    def heads(self) -> BlockHeads:
        """The block heads, the first h of them if so chosen."""
        from lm.block_heads import load_heads

        heads = load_heads(self.options.heads, self.base.identity, device=self.base.device, dtype=self.base.heads_dtype)
        return heads.first(self.options.h) if self.options.h else heads

    @cached_property
    def tokenizer(self) -> Any:
        """The base LM's tokenizer."""
        from lm.catalog import load_tokenizer

        return load_tokenizer(self.options.base)

    def trace_settings(self, task: Task, data: TaskData) -> dict[str, Any]:
        """Everything that a trace depends on; none of it needs the weights in memory."""
        from lm.block_heads import heads_folder, heads_sha256
        from lm.catalog import identify

        identity = identify(self.options.base, dtype=self.options.dtype)
        return {
            "base": dataclasses.asdict(identity),
            "heads_sha256": heads_sha256(heads_folder(self.options.heads, identity)),
            "task": task.name,
            "template": task.template,
            "chat": task.chat and bool(self.tokenizer.chat_template),
            "chat_template": self.tokenizer.chat_template if task.chat else None,
            "data": data.source,
            "max_new_tokens": self.options.max_new_tokens,
            "max_prompt_tokens": self.options.max_prompt_tokens,
        }


def evaluate(options: EvalOptions, *, out: Path | None = None, progress: Progress | None = None) -> Evaluation:
    """Runs every rescorer on every task and accounts for it.

    `out`: a folder for `examples.jsonl` (one line per finished example, resumable) and `results.json` (last). Ctrl-C
    keeps what is finished and returns it with `interrupted` set. Raises `RescoreError` for what can't be done.
    """
    _check(options)
    rescorers = {name: load_rescorer(name) for name in options.rescorers}
    models = Models(options)
    log = ExampleLog(out, options)
    evaluation = _new_evaluation(options)
    for name in options.tasks:
        try:
            trace = obtain_trace(options, name, models, evaluation, progress)
            if options.mode == "live":
                _decode_live(options, name, trace, models, rescorers, log, progress)
            else:
                _replay(options, name, trace, models, rescorers, log)
        except KeyboardInterrupt:
            evaluation.interrupted = True
        if evaluation.interrupted:
            break
    for name in options.tasks:
        for typed in options.rescorers:
            records = log.records(name, typed)
            if records:
                evaluation.document.results.append(_result(options, name, typed, records))
    if out is not None and not evaluation.interrupted:
        evaluation.document.save(out)
    return evaluation


def oracle_by_k(options: EvalOptions, ks: Sequence[int], *, progress: Progress | None = None) -> Evaluation:
    """Oracle block efficiency of each task for each k: one result per k, `rescorer` = oracle."""
    _check(options)
    for k in ks:
        _check(dataclasses.replace(options, k=k))
    models = Models(options)
    evaluation = _new_evaluation(options)
    for name in options.tasks:
        trace = obtain_trace(options, name, models, evaluation, progress)
        scores = _quality(options, name, trace.examples, models)
        for k in ks:
            accepted = replay(trace.examples, load_rescorer("oracle"), k=k)
            records = [
                {"h": trace.header.h, "accepted": lengths, "oracle_accepted": lengths, "quality": score}
                for lengths, score in zip(accepted, scores, strict=True)
            ]
            at_k = dataclasses.replace(options, k=k, mode="replay")
            evaluation.document.results.append(_result(at_k, name, "oracle", records))
        if evaluation.interrupted:
            break
    return evaluation


def trace_task(
    options: EvalOptions, out: Path, *, progress: Progress | None = None
) -> tuple[Trace, str | None]:
    """Records the trace of the first task into `out`; with a notice if the data is a stand-in."""
    _check(options)
    models = Models(options)
    task = load_task(options.tasks[0])
    data = load_examples(task, data=_path(options.data), limit=options.limit)
    return _record(options, models, task, data, out, progress), data.notice


def _record(
    options: EvalOptions, models: Models, task: Task, data: TaskData, folder: Path, progress: Progress | None
) -> Trace:
    settings = models.trace_settings(task, data)
    return record_trace(
        models.base,
        models.heads,
        data.examples,
        folder,
        settings=settings,
        chat=settings["chat"],
        max_new_tokens=options.max_new_tokens,
        max_prompt_tokens=options.max_prompt_tokens,
        k=options.k,
        progress=(lambda done, total: progress(f"trace {task.name}", done, total)) if progress else None,
    )


def _path(text: str | None) -> Path | None:
    return Path(text).expanduser() if text else None


def _new_evaluation(options: EvalOptions) -> Evaluation:
    config = {"options": dataclasses.asdict(options), **environment(), "data": {}, "traces": {}}
    return Evaluation(ResultsDocument(config=config))


def obtain_trace(
    options: EvalOptions, name: str, models: Models, evaluation: Evaluation, progress: Progress | None = None
) -> Trace:
    """The trace of a task: the one given, or the cached one with what it lacks recorded now."""
    if options.trace:
        trace = load_trace(Path(options.trace).expanduser())
        evaluation.document.config["traces"][name] = trace.header.settings
        examples = trace.examples[: options.limit]
        return _first_heads(Trace(trace.header, examples), options.h)
    task = load_task(name)
    data = load_examples(task, data=_path(options.data), limit=options.limit)
    if data.notice and data.notice not in evaluation.notices:
        evaluation.notices.append(data.notice)
    settings = models.trace_settings(task, data)
    evaluation.document.config["data"][name] = {**data.source, "notice": data.notice}
    evaluation.document.config["traces"][name] = settings
    folder = cache_directory() / "traces" / f"{name}-{trace_key(settings)}"
    held = {e.id: e for e in load_trace(folder).examples} if (folder / HEADER_FILE).is_file() else {}
    if all(e.id in held for e in data.examples):
        trace = Trace(read_header(folder), tuple(held[e.id] for e in data.examples))
        return _first_heads(trace, options.h)
    full = dataclasses.replace(options, h=None, k=max(DEFAULT_K, options.k))
    try:
        trace = _record(full, Models(full) if options.h else models, task, data, folder, progress)
    except KeyboardInterrupt:
        evaluation.interrupted = True
        if not (folder / HEADER_FILE).is_file():
            raise
        trace = load_trace(folder)
        wanted = {e.id for e in data.examples}
        trace = Trace(trace.header, tuple(e for e in trace.examples if e.id in wanted))
    return _first_heads(trace, options.h)


def _check(options: EvalOptions) -> None:
    if options.mode not in MODES:
        raise UnknownNameError("mode", options.mode, MODES)
    if options.verify not in VERIFY_MODES:
        raise UnknownNameError("verify mode", options.verify, VERIFY_MODES)
    if options.p < 1:
        raise RescoreError(f"p = {options.p}; at least one draft must be verified (--p 1)")
    if options.k < 1:
        raise RescoreError(f"k = {options.k}; a lattice needs at least one token per head (--k 1)")
    if options.limit is not None and options.limit < 1:
        raise RescoreError(f"--limit {options.limit}; at least one example is needed")
    if options.max_new_tokens < 1:
        raise RescoreError(f"--max-new-tokens {options.max_new_tokens}; at least one token must be decoded")
    if options.trace and options.mode == "live":
        raise RescoreError("a trace made elsewhere can be replayed, not decoded live; drop --trace or --mode live")
    for name in options.tasks:
        if not options.trace:
            load_task(name)


def _first_heads(trace: Trace, h: int | None) -> Trace:
    if h is None or h == trace.header.h:
        return trace
    examples = tuple(
        dataclasses.replace(e, lattice=e.lattice.first_heads(h), entropies=e.entropies[:, :h]) for e in trace.examples
    )
    return Trace(dataclasses.replace(trace.header, h=h), examples)


def _replay(
    options: EvalOptions,
    name: str,
    trace: Trace,
    models: Models,
    rescorers: dict[str, Rescorer],
    log: ExampleLog,
) -> None:
    check_k(trace.examples, options.k)
    oracle = replay(trace.examples, load_rescorer("oracle"), k=options.k)
    scores = _quality(options, name, trace.examples, models)
    for typed, rescorer in rescorers.items():
        accepted = replay(trace.examples, rescorer, k=options.k, p=options.p)
        for example, lengths, best, score in zip(trace.examples, accepted, oracle, scores, strict=True):
            log.add({
                "task": name, "rescorer": typed, "id": example.id, "h": trace.header.h, "accepted": lengths,
                "oracle_accepted": best, "quality": score, "output_ids": example.output_ids.tolist(),
            })  # fmt: skip


def _quality(
    options: EvalOptions, name: str, examples: Sequence[TracedExample], models: Models
) -> list[float | None]:
    """The task's metric of every greedy output; None where the task has none or the text is not known."""
    metric = None if options.trace else load_task(name).metric
    if metric is None:
        return [None] * len(examples)
    texts = models.tokenizer.batch_decode([e.output_ids for e in examples], skip_special_tokens=True)
    return [metric.score(text, e.references) for text, e in zip(texts, examples, strict=True)]


def _decode_live(
    options: EvalOptions,
    name: str,
    trace: Trace,
    models: Models,
    rescorers: dict[str, Rescorer],
    log: ExampleLog,
    progress: Progress | None,
) -> None:
    check_k(trace.examples, options.k)
    base, heads = models.base, models.heads
    oracle = replay(trace.examples, load_rescorer("oracle"), k=options.k)
    scores = _quality(options, name, trace.examples, models)
    warm = True
    for place, example in enumerate(trace.examples):
        wanted = {typed: r for typed, r in rescorers.items() if not log.has(name, typed, example.id)}
        if wanted:
            prompt = example.prompt_ids.tolist()
            if warm:  # the first calls of a process allocate and compile
                decode(base, None, prompt, max_new_tokens=4)
            baseline = decode(base, None, prompt, max_new_tokens=options.max_new_tokens)
            for typed, rescorer in wanted.items():
                request: dict[str, Any] = {
                    "rescorer": rescorer, "k": options.k, "p": options.p, "verify": options.verify,
                    "future": np.asarray(baseline.output_ids),
                }  # fmt: skip
                if warm:
                    decode(base, heads, prompt, max_new_tokens=2 * heads.h, **request)
                decoded = decode(base, heads, prompt, max_new_tokens=options.max_new_tokens, **request)
                log.add({
                    "task": name, "rescorer": typed, "id": example.id, "h": heads.h, "accepted": decoded.accepted,
                    "oracle_accepted": oracle[place], "quality": scores[place], "output_ids": decoded.output_ids,
                    "first_difference": first_difference(decoded.output_ids, baseline.output_ids),
                    "seconds": dataclasses.asdict(decoded.seconds), "rescore_seconds": decoded.rescore_seconds,
                    "autoregressive_tokens": len(baseline.output_ids),
                    "autoregressive_seconds": dataclasses.asdict(baseline.seconds),
                })  # fmt: skip
            warm = False
        if progress:
            progress(f"decode {name}", place + 1, len(trace.examples))


def _result(options: EvalOptions, name: str, typed: str, records: list[dict[str, Any]]) -> Result:
    h = records[0]["h"]
    accounting = account([r["accepted"] for r in records], h, seed=options.seed)
    oracle = account([r["oracle_accepted"] for r in records], h, seed=options.seed)
    scores = [r["quality"] for r in records if r["quality"] is not None]
    live = options.mode == "live"
    metric = None if options.trace else load_task(name).metric
    return Result(
        task=name,
        rescorer=typed,
        k=options.k,
        p=options.p,
        alpha=None,
        n=len(records),
        oracle_block_efficiency=oracle.block_efficiency,
        **dataclasses.asdict(accounting),
        quality={"metric": metric.name, "value": float(np.mean(scores))} if metric and scores else None,
        identical={"n": len(records), "identical": sum(r["first_difference"] is None for r in records)}
        if live
        else None,
        latency=_latency(records, accounting.block_efficiency) if live else None,
    )


def _latency(records: list[dict[str, Any]], block_efficiency: float) -> dict[str, float]:
    """Milliseconds per step of each part, tokens per second without prefill, and the speed-up over the baseline."""
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
        "predicted_speedup": block_efficiency * (autoregressive / greedy_tokens * 1e3) / known,
    }
