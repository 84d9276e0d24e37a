"""Traces: the base LM runs once over a task, and everything but wall-clock is replayed from what it left.

A trace is a folder: `trace.json` (the fields of `TraceHeader`) and parts, each an Arrow data set of `datasets`
(`save_to_disk`), memory-mapped when read. One row is one example; position i is the lattice that stands before output
token i, i = 0..t-1, with entry [i, 0, 0] = output token i.

    id               string                     unique in the trace
    prompt           string
    references       list<string>
    output           string                     text of the output, null where it is not known
    prompt_ids       list<int32>   [prompt tokens]
    output_ids       list<int32>   [t]          greedy output; end-of-text is its last token where it came
    token_ids        list<int32>   [t * h * K]  lattice token ids, each slot by falling log-probability
    logps            list<float32> [t * h * K]  natural-log probabilities
    entropies        list<float32> [t * h]      nats
    margins          list<float32> [t]          logit of the greedy token less the runner-up's
    group            string                     key of the source that examples share; optional, null: none is shared

A trace made elsewhere (Medusa, EAGLE, MTP, DFlash ...) needs the same folder; `read_trace` checks everything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError, first_line
from lattices.lattice import Lattice
from lm.files import atomic_folder, changed_settings, sha256_of_file, write_json
from lm.keys import cache_entry, software
from lm.locks import writing_to
from lm.records import plain, read_record
from rescore.checks import check_fits, check_k
from rescore.tasks.base import Example
from rescore.tasks.groups import digest, one_of_each_first
from rescore.traced_rows import BATCH_SIZE, rows_of

if TYPE_CHECKING:
    from lm.base.model import BaseLM
    from lm.heads.block_heads import BlockHeads

SCHEMA = "rescore.trace/1"
RECORDING = 1  # changes with what `record_trace` computes: its prompts, outputs, lattices or rounding
HEADER_FILE = "trace.json"
PART_EXAMPLES = 32  # examples per part: what a kill can lose, and the window in which prompts are sorted by length
TRACE_K = 32
ROUNDING = 1e-3  # nats below 0 that an entropy may have by rounding
OPTIONAL = ("group",)  # columns that older traces and those of others may lack
Positive = Annotated[int, msgspec.Meta(ge=1)]
RecordParts = Callable[[Sequence[Sequence[Example]]], Iterator[list[dict[str, Any]]]]


class TraceHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`trace.json`.

    h: heads.
    k: lattice entries per slot (K).
    settings: what the trace was made of (base, heads, task, template, limits); free for traces made elsewhere.
    parts: names of the folders.
    """

    h: Positive
    k: Positive
    vocab_size: Positive
    eos_token_ids: list[int]
    settings: dict[str, Any]
    parts: list[str]
    schema: str = SCHEMA

    @property
    def task(self) -> str | None:
        """The task that it was recorded for; None where it does not say."""
        task = self.settings.get("task")
        return task if isinstance(task, str) else None


@dataclass(frozen=True)
class TracedExample:
    """One example of a trace; arrays as in the schema, `lattice` `[t, h, K]`, `entropies` `[t, h]`.

    A `group` that is not known is that of the prompt, or where there is none the example's own.
    """

    id: str
    prompt: str
    references: tuple[str, ...]
    output: str | None
    prompt_ids: np.ndarray
    output_ids: np.ndarray
    lattice: Lattice
    entropies: np.ndarray
    margins: np.ndarray
    group: str = ""

    def __post_init__(self) -> None:
        if not self.group:
            object.__setattr__(self, "group", digest(self.prompt or self.id))


