"""What is evaluated, as a user names it: base LM, block heads, a task's examples, and limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from lattices.errors import RescoreError
from lattices.paths import user_path
from lm.options import Base, Compile, Device, Dtype, Heads
from rescore.checks import check_new_tokens
from rescore.options import Data, Limit

DEFAULT_TASK = "squad"
DEFAULT_BASE = "smollm2-135m"
DEFAULT_NEW_TOKENS = 64

Progress = Callable[[str, int, int], None]  # what is being done, done, total
Notify = Callable[[str], None]  # takes a line for the user, before the work that it is about


def add_notice(notices: list[str], notify: Notify | None, line: str) -> None:
    """Adds a notice and passes it on; one that comes again (for another task) only once."""
    if line not in notices:
        notices.append(line)
        if notify:
            notify(line)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One task with the models that decode it; the help of the command line is on the fields.

    task: its name or YAML file; None: `DEFAULT_TASK`, or what `trace` was recorded for.
    limit, max_new_tokens, max_prompt_tokens: None is what the task's file says, else all, `DEFAULT_NEW_TOKENS`, no cut.
    """

    task: str | None = None
    base: Base = DEFAULT_BASE
    heads: Heads = None
    h: Annotated[int | None, "Use only the first h heads (block of h tokens)."] = None
    limit: Limit = None
    data: Data = None
    trace: Annotated[str | None, "Replay this trace folder instead of recording one."] = None
    leave_out: Annotated[
        str | None,
        "Leave out the examples of this list: a file of rescore overlap --out, or shipped: those that share text with "
        "what the shipped models were trained on.",
    ] = None
    max_new_tokens: Annotated[
        int | None, "Output tokens per example, at most. Default: what the task's file says, else 64."
    ] = None
    max_prompt_tokens: Annotated[int | None, "Cut prompts to this many tokens."] = None
    dtype: Dtype = "float32"
    device: Device = "auto"
    compile: Compile = "auto"

    def check(self) -> None:
        """Raises `RescoreError` for what makes no sense, whatever the models and data are."""
        if self.max_new_tokens is not None:
            check_new_tokens(self.max_new_tokens)
        if self.h is not None and self.h < 2:
            raise RescoreError(f"h = {self.h}; a block has at least 2 heads, the base LM's own and one more (--h 2)")
        if self.limit is not None and self.limit < 1:
            raise RescoreError(f"--limit {self.limit}; at least one example is needed")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise RescoreError(f"--max-prompt-tokens {self.max_prompt_tokens}; a prompt needs at least one token")
        for name in ("base", "heads", "data", "trace"):
            if (path := getattr(self, name)) is not None:
                user_path(path, f"--{name}")
        if self.trace is not None:
            self._check_given_trace()

    def _check_given_trace(self) -> None:
        """A trace brings its own examples and lattices, and is replayed as it was recorded."""
        for name in ("data", "heads"):
            if getattr(self, name) is not None:
                raise RescoreError(f"a given trace has its own examples and lattices; drop --{name} or --trace")
        for name in ("base", "dtype", "max_new_tokens", "max_prompt_tokens"):
            if getattr(self, name) != getattr(Inputs, name):
                option = "--" + name.replace("_", "-")
                raise RescoreError(f"a given trace is replayed as it was recorded; drop {option} or --trace")
