"""Commands for tasks: `tasks` lists them, `perplexity` scores the base LM on their passages."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from cli_options import Base, Data, Device, Dtype, Json, Limit, notify, progress_bar
from rescore.terminal import printable, shortened

if TYPE_CHECKING:
    from rescore.tasks.listing import TaskFacts

tasks = typer.Typer(rich_markup_mode=None)
FIRST_PROMPT = 160  # characters of it that are shown


@tasks.command(name="tasks")
def tasks_command(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Show these in full: names, or YAML files, which are checked and whose data are read."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the tasks: what they ask, what they are scored by, where their data come from."""
    from rescore.tasks.listing import list_tasks

    found = list_tasks(names or ())
    if as_json:
        print(json.dumps([facts.as_dict() for facts in found], ensure_ascii=False))
    elif names:
        print("\n\n".join(map(_in_full, found)))
    else:
        print(_table(found))


def _table(found: list[TaskFacts]) -> str:
    from rescore.report.tables import table

    rows = [[facts.name, facts.problem or facts.description, ", ".join(facts.metrics) or "-"] for facts in found]
    note = (
        "rescore tasks NAME shows prompt, data and limits; --task ./mine.yaml is a task of your own (docs/formats.md)."
    )
    return table(["task", "what it is", "metrics"], rows, text_columns=3) + "\n" + note


def _in_full(facts: TaskFacts) -> str:
    limits = ", ".join(f"{name} {limit}" for name, limit in (facts.limits or {}).items() if limit is not None)
    lines = {
        "task": facts.name,
        "what it is": printable(facts.description),
        "prompt": ("\n" + " " * 12).join(map(printable, facts.prompt.strip().split("\n"))),
        "chat": "in the chat template, where the base LM has one" if facts.chat else "no, plain text",
        "metrics": ", ".join(facts.metrics) or "-",
        "data": printable(facts.source),
        "--data": f"JSON lines with {facts.rows}",
        "passages": facts.passage or "-",
        "limits": limits or "-",
    }
    if facts.first_prompt is not None:
        lines["examples"] = f"{facts.examples}, the first prompt: " + shortened(
            printable(facts.first_prompt), head=FIRST_PROMPT, tail=0
        )
    return "\n".join(f"{name:<10}  {text}" for name, text in lines.items())


@tasks.command(name="perplexity")
def perplexity_command(
    task: Annotated[str, typer.Option(help="A task with passages: lambada, or a YAML file of your own.")] = "lambada",
    data: Data = None,
    limit: Limit = None,
    base: Base = "smollm2-135m",
    stride: Annotated[
        int | None, typer.Option(help="Tokens that the window moves on by. Default: half a window.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens that are read at a time. Default: the base LM's context length.")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity of the base LM on a task's passages, by a window that moves on with a stride."""
    from dataclasses import asdict

    from rescore.perplexity import perplexity_of_task

    with progress_bar() as progress:
        found = perplexity_of_task(
            task, base=base, data=data, limit=limit, stride=stride, window=window, dtype=dtype, device=device,
            progress=progress,
        )  # fmt: skip
    if found.notice:
        notify(found.notice)
    if as_json:
        print(json.dumps(asdict(found), ensure_ascii=False))
        return
    print(
        f"{found.task}: perplexity {found.perplexity:.3f} over {found.tokens:,} tokens of {found.passages:,} passages "
        f"({base} in {dtype}, window {found.window}, stride {found.stride})"
    )
