"""Evaluates runs on tasks: by replay from a trace (recorded if need be) or by live decoding, with wall-clock.

Finished examples become results in `rescore.runs.summary`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lattices.errors import IncompatibleError, RescoreError, UnknownNameError
from lm.base.catalog import Watch
from lm.base.model import BaseLM
from lm.environment import environment
from lm.executors import HERE, Executor
from lm.heads.block_heads import BlockHeads
from lm.keys import key_of
from lm.records import plain
from rescore.acceptance import Rule, first_difference
from rescore.calls import usable_verify
from rescore.checks import VERIFY_MODES
from rescore.costs.predicting import not_measured
from rescore.costs.table import Costs
from rescore.decoding import GREEDY, Decoded, decode, margin_at
from rescore.drafters.drafting import Drafting
from rescore.drafters.provenance import provenance
from rescore.peers import Peer, load_peer
from rescore.replaying import Drafted, Limits, replay, replay_steps, unrescored_at
from rescore.rescorers import load_rescorer
from rescore.runs.evaluated import Evaluation
from rescore.runs.inputs import Inputs, Notify, Progress, add_notice
from rescore.runs.log import ExampleLog, key_of_record, save_results
from rescore.runs.recording import Recording, check_names, open_recording
from rescore.runs.records import ExampleRecord, LiveExample, ResultsDocument, RunConfig, RunRecord
from rescore.runs.run import ORACLE, Run
from rescore.runs.summary import is_cut
from rescore.runs.work import Asked, Work, check_identities, prepared
from rescore.tracing import Trace, TracedExample, TraceHeader

# Replayed side by side, here or by a worker, and always the same ones: a neural rescorer's sums are rounded by the
# shape of its batch. A kill loses what of these is not finished.
SHARD_EXAMPLES = 16
LIVE_IS_HERE = "live decoding measures the time that it takes here; drop --executor, or --mode live"


def evaluate(
    recordings: Recording | Iterable[Recording],
    runs: Asked | Mapping[str, Asked],
    *,
    live: bool = False,
    verify: str = "tree",
    rule: Rule = GREEDY,
    peers: Sequence[str | Peer] = (),
    costs: Costs | str | None = None,
    seed: int = 0,
    out: Path | None = None,
    executor: Executor = HERE,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> Evaluation:
    """Makes every run on every task, and accounts for it.

    recordings: of `rescore.record` or `rescore.load_trace`; runs: specs, `Run`s or rescorers, the same on all tasks or
    by task.
    live: decodes with base LM and heads and measures time; else replays. verify: p drafts as a `tree` or a `batch`.
    rule: what is accepted, or how the output is drawn (live); what is not greedy is compared with nothing greedy.
    peers: other libraries' decoders, or their specs, that are measured in the same turns (live).
    costs: what the speed-up of each run is predicted by, and `joint` with `nodes=auto` plans by: a table, its file, or
        `here` (measured on this machine); None: `here` where a run plans, else nothing is predicted.
    seed: of the bootstrap intervals, the one random thing.
    out: a folder for `examples.jsonl` (a line per finished example, resumable) and `results.json` (last).
    executor: who records and replays.
    notify: gets each of the notices once, before the work that it is about.
    Ctrl-C keeps what is finished and returns it with `interrupted` set. Raises `RescoreError` for what can't be done.
    """
    of_tasks = [recordings] if isinstance(recordings, Recording) else list(recordings)
    if not of_tasks:
        raise RescoreError("nothing is to be evaluated; give a recording at least")
    check_names(of_tasks)
    if isinstance(runs, Mapping) and (missing := [r.name for r in of_tasks if r.name not in runs]):
        raise RescoreError(f"no runs are given for {missing[0]}; give them by the name of each task")
    if verify not in VERIFY_MODES:
        raise UnknownNameError("verify mode", verify, VERIFY_MODES)
    if seed < 0:
        raise RescoreError(f"--seed {seed}; a seed is 0 or more")
    if not live and verify != VERIFY_MODES[0] and costs is None:
        raise RescoreError(f"--verify {verify} is how live decoding verifies; drop it, or add --mode live (or --costs)")
    if rule.name != GREEDY.name and not live:
        what = "drawn" if rule.random else f"kept by {rule.name} acceptance"
        raise RescoreError(
            f"what is {what} leaves a trace at its first token that is not greedy decoding's, and what is drafted "
            "there is not in it; add --mode live"
        )
    if peers and rule.name != GREEDY.name:
        raise RescoreError("peers are timed decoding greedily; drop --peer, or what is not greedy")
    if peers and not live:
        raise RescoreError("peers are timed beside live decoding; drop --peer, or add --mode live")
    if live and not executor.is_local:
        raise RescoreError(LIVE_IS_HERE)
    if live and any(recording.given for recording in of_tasks):
        raise RescoreError("a given trace can be replayed, not decoded live; drop --trace or --mode live")
    loaded: dict[object, Any] = {}
    beside = [load_peer(peer) if isinstance(peer, str) else peer for peer in peers]
    work = [
        prepared(
            recording, runs[recording.name] if isinstance(runs, Mapping) else runs, loaded,
            live=live, costs=costs, peers=beside, rule=rule,
        )
        for recording in of_tasks
    ]  # fmt: skip
    if out is not None:
        check_identities(work)
    document = ResultsDocument(
        config=RunConfig(
            mode="live" if live else "replay",
            verify=verify,  # type: ignore[arg-type]
            acceptance=rule.name,
            lossy=rule.lossy,
            sampled=rule.random,
            sampling_seed=getattr(rule, "seed", 0),
            seed=seed,
            inputs={task.name: task.recording.inputs for task in work},
            runs={task.name: task.records for task in work},
            peers={peer.name: peer.identity for peer in beside},
            **environment(),
            device=of_tasks[0].models.device,
            threads=torch.get_num_threads() if executor.is_local else 1,
            data={task.name: task.recording.source for task in work},
            traces={task.name: {"k": task.recording.k, **task.recording.settings} for task in work},
            costs={task.name: task.costs for task in work if task.costs},
        )
    )
    add = partial(add_notice, document.config.notices, notify)
    for task in work:
        for line in task.notices(live=live):
            add(line)
        if task.costs and (lacking := not_measured(task.costs, task.runs)):
            add(lacking)
    interrupted = False
    with ExampleLog(out, document.config.decides()) as log:
        try:
            for task in work:
                _Evaluator(task, document.config, log, executor, progress, add, loaded, rule).run(live=live)
        except KeyboardInterrupt:
            interrupted = True
        for task in work:
            task.summarize(log, document, seed=seed)
        examples = [r for task in work for side in task.sides for r in log.records(task.key(side), task.recording.ids)]
        if out is not None and not interrupted:
            save_results(document, out)
    return Evaluation(document, examples, out, interrupted)


@dataclass
class _Evaluator:
    """Finishes the examples of one task that the log lacks."""

    task: Work
    config: RunConfig
    log: ExampleLog
    executor: Executor
    progress: Progress | None
    notify: Notify
    loaded: dict[object, Any]
    rule: Rule = GREEDY
    drafting: dict[Run, Drafting] = field(default_factory=dict)
    drafted: Drafted = field(default_factory=dict)

    def run(self, *, live: bool) -> None:
        """Finishes the task. Ctrl-C while its trace is recorded: what there is of it is replayed first."""
        recording = self.task.recording
        p = max(run.p for run in self.task.runs)
        trees = recording.models.base.supports_tree if live else True
        if usable_verify(self.config.verify, p, trees=trees) != self.config.verify:
            line = f"{recording.inputs.base} takes no tree mask; its {p} drafts a step are verified as a batch"
            self.notify(line)
        try:
            trace = recording.trace(executor=self.executor, progress=self.progress)
        except KeyboardInterrupt:
            if not live and (trace_so_far := recording.recorded()) is not None:
                self._replay(trace_so_far, None)
            raise
        if live:
            self._decode(trace)
        elif self.executor.is_local:
            self._replay(trace, self.progress)
        else:
            self._replay_by_workers(trace)

    def _fit(self, trace: Trace, shared: BaseLM | None = None) -> None:
        recording = self.task.recording
        self.drafting = self.task.fitted(trace, self.notify, shared)
        drafters = (drafter for drafting in self.drafting.values() for drafter in drafting.drafters)
        self.drafted = recording.drafted(trace, drafters, self.progress)

    def _missing(self, side: Run | Peer, examples: Iterable[TracedExample]) -> list[TracedExample]:
        key = self.task.key(side)
        return [example for example in examples if not self.log.has(key, example.id)]

    def _replay(self, trace: Trace, progress: Progress | None) -> None:
        self._fit(trace)
        finished = 0
        for shard in _shards(trace):
            self._replay_side_by_side(trace.header, shard)
            finished += len(shard)
            if progress:
                progress(f"replay {self.task.name}", finished, len(trace.examples))

    def _replay_side_by_side(self, header: TraceHeader, examples: Sequence[TracedExample]) -> None:
        """Finishes the examples of a shard; those that are finished already are replayed with those that are not."""
        quality = {example.id: self._quality(example.output, example) for example in examples}
        oracles = self._oracles(examples)
        for run, drafting in self.drafting.items():
            missing = {example.id for example in self._missing(run, examples)}
            if not missing:
                continue
            verify, limits = self.task.verify(self.config.verify, run.p), Limits.of(header)
            replayed = replay_steps(examples, drafting, self.drafted, verify=verify, limits=limits)
            for example, steps in zip(examples, replayed, strict=True):
                if example.id not in missing:
                    continue
                self.log.add(ExampleRecord(
                    **self._facts(run, header, example), quality=quality[example.id],
                    cut=is_cut(example.output_ids, header.eos_token_ids), accepted=steps.accepted,
                    drafts=steps.drafts, calls=steps.calls,
                    oracle_accepted=oracles[_chosen_among(drafting)][example.id],
                    output_ids=example.output_ids.tolist(), **self._beside(drafting, example, steps.accepted),
                ))  # fmt: skip

    def _replay_by_workers(self, trace: Trace) -> None:
        work, recording = self.task, self.task.recording
        shards = [shard for shard in _shards(trace) if any(self._missing(run, shard) for run in work.runs)]
        if shards:
            self.executor.begin()
        self._fit(trace)  # what is refused is refused here, and drafters with a model propose here
        by_workers = _ReplayedByWorkers(
            trace.header, recording.models.inputs_of_worker, recording.k, recording.models.heads_needed, work.runs,
            work.records, work.costs, self.config,
        )  # fmt: skip
        drafted = [
            {name: {example.id: of[example.id] for example in shard} for name, of in self.drafted.items()}
            for shard in shards
        ]
        finished = len(trace.examples) - sum(map(len, shards))
        found = self.executor.map(by_workers, zip(shards, drafted, strict=True))
        for shard, records in zip(shards, found, strict=True):
            for record in records:
                if not self.log.has(key_of_record(record), record.id):
                    self.log.add(record)
            finished += len(shard)
            if self.progress:
                self.progress(f"replay {self.task.name}", finished, len(trace.examples))

    def _decode(self, trace: Trace) -> None:
        """Decodes every example that is not finished: token by token as the baseline, then with each run and each peer,
        in turns. What is not greedy is compared with no trace and no oracle."""
        recording, limit = self.task.recording, self.task.recording.settings["max_new_tokens"]
        base = recording.models.base
        self._fit(trace, shared=base)
        heads = recording.models.used_heads if any(drafting.heads for drafting in self.drafting.values()) else None
        sides = [side for side in self.task.sides if self._missing(side, trace.examples)]
        peers = {side: side.load(base, self.loaded) for side in sides if isinstance(side, Peer)}
        greedy = self.rule.name == GREEDY.name
        watch, warm = Watch(base), set[Run | Peer]()  # the first calls of a process allocate and compile
        recording.models.check_unchanged(recording.settings)
        for place, example in enumerate(trace.examples):
            missing = [side for side in sides if self._missing(side, [example])]
            if missing:
                prompt = example.prompt_ids.tolist()
                if not warm:
                    decode(base, None, prompt, max_new_tokens=min(4, limit))
                # Decoded anew beside the runs of every rule: the speed of a machine drifts within minutes, so that the
                # seconds of another turn would not make an honest ratio.
                alone = self.rule.started(example.id) if self.rule.random else GREEDY
                baseline = decode(base, None, prompt, max_new_tokens=limit, rule=alone)
                oracles = self._oracles([example]) if greedy else {}
                for side in missing:
                    decoder = partial(peers[side], prompt) if isinstance(side, Peer) else self._decoder(
                        side, base, heads, example, baseline
                    )  # fmt: skip
                    if side not in warm:
                        decoder(min(2 * trace.header.h, limit))
                        warm.add(side)
                    decoded = decoder(limit)
                    watch.check()  # before anything is kept that may be of other weights
                    differs = None
                    if not self.rule.random:
                        differs = first_difference(decoded.output_ids, baseline.output_ids)
                    margin = None if differs is None else margin_at(base, prompt, baseline.output_ids, differs)
                    # Where the output is the trace's, so are the lattices that the steps began with.
                    traced = first_difference(decoded.output_ids, example.output_ids.tolist()) is None
                    drafting = None if isinstance(side, Peer) else self.drafting[side]
                    self.log.add(ExampleRecord(
                        **self._facts(side, trace.header, example),
                        quality=self._quality(base.decode_text(decoded.output_ids), example),
                        cut=is_cut(decoded.output_ids, base.eos_token_ids), accepted=decoded.accepted,
                        drafts=decoded.drafts, calls=decoded.calls, output_ids=decoded.output_ids,
                        oracle_accepted=oracles[_chosen_among(drafting)][example.id] if drafting and greedy else None,
                        **(self._beside(drafting, example, decoded.accepted) if traced and drafting and greedy else {}),
                        live=LiveExample(
                            first_difference=differs, margin=margin, verify=decoded.verify, seconds=decoded.seconds,
                            rescore_seconds=decoded.rescore_seconds, autoregressive_tokens=len(baseline.output_ids),
                            autoregressive_seconds=baseline.seconds,
                            autoregressive_quality=self._quality(base.decode_text(baseline.output_ids), example),
                        ),
                    ))  # fmt: skip
            if self.progress:
                self.progress(f"decode {self.task.name}", place + 1, len(trace.examples))

    def _decoder(
        self, run: Run, base: BaseLM, heads: BlockHeads | None, example: TracedExample, baseline: Decoded
    ) -> Callable[[int], Decoded]:
        """Decodes an example with a run, to so many tokens at most."""
        drafting = self.drafting[run]
        prompt, future = example.prompt_ids.tolist(), np.asarray(baseline.output_ids)
        return lambda most: decode(
            base, heads, prompt, rescorer=drafting.rescorer, drafters=drafting.drafters, k=run.k, p=run.p,
            max_new_tokens=most, verify=self.config.verify, future=future,
            rule=self.rule.started(example.id, *run.key),
        )  # fmt: skip

    def _facts(self, side: Run | Peer, header: TraceHeader, example: TracedExample) -> dict[str, Any]:
        task, label, p, k = self.task.key(side)
        longest = side.longest if isinstance(side, Peer) else self.drafting[side].longest(header.h)
        return {
            "task": task, "rescorer": label, "p": p, "k": k, "id": example.id, "group": example.group,
            "h": header.h, "longest": longest, "prompt_tokens": len(example.prompt_ids),
        }  # fmt: skip

    def _beside(self, drafting: Drafting, example: TracedExample, accepted: list[int]) -> dict[str, Any]:
        """What else could have been accepted at the positions of these steps, and who proposed what was."""
        beside: dict[str, Any] = {"unrescored_accepted": unrescored_at(example, accepted)}
        if len(drafting.drafters) > 1:
            of = provenance(example, accepted, drafting.drafters, drafting.k, self.drafted)
            beside |= {"origins": of.origins, "alone_accepted": of.alone}
        return beside

    def _oracles(self, examples: Sequence[TracedExample]) -> _Oracles:
        """Accepted lengths of the oracle's decode by what runs that are not finished choose among, and by example."""
        oracles: _Oracles = {}
        for run, drafting in self.drafting.items():
            key = _chosen_among(drafting)
            if key not in oracles and self._missing(run, examples):
                oracle = load_rescorer(ORACLE)
                accepted = replay(examples, oracle, k=drafting.k, drafters=drafting.drafters, drafted=self.drafted)
                oracles[key] = {e.id: lengths for e, lengths in zip(examples, accepted, strict=True)}
        return oracles

    def _quality(self, output: str | None, example: TracedExample) -> dict[str, float]:
        """The task's metrics of an output by name; none where its text is not known or nothing is there to compare
        with."""
        if output is None or not example.references:
            return {}
        return {m.name: m.score(output, example.references) for m in self.task.recording.metrics}


