"""The tasks as a list to show: what each asks, needs and is scored by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lattices.errors import RescoreError
from rescore.tasks import Task, load_task, task_names
from rescore.tasks.data import load_examples, wanted_rows


@dataclass(frozen=True)
class TaskFacts:
    """One task in words.

    rows: what a `--data` file must hold.
    source: where its data come from by default.
    limits: what its file says.
    examples, first_prompt: there where its data lie in a file of its own, which has been read then.
    problem: why another package's task can't be loaded (all else is empty then).
    """

    name: str
    description: str = ""
    prompt: str = ""
    chat: bool = True
    rows: str = ""
    metrics: tuple[str, ...] = ()
    source: str = ""
    passage: str | None = None
    limits: dict[str, int | None] | None = None
    examples: int | None = None
    first_prompt: str | None = None
    problem: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)


def list_tasks(names: Sequence[str] = ()) -> list[TaskFacts]:
    """The facts of the tasks (names or YAML files; none: of all there are, broken ones with their `problem`).

    Raises `RescoreError` for a task asked for by name that can't be loaded, or whose own data file can't be read.
    """
    if names:
        return [facts_of(load_task(name), reads=True) for name in names]
    facts = []
    for name in task_names():
        try:
            facts.append(facts_of(load_task(name)))
        except RescoreError as error:
            facts.append(TaskFacts(name, problem=str(error)))
    return facts


def facts_of(task: Task, *, reads: bool = False) -> TaskFacts:
    """The facts of one task. `reads` the data file that is its own, if it has one, and raises as `load_examples`."""
    examples = load_examples(task).examples if reads and task.file is not None else None
    return TaskFacts(
        name=task.name,
        description=task.description,
        prompt=task.template,
        chat=task.chat,
        rows=wanted_rows(task),
        metrics=tuple(metric.name for metric in task.metrics),
        source=_source(task),
        passage=task.passage,
        limits=asdict(task.limits),
        examples=len(examples) if examples else None,
        first_prompt=examples[0].prompt if examples else None,
    )


def _source(task: Task) -> str:
    if task.file is not None:
        return str(task.file)
    if task.hub is None:
        return f"--data ({task.without_hub})"
    parts = [task.hub.path, task.hub.name, task.hub.split, task.hub.revision, task.hub.data_files]
    return " ".join(part for part in parts if part)
