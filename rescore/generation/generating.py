"""`rescore generate`: prompts of a command line or a file, decoded in turn with the models loaded once."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lattices.errors import InvalidDataError, RescoreError
from lattices.paths import user_path
from lm.files import is_text
from lm.locks import warn
from lm.text_files import BYTE_ORDER_MARK, CSV, JSON_OBJECT, TSV, TextFile, identify, json_row, rows, text_lines
from rescore import options as shared
from rescore.acceptance.options import Acceptance
from rescore.options import Spec
from rescore.runs.inputs import Inputs
from rescore.terminal import printable

if TYPE_CHECKING:
    from rescore.generation.live import Messages, Output
    from rescore.runs.run import Run

STDIN = "-"
NEW_TOKENS = 256
CHAT = {"auto": None, "yes": True, "no": False}
TEXT_CHAT = {"true": True, "false": False, "": None}
ESCAPE = re.compile(r"\\(?:[ntr\\]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})")


@dataclass(frozen=True)
class Request:
    """What is to be answered: text, or the messages of a conversation.

    chat: whether a text goes through the chat template; None: not said.
    id: of a row that has one.
    """

    prompt: str | Messages
    chat: bool | None = None
    id: str | int | None = None


@dataclass(frozen=True)
class Answer:
    """A request with its output."""

    request: Request
    output: Output

    def as_dict(self) -> dict[str, Any]:
        """All of it, for a line of JSON lines."""
        request = self.request
        given = {"prompt" if isinstance(request.prompt, str) else "messages": request.prompt}
        return ({} if request.id is None else {"id": request.id}) | given | self.output.as_dict()


def answers(
    *,
    prompt: Annotated[str | None, "The prompt. Or give --prompts."] = None,
    prompts: Annotated[
        str | None,
        "File of prompts: text, a prompt a line; or JSON lines (CSV, Parquet ...) with prompt, or messages: "
        '[{"role", "content"}, ...]. A dash (-): stdin, answered line by line.',
        "<path>",
    ] = None,
    rescorer: Annotated[
        Spec | None,
        "What chooses the drafts, as for rescore eval. Default: joint where its weights are shipped for the base, else "
        "context-ngram if there are heads, else none. The text is the same with any.",
    ] = None,
    drafter: Annotated[
        Sequence[Spec], "What it chooses among: heads, lookup ... Default: heads and lookup; lookup if there are none."
    ] = (),
    k: Annotated[int | None, "Tokens of each head that are in the lattice. Default: 16."] = None,
    p: Annotated[int | None, "Drafts that one step verifies. Default: 1."] = None,
    nodes: shared.Nodes = None,
    alpha: Annotated[float | None, "Weight of the rescorer. Default: its own."] = None,
    stop: Annotated[
        Sequence[str], r"Texts that end the output, which is cut before the first of them. \n, \t, \x2c (a comma)."
    ] = (),
    chat: Annotated[
        Literal["auto", "yes", "no"], "Put prompts into the base's chat template; auto: where it has one."
    ] = "auto",
    verify: shared.Verify = "tree",
    accepting: Acceptance = Acceptance(),  # noqa: B008 (it is frozen)
    inputs: Inputs,
    stream: Callable[[str], object] | None = None,
) -> Iterator[Answer]:
    """The answers to all prompts, one by one; `stream` takes the pieces of each as they are settled.

    Raises `RescoreError` for mistakes: those of files and options before a model is loaded, those of a prompt that is
    too long, or that the chat template refuses, when it comes.
    """
    inputs.check()
    requests = _requests(prompt, prompts)
    run = _run(rescorer, drafter, k=k, p=p, nodes=nodes, alpha=alpha)
    stops, rule = [unescaped(text) for text in stop], accepting.rule()

    def answered() -> Iterator[Answer]:
        from rescore.generation.live import Generator, best_run
        from rescore.runs.models import Models
        from rescore.runs.run import DEFAULT_K, is_heads

        needs_heads = run.needs_heads if run else any(map(is_heads, drafter))
        models = Models(inputs, heads_needed=needs_heads)
        base = models.base
        # Where nothing is named, if there are some.
        heads = models.used_heads if needs_heads or not (run or drafter) else None
        if heads is not None and (line := models.about_heads()):
            warn(line)
        chosen = run or best_run(base, heads, drafters=drafter, nodes=nodes, k=_or(k, DEFAULT_K), p=p, inputs=inputs)
        generator = Generator.of(base, heads, chosen, verify=verify, rule=rule, inputs=inputs)
        for number, request in enumerate(requests):
            if stream is not None and number:
                stream("\n")  # an empty line between outputs
            how = CHAT[chat] if request.chat is None else request.chat
            limit = inputs.max_new_tokens or min(NEW_TOKENS, base.context_length - len(base.prefix([])))
            output = generator.generate(request.prompt, max_new_tokens=limit, stop=stops, stream=stream, chat=how)
            yield Answer(request, output)

    return answered()


def _run(
    rescorer: Spec | None,
    drafters: Sequence[Spec],
    *,
    k: int | None,
    p: int | None,
    nodes: int | Literal["auto"] | None,
    alpha: float | None,
) -> Run | None:
    """The run that is asked for, if a rescorer is named."""
    from rescore.rescorers import JOINT
    from rescore.runs.run import DEFAULT_K, Run, runs_of

    if rescorer is None and alpha is not None:
        raise RescoreError("--alpha is a rescorer's; give --rescorer as well")
    if rescorer is not None or nodes is not None:
        ks, ps = (() if size is None else [size] for size in (k, p))
        run = runs_of([rescorer or JOINT], drafters=drafters, ks=ks, ps=ps, alpha=alpha, nodes=nodes)[0]
    else:
        run = Run(drafters=tuple(drafters), k=_or(k, DEFAULT_K), p=_or(p, 1))
    run.load_drafters(run.load())  # what is none is refused before a model is loaded
    return run if rescorer is not None else None


def _or(size: int | None, default: int) -> int:
    return default if size is None else size


def _requests(prompt: str | None, prompts: str | None) -> Iterable[Request]:
    if (prompt is None) == (prompts is None):
        raise RescoreError("give --prompt TEXT, or --prompts FILE (- for stdin)" + (", not both" if prompt else ""))
    if prompt is not None:
        return [Request(prompt)]
    assert prompts is not None
    if prompts == STDIN:
        return _from_stdin()
    path = user_path(prompts, "--prompts")
    if not (requests := list(_from_file(path))):
        raise InvalidDataError(f"{path} holds no prompts")
    return requests


def _from_file(path: Path) -> Iterator[Request]:
    file = identify(path)
    if not file.has_rows:
        yield from (Request(line) for line in text_lines(file) if line.strip())
        return
    for number, row in rows(file):
        yield _request(row, f"{path} {file.unit} {number}", file)


def _from_stdin() -> Iterator[Request]:
    """Line by line, so that each is answered when it comes. The first one says whether they are JSON."""
    if sys.stdin is None:
        raise RescoreError("--prompts -: stdin is closed; give a file")
    is_json, found = None, False
    for number, line in enumerate(iter(sys.stdin.buffer.readline, b""), start=1):
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line.strip():
            continue
        found = True
        is_json = bool(JSON_OBJECT.match(line)) if is_json is None else is_json
        if is_json:
            yield _request(json_row(line, f"stdin line {number}"), f"stdin line {number}")
            continue
        try:
            yield Request(line.decode("utf-8").rstrip("\r\n"))
        except UnicodeDecodeError as error:
            raise InvalidDataError(
                f"stdin line {number} is not UTF-8 text ({error.reason}); give it as UTF-8"
            ) from error
    if not found:
        raise InvalidDataError("stdin holds no prompts")


def _request(row: dict[str, Any], where: str, file: TextFile | None = None) -> Request:
    from rescore.generation.live import check_messages

    chat, messages, text = row.get("chat"), row.get("messages"), row.get("prompt")
    if file is not None and file.layout in (CSV, TSV):  # whose values are all text
        chat = TEXT_CHAT.get(str(chat or "").lower(), chat)
    if chat is not None and not isinstance(chat, bool):
        raise InvalidDataError(f"{where} has {chat!r} in the field 'chat'; write true or false")
    identity = row.get("id")
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, str | int)):
        raise InvalidDataError(
            f"{where} has {json.dumps(identity)} in the field 'id' where text or a whole number is needed"
        )
    if messages is not None and text is not None:
        raise InvalidDataError(f"{where} has both 'prompt' and 'messages'; keep one of them")
    if messages is not None:
        check_messages(messages, f"{where}, the field 'messages'")
        return Request(messages, chat, identity)
    if not is_text(text):
        raise InvalidDataError(f"{where} has no text in the field 'prompt', and no 'messages'")
    return Request(str(text), chat, identity)


def unescaped(text: str) -> str:
    """A text as it is given on a command line, where `\\n` stands for the end of a line."""
    return ESCAPE.sub(lambda match: match[0].encode().decode("unicode_escape"), text)


def write_piece(text: str) -> None:
    """Writes a piece of an output to stdout at once; on a terminal without what could control it."""
    if sys.stdout.isatty():
        lines = text.replace("\t", "    ").split("\n")
        text = "\n".join(printable(line, joiners=True) for line in lines)
    print(text, end="", flush=True)