def _shards(trace: Trace) -> Iterator[Sequence[TracedExample]]:
    for begin in range(0, len(trace.examples), SHARD_EXAMPLES):
        yield trace.examples[begin : begin + SHARD_EXAMPLES]


_Among = tuple[tuple[str, ...], int]
_Oracles = dict[_Among, dict[str, list[int]]]


def _chosen_among(drafting: Drafting) -> _Among:
    """Drafters and k: what a rescorer chooses among."""
    return tuple(drafter.name for drafter in drafting.drafters), drafting.k


@dataclass(frozen=True)
class _ReplayedByWorkers:
    """Replays a shard in a worker: examples, and what drafters with a model of their own propose along them.

    The worker opens the task and loads rescorers itself, as the fields name them; they must be those of the records.
    """

    header: TraceHeader
    inputs: Inputs
    k: int
    heads_needed: bool
    runs: list[Run]
    records: list[RunRecord]
    costs: Costs | None
    config: RunConfig

    def __call__(self, shard: tuple[Sequence[TracedExample], Drafted]) -> list[ExampleRecord]:
        examples, drafted = shard
        evaluator = self._evaluator()
        evaluator.drafted = drafted
        with ExampleLog(None, {}) as evaluator.log:
            evaluator._replay_side_by_side(self.header, examples)
            return evaluator.log.all

    def _evaluator(self) -> _Evaluator:
        of = (self.header, self.inputs, self.k, self.records, self.costs, self.config.verify)
        key = key_of([plain(each) for each in of])
        if key not in _OF_WORKER:
            recording = open_recording(self.inputs, k=self.k, heads_needed=self.heads_needed)
            work = prepared(recording, self.runs, {}, live=False, costs=self.costs, peers=[], rule=GREEDY)
            if plain(work.records) != plain(self.records):
                raise IncompatibleError("a worker finds other rescorers than there are here; give all the same files")
            _OF_WORKER.clear()
            evaluator = _OF_WORKER[key] = _Evaluator(
                work, self.config, ExampleLog(None, {}), HERE, None, lambda line: None, {}
            )
            evaluator.drafting = work.fitted(Trace(self.header, ()), evaluator.notify)
        return _OF_WORKER[key]


_OF_WORKER: dict[str, _Evaluator] = {}  # of its last shard
