"""The command `rescore`: thin commands that parse, call one function of the project, and print.

Results go to stdout, progress and notices to stderr. Exit codes: 0 fine, 1 the run failed, 2 something the user can
mend, 130 interrupted. Heavy libraries are imported inside commands, so that `--help` is quick.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli_analysis import analysing
from cli_bench import bench
from cli_compare import comparing
from cli_ngram import ngram_models
from cli_options import (
    INTERRUPTED,
    TASK_NAMES,
    Base,
    Data,
    Details,
    Device,
    Dtype,
    FirstHeads,
    GivenTrace,
    Heads,
    Json,
    LeaveOut,
    Limit,
    PromptTokens,
    ReaderGoneError,
    Tasks,
    TaskTokens,
    check_all,
    notify,
    numbers,
    print_notices,
    progress_bar,
)
from cli_report import reporting
from cli_tasks import tasks
from cli_training import training
from lattices.errors import RescoreError, UnknownNameError
from rescore.runs.inputs import Inputs

MODES = ("replay", "live")
if TYPE_CHECKING:
    from collections.abc import Sequence

    from rescore.runs.evaluated import Evaluation

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what writing to stdout may say

app = typer.Typer(
    help="Draft-refinement rescoring for blockwise parallel decoding: how many tokens does a step accept, how many "
    "could it, which rescorer recovers how much, at what cost.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(training)
app.add_typer(ngram_models)
app.add_typer(analysing)
app.add_typer(comparing)
app.add_typer(tasks)
app.add_typer(reporting)
app.add_typer(bench, name="bench")


def main() -> None:
    """Runs the command line; the installed command `rescore` calls this."""
    # glibc returns large blocks to the system at every free; keeping them makes CPU inference up to 1.5x faster. The
    # settings are read when a process starts, so the process starts once more with them.
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ and not _only_asks_for_help():
        kept = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **kept})
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = "--debug" in sys.argv
    if not debug:  # what a library says of its next version is for us: the test suite fails of it
        warnings.simplefilter("ignore")
    print_notices()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal without Unicode, and one with it for a file name that is none, still show what they can.
            stream.reconfigure(errors="backslashreplace")
    try:
        # Not standalone: errors and exit codes come here instead of being printed by the library.
        code = app(args=arguments or ["--help"], prog_name="rescore", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a failure can still be told
    except (KeyboardInterrupt, typer.Abort):
        notify("interrupted; what is finished is kept, the same command goes on")
        code = INTERRUPTED
    except (ReaderGoneError, BrokenPipeError):  # head or less has seen enough
        code = 0
        _close_stdout()
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, code = _explain(error)
        notify(message)
        _close_stdout()
    sys.exit(code)


def _close_stdout() -> None:
    """Prints what is left if that can be done; else gives it up, which Python would try again, and complain of."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _only_asks_for_help() -> bool:
    return len(sys.argv) == 1 or "--help" in sys.argv or "--version" in sys.argv


def _explain(error: Exception) -> tuple[str, int]:
    """One line that says what is wrong, and the exit code."""
    if isinstance(error, RescoreError):
        message, code = str(error), 2
    elif hasattr(error, "format_message"):  # of click, which typer imports or, in later versions, brings along
        message, code = _plainer(error.format_message()), 2
    elif isinstance(error, OSError) and error.strerror and (error.filename is not None or error.errno in NO_ROOM):
        # No permission, a name too long, a full disk: nothing of ours is wrong.
        what = "can't write what is printed" if error.filename is None else f"can't use {os.fsdecode(error.filename)}"
        message, code = f"{what}: {error.strerror}; give another place, or mend this one", 2
    elif isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        message, code = f"a file name that is no UTF-8 can't be used here; rename it ({error.object!r:.200})", 2
    else:
        message, code = f"{type(error).__name__}: {error} (--debug shows where)", 1
    return " ".join(message.split()), code


def _plainer(message: str) -> str:
    """What the library says of a value that is no number, as we say it."""
    message = re.sub(r"Input should be a valid integer.*", "give a whole number, like 16", message)
    return re.sub(r"Input should be a valid number.*", "give a number, like 0.5", message)