@dataclass(frozen=True)
class Trace:
    """A loaded trace; examples in the order of its rows."""

    header: TraceHeader
    examples: tuple[TracedExample, ...]

    def first_examples(self, limit: int | None) -> Trace:
        """The trace of the first `limit` examples (None: all), one of each group before a second one of any."""
        order = one_of_each_first([example.group for example in self.examples])
        return Trace(self.header, tuple(self.examples[place] for place in order[:limit]))

    def first_heads(self, h: int | None) -> Trace:
        """The trace with the first h heads only (None: all)."""
        if h is None or h == self.header.h:
            return self
        cut = [replace(e, lattice=e.lattice.first_heads(h), entropies=e.entropies[:, :h]) for e in self.examples]
        return Trace(msgspec.structs.replace(self.header, h=h), tuple(cut))

    def line(self) -> str:
        """What it holds."""
        positions = sum(len(example.output_ids) for example in self.examples)
        return f"{len(self.examples)} examples, {positions} positions, h = {self.header.h}, K = {self.header.k}"


def record_trace(
    base: BaseLM,
    heads: BlockHeads | None,
    examples: Sequence[Example],
    folder: Path,
    *,
    settings: dict[str, Any],
    chat: bool,
    max_new_tokens: int = 64,
    max_prompt_tokens: int | None = None,
    k: int = TRACE_K,
    batch_size: int = BATCH_SIZE,
    recorded: Trace | None = None,
    elsewhere: RecordParts | None = None,
    check: Callable[[], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Records what `folder` lacks of the examples and returns the trace of exactly these, in their order.

    heads: None for a trace of the base's own next token only (h = 1).

    A part is written after every `PART_EXAMPLES`, so a killed recording goes on where it stopped. `recorded`: what
    `read_trace` gave of the folder, at least the examples asked for, if it has been called already. `elsewhere` gives
    the rows of parts, in their order, where they are not recorded here. `check` is called before a part is written, and
    raises if what the settings say no longer holds. `progress(done, total)` is called after every example.

    Raises `IncompatibleError` if the folder holds a trace with other settings, `OutputError` if it can't be written or
    another process writes to it, `RescoreError` for prompts that do not fit into the context and for k beyond the
    vocabulary.
    """
    check_k(k, base.vocab_size)
    header = TraceHeader(heads.h if heads else 1, k, base.vocab_size, sorted(base.eos_token_ids), settings, [])
    with writing_to(folder):  # before the work: a place that can't be written to is refused at once
        if (folder / HEADER_FILE).is_file():
            known = read_header(folder)
            asked = {f: getattr(header, f) for f in ("h", "k", "vocab_size", "eos_token_ids", "settings")}
            check_settings(folder, known, **asked)
            header = known
            if recorded is None or recorded.header.parts != header.parts:  # another process may have gone on with it
                recorded = read_trace(folder)
        done = {e.id: e for e in recorded.examples} if recorded else {}
        missing = [e for e in examples if e.id not in done]
        for example in missing:
            if not example.prompt:
                raise RescoreError(f"example {example.id}: the prompt is empty; give it text, or leave the example out")
            ids = base.encode_prompt(example.prompt, chat=chat, max_tokens=max_prompt_tokens)
            check_fits(base, len(ids), max_new_tokens, what=f"example {example.id}: a prompt")
        finished = len(examples) - len(missing)
        if missing:
            base.unpack()  # what is recorded is the same to the last bit whatever was decoded before

        def one_more() -> None:
            nonlocal finished
            finished += 1
            if progress:
                progress(finished, len(examples))

        how: dict[str, Any] = {
            "chat": chat, "max_new_tokens": max_new_tokens, "max_prompt_tokens": max_prompt_tokens, "k": k,
            "batch_size": batch_size,
        }  # fmt: skip
        parts = [missing[start : start + PART_EXAMPLES] for start in range(0, len(missing), PART_EXAMPLES)]
        here = (rows_of(base, heads, part, **how, each=one_more) for part in parts)
        for part, rows in zip(parts, elsewhere(parts) if elsewhere else here, strict=True):
            for _ in part if elsewhere else ():
                one_more()
            if check:
                check()
            name = f"part-{len(header.parts):05d}"
            write_part(folder / name, rows)
            header = msgspec.structs.replace(header, parts=[*header.parts, name])
            write_json(folder / HEADER_FILE, plain(header))
            done |= {e.id: e for e in _read_part(folder / name, header)}
        return Trace(header, tuple(done[e.id] for e in examples))


def recorded_by(device: str) -> dict[str, str | int]:
    """What rounds in its own way: the kind of device, this project's recording, the libraries' minor versions."""
    return {"device": device.partition(":")[0], "recording": RECORDING, **software()}


def given_settings(settings: dict[str, Any], sha256: str, device: str) -> dict[str, Any]:
    """What is recorded here beside a trace that was given: of all that this says of itself, by its hash, and of what
    records now."""
    return {**settings, "trace": sha256, "recorded_by": recorded_by(device)}


def trace_folder(task: str, settings: dict[str, Any], k: int) -> Path:
    """Where the cache keeps the trace of a task with these settings and k entries per slot."""
    return cache_entry("traces", task, {"schema": SCHEMA, "k": k, "settings": settings})


def _features() -> Any:
    """The columns of a part, in the order of their documentation."""
    from datasets import Features, List, Value

    text, ints, floats = Value("string"), List(Value("int32")), List(Value("float32"))
    return Features({
        "id": text, "prompt": text, "references": List(text), "output": text,
        "prompt_ids": ints, "output_ids": ints, "token_ids": ints,
        "logps": floats, "entropies": floats, "margins": floats, "group": text,
    })  # fmt: skip


def write_part(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Writes examples, by column, as one part. Raises `OutputError`."""
    import datasets

    columns = {name: [row[name] for row in rows] for name in rows[0]}
    bars_are_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with atomic_folder(folder) as temporary:
            datasets.Dataset.from_dict(columns, features=_features()).save_to_disk(temporary)
    finally:
        if bars_are_on:
            datasets.enable_progress_bars()


def check_settings(folder: Path, header: TraceHeader, **expected: Any) -> None:
    """Raises `IncompatibleError` with the difference if fields of the header in `folder` are not the expected ones."""
    recorded = {name: getattr(header, name) for name in expected}
    if "settings" in expected and (others := header.settings.get("drafter")) != expected["settings"].get("drafter"):
        raise IncompatibleError(
            f"{folder} holds a trace with other settings (drafter: {others or 'heads'} -> "
            f"{expected['settings'].get('drafter') or 'heads'}); use another --out"
        )
    if changed := changed_settings(recorded, plain(expected)):
        raise IncompatibleError(f"{folder} holds a trace with other settings ({'; '.join(changed)}); use another --out")


def read_header(folder: Path) -> TraceHeader:
    """`trace.json` of a trace folder, checked. Raises `RescoreError` if there is none, `InvalidDataError` if it is
    broken or of another version."""
    path = folder / HEADER_FILE
    advice = f"rescore trace --out {folder} records it"
    return read_record(path, TraceHeader, missing=f"no trace in {folder}", advice=advice, schema=SCHEMA)


def content_sha256(folder: Path, parts: Sequence[str]) -> str:
    """sha256 over all files of a trace."""
    digest = hashlib.sha256()
    for path in [folder / HEADER_FILE, *(file for part in parts for file in sorted((folder / part).glob("*.arrow")))]:
        digest.update(sha256_of_file(path).encode())
    return digest.hexdigest()


def read_trace(folder: Path) -> Trace:
    """Opens a trace and checks it: columns and types, lengths, ids, log-probabilities, order.

    Raises `InvalidDataError` naming the example and what is wrong with it, `RescoreError` if there is no trace.
    """
    header = read_header(folder)
    examples: dict[str, TracedExample] = {}
    for part in header.parts:
        for example in _read_part(folder / part, header):
            if example.id in examples:
                raise InvalidDataError(f"{folder / part}: the id {example.id!r} is there twice in the trace")
            examples[example.id] = example
    if not examples:
        raise InvalidDataError(f"the trace in {folder} is empty")
    return Trace(header, tuple(examples.values()))


def _read_part(folder: Path, header: TraceHeader) -> Iterator[TracedExample]:
    import datasets
    import pyarrow

    try:
        table = datasets.Dataset.load_from_disk(str(folder)).data.table
        table.validate(full=True)  # else what is read from a damaged file may lie anywhere in memory
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pyarrow.ArrowException) as error:
        raise InvalidDataError(f"can't read the trace part {folder}: {first_line(error)}") from error
    columns = dict(zip(table.column_names, table.schema.types, strict=True))
    for field in _features().arrow_schema:
        if field.name not in columns and field.name not in OPTIONAL:
            raise InvalidDataError(f"{folder} has no column {field.name!r}")
        if (kind := columns.get(field.name, field.type)) != field.type:
            raise InvalidDataError(f"{folder}: column {field.name!r} is {kind}, not {field.type}")
    for batch in table.to_batches():
        for row in range(batch.num_rows):
            yield _checked_example(folder, header, {name: batch.column(name)[row] for name in table.column_names})


def _checked_example(folder: Path, header: TraceHeader, row: dict[str, Any]) -> TracedExample:
    """The example of one row: Arrow scalars by column."""
    where = f"{folder}: example {row['id'].as_py()!r}"

    def fail(wrong: str) -> InvalidDataError:
        return InvalidDataError(f"{where} {wrong}")

    def filled(column: str) -> Any:
        value = row[column].as_py()
        if value is None or (isinstance(value, list) and None in value):
            raise fail(f"has an empty entry in {column!r}")
        return value

    def array(column: str) -> np.ndarray:
        values = row[column].values
        if values is None or values.null_count:
            raise fail(f"has an empty entry in {column!r}")
        return np.asarray(values.to_numpy(zero_copy_only=True))

    lists = ("prompt_ids", "output_ids", "token_ids", "logps", "entropies", "margins")
    arrays = {column: array(column) for column in lists}
    prompt_ids, output_ids, token_ids, logps, entropies, margins = arrays.values()
    t, h, k = len(output_ids), header.h, header.k
    if t == 0:
        raise fail("has no output tokens")
    for column, size in {"token_ids": t * h * k, "logps": t * h * k, "entropies": t * h, "margins": t}.items():
        if (length := len(arrays[column])) != size:
            raise fail(f"has {length} values in {column!r}; {t} output tokens, h = {h} and k = {k} need {size}")
    for column in ("prompt_ids", "output_ids"):
        if ((arrays[column] < 0) | (arrays[column] >= header.vocab_size)).any():
            raise fail(f"has ids outside the vocabulary in {column!r}")
    if np.isin(output_ids[:-1], header.eos_token_ids).any():
        raise fail("has output tokens after end-of-text; cut the output after it")
    for column in ("entropies", "margins"):
        if np.isnan(arrays[column]).any():
            raise fail(f"has NaN in {column!r}")
    if not np.isfinite(entropies).all() or (entropies < -ROUNDING).any():
        raise fail("has a value in 'entropies' that is no entropy: infinite or below 0")
    lattice = Lattice(token_ids.reshape(t, h, k), logps.reshape(t, h, k))
    try:
        lattice.validate(header.vocab_size)
    except InvalidDataError as error:
        raise InvalidDataError(f"{where}: {error}") from error
    if len(wrong := np.flatnonzero(lattice.token_ids[:, 0, 0] != output_ids)):
        raise InvalidDataError(f"{where}: the first entry of slot 1 at position {wrong[0]} is not the output token")
    return TracedExample(
        id=filled("id"),
        prompt=filled("prompt"),
        references=tuple(filled("references")),
        output=row["output"].as_py(),
        prompt_ids=prompt_ids,
        output_ids=output_ids,
        lattice=lattice,
        entropies=entropies.reshape(t, h),
        margins=margins,
        group=(row["group"].as_py() or "") if "group" in row else "",
    )
