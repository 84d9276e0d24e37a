"""What all commands share: how their options are checked, option types, notices, the progress bar."""

from __future__ import annotations

import logging
import os
import re
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import typer.core

from lattices.errors import RescoreError
from lattices.paths import user_path
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
Data = Annotated[
    str | None, typer.Option(help="File with the task's examples: JSON lines, a JSON array, CSV or Parquet.")
]
GivenTrace = Annotated[str | None, typer.Option(help="Replay this trace folder instead of recording one.")]
FirstHeads = Annotated[int | None, typer.Option(help="Use only the first h heads (block of h tokens).")]
NewTokens = Annotated[int, typer.Option(help="Output tokens per example, at most.")]
TaskTokens = Annotated[
    int | None, typer.Option(help="Output tokens per example, at most. Default: what the task's file says, else 64.")
]
PromptTokens = Annotated[int | None, typer.Option(help="Cut prompts to this many tokens.")]
Details = Annotated[
    bool, typer.Option("--details", help="Also quality, acceptance by position, and in live mode the times.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]


class CheckedCommand(typer.core.TyperCommand):
    """A command whose options are said once, hold something, and name home folders by `~`; each of them in one line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As the library does it, which keeps the last of an option that is repeated, takes an empty path for the
        working folder, and makes a folder called `~`. Raises `RescoreError` for the first two."""
        given, _, order = self.make_parser(ctx).parse_args(args=list(args))
        if not any(parameter.name == "help" for parameter in order):
            for parameter in self.params:
                _check_given(parameter, given.get(parameter.name or ""), sum(p is parameter for p in order))
        rest = super().parse_args(ctx, args)
        for parameter in self.params:
            value = ctx.params.get(parameter.name or "")
            if isinstance(value, Path):
                ctx.params[parameter.name] = user_path(value, _spelled(parameter))
            elif isinstance(value, list | tuple) and value and isinstance(value[0], Path):
                ctx.params[parameter.name] = type(value)(user_path(path, _spelled(parameter)) for path in value)
        return rest

    def invoke(self, ctx: Any) -> Any:
        """As the library does it, but whoever stops reading what is printed (head, less) is no failure."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            if _is_read_no_more():
                raise ReaderGoneError from error
            # Not as it is: the library would end without a word.
            raise RuntimeError(f"the connection to another process broke ({error})") from error


class ReaderGoneError(Exception):
    """Nobody reads the output any more."""


def _is_read_no_more() -> bool:
    """Whether stdout is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _check_given(parameter: Any, given: Any, times: int) -> None:
    """Refuses an option or argument that is empty, and a single-valued option that is there `times` > 1."""
    is_option, name = parameter.param_type_name == "option", _spelled(parameter)
    values = given if isinstance(given, list | tuple) else [given]
    if any(isinstance(value, str) and not value.strip() for value in values):
        raise RescoreError(f"{name} is empty; give it a value" + (", or leave it out" if is_option else ""))
    if is_option and isinstance(given, str) and times > 1:
        lists = re.search(r"omma-separated|[0-9],[0-9]", parameter.help or "")
        raise RescoreError(
            f"{name} is there {times} times; give it once" + (", its values with commas between them" if lists else "")
        )


def _spelled(parameter: Any) -> str:
    """`--out`, or `CORPUS` for an argument."""
    return str(parameter.opts[0] if parameter.param_type_name == "option" else parameter.name.upper())


def check_all(commands: typer.Typer) -> None:
    """Makes every command of an application, and of those in it, a `CheckedCommand`."""
    for command in commands.registered_commands:
        command.cls = CheckedCommand
    for group in commands.registered_groups:
        if group.typer_instance is not None:
            check_all(group.typer_instance)


def parts(text: str) -> list[str]:
    """What an option lists, with commas or spaces between: `0,0,1`, `0, 0, 1` or `0 0 1`."""
    return re.split(r"\s*,\s*|\s+", text.strip())


def numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """The numbers that an option lists (`parts`). Raises `RescoreError` for text that is none."""
    try:
        return [kind(part) for part in parts(text)]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise RescoreError(f"{option} {text}: give {what} with commas between them, like 1,2,4") from None


def known_tasks(names: Iterable[str], trace: str | None, **of_recording: object) -> tuple[str, ...]:
    """The tasks asked for. A mistake is told before the heavy libraries are loaded; a given trace's name may be any.

    `of_recording`: options that say how a trace is recorded, None where not given; a given trace refuses them.
    """
    from rescore.tasks import load_task

    if trace is not None and (given := [name for name, value in of_recording.items() if value is not None]):
        option = "--" + given[0].replace("_", "-")
        raise RescoreError(f"a given trace is replayed as it was recorded; drop {option} or --trace")

    chosen = tuple(names)
    if trace is None:
        for name in chosen:
            load_task(name)
    return chosen


def notify(line: str) -> None:
    """A line for the user, on stderr; where that is closed or full, nobody is told, and the work goes on."""
    if sys.stderr is None:  # closed
        return
    with suppress(OSError):
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