def _version(wanted: bool) -> None:
    if wanted:
        from rescore.runs.environment import versions

        print("\n".join(f"{name} {version}" for name, version in versions().items()))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print versions.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options before the command; `--debug` may stand anywhere (`main` takes it)."""


@app.command(name="eval")
def evaluate_command(
    task: Tasks = None,
    rescorer: Annotated[
        list[str],
        typer.Option(
            help="none, oracle, ngram[:PATH], context-ngram[:PATH], neural-32m, neural-61m, neural-94m, neural:PATH, "
            "ngram-neural[:MODEL], learned-bigram[:PATH] or a plug-in's name[:text]; several."
        ),
    ] = ["none"],  # noqa: B006 (typer copies it)
    k: Annotated[str, typer.Option(help="Tokens of each head that are in the lattice; 4,16 runs both.")] = "16",
    p: Annotated[str, typer.Option(help="Drafts that one step verifies; 1,16 runs both.")] = "1",
    alpha: Annotated[
        str | None,
        typer.Option(
            help="Weight of the rescorer: a number, or tuned (what rescore tune kept here). Default: its own."
        ),
    ] = None,
    h: FirstHeads = None,
    base: Base = "smollm2-135m",
    heads: Heads = None,
    limit: Limit = None,
    mode: Annotated[str, typer.Option(help="replay (from a trace, fast) or live (decodes, measures time).")] = "replay",
    verify: Annotated[str, typer.Option(help="Live: p drafts as one prefix tree (tree) or as rows (batch).")] = "tree",
    data: Data = None,
    trace: GivenTrace = None,
    leave_out: LeaveOut = None,
    max_new_tokens: TaskTokens = None,
    max_prompt_tokens: PromptTokens = None,
    out: Annotated[Path | None, typer.Option(help="Folder for per-example lines and results.json; resumable.")] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap interval.")] = 0,
    details: Details = False,
    as_json: Json = False,
) -> None:
    """Block efficiency of rescorers on tasks: what a step accepts, and what it could (oracle)."""
    inputs = Inputs(
        base=base, heads=heads, h=h, limit=limit, data=data, trace=trace, leave_out=leave_out,
        max_new_tokens=max_new_tokens, max_prompt_tokens=max_prompt_tokens, dtype=dtype, device=device,
    )  # fmt: skip
    _check_tasks(task or (), inputs)
    from rescore.runs.evaluation import evaluate
    from rescore.runs.recording import open_recordings
    from rescore.runs.run import parse_alpha, runs_of

    if mode not in MODES:
        raise UnknownNameError("mode", mode, MODES)
    runs = runs_of(
        rescorer, ks=numbers("--k", k, int), ps=numbers("--p", p, int), alpha=parse_alpha(alpha) if alpha else None
    )
    recordings = open_recordings(task or (), inputs, k=max(run.k for run in runs))
    with progress_bar() as progress:
        evaluation = evaluate(
            recordings, runs, live=mode == "live", verify=verify, seed=seed, out=out, progress=progress, notify=notify
        )
    _print_evaluation(evaluation, as_json, details=details)
    if evaluation.interrupted:
        kept = f"and kept in {out}: the same command goes on" if out else "(--out DIR would keep them)"
        shown = f"the finished examples are shown {kept}" if evaluation.results else "none was finished yet"
        notify(f"interrupted; {shown}")
        raise typer.Exit(INTERRUPTED)


def _check_tasks(tasks: Sequence[str], inputs: Inputs) -> None:
    """A mistake is told before the heavy libraries are loaded; a given trace's name may be any."""
    inputs.check()
    if inputs.trace is None:
        from rescore.tasks import load_task

        for name in tasks:
            load_task(name)


def _print_evaluation(evaluation: Evaluation, as_json: bool, *, details: bool) -> None:
    from lm.records import plain
    from rescore.table import joined

    document = evaluation.document
    if as_json:
        print(json.dumps(plain(document), ensure_ascii=False))
    else:
        print(joined(evaluation.tables(details=details)))


