"""The tasks as a list to show: what each asks, needs and is scored by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

from lattices.errors import RescoreError
from rescore.table import Column, Table
from rescore.tasks import Task, load_task, task_names
from rescore.tasks.data import load_examples, wanted_rows
from rescore.terminal import printable, shortened

FIRST_PROMPT = 160  # characters of it that are shown


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

    def in_full(self) -> str:
        """Everything, one line each."""
        limits = ", ".join(f"{name} {limit}" for name, limit in (self.limits or {}).items() if limit is not None)
        lines = {
            "task": self.name,
            "what it is": printable(self.description),
            "prompt": ("\n" + " " * 12).join(map(printable, self.prompt.strip().split("\n"))),
            "chat": "in the chat template, where the base LM has one" if self.chat else "no, plain text",
            "metrics": ", ".join(self.metrics) or "-",
            "data": printable(self.source),
            "--data": f"JSON lines with {self.rows}",
            "passages": self.passage or "-",
            "limits": limits or "-",
        }
        if self.first_prompt is not None:
            shown = shortened(printable(self.first_prompt), head=FIRST_PROMPT, tail=0)
            lines["examples"] = f"{self.examples}, the first prompt: {shown}"
        return "\n".join(f"{name:<10}  {text}" for name, text in lines.items())


def tasks_table(tasks: Sequence[TaskFacts]) -> Table:
    """The tasks with what they are and what they are scored by."""
    rows = [[facts.name, facts.problem or facts.description, ", ".join(facts.metrics) or None] for facts in tasks]
    note = (
        "rescore tasks NAME shows prompt, data and limits; --task ./mine.yaml is a task of your own (docs/formats.md)."
    )
    return Table([Column("task"), Column("what it is"), Column("metrics")], rows, note=note)


def list_tasks(
    names: Annotated[
        Sequence[str], "Show these in full: names, or YAML files, which are checked and whose data are read.", "TASK"
    ] = (),
) -> list[TaskFacts]:
    """The facts of the tasks (names or YAML files; none: of all there are, broken ones with their `problem`).

    Raises `RescoreError` for a task asked for by name that can't be loaded, or whose own data file can't be read.
    """
    facts = []
    for name in names or task_names():
        try:
            facts.append(_facts(load_task(name), reads=bool(names)))
        except RescoreError as error:
            if names:
                raise
            facts.append(TaskFacts(name, problem=str(error)))
    return facts


def _facts(task: Task, *, reads: bool) -> TaskFacts:
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
