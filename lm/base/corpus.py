"""A corpus of the base LM's own output, greedy or sampled: what block heads must predict and should learn from.

[B] (Stern et al. 2018, section 6.1) trains on such "distilled" data. Prompts come as JSON lines
`{"prompt": text, "chat": bool}` (`chat` is optional; other rows of `lm.text_files` do as well) or as text, a prompt a
line. The corpus is a folder:
`corpus.jsonl`, one finished example a line `{"prompt", "chat", "prompt_ids", "output_ids", "text"}`, appended as they
come (an output that was there before: `"duplicate": true` and no tokens); `hidden.f16`, the state that chose each
output token (raw float16 rows of `hidden_size`, in the order of the lines), so that training need not run the base LM
again; and `manifest.json`, written last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lattices.errors import IncompatibleError, InvalidDataError, OutputError, RescoreError
from lm.base.generation import generate
from lm.base.machine import Work
from lm.base.model import BaseLM
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
from lm.text_files import CSV, TSV, identify, rows, text_lines

CORPUS_FILE, HIDDEN_FILE = "corpus.jsonl", "hidden.f16"
MANIFEST_FILE, SETTINGS_FILE = "manifest.json", "settings.json"
GENERATION = 1  # changes with what `generate_corpus` writes for the same prompts
STATE_BYTES = np.dtype(np.float16).itemsize  # per element of a state


@dataclass(frozen=True)
class Prompt:
    """Text to start from; `chat` puts it into the base's chat template."""

    text: str
    chat: bool


@dataclass(frozen=True)
class CorpusSummary:
    """What a corpus holds: examples and tokens in `path`, the examples whose output was there already, how many this
    run made, and in how many seconds it decoded how many output tokens (duplicates too) by how much `work`."""

    path: str
    examples: int
    duplicates: int
    output_tokens: int
    made: int
    seconds: float
    decoded: int
    work: Work


def read_prompts(path: Path, *, default_chat: bool) -> list[Prompt]:
    """Prompts of a file of rows (JSON lines and what else `lm.text_files` reads) or of text.

    Raises `InvalidDataError` with the line number of a bad one, `RescoreError` if the file can't be read.
    """
    prompts = []
    file = identify(path)
    if file.has_rows:
        for number, record in rows(file):
            text: Any = record.get("prompt")
            if not is_text(text):
                raise InvalidDataError(f"{path} {file.unit} {number} has no text in the field 'prompt'")
            chat = record.get("chat", default_chat)
            if file.layout in (CSV, TSV):  # whose values are all text
                chat = {"true": True, "false": False, "": default_chat}.get(str(chat).lower(), chat)
            if not isinstance(chat, bool):
                raise InvalidDataError(
                    f"{path} {file.unit} {number} has {chat!r} in the field 'chat'; write true or false"
                )
            prompts.append(Prompt(text, chat))
    else:
        prompts = [Prompt(line, default_chat) for line in text_lines(file) if line.strip()]
    if not prompts:
        raise InvalidDataError(f"{path} holds no prompts")
    return prompts


