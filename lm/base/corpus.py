"""A corpus of the base LM's own output, greedy or sampled: what block heads must predict and should learn from.

[B] (Stern et al. 2018, section 6.1) trains on such "distilled" data. Prompts come as JSON lines
`{"prompt": text, "chat": bool}` (`chat` is optional; other rows of `lm.text_files` do as well) or as text, a prompt a
line. The corpus is a folder:

- `corpus.jsonl`: a finished example a line, `{"prompt", "chat", "prompt_ids", "output_ids", "text"}`, appended as they
  come; an output that was there before: `"duplicate": true` and no tokens.
- `hidden.f16`: the state that chose each output token (raw float16 rows of `hidden_size`, in the order of the lines),
  so that training need not run the base LM again; `with_prompts`: before them those after the prompt's tokens but the
  last one, which predict the prompt's other tokens.
- `settings.json`: what it was begun with; `manifest.json`, written last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from lattices.errors import IncompatibleError, InvalidDataError, OutputError, RescoreError
from lm.executors import HERE, LOCALLY, Executor, ExecutorOptions
from lm.files import (
    append_json_line,
    changed_settings,
    is_text,
    open_appending,
    read_json_lines,
    read_json_object,
    sha256_of_file,
    write_json,
    writing,
)
from lm.locks import writing_to
from lm.options import Base, Device, Dtype
from lm.text_files import CSV, TSV, TextFile, identify, rows, text_lines

if TYPE_CHECKING:
    from lm.base.generation import Generated
    from lm.base.machine import Work
    from lm.base.model import BaseIdentity, BaseLM

CORPUS_FILE, HIDDEN_FILE = "corpus.jsonl", "hidden.f16"
MANIFEST_FILE, SETTINGS_FILE = "manifest.json", "settings.json"
GENERATION = 1  # changes with what `generate_corpus` writes for the same prompts
STATE_BYTES = np.dtype(np.float16).itemsize  # per element of a state


@dataclass(frozen=True)
class Prompt:
    """Text to start from; `chat` puts it into the base's chat template."""

    text: str
    chat: bool


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How output is generated."""

    max_new_tokens: Annotated[int, "Output tokens of each prompt, at most."] = 96
    max_prompt_tokens: Annotated[int, "Cut prompts to this many tokens."] = 384
    batch_size: Annotated[int, "Prompts decoded side by side."] = 64
    temperature: Annotated[float, "0: greedy; above: tokens are drawn."] = 0.0
    seed: Annotated[int, "Seed of what is drawn."] = 0
    with_prompts: Annotated[
        bool, "Keep the states over the prompts as well: what learns from the corpus then learns to predict these, too."
    ] = False

    def check(self) -> None:
        """Raises `RescoreError` for the first option that makes no sense."""
        for name in ("max_new_tokens", "max_prompt_tokens", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise RescoreError(f"{name} = {value}; it must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise RescoreError(f"temperature = {self.temperature:g}; it must be 0 (greedy) or more")
        if self.seed < 0:
            raise RescoreError(f"seed = {self.seed}; it must be 0 or more")


@dataclass(frozen=True)
class CorpusSummary:
    """What a corpus holds, and what this run did for it."""

    path: str
    examples: int
    duplicates: int  # examples whose output was there already
    output_tokens: int
    made: int  # examples of this run
    seconds: float
    decoded: int  # output tokens of this run, those of duplicates too
    work: Work


def write_own_corpus(
    prompts: Annotated[Path, 'JSON lines {"prompt", "chat"} (or CSV, Parquet ...) or text, a prompt a line.'],
    out: Annotated[Path, "Folder for the corpus; resumable."],
    *,
    base: Base = "smollm2-135m",
    dtype: Dtype = "float32",
    device: Device = "auto",
    options: GenerationOptions,
    execution: ExecutorOptions = LOCALLY,
    progress: Callable[[str, int, int], None] | None = None,
) -> str:
    """`generate_corpus` for a file of prompts and a base LM by name; says in words what there is, and how fast it was.

    Raises as `load_base`, `read_prompts` and `generate_corpus`.
    """
    from lm.base.catalog import load_base
    from lm.base.machine import share_of_limits

    execution.check(device)
    loaded = load_base(base, dtype=dtype, device=device)
    chosen = read_prompts(prompts, default_chat=loaded.is_chat)
    shown = partial(progress, "generate") if progress else None
    with execution.started(device) as executor:
        summary = generate_corpus(loaded, chosen, out, options, executor=executor, progress=shown)
    counts = f"{summary.examples} examples ({summary.made} new, {summary.duplicates} duplicates)"
    told = f"{summary.path}: {counts}, {summary.output_tokens} output tokens"
    if summary.made:
        told += f"\n{summary.decoded / summary.seconds:.0f} output tokens a second"
        if executor.is_local:
            told += f": {share_of_limits(loaded, summary.work, summary.seconds)}"
    return told


def read_prompts(path: Path, *, default_chat: bool) -> list[Prompt]:
    """Prompts of a file of rows (JSON lines and what else `lm.text_files` reads) or of text.

    Raises `InvalidDataError` with the line number of a bad one, `RescoreError` if the file can't be read.
    """
    file = identify(path)
    if not file.has_rows:
        prompts = [Prompt(line, default_chat) for line in text_lines(file) if line.strip()]
    else:
        prompts = [_prompt(row, default_chat, file, f"{path} {file.unit} {number}") for number, row in rows(file)]
    if not prompts:
        raise InvalidDataError(f"{path} holds no prompts")
    return prompts


def _prompt(row: dict[str, Any], default_chat: bool, file: TextFile, where: str) -> Prompt:
    text: Any = row.get("prompt")
    chat = row.get("chat", default_chat)
    if not is_text(text):
        raise InvalidDataError(f"{where} has no text in the field 'prompt'")
    if file.layout in (CSV, TSV):  # whose values are all text
        chat = {"true": True, "false": False, "": default_chat}.get(str(chat).lower(), chat)
    if not isinstance(chat, bool):
        raise InvalidDataError(f"{where} has {chat!r} in the field 'chat'; write true or false")
    return Prompt(text, chat)


def generate_corpus(
    base: BaseLM,
    prompts: Sequence[Prompt],
    out: Path,
    options: GenerationOptions = GenerationOptions(),
    *,
    executor: Executor = HERE,
    progress: Callable[[int, int], None] | None = None,
) -> CorpusSummary:
    """Writes the output of every prompt to `out`; what an earlier, interrupted run made is kept.

    A prompt that comes twice is taken once; an output that is there already is not written again: its line says so
    (`duplicate`) and holds no tokens. `progress(done, total)` is called after every example; an exception from it
    interrupts the run.

    Raises `IncompatibleError` (with the difference) for other options than the earlier run's, and where the base's
    files are replaced meanwhile, `RescoreError` for options that make no sense, `OutputError` if `out` can't be written
    or another process is writing to it.
    """
    from lm.base.catalog import Watch  # torch, which n-gram models do not need
    from lm.base.machine import Work

    options.check()
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; --out is a folder")
    settings = {
        "base": dataclasses.asdict(base.identity),
        "max_new_tokens": options.max_new_tokens,
        "max_prompt_tokens": options.max_prompt_tokens,
        "temperature": options.temperature,
        "seed": options.seed if options.temperature else 0,  # greedy output has none
        "with_prompts": options.with_prompts,
    }
    with writing_to(out):
        if (out / SETTINGS_FILE).is_file() and (changed := changed_settings(read_settings(out), settings)):
            raise IncompatibleError(f"{out} was begun with other settings ({'; '.join(changed)}); use another --out")
        corpus = _Corpus(out, with_prompts=options.with_prompts)
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in corpus.prompts]
        encoded = _encoded(base, missing, options)
        if not (out / SETTINGS_FILE).is_file():
            write_json(out / SETTINGS_FILE, settings)
        total, decoded, work, began = len(corpus.prompts) + len(missing), 0, Work(base), time.perf_counter()
        watch = Watch(base)
        with writing(out), corpus.appending(base.hidden_size) as append:
            for generated in _generated(base, encoded, options, executor, work):
                ids = generated.output_ids.tolist()
                fields = {
                    "prompt_ids": encoded[generated.index], "output_ids": ids, "text": base.decode_text(ids)
                }  # fmt: skip
                watch.check()  # before an output is kept that may be of other weights
                append(missing[generated.index], fields, generated.hidden)
                decoded += len(ids)
                if progress:
                    progress(len(corpus.prompts), total)
        manifest = {
            **settings,
            **corpus.counts(),
            "prompts_sha256": hashlib.sha256(json.dumps([[p.text, p.chat] for p in prompts]).encode()).hexdigest(),
            "corpus_sha256": sha256_of_file(corpus.path),
        }
        write_json(out / MANIFEST_FILE, manifest)
        return CorpusSummary(
            str(corpus.path), **corpus.counts(), made=len(missing), seconds=time.perf_counter() - began,
            decoded=decoded, work=work,
        )  # fmt: skip


def _generated(
    base: BaseLM, prompts: Sequence[Sequence[int]], options: GenerationOptions, executor: Executor, work: Work
) -> Iterator[Generated]:
    from lm.base.generation import batches_of, generate

    if executor.is_local:
        yield from generate(base, prompts, batch_size=options.batch_size, work=work, **_how(options))
        return
    batches = list(batches_of(base, prompts, options.batch_size))
    shards = ([prompts[place] for place in batch] for batch in batches)
    found = executor.map(partial(_outputs_by_worker, base.identity, base.device.type, options), shards)
    for places, outputs in zip(batches, found, strict=True):
        for generated in outputs:
            yield dataclasses.replace(generated, index=places[generated.index])


def _how(options: GenerationOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "seed", "with_prompts")}


def _outputs_by_worker(
    identity: BaseIdentity, device: str, options: GenerationOptions, prompts: Sequence[Sequence[int]]
) -> list[Generated]:
    """Continues a batch of prompts in a worker, which loads the base itself: it must be the same. device: cpu or cuda;
    which GPU is a worker's own is Ray's to say."""
    from lm.base.generation import generate

    base = _base_of_worker(identity, device)
    if base.identity != identity:
        raise IncompatibleError(f"a worker finds another {identity.name} than there is here")
    return list(generate(base, prompts, batch_size=len(prompts), **_how(options)))


@lru_cache(maxsize=1)
def _base_of_worker(identity: BaseIdentity, device: str) -> BaseLM:
    from lm.base.catalog import load_base

    return load_base(identity.name, dtype=identity.dtype, device=device)


def _encoded(base: BaseLM, prompts: Sequence[Prompt], options: GenerationOptions) -> list[list[int]]:
    """Token ids of the prompts, which with their output must fit into the base's context."""
    encoded = [base.encode_prompt(p.text, chat=p.chat, max_tokens=options.max_prompt_tokens) for p in prompts]
    longest = max(encoded, key=len, default=[])
    positions = len(base.prefix(longest)) + options.max_new_tokens
    both, advice = "prompts and output", "lower --max-prompt-tokens or --max-new-tokens"
    if base.has_encoder and options.with_prompts:
        raise RescoreError(f"{base.identity.name} has an encoder, which reads the prompts; leave out --with-prompts")
    if base.has_encoder:  # which has a context of its own
        both, advice = "the decoder's start and an output", "lower --max-new-tokens"
    for what, tokens, limit, how in (
        ("prompts", len(longest), base.prompt_length, "lower --max-prompt-tokens"),
        (both, positions, base.context_length, advice),
    ):
        if tokens > limit:
            raise RescoreError(
                f"{what} of {tokens} tokens exceed the context of {limit} of {base.identity.name}; {how}"
            )
    return encoded