@app.command()
def oracle(
    task: Tasks = None,
    k: Annotated[str, typer.Option(help="Comma-separated k.")] = "1,2,4,8,16",
    h: FirstHeads = None,
    base: Base = "smollm2-135m",
    heads: Heads = None,
    limit: Limit = None,
    data: Data = None,
    trace: GivenTrace = None,
    leave_out: LeaveOut = None,
    max_new_tokens: TaskTokens = None,
    max_prompt_tokens: PromptTokens = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    details: Details = False,
    as_json: Json = False,
) -> None:
    """Oracle block efficiency by k: what a perfect choice from the top k of every head would reach."""
    inputs = Inputs(
        base=base, heads=heads, h=h, limit=limit, data=data, trace=trace, leave_out=leave_out,
        max_new_tokens=max_new_tokens, max_prompt_tokens=max_prompt_tokens, dtype=dtype, device=device,
    )  # fmt: skip
    _check_tasks(task or (), inputs)
    from rescore.runs.evaluation import evaluate
    from rescore.runs.recording import open_recordings
    from rescore.runs.run import runs_of

    runs = runs_of(["oracle"], ks=numbers("--k", k, int))
    recordings = open_recordings(task or (), inputs, k=max(run.k for run in runs))
    with progress_bar() as progress:
        evaluation = evaluate(recordings, runs, progress=progress, notify=notify)
    _print_evaluation(evaluation, as_json, details=details)


@app.command(name="tune")
def tune_command(
    rescorer: Annotated[list[str], typer.Option(help="A rescorer with a weight, like ngram; several.")],
    task: Tasks = None,
    alphas: Annotated[
        str | None, typer.Option(help="Comma-separated weights; 0 is always among them. Default: nine from 0.1 to 5.")
    ] = None,
    k: Annotated[str, typer.Option(help="Comma-separated k.")] = "16",
    p: Annotated[str, typer.Option(help="Comma-separated p.")] = "1,16",
    h: FirstHeads = None,
    base: Base = "smollm2-135m",
    heads: Heads = None,
    limit: Annotated[
        int, typer.Option(help="Held-out examples, of the last sources of the data; at most half of them.")
    ] = 100,
    data: Data = None,
    trace: GivenTrace = None,
    leave_out: LeaveOut = None,
    max_new_tokens: TaskTokens = None,
    max_prompt_tokens: PromptTokens = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Tune a rescorer's weight (alpha) by replay on held-out examples, for `rescore eval --alpha tuned`."""
    inputs = Inputs(
        base=base, heads=heads, h=h, data=data, trace=trace, leave_out=leave_out,
        max_new_tokens=max_new_tokens, max_prompt_tokens=max_prompt_tokens, dtype=dtype, device=device,
    )  # fmt: skip
    _check_tasks(task or (), inputs)
    from dataclasses import asdict

    from rescore.runs.recording import open_recordings
    from rescore.runs.tables import tuning_table
    from rescore.runs.tuning import DEFAULT_ALPHAS, tune

    if limit < 1:
        raise RescoreError(f"--limit {limit}; at least one example is needed")
    ks = numbers("--k", k, int)
    recordings = open_recordings(task or (), inputs, k=max(ks))
    with progress_bar() as progress:
        sweeps = tune(
            recordings, rescorer, alphas=numbers("--alphas", alphas, float) if alphas else DEFAULT_ALPHAS,
            ks=ks, ps=numbers("--p", p, int), held_out=limit, progress=progress, notify=notify,
        )  # fmt: skip
    print(json.dumps([asdict(tuned) for tuned in sweeps]) if as_json else tuning_table(sweeps).text())
    notify("kept on this machine: rescore eval --alpha tuned with the same options uses these weights")


@app.command(name="trace")
def trace_command(
    out: Annotated[Path, typer.Option(help="Folder for the trace; resumable.")],
    task: Annotated[str, typer.Option(help=f"{TASK_NAMES}.")] = "squad",
    base: Base = "smollm2-135m",
    heads: Heads = None,
    k: Annotated[int, typer.Option(help="Lattice entries kept per head.")] = 32,
    limit: Limit = None,
    data: Data = None,
    leave_out: LeaveOut = None,
    max_new_tokens: TaskTokens = None,
    max_prompt_tokens: PromptTokens = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Record a trace: greedy output and lattices of a task, for replay with `rescore eval --trace`."""
    inputs = Inputs(
        task=task, base=base, heads=heads, limit=limit, data=data, leave_out=leave_out, max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens, dtype=dtype, device=device,
    )  # fmt: skip
    _check_tasks((task,), inputs)
    from rescore.runs.recording import open_recording

    recording = open_recording(inputs, k=k, out=out)
    for line in recording.notices:
        notify(line)
    with progress_bar() as progress:
        trace = recording.trace(progress=progress)
    positions = sum(len(example.output_ids) for example in trace.examples)
    print(f"{out}: {len(trace.examples)} examples, {positions} positions, h = {trace.header.h}, K = {trace.header.k}")


check_all(app)

if __name__ == "__main__":
    main()
