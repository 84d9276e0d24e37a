"""What to evaluate: the options of a run, filled in and checked before any work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lattices.errors import IncompatibleError, RescoreError, UnknownNameError
from lattices.paths import user_path
from lm.records import Count
from rescore.checks import check_k, check_new_tokens, check_p
from rescore.decoding import VERIFY_MODES
from rescore.tasks import Task, is_task_file, load_task
from rescore.tracing import (
    TraceHeader,
    read_header,
)

if TYPE_CHECKING:
    pass

DEFAULT_TASK = "squad"
DEFAULT_NEW_TOKENS = 64
MAX_ALPHA = 64.0
TUNED: Literal["tuned"] = "tuned"  # the alpha that stands for what `rescore tune` kept
MODES = ("replay", "live")
Progress = Callable[[str, int, int], None]  # what is being done, done, total
Run = tuple[str, int]  # a rescorer as typed, and p


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate.

    `tasks` (none: squad, or the task that `trace` was recorded for) by name or as YAML files, `rescorers` by name;
    `base` and `heads` (path, None for those shipped); `h`: use the first h heads only; `k`: lattice entries per head;
    `p`: drafts per step, a number or several, each of which is run (`resolve` makes it a tuple); `alpha`: weight of the
    rescorer (None: its default; `tuned`: what `rescore.runs.tuning.tune` kept for it on this machine); `limit`: the
    first so
    many examples, one of each group before a second one of any; `leave_out`: `shipped` or a file of `rescore overlap`,
    whose examples are left out; `max_new_tokens` an output; `max_prompt_tokens`: cuts prompts (these three, None: what
    the task's file says, else all, 64 and no cut); `mode`: replay or live; `verify`: tree or batch (live); `data`: file
    of rows; `trace`: folder to replay, wherever it was made; `dtype` and `device` of the base; `seed` of the
    bootstrap intervals, the one random thing in an evaluation; `own_p`: rescorers whose p are others than `p`.
    """

    tasks: tuple[str, ...] = ()
    rescorers: tuple[str, ...] = ("none",)
    base: str = "smollm2-135m"
    heads: str | None = None
    h: Count | None = None
    k: Count = 16
    p: int | tuple[int, ...] = 1
    alpha: float | Literal["tuned"] | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    max_prompt_tokens: int | None = None
    mode: str = "replay"
    verify: str = "tree"
    data: str | None = None
    trace: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    seed: Count = 0
    own_p: tuple[tuple[str, tuple[int, ...]], ...] = ()
    leave_out: str | None = None

    @property
    def ps(self) -> tuple[int, ...]:
        """Each p once, in the order given."""
        return (self.p,) if isinstance(self.p, int) else tuple(dict.fromkeys(self.p))

    @property
    def runs(self) -> tuple[Run, ...]:
        """What there is a result of, on each task."""
        return tuple((typed, p) for typed in self.rescorers for p in self.ps_of(typed))

    def ps_of(self, typed: str) -> tuple[int, ...]:
        """Each p of one rescorer. The oracle knows which draft is best: it is run with p = 1 only."""
        return (1,) if typed == "oracle" else dict(self.own_p).get(typed, self.ps)


def resolve(options: EvalOptions) -> EvalOptions:
    """The options with the default task and the length of outputs filled in, p as a tuple, and repeats dropped.

    Raises `RescoreError` for values that make no sense, whatever the models and data are.
    """
    _check(options)
    tasks = options.tasks or (DEFAULT_TASK,)
    if options.trace:
        # A trace knows its task, or (made elsewhere) is called what the user likes, else like its folder.
        folder = _path(options.trace)
        recorded = recorded_task(read_header(folder))
        tasks = options.tasks or (recorded or folder.resolve().name,)
        names = {load_task(task).name if is_task_file(task) else task for task in tasks}
        if recorded and names != {recorded}:
            raise IncompatibleError(f"{folder} is a trace of {recorded}, not of {' and '.join(tasks)}; drop --task")
        if len(set(tasks)) > 1:
            raise RescoreError(f"{folder} is the trace of one task; give one --task, or none")
        new_tokens = options.max_new_tokens or DEFAULT_NEW_TOKENS
    else:
        tasks = tuple(dict.fromkeys(tasks))
        new_tokens = _new_tokens(options, [load_task(task) for task in tasks])
    return dataclasses.replace(
        options, tasks=tuple(dict.fromkeys(tasks)), rescorers=tuple(dict.fromkeys(options.rescorers)), p=options.ps,
        max_new_tokens=new_tokens,
    )  # fmt: skip


def _new_tokens(options: EvalOptions, tasks: Sequence[Task]) -> int:
    """The length of outputs: as given, else what the tasks' files say, on which they have to agree."""
    by_name: dict[str, int] = {}
    for task in tasks:
        if task.name in by_name:
            raise RescoreError(f"two of the tasks are called {task.name}; give one of them another name: in its file")
        by_name[task.name] = task.limits.new_tokens or DEFAULT_NEW_TOKENS
    lengths = {options.max_new_tokens} if options.max_new_tokens else set(by_name.values())
    if len(lengths) > 1:
        said = ", ".join(f"{name} {length}" for name, length in by_name.items())
        raise RescoreError(f"the tasks have outputs of different lengths ({said}); give --max-new-tokens for all")
    length = lengths.pop()
    assert length is not None
    return length


def recorded_task(header: TraceHeader) -> str | None:
    """The task that a trace was recorded for; None where it does not say."""
    task = header.settings.get("task")
    return task if isinstance(task, str) else None


def _check(options: EvalOptions) -> None:
    if options.mode not in MODES:
        raise UnknownNameError("mode", options.mode, MODES)
    if options.verify not in VERIFY_MODES:
        raise UnknownNameError("verify mode", options.verify, VERIFY_MODES)
    if not options.ps:
        raise RescoreError("no p is given; give one at least (--p 1)")
    for p in (*options.ps, *(p for _, ps in options.own_p for p in ps)):
        check_p(p)
    check_k(options.k)
    if options.max_new_tokens is not None:
        check_new_tokens(options.max_new_tokens)
    if options.h is not None and options.h < 2:
        raise RescoreError(f"h = {options.h}; a block has at least 2 heads, the base LM's own and one more (--h 2)")
    if isinstance(options.alpha, str):
        if options.alpha != TUNED:
            raise RescoreError(f"--alpha {options.alpha}; a rescorer's weight is a number, or {TUNED} (rescore tune)")
    elif options.alpha is not None and not 0 <= options.alpha <= MAX_ALPHA:
        raise RescoreError(f"--alpha {options.alpha:g}; a rescorer's weight is from 0 to {MAX_ALPHA:g}")
    if options.limit is not None and options.limit < 1:
        raise RescoreError(f"--limit {options.limit}; at least one example is needed")
    if options.max_prompt_tokens is not None and options.max_prompt_tokens < 1:
        raise RescoreError(f"--max-prompt-tokens {options.max_prompt_tokens}; a prompt needs at least one token")
    if options.seed < 0:
        raise RescoreError(f"--seed {options.seed}; a seed is 0 or more")
    for name in ("base", "heads", "data", "trace"):
        if (path := getattr(options, name)) is not None:
            user_path(path, f"--{name}")
    if options.trace and options.mode == "live":
        raise RescoreError("a given trace can be replayed, not decoded live; drop --trace or --mode live")
    for name in ("data", "heads"):
        if options.trace and getattr(options, name):
            raise RescoreError(f"a given trace has its own examples and lattices; drop --{name} or --trace")


def _path(text: str) -> Path:
    return user_path(text)
