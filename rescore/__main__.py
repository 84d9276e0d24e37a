"""The installed command `rescore`, and `python -m rescore`: runs the command line of `cli`, wherever it is started.

Exit codes: 0 fine, 1 the run failed, 2 something the user can mend, 130 interrupted.
"""

from __future__ import annotations

import atexit
import errno
import io
import os
import re
import select
import signal
import sys
import traceback
import warnings

from lattices.errors import RescoreError
from rescore import import_neighbours
from rescore.terminal import INTERRUPTED, CutShortError, notify, print_notices

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what writing to stdout may say
# glibc returns large blocks to the system at every free; keeping them makes CPU inference up to 1.5x faster.
KEEP_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


def main() -> None:
    """Runs the command line of this process's arguments and ends the process with its exit code."""
    try:
        code = _run()
    except KeyboardInterrupt:  # while the command line is loaded
        code = INTERRUPTED
    # All is done and said: a Ctrl-C while Python takes itself apart would change the exit code alone.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def _run() -> int:
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ and not _only_asks_for_help():
        # These settings are read when a process starts, so it starts once more with them.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **KEEP_BLOCKS})
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
    import_neighbours("cli")
    from cli import run_command

    try:
        code = run_command(arguments or ["--help"])
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a failure can still be reported
    except (KeyboardInterrupt, Exception) as error:
        cause = error.__cause__ if isinstance(error, CutShortError) else error
        if isinstance(cause, KeyboardInterrupt):
            notify("interrupted; what is finished is kept, the same command goes on")
            return INTERRUPTED
        if isinstance(cause, BrokenPipeError) and _is_read_no_more():  # head or less has seen enough
            _close_stdout()
            return 0
        if debug:
            traceback.print_exc()
        message, code = _explain(cause or error)
        notify(message)
        _close_stdout()
    return code


def _only_asks_for_help() -> bool:
    return len(sys.argv) == 1 or "--help" in sys.argv or "--version" in sys.argv


def _is_read_no_more() -> bool:
    """Whether stdout is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _close_stdout() -> None:
    """Prints what is left if that can be done; else gives it up, which Python would try again, and complain of."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(error: BaseException) -> tuple[str, int]:
    """One line that says what is wrong, and the exit code."""
    if isinstance(error, RescoreError):
        message, code = str(error), 2
    elif hasattr(error, "format_message"):  # of click, which typer imports or, in later versions, brings along
        message, code = error.format_message(), 2
        message = re.sub(r"^Missing command\.", "Missing command; --help lists them", message)
    elif isinstance(error, BrokenPipeError):
        message, code = f"the connection to another process broke ({error}) (--debug shows where)", 1
    elif isinstance(error, OSError) and error.strerror and (error.filename is not None or error.errno in NO_ROOM):
        # No permission, a name too long, a full disk: nothing of ours is wrong.
        what = "can't write what is printed" if error.filename is None else f"can't use {os.fsdecode(error.filename)}"
        message, code = f"{what}: {error.strerror}; give another place, or mend this one", 2
    elif isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        message, code = f"a file name that is no UTF-8 can't be used here; rename it ({error.object!r:.200})", 2
    else:
        message, code = f"{type(error).__name__}: {error} (--debug shows where)", 1
    return " ".join(message.split()), code


if __name__ == "__main__":
    main()
