"""Commands for tasks: `tasks` lists them, `perplexity` scores the base LM on their passages, `overlap` finds examples
that share text with training corpora."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli_options import Base, Data, Device, Dtype, Json, Limit, notify, progress_bar
from rescore.terminal import printable, shortened

if TYPE_CHECKING:
    from rescore.studies.overlap import Overlap
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
    from rescore.table import Column, Table

    rows = [[facts.name, facts.problem or facts.description, ", ".join(facts.metrics) or None] for facts in found]
    note = (
        "rescore tasks NAME shows prompt, data and limits; --task ./mine.yaml is a task of your own (docs/formats.md)."
    )
    return Table([Column("task"), Column("what it is"), Column("metrics")], rows, note=note).text()


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

    from rescore.studies.perplexity import perplexity_of_task

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


@tasks.command(name="overlap")
def overlap_command(
    task: Annotated[list[str], typer.Option(help="A task, by name or as a YAML file; several.")],
    corpus: Annotated[
        list[Path], typer.Option(help="Training text: .txt, .jsonl (also .gz, .zst) or a folder of these; several.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="JSON lines file with the task's examples, or a folder with TASK.jsonl for each."),
    ] = None,
    n: Annotated[int, typer.Option(help="Words in a row that count as shared text.")] = 13,
    threshold: Annotated[
        float, typer.Option(help="Only examples of which more than this share of the runs is in the corpora.")
    ] = 0.0,
    limit: Limit = None,
    out: Annotated[Path | None, typer.Option(help="Write the list for --leave-out (ids and digests, no text).")] = None,
    as_json: Json = False,
) -> None:
    """Find examples that share runs of 13 words (prompt or references) with training corpora."""
    from rescore.runs.leave_out import write_leave_out
    from rescore.studies.overlap import find_overlap

    with progress_bar() as progress:
        found = find_overlap(task, corpus, data=data, n=n, threshold=threshold, limit=limit, progress=progress)
    if out is not None:
        write_leave_out(found, out, about=f"Examples that share {n} words in a row with {', '.join(found.corpora)}")
    print(json.dumps(found.as_dict(), ensure_ascii=False) if as_json else _overlap_table(found))


def _overlap_table(found: Overlap) -> str:
    from rescore.table import SHARE, Column, Table

    rows = [
        [task.task, shared.id, ", ".join(shared.corpora), shared.share] for task in found.tasks for shared in task.found
    ]
    told = ", ".join(f"{task.task} {len(task.found)} of {task.examples}" for task in found.tasks)
    note = f"examples that share {found.n} words in a row with the corpora: {told}"
    if not rows:
        return note
    shares = f"shared: of the runs of {found.n} words in prompt and references, those that are in the corpora too"
    columns = [Column("task"), Column("example"), Column("corpora"), Column("shared", SHARE)]
    return Table(columns, rows, note=f"{shares};\n{note}").text()
