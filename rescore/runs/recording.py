"""Recordings: a task's examples and its trace, which is recorded when it is first needed, or given by the user.

`open_recording` refuses whatever can be refused before a model runs; `Recording.trace` does the work.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lattices.errors import IncompatibleError, RescoreError
from lattices.lattice import Lattice
from lattices.paths import encodable, user_path
from lm.executors import HERE, LOCALLY, Executor, ExecutorOptions
from lm.locks import making, warn, writing_to
from lm.records import plain
from rescore.checks import check_held_k, check_k
from rescore.drafters import Drafter, LatticeDrafter, load_drafter
from rescore.drafters.asked import fit_drafter
from rescore.drafters.heads import Heads
from rescore.drafters.recorded import drafted, record_drafter
from rescore.rescorers import Target
from rescore.runs.inputs import DEFAULT_NEW_TOKENS, DEFAULT_TASK, Inputs, Notify, Progress
from rescore.runs.models import Models, RowsByWorkers
from rescore.tasks import Metric, is_task_file, load_task, task_names
from rescore.tasks.data import TaskData, file_in, load_examples
from rescore.tasks.groups import digest, held_out
from rescore.tasks.leave_out import read_leave_out
from rescore.tasks.metrics import find_metric
from rescore.tracing import (
    HEADER_FILE,
    TRACE_K,
    Trace,
    TraceHeader,
    check_settings,
    content_sha256,
    given_settings,
    read_header,
    read_trace,
    record_trace,
    trace_folder,
)

if TYPE_CHECKING:
    from lm.base.model import BaseLM
    from lm.heads.block_heads import BlockHeads


@dataclass(frozen=True)
class Recording:
    """One task's trace with all that belongs to it.

    name: of the task; metrics: its own.
    source: where its examples are from; settings: all that its trace depends on.
    ids, groups: of its examples (`rescore.tasks.groups`).
    folder: of the trace; cached: it is the cache's, not the user's.
    k: lattice entries of a slot; inputs: as the user named them; models: that record it.
    data: the examples to record; None for a trace that was `given`.
    """

    name: str
    metrics: tuple[Metric, ...]
    source: dict[str, Any]
    settings: dict[str, Any]
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    folder: Path
    k: int
    inputs: Inputs
    models: Models
    cached: bool = False
    data: TaskData | None = None
    given: Trace | None = None

    @property
    def h(self) -> int:
        """Heads that are used: tokens of a block."""
        return int(self.inputs.h or self.settings["h"])

    @property
    def data_sha256(self) -> str | None:
        """sha256 of the data that the examples are from; of a trace made elsewhere, which does not say: its own."""
        return self.settings.get("data_sha256") or self.source.get("sha256")

    @property
    def all_settings(self) -> dict[str, Any]:
        """All that is recorded beside the trace depends on these; `given_settings` of a trace that was given."""
        return given_settings(self.settings, self.source["sha256"], self.models.device) if self.given else self.settings

    @property
    def loads(self) -> Callable[[], tuple[BaseLM, BlockHeads | None]] | None:
        """Gives the base and the heads that are used; None of a given trace."""
        return None if self.given else partial(self.models.loaded, self.settings)

    @property
    def notices(self) -> list[str]:
        """What to know: examples left out or not the task's own, heads not the base's; what a given trace says."""
        left_out = self.source.get("left_out") or ()
        shown = ", ".join(left_out[:5]) + (" ..." if len(left_out) > 5 else "")
        few = "1 example of the data is" if len(left_out) == 1 else f"{len(left_out)} examples of the data are"
        lines = (
            self.data and self.data.notice,
            f"{self.name}: {few} left out ({shown})" if left_out else None,
            self.settings.get("notice") if self.given else self.models.about_heads(),
        )
        return [line for line in lines if line]

    def announce(self, notify: Notify | None) -> None:
        """Passes the notices on."""
        if notify:
            for line in self.notices:
                notify(line)

    def at(self, places: Sequence[int]) -> Recording:
        """The same with only the examples at these places."""
        examples = tuple(self.data.examples[place] for place in places) if self.data else ()
        return dataclasses.replace(
            self,
            ids=tuple(self.ids[place] for place in places),
            groups=tuple(self.groups[place] for place in places),
            data=dataclasses.replace(self.data, examples=examples) if self.data else None,
        )

    def held_out(self, count: int, *, evaluated: Collection[str] = ()) -> Recording:
        """The same with only `count` held-out examples, apart from the `evaluated` groups where there are others; see
        `rescore.tasks.groups.held_out`."""
        return self.at(held_out(self.groups, count, evaluated=evaluated))

    def recorded(self) -> Trace | None:
        """The trace as far as it is recorded: of these examples, in their order; None if nothing is, or a broken one
        in the cache, which is made again.

        Raises `IncompatibleError` if the user's folder holds another trace, `InvalidDataError` if it is broken.
        """
        trace = self._known()
        return trace and trace.first_heads(self.inputs.h)

    def trace(self, *, executor: Executor = HERE, progress: Progress | None = None) -> Trace:
        """The whole trace, of the first h heads; what it lacks is recorded now. Ctrl-C leaves what `recorded` gives.

        One process records it: where it is the cache's the others wait, and replay it; where it is the user's they are
        refused (`OutputError`).
        """
        return self._whole(executor, progress).first_heads(self.inputs.h)

    def drafted(
        self, trace: Trace, drafters: Iterable[Drafter], progress: Progress | None
    ) -> dict[str, dict[str, Lattice]]:
        """See `rescore.drafters.recorded.drafted`; of drafters of one name the last counts."""
        named = {drafter.name: drafter for drafter in drafters}.values()
        return drafted(trace, named, task=self.name, settings=self.all_settings, progress=progress)

    def _whole(self, executor: Executor, progress: Progress | None) -> Trace:
        trace = self._known()
        if trace is not None and len(trace.examples) == len(self.ids):
            return trace
        with making(self.folder, f"the trace of {self.name}") if self.cached else writing_to(self.folder):
            if trace is None or self._has_grown(trace):  # by the process that was waited for
                trace = self._read_or_remove()
                if trace is not None and len(trace.examples) == len(self.ids):
                    return trace
            return self._record(trace, executor, progress)

    def _known(self) -> Trace | None:
        """What is recorded already; a broken trace in the cache counts as none."""
        with suppress(*((RescoreError,) if self.cached else ())):
            return self._read()
        return None

    def _has_grown(self, trace: Trace) -> bool:
        try:
            return read_header(self.folder).parts != trace.header.parts
        except RescoreError:
            return True

    def _read(self) -> Trace | None:
        trace = self.given
        if trace is None:
            if not (self.folder / HEADER_FILE).is_file():
                return None
            trace = read_trace(self.folder)
            check_settings(self.folder, trace.header, k=self.k, settings=self.settings)
        by_id = {example.id: example for example in trace.examples}
        for example in self.data.examples if self.data else ():
            recorded = by_id.get(example.id)
            if recorded and (recorded.prompt, recorded.references) != (example.prompt, example.references):
                # The code that makes prompts of records is no part of the settings.
                raise IncompatibleError(
                    f"{self.folder} holds another prompt or other references of the example {example.id!r} than the "
                    "task gives now; use another --out"
                )
        # The data say what belongs together: a trace may be older than its column.
        groups = zip(self.ids, self.groups, strict=True)
        examples = tuple(dataclasses.replace(by_id[name], group=group) for name, group in groups if name in by_id)
        return Trace(trace.header, examples)

    def _read_or_remove(self) -> Trace | None:
        """What is recorded; a broken trace in the cache makes room for a whole one."""
        try:
            return self._read()
        except RescoreError as error:
            if not self.cached:
                raise
            warn(f"the cached trace of {self.name} can't be used ({error}); it is made again")
            shutil.rmtree(self.folder, ignore_errors=True)
            return None

    def _record(self, recorded: Trace | None, executor: Executor, progress: Progress | None) -> Trace:
        assert self.data is not None, "a trace that was given is whole"
        executor.begin()
        models = self.models
        limits = {name: self.settings[name] for name in ("chat", "max_new_tokens", "max_prompt_tokens")}
        by_workers = RowsByWorkers(models.inputs_of_worker, models.heads_needed, self.settings, self.k)
        return record_trace(
            models.base,
            models.heads,
            self.data.examples,
            self.folder,
            settings=self.settings,
            **limits,
            k=self.k,
            recorded=recorded,
            elsewhere=None if executor.is_local else partial(executor.map, by_workers),
            check=lambda: models.check_unchanged(self.settings),
            progress=(lambda done, total: progress(f"trace {self.name}", done, total)) if progress else None,
        )


def open_recording(
    inputs: Inputs,
    *,
    k: int = 1,
    out: Path | None = None,
    base: BaseLM | None = None,
    heads: BlockHeads | None = None,
    heads_needed: bool = True,
) -> Recording:
    """The recording of a task; nothing is decoded yet.

    k: lattice entries of a slot that will be needed; the cache's traces have at least `TRACE_K`.
    out: records into this folder, exactly k entries, instead of into the cache.
    base, heads: loaded already; else what `inputs` names. heads_needed: see `Models`.
    Raises `RescoreError` for data, models, k or h that can't be used.
    """
    inputs.check()
    if inputs.trace is not None:
        return _given(inputs, k)
    task = load_task(inputs.task or DEFAULT_TASK)
    inputs = dataclasses.replace(inputs, task=inputs.task or DEFAULT_TASK)
    rows = user_path(inputs.data) if inputs.data else None
    data = load_examples(
        task, data=file_in(rows, task) if rows and rows.is_dir() else rows, limit=inputs.limit,
        leave_out=read_leave_out(inputs.leave_out),
    )  # fmt: skip
    models = Models(inputs, base, heads, heads_needed=heads_needed)
    new_tokens = inputs.max_new_tokens or task.limits.new_tokens or DEFAULT_NEW_TOKENS
    settings = models.trace_settings(task, data, new_tokens)
    _check_h(settings["h"], inputs.h)
    vocab_size = settings["base"]["vocab_size"]
    check_k(k, vocab_size)
    k = k if out else min(max(TRACE_K, k), vocab_size)
    return Recording(
        name=task.name,
        metrics=task.metrics,
        source=data.source,
        settings=settings,
        ids=tuple(example.id for example in data.examples),
        groups=tuple(example.group for example in data.examples),
        folder=encodable(out, "--out") if out else trace_folder(task.name, settings, k),
        k=k,
        inputs=inputs,
        models=models,
        cached=out is None,
        data=data,
    )


def open_recordings(tasks: Iterable[str], inputs: Inputs, *, k: int = 1, heads_needed: bool = True) -> list[Recording]:
    """The recordings of several tasks with the same inputs; without any, that of `inputs`.

    Raises as `open_recording`, and `RescoreError` for two tasks of one name.
    """
    names: list[str | None] = [*dict.fromkeys(tasks)] or [inputs.task]
    if inputs.trace is not None and len(names) > 1:
        raise RescoreError(f"{inputs.trace} is the trace of one task; give one --task, or none")
    recordings = [
        open_recording(dataclasses.replace(inputs, task=name), k=k, heads_needed=heads_needed) for name in names
    ]
    check_names(recordings)
    return recordings


def check_names(recordings: Sequence[Recording]) -> None:
    """Raises `RescoreError` if two of them are called the same."""
    names = [recording.name for recording in recordings]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RescoreError(f"two of the tasks are called {twice}; give one of them another name: in its file")


def record(
    base: BaseLM | str = Inputs.base,
    heads: BlockHeads | str | None = None,
    *,
    task: str = DEFAULT_TASK,
    heads_needed: bool = True,
    k: int = TRACE_K,
    out: str | Path | None = None,
    progress: Progress | None = None,
    notify: Notify | None = None,
    **inputs: Any,
) -> Recording:
    """Decodes a task greedily and keeps every position's lattice, for `rescore.evaluate`.

    base, heads: loaded, or named as on the command line; task: its name or YAML file.
    heads_needed: False for drafters that need none: a base without heads is recorded without.
    k: lattice entries of a slot; out: a folder for the trace (default: in the cache, where it is found again).
    inputs: further fields of `rescore.runs.inputs.Inputs` (limit, data, max_new_tokens ...).
    """
    inputs |= {"base": base} if isinstance(base, str) else {"base": base.identity.name, "dtype": base.identity.dtype}
    recording = open_recording(
        Inputs(task=task, heads=heads if isinstance(heads, str) else None, **inputs),
        k=k,
        out=None if out is None else user_path(out, "out"),
        base=None if isinstance(base, str) else base,
        heads=None if isinstance(heads, str) else heads,
        heads_needed=heads_needed,
    )
    recording.announce(notify)
    recording.trace(progress=progress)
    return recording


def record_task(
    inputs: Inputs,
    drafter: str,
    out: Path,
    *,
    k: int,
    execution: ExecutorOptions = LOCALLY,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> Trace:
    """Records a task with the lattices of a drafter, k entries a slot, into the folder `out`, or goes on with it.

    With any drafter but heads of all tokens the base's own outputs are recorded in the cache first; `none` records
    these alone, where there are no heads. Raises `RescoreError` for a drafter without lattices, and as
    `open_recording`.
    """
    execution.check(inputs.device)
    loaded = None if drafter == "none" else load_drafter(drafter)
    if loaded is not None and not (isinstance(loaded, LatticeDrafter) and loaded.decodes):
        raise RescoreError(f"--drafter {drafter} has no lattices of its own to record; give heads or draft-model:NAME")
    in_trace = loaded is None or (isinstance(loaded, Heads) and loaded.size is None)
    recording = open_recording(inputs, k=k, out=out if in_trace else None, heads_needed=isinstance(loaded, Heads))
    recording.announce(notify)
    with execution.started(inputs.device) as executor:
        trace = recording.trace(executor=executor, progress=progress)
    if loaded is None or in_trace:
        return trace
    header, device, settings = trace.header, recording.models.device, recording.settings
    target = Target.of(settings["base"], header.vocab_size, header.eos_token_ids, device=device)
    fitted = fit_drafter(loaded, dataclasses.replace(target, models=recording.loads))
    return record_drafter(trace, fitted, task=recording.name, settings=settings, k=k, folder=out, progress=progress)


def load_trace(folder: str | Path, *, k: int = 1, **inputs: Any) -> Recording:
    """A trace that `record` or `rescore trace` left, or that was made elsewhere, for `rescore.evaluate`.

    k: lattice entries of a slot that will be needed; inputs: further fields of `Inputs` (task, limit, h, leave_out).
    Raises `RescoreError` for what it does not hold, `InvalidDataError` if it is broken.
    """
    return open_recording(Inputs(trace=str(folder), **inputs), k=k)


def _given(inputs: Inputs, k: int) -> Recording:
    """The recording of a trace folder, wherever it was made; it is called by its own task, else by the one that the
    user gives, else like its folder."""
    assert inputs.trace is not None
    folder = user_path(inputs.trace)
    trace = read_trace(folder)
    recorded = trace.header.task
    own = load_task(inputs.task) if inputs.task and is_task_file(inputs.task) else None
    name = own.name if own else inputs.task or recorded or folder.resolve().name
    if recorded not in (None, name):
        raise IncompatibleError(f"{folder} is a trace of {recorded}, not of {inputs.task}; drop --task")
    definition = trace.header.settings.get("definition")
    if own is not None and definition is not None and plain(own.definition) != definition:
        raise IncompatibleError(
            f"{folder} was recorded for another version of {inputs.task}; record it again, or drop --task"
        )
    chosen, left_out = _without(trace, read_leave_out(inputs.leave_out))
    chosen = chosen.first_examples(inputs.limit)
    check_held_k(trace.header.k, k)
    _check_h(trace.header.h, inputs.h)
    inputs = dataclasses.replace(inputs, task=inputs.task or name)
    return Recording(
        name=name,
        metrics=own.metrics if own else _recorded_metrics(trace.header),
        source={
            "kind": "trace",
            "path": inputs.trace,
            "sha256": content_sha256(folder, trace.header.parts),
            **left_out,
        },
        settings={**trace.header.settings, "h": trace.header.h},
        ids=tuple(example.id for example in chosen.examples),
        groups=tuple(example.group for example in chosen.examples),
        folder=folder,
        k=trace.header.k,
        inputs=inputs,
        models=Models(inputs),
        given=trace,
    )


def _without(trace: Trace, leave_out: Collection[str]) -> tuple[Trace, dict[str, Any]]:
    """The trace without the examples that have these prompts, and for its source which these are."""
    if not leave_out:
        return trace, {}
    remaining = tuple(example for example in trace.examples if digest(example.prompt) not in leave_out)
    if not remaining:
        raise RescoreError("all examples of the trace are to be left out; drop --leave-out")
    ids = {example.id for example in remaining}
    return Trace(trace.header, remaining), {"left_out": [e.id for e in trace.examples if e.id not in ids]}


def _recorded_metrics(header: TraceHeader) -> tuple[Metric, ...]:
    """The metrics of the task that a trace was recorded for, as far as they are known here."""
    task = header.task
    if task in task_names():
        return load_task(task).metrics
    definition = header.settings.get("definition")
    named = definition.get("metric") if isinstance(definition, dict) else None
    metrics = []
    for name in named if isinstance(named, list) else [named]:
        with suppress(RescoreError):  # a trace may come from a version that has other metrics
            metrics.append(find_metric(str(name)))
    return tuple(metrics)


def _check_h(available: int, h: int | None) -> None:
    if h is not None and h > available:
        raise RescoreError(f"h = {h}, but these heads propose blocks of {available}; choose h from 2 to {available}")