class _Corpus:
    """The corpus in a folder as it grows."""

    def __init__(self, folder: Path, *, with_prompts: bool) -> None:
        self.path, self.hidden_path = folder / CORPUS_FILE, folder / HIDDEN_FILE
        self.with_prompts = with_prompts
        self.prompts: set[Prompt] = set()
        self.duplicates = self.output_tokens = self.states = 0
        self._outputs: set[tuple[int, ...]] = set()
        for number, record in corpus_lines(folder) if self.path.is_file() else ():
            if not is_example(record):
                raise InvalidDataError(
                    f"{self.path} line {number} is not an example of generate-corpus; use another --out"
                )
            self._add(record)

    def _add(self, record: dict[str, Any]) -> None:
        self.prompts.add(Prompt(record["prompt"], record["chat"]))
        self.duplicates += bool(record.get("duplicate"))
        self.output_tokens += len(record["output_ids"])
        _, predicted = tokens_of(record, with_prompts=self.with_prompts)
        self.states += len(predicted)
        self._outputs.add(tuple(record["output_ids"]))

    def counts(self) -> dict[str, int]:
        return {"examples": len(self.prompts), "duplicates": self.duplicates, "output_tokens": self.output_tokens}

    @contextmanager
    def appending(self, hidden_size: int) -> Iterator[Callable[[Prompt, dict[str, Any], np.ndarray], None]]:
        """What appends an example: its prompt, its other fields, the states `[t, hidden_size]` before its targets."""
        with open_appending(self.path) as stream, self.hidden_path.open("ab") as hidden_stream:
            # The line is written after its states: a kill in between leaves states without a line, which go here.
            if (size := self.states * hidden_size * STATE_BYTES) > hidden_stream.tell():
                folder = self.path.parent
                raise InvalidDataError(
                    f"{self.hidden_path} lacks states of {self.path}; remove {folder} or use another --out"
                )
            hidden_stream.truncate(size)

            def append(prompt: Prompt, fields: dict[str, Any], hidden: np.ndarray) -> None:
                if tuple(fields["output_ids"]) in self._outputs:
                    fields = {"prompt_ids": [], "output_ids": [], "text": "", "duplicate": True}
                else:
                    hidden_stream.write(hidden.astype(np.float16).tobytes())
                    hidden_stream.flush()
                record = {"prompt": prompt.text, "chat": prompt.chat, **fields}
                append_json_line(stream, record)
                self._add(record)

            yield append