def generate_corpus(
    base: BaseLM,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    max_new_tokens: int = 96,
    max_prompt_tokens: int = 384,
    batch_size: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> CorpusSummary:
    """Writes the output of every prompt to `out`; what an earlier, interrupted run made is kept.

    Greedy at temperature 0, else sampled by `seed`. A prompt that comes twice is taken once; an output that is there
    already is not written again: its line says so (`duplicate`) and holds no tokens.

    Refuses to go on with other settings than the earlier run's (`IncompatibleError` shows the difference). Raises
    `RescoreError` for settings that make no sense, `OutputError` if `out` can't be written or another process is
    writing to it. `progress(done, total)` is called after every example; an exception from it interrupts the run.
    """
    for name, value in (
        ("max_new_tokens", max_new_tokens), ("max_prompt_tokens", max_prompt_tokens), ("batch_size", batch_size)
    ):  # fmt: skip
        if value < 1:
            raise RescoreError(f"{name} = {value}; it must be at least 1")
    if not 0 <= temperature < math.inf:
        raise RescoreError(f"temperature = {temperature:g}; it must be 0 (greedy) or more")
    if seed < 0:
        raise RescoreError(f"seed = {seed}; it must be 0 or more")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; --out is a folder")
    settings = {
        "base": dataclasses.asdict(base.identity),
        "max_new_tokens": max_new_tokens,
        "max_prompt_tokens": max_prompt_tokens,
        "temperature": temperature,
        "seed": seed if temperature else 0,  # greedy output has none
    }
    with writing_to(out):
        _check_settings(out, settings)
        path, hidden_path = out / CORPUS_FILE, out / HIDDEN_FILE
        done, outputs, rows = set(), set(), 0
        for record in _finished(path):
            done.add((record["prompt"], record["chat"]))
            outputs.add(tuple(record["output_ids"]))
            rows += len(record["output_ids"])
        missing = [p for p in dict.fromkeys(prompts) if (p.text, p.chat) not in done]
        total, made, decoded, work, began = len(done) + len(missing), 0, 0, Work(base), time.perf_counter()
        encoded = [base.encode_prompt(p.text, chat=p.chat, max_tokens=max_prompt_tokens) for p in missing]
        longest = max(map(len, encoded), default=0) + max_new_tokens
        if longest > base.context_length:
            raise RescoreError(
                f"prompts and output of {longest} tokens exceed the context of {base.context_length} of "
                f"{base.identity.name}; lower max_prompt_tokens or max_new_tokens"
            )
        if not (out / SETTINGS_FILE).is_file():
            write_json(out / SETTINGS_FILE, settings)
        with writing(out), open_appending(path) as stream, hidden_path.open("ab") as hidden_stream:
            # The line is written after its states: a kill in between leaves states without a line, which go here.
            if (size := rows * base.hidden_size * STATE_BYTES) > hidden_stream.tell():
                raise InvalidDataError(f"{hidden_path} lacks states of {path}; remove {out} or use another --out")
            hidden_stream.truncate(size)
            for made_of in generate(
                base, encoded, max_new_tokens=max_new_tokens, batch_size=batch_size, with_hidden=True,
                temperature=temperature, seed=seed, work=work,
            ):  # fmt: skip
                assert made_of.hidden is not None
                prompt, output_ids = missing[made_of.index], made_of.output_ids.tolist()
                line: dict[str, Any] = {"prompt": prompt.text, "chat": prompt.chat}
                if tuple(output_ids) in outputs:
                    line |= {"prompt_ids": [], "output_ids": [], "text": "", "duplicate": True}
                else:
                    outputs.add(tuple(output_ids))
                    hidden_stream.write(made_of.hidden.astype(np.float16).tobytes())
                    hidden_stream.flush()
                    text = base.decode_text(output_ids)
                    line |= {"prompt_ids": encoded[made_of.index], "output_ids": output_ids, "text": text}
                append_json_line(stream, line)
                made += 1
                decoded += len(output_ids)
                if progress:
                    progress(len(done) + made, total)
        seconds = time.perf_counter() - began
        examples = duplicates = output_tokens = 0
        for record in _finished(path):
            examples += 1
            duplicates += bool(record.get("duplicate"))
            output_tokens += len(record["output_ids"])
        summary = CorpusSummary(str(path), examples, duplicates, output_tokens, made, seconds, decoded, work)
        manifest = {
            **settings,
            "examples": examples,
            "duplicates": duplicates,
            "output_tokens": output_tokens,
            "prompts_sha256": hashlib.sha256(json.dumps([[p.text, p.chat] for p in prompts]).encode()).hexdigest(),
            "corpus_sha256": sha256_of_file(path),
        }
        write_json(out / MANIFEST_FILE, manifest)
        return summary


def _finished(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    once = Once(path)
    for number, record in read_json_lines(path, torn_tail=True):
        if not record.keys() >= {"prompt", "chat", "output_ids"}:
            raise InvalidDataError(f"{path} line {number} is not an example of generate-corpus; use another --out")
        once.check(number, record)
        yield record


class Once:
    """Sees to it that every prompt is in a corpus once: two processes that wrote to one folder left others' states."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: set[tuple[str, bool]] = set()

    def check(self, number: int, record: dict[str, Any]) -> None:
        """Raises `InvalidDataError` for a line whose prompt came before."""
        prompt, chat = record.get("prompt"), record.get("chat")
        if not isinstance(prompt, str) or not prompt or not isinstance(chat, bool):
            return  # not of `generate_corpus`, which has its own error
        if (key := (prompt, chat)) in self._seen:
            raise InvalidDataError(
                f"{self.path} line {number} has a prompt that is there already: two processes wrote to the folder; "
                "remove it and make the corpus again"
            )
        self._seen.add(key)


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    if not (out / SETTINGS_FILE).is_file():
        return
    found = {"temperature": 0.0, "seed": 0, **read_settings(out)}  # corpora from before there was sampling
    if changed := changed_settings(found, settings):
        raise IncompatibleError(f"{out} was begun with other settings ({'; '.join(changed)}); use another --out")


def read_settings(folder: Path) -> dict[str, Any]:
    """What the corpus in a folder was begun with: `base` (fields of `BaseIdentity`) and limits.

    Raises `RescoreError` if the folder was not made by `generate_corpus`.
    """
    path = folder / SETTINGS_FILE
    advice = f"remove {folder} or use another"
    settings = read_json_object(path, missing=f"{folder} is not a folder made by generate-corpus", advice=advice)
    base = settings.get("base")
    if not isinstance(base, dict) or not base.keys() >= {"name", "weights_sha256", "tokenizer_sha256"}:
        raise InvalidDataError(f"{path} does not say which base LM made the corpus; {advice}")
    return settings
