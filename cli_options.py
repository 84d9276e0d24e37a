"""What the commands of `cli`, `cli_ngram` and `cli_training` share: option types, notices, the progress bar."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import typer

from lattices.errors import RescoreError
from rescore.terminal import printable

Number = TypeVar("Number", int, float)
LINE_EVERY = 60.0  # seconds between lines of progress where there is no terminal
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
TASK_NAMES = (
    "cnn_dailymail, gsm8k, lambada, mt_bench, multi_news, newsroom, qa, rag, samsum, squad, summarization, "
    "translation, xsum (rescore tasks shows them), a plug-in's, or a YAML file of your own, like ./mine.yaml"
)

Base = Annotated[
    str,
    typer.Option(
        help="Base LM: smollm2-135m, smollm2-135m-bpd (tuned with its heads), a model folder, .gguf file or hub id."
    ),
]
Heads = Annotated[str | None, typer.Option(help="Folder of block heads; default: those shipped for the base.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", help=f"{TASK_NAMES}; may be given several times. Default: squad, or the task of --trace."),
]
Limit = Annotated[
    int | None, typer.Option(help="Only N examples: one of each source (passage, document) before a second one of any.")
]
LeaveOut = Annotated[
    str | None,
    typer.Option(
        "--leave-out",
        help="Leave out the examples of this list: a file of rescore overlap --out, or shipped: those that share text "
        "with what the shipped models were trained on.",
    ),
]
Data = Annotated[str | None, typer.Option(help="JSON lines file with the task's examples.")]
GivenTrace = Annotated[str | None, typer.Option(help="Replay this trace folder instead of recording one.")]
FirstHeads = Annotated[int | None, typer.Option(help="Use only the first h heads (block of h tokens).")]
NewTokens = Annotated[int, typer.Option(help="Output tokens per example, at most.")]
TaskTokens = Annotated[
    int | None, typer.Option(help="Output tokens per example, at most. Default: what the task's file says, else 64.")
]
PromptTokens = Annotated[int | None, typer.Option(help="Cut prompts to this many tokens.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]


def numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Comma-separated numbers of an option. Raises `RescoreError` for text that is none."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise RescoreError(f"{option} {text}: give {what} with commas between them, like 1,2,4") from None


def known_tasks(names: Iterable[str], trace: str | None) -> tuple[str, ...]:
    """The tasks asked for. A mistake is told before the heavy libraries are loaded; a given trace's name may be any."""
    from rescore.tasks import load_task

    chosen = tuple(names)
    if trace is None:
        for name in chosen:
            load_task(name)
    return chosen


def notify(line: str) -> None:
    """A line for the user, on stderr."""
    print(f"rescore: {printable(line, joiners=True)}", file=sys.stderr)


class _Notices(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        notify(" ".join(record.getMessage().split()))


def print_notices() -> None:
    """What the project tells its logger (waits for another process, makes a broken cache again) is a notice, too."""
    logger = logging.getLogger("rescore")
    logger.handlers, logger.propagate = [_Notices()], False


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr; where stderr is no terminal, a line a minute. Ctrl-C that ends the command is told
    there too."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns: list[Any] = [
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    ]  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        tasks: dict[str, Any] = {}
        says_lines = not console.is_terminal and os.environ.get("RANK", "0") == "0"  # one of several processes
        told = time.monotonic()

        def show(description: str, done: int, total: int) -> None:
            nonlocal told
            if says_lines and time.monotonic() - told >= LINE_EVERY:
                told = time.monotonic()
                notify(f"{description}: {done} of {total}")
            key = description.split(",")[0]
            if key not in tasks:
                tasks[key] = bar.add_task(description, total=total)
            bar.update(tasks[key], description=description, completed=done, total=total)

        try:
            yield show
        except KeyboardInterrupt:
            notify("interrupted; what is finished is kept, the same command goes on")
            raise typer.Exit(INTERRUPTED) from None
