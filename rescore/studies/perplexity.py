"""Perplexity of the base LM on a task's passages: what the command `rescore perplexity` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

from lattices.errors import RescoreError
from lattices.paths import user_path
from lm.environment import environment
from lm.options import Base, Device, Dtype
from rescore.options import Data, Limit
from rescore.studies.records import record_of
from rescore.tasks import load_task, task_names
from rescore.tasks.data import load_examples


@dataclass(frozen=True)
class TaskPerplexity:
    """Perplexity of the base LM over the `tokens` of `passages`.

    nll: nats in all; window, stride: tokens of the windows that were read, and by how many they move.
    base: as it identifies itself; source: of the data; notice: for the user, if the data are not the task's own.
    """

    task: str
    passages: int
    tokens: int
    nll: float
    perplexity: float
    window: int
    stride: int
    base: dict[str, Any]
    source: dict[str, Any]
    environment: dict[str, Any]
    notice: str | None = None

    def line(self, base: str, dtype: str) -> str:
        """The same in words."""
        return (
            f"{self.task}: perplexity {self.perplexity:.3f} over {self.tokens:,} tokens of {self.passages:,} passages "
            f"({base} in {dtype}, window {self.window}, stride {self.stride})"
        )


def perplexity_of_task(
    name: Annotated[str, "A task with passages: lambada, or a YAML file of your own.", "--task"] = "lambada",
    *,
    base: Base = "smollm2-135m",
    data: Data = None,
    limit: Limit = None,
    stride: Annotated[int | None, "Tokens that the window moves on by. Default: half a window."] = None,
    window: Annotated[int | None, "Tokens that are read at a time. Default: the base LM's context length."] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> TaskPerplexity:
    """Perplexity of a task's passages (`Task.passage`), each read by itself, as plain text.

    Raises `RescoreError` for a task without passages and for what can't be used.
    """
    task = load_task(name)
    if task.passage is None:
        known = ", ".join(other for other in task_names() if load_task(other).passage)
        raise RescoreError(
            f"task {task.name} has no passages to score; {known} has, and a YAML file may name its field: passage: text"
        )
    loaded = load_examples(task, data=None if data is None else user_path(data, "--data"), limit=limit)
    passages = [example.passage or "" for example in loaded.examples]

    from lm.base.catalog import Watch, load_base
    from lm.base.perplexity import perplexity

    model = load_base(base, dtype=dtype, device=device)
    shown = partial(progress, f"perplexity {task.name}") if progress else None
    scored = perplexity(model, passages, stride=stride, window=window, progress=shown)
    Watch(model).check()  # what was scored is what is named
    return record_of(
        TaskPerplexity, scored, task=task.name, passages=scored.texts, base=asdict(model.identity),
        source=loaded.source, environment=environment(), notice=loaded.notice,
    )  # fmt: skip