def corpus_lines(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, example) of the corpus in a folder; what a killed run left unfinished is passed over.

    Raises `InvalidDataError` for a line that is no JSON object, and for a prompt that is there twice: two processes
    that wrote to one folder left others' states.
    """
    path, seen = folder / CORPUS_FILE, set[tuple[str, bool]]()
    for number, record in read_json_lines(path, torn_tail=True):
        prompt, chat = record.get("prompt"), record.get("chat")
        if isinstance(prompt, str) and prompt and isinstance(chat, bool):  # else not of `generate_corpus`
            if (prompt, chat) in seen:
                raise InvalidDataError(
                    f"{path} line {number} has a prompt that is there already: two processes wrote to the folder; "
                    "remove it and make the corpus again"
                )
            seen.add((prompt, chat))
        yield number, record


def is_example(record: dict[str, Any]) -> bool:
    """Whether a line of a corpus has what `generate_corpus` writes."""
    ids = [record.get("prompt_ids"), record.get("output_ids")]
    return (
        isinstance(record.get("prompt"), str)
        and isinstance(record.get("chat"), bool)
        and all(isinstance(each, list) and all(type(token) is int for token in each) for each in ids)
    )


def tokens_of(record: dict[str, Any], *, with_prompts: bool) -> tuple[list[int], list[int]]:
    """(context, targets) of a line of a corpus: the tokens before those that kept states predict, and these."""
    prompt, output = record["prompt_ids"], record["output_ids"]
    return (prompt[:1], prompt[1:] + output) if with_prompts else (prompt, output)


def read_settings(folder: Path) -> dict[str, Any]:
    """What the corpus in a folder was begun with: `base` (fields of `BaseIdentity`) and the options.

    Raises `RescoreError` if the folder was not made by `generate_corpus`.
    """
    path = folder / SETTINGS_FILE
    advice = f"remove {folder} or use another"
    settings = read_json_object(path, missing=f"{folder} is not a folder made by generate-corpus", advice=advice)
    base = settings.get("base")
    if not isinstance(base, dict) or not base.keys() >= {"name", "weights_sha256", "tokenizer_sha256"}:
        raise InvalidDataError(f"{path} does not say which base LM made the corpus; {advice}")
    return {"temperature": 0.0, "seed": 0, "with_prompts": False, **settings}  # older corpora lack these
