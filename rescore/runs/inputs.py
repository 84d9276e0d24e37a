"""What a run works on: options, models that are loaded when needed, and for every task its examples and its trace.

`prepare` refuses whatever can be refused before the first forward of a model; `TaskInput.trace` does the recording.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lattices.errors import IncompatibleError, RescoreError
from lattices.paths import user_path
from lm.files import sha256_of_file
from lm.keys import key_of, software
from lm.locks import making, tell, writing_to
from lm.records import plain
from rescore.checks import check_held_k, check_k
from rescore.groups import digest, held_out
from rescore.runs.leave_out import read_leave_out
from rescore.runs.options import EvalOptions, Progress, recorded_task
from rescore.tasks import Metric, Task, is_task_file, load_task, task_names
from rescore.tasks.data import TaskData, load_examples
from rescore.tasks.metrics import find_metric
from rescore.tracing import (
    DEFAULT_K,
    HEADER_FILE,
    RECORDING,
    Trace,
    TraceHeader,
    check_settings,
    load_trace,
    read_header,
    record_trace,
    trace_folder,
)

if TYPE_CHECKING:
    from lm.base.model import BaseIdentity, BaseLM
    from lm.heads.block_heads import BlockHeads


class Models:
    """The base LM and heads of a run, loaded when first needed: a replay from the cache needs neither."""

    def __init__(self, options: EvalOptions) -> None:
        self.options = options

    @cached_property
    def base(self) -> BaseLM:
        """The base LM."""
        from lm.base.catalog import load_base

        return load_base(self.options.base, dtype=self.options.dtype, device=self.options.device)

    @cached_property
    def identity(self) -> BaseIdentity:
        """Which base LM that is, told without its weights in memory."""
        from lm.base.catalog import identify

        return identify(self.options.base, dtype=self.options.dtype)

    @cached_property
    def heads(self) -> BlockHeads:
        """All of the block heads."""
        from lm.heads.block_heads import load_heads

        return load_heads(self.options.heads, self.base.identity, device=self.base.device, dtype=self.base.heads_dtype)

    def check_unchanged(self, settings: Mapping[str, Any]) -> None:
        """Raises `IncompatibleError` if base or heads are no longer those that the settings of a trace name.

        Files may be replaced between the moment they are identified and the one they are read, and even later: weights
        are mapped into memory, so that a file written over changes the model that runs.
        """
        from lm.base.catalog import identify
        from lm.heads.block_heads import heads_folder, heads_sha256

        now = identify(self.options.base, dtype=self.options.dtype)
        heads = heads_sha256(heads_folder(self.options.heads, now))
        if plain([dataclasses.asdict(now), heads]) != plain([settings["base"], settings["heads_sha256"]]):
            raise IncompatibleError(
                f"the files of {self.options.base} or of its heads were replaced while they were read; run the command "
                "again"
            )

    def about_heads(self) -> str | None:
        """What the user should know of the heads, if anything."""
        from lm.heads.block_heads import of_other_weights

        return of_other_weights(self.options.heads, self.identity)

    def trace_settings(self, task: Task, data: TaskData) -> dict[str, Any]:
        """Everything that a trace depends on, but for its k; none of it needs the weights in memory.

        `recorded_by`: the kind of device, this project's recording and the libraries' minor versions, which all round
        in their own ways: a trace of another one is not replayed unseen.
        """
        from lm.base.catalog import choose_device, load_tokenizer
        from lm.heads.block_heads import heads_folder, heads_sha256, read_config

        options, identity = self.options, self.identity
        folder = heads_folder(self.options.heads, identity)
        template = load_tokenizer(self.options.base).chat_template if task.chat else None
        settings = {
            "base": dataclasses.asdict(identity),
            "heads_sha256": heads_sha256(folder),
            "heads_config_sha256": key_of(read_config(folder)),
            "h": read_config(folder).h,
            "task": task.name,
            "template": task.template,
            "chat": bool(template),
            "chat_template": template,
            "data_sha256": data.source["sha256"],
            "max_new_tokens": options.max_new_tokens,
            "max_prompt_tokens": options.max_prompt_tokens or task.limits.prompt_tokens,
            "recorded_by": {
                "device": choose_device(options.device).partition(":")[0], "recording": RECORDING, **software()
            },
        }  # fmt: skip
        # A task of the user's own is what its file says: with another word in it, it is another task.
        return settings if task.definition is None else {**settings, "definition": dict(task.definition)}


@dataclass(frozen=True)
class TaskInput:
    """One task of a run: its name and metrics, `source` of its examples, `settings` of its trace, ids of its examples
    and their `groups` (`rescore.groups`).

    `folder` holds the trace, or will, and is `cached` or the user's own; `k` is what is recorded; `data` are the
    examples to record, unless the trace was `given`. `about_heads`: what the user should know of them.
    """

    name: str
    metrics: tuple[Metric, ...]
    source: dict[str, Any]
    settings: dict[str, Any]
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    folder: Path
    k: int
    cached: bool = False
    data: TaskData | None = None
    given: Trace | None = None
    about_heads: str | None = None

    def tell(self, notify: Callable[[str], None] | None) -> None:
        """Passes on what the user should know: examples that are not the task's own, heads that are not the base's."""
        for line in (self.data and self.data.notice, self._left_out(), self.about_heads):
            if line and notify:
                notify(line)

    def _left_out(self) -> str | None:
        if not (ids := self.source.get("left_out")):
            return None
        shown = ", ".join(ids[:5]) + (" ..." if len(ids) > 5 else "")
        return f"{self.name}: {len(ids)} examples of the data are left out ({shown})"

    def of(self, places: Sequence[int]) -> TaskInput:
        """The same with only the examples at these places."""
        examples = tuple(self.data.examples[place] for place in places) if self.data else ()
        return dataclasses.replace(
            self,
            ids=tuple(self.ids[place] for place in places),
            groups=tuple(self.groups[place] for place in places),
            data=dataclasses.replace(self.data, examples=examples) if self.data else None,
        )

    def held_out(self, count: int, *, evaluated: Collection[str] = ()) -> TaskInput:
        """The same with only `count` held-out examples (`rescore.groups.held_out`), apart from the `evaluated` groups
        where there are others."""
        return self.of(held_out(self.groups, count, evaluated=evaluated))

    def held(self) -> Trace | None:
        """The trace as far as it is recorded: of the examples of this run, in their order; None if nothing is, or a
        broken one in the cache, which is made again.

        Raises `IncompatibleError` if the user's folder holds another trace, `InvalidDataError` if it is broken.
        """
        try:
            return self._held()
        except RescoreError:
            if self.cached:
                return None
            raise

    def trace(self, models: Models, *, progress: Progress | None = None) -> Trace:
        """The whole trace; what it lacks is recorded now. Ctrl-C leaves what `held` gives.

        One process records it: where it is the cache's the others wait, and replay it; where it is the user's they are
        refused (`OutputError`).
        """
        held = self.held()
        if held is not None and len(held.examples) == len(self.ids):
            return held
        with making(self.folder, f"the trace of {self.name}") if self.cached else writing_to(self.folder):
            if held is None or self._went_on(held):  # by the process that was waited for
                held = self._held_or_removed()
                if held is not None and len(held.examples) == len(self.ids):
                    return held
            return self._record(models, held, progress)

    def _held(self) -> Trace | None:
        trace = self.given
        if trace is None:
            if not (self.folder / HEADER_FILE).is_file():
                return None
            trace = load_trace(self.folder)
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
        return Trace(
            trace.header,
            tuple(
                dataclasses.replace(by_id[name], group=group)
                for name, group in zip(self.ids, self.groups, strict=True)
                if name in by_id
            ),
        )

    def _went_on(self, held: Trace) -> bool:
        try:
            return read_header(self.folder).parts != held.header.parts
        except RescoreError:
            return True

    def _held_or_removed(self) -> Trace | None:
        """What is held; a broken trace in the cache makes room for a whole one."""
        try:
            return self._held()
        except RescoreError as error:
            if not self.cached:
                raise
            tell(f"the cached trace of {self.name} can't be used ({error}); it is made again")
            shutil.rmtree(self.folder, ignore_errors=True)
            return None

    def _record(self, models: Models, held: Trace | None, progress: Progress | None) -> Trace:
        assert self.data is not None, "a trace that was given is whole"
        base, heads = models.base, models.heads
        return record_trace(
            base,
            heads,
            self.data.examples,
            self.folder,
            settings=self.settings,
            chat=self.settings["chat"],
            max_new_tokens=self.settings["max_new_tokens"],
            max_prompt_tokens=self.settings["max_prompt_tokens"],
            k=self.k,
            recorded=held,
            check=lambda: models.check_unchanged(self.settings),
            progress=(lambda done, total: progress(f"trace {self.name}", done, total)) if progress else None,
        )


def prepare(options: EvalOptions, models: Models, *, k: int | None = None, out: Path | None = None) -> list[TaskInput]:
    """The input of every task of resolved options; nothing is decoded yet.

    The trace is recorded into `out` with `k` entries per slot; by default into the cache, with `DEFAULT_K` or what the
    options need. Raises `RescoreError` for data, models, heads, k or h that can't be used.
    """
    if options.trace:
        return [_given(options)]
    return [_recorded(options, models, load_task(name), k, out) for name in options.tasks]


def _given(options: EvalOptions) -> TaskInput:
    assert options.trace is not None
    folder = _path(options.trace)
    trace = load_trace(folder)
    given, left_out = _without(trace, read_leave_out(options.leave_out))
    given = given.first_examples(options.limit)
    check_held_k(trace.header.k, options.k)
    _check_h(trace.header.h, options.h)
    typed = options.tasks[0]
    own = load_task(typed) if is_task_file(typed) else None
    recorded = trace.header.settings.get("definition")
    if own is not None and recorded is not None and plain(own.definition) != recorded:
        raise IncompatibleError(
            f"{folder} was recorded for another version of {typed}; record it again, or drop --task"
        )
    return TaskInput(
        name=own.name if own else typed,
        metrics=own.metrics if own else _recorded_metrics(trace.header),
        source={
            "kind": "trace",
            "path": options.trace,
            "sha256": content_sha256(folder, trace.header.parts),
            **left_out,
        },
        settings={**trace.header.settings, "h": trace.header.h},
        ids=tuple(example.id for example in given.examples),
        groups=tuple(example.group for example in given.examples),
        folder=folder,
        k=trace.header.k,
        given=trace,
    )


def _without(trace: Trace, leave_out: Collection[str]) -> tuple[Trace, dict[str, Any]]:
    """The trace without the examples that have these prompts, and for its source which these are."""
    if not leave_out:
        return trace, {}
    kept = tuple(example for example in trace.examples if digest(example.prompt) not in leave_out)
    if not kept:
        raise RescoreError("all examples of the trace are to be left out; drop --leave-out")
    ids = {example.id for example in kept}
    return Trace(trace.header, kept), {"left_out": [e.id for e in trace.examples if e.id not in ids]}


def _recorded_metrics(header: TraceHeader) -> tuple[Metric, ...]:
    """The metrics of the task that a trace was recorded for, as far as they are known here."""
    task = recorded_task(header)
    if task in task_names():
        return load_task(task).metrics
    definition = header.settings.get("definition")
    named = definition.get("metric") if isinstance(definition, dict) else None
    found = []
    for name in named if isinstance(named, list) else [named]:
        with suppress(RescoreError):  # a trace may come from a version that has other metrics
            found.append(find_metric(str(name)))
    return tuple(found)


def _recorded(options: EvalOptions, models: Models, task: Task, k: int | None, out: Path | None) -> TaskInput:
    data = load_examples(
        task, data=_path(options.data) if options.data else None, limit=options.limit,
        leave_out=read_leave_out(options.leave_out),
    )  # fmt: skip
    settings = models.trace_settings(task, data)
    _check_h(settings["h"], options.h)
    vocab_size = settings["base"]["vocab_size"]
    check_k(k or options.k, vocab_size)
    k = k or min(max(DEFAULT_K, options.k), vocab_size)
    return TaskInput(
        name=task.name,
        metrics=task.metrics,
        source=data.source,
        settings=settings,
        ids=tuple(example.id for example in data.examples),
        groups=tuple(example.group for example in data.examples),
        folder=out or trace_folder(task.name, settings, k),
        k=k,
        cached=out is None,
        data=data,
        about_heads=models.about_heads(),
    )


def _check_h(held: int, h: int | None) -> None:
    if h is not None and h > held:
        raise RescoreError(f"h = {h}, but these heads propose blocks of {held}; choose --h from 2 to {held}")


def content_sha256(folder: Path, parts: Sequence[str]) -> str:
    """sha256 over all files of a trace."""
    digest = hashlib.sha256()
    for path in [folder / HEADER_FILE, *(file for part in parts for file in sorted((folder / part).glob("*.arrow")))]:
        digest.update(sha256_of_file(path).encode())
    return digest.hexdigest()


def _path(text: str) -> Path:
    return user_path(text)
