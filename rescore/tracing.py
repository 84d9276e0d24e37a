"""Traces: the base LM runs once over a task, and everything but wall-clock is replayed from what it left.

A trace is a folder: `trace.json` (`TraceHeader`, schema below) and parts, each an Arrow data set of `datasets`
(`save_to_disk`), memory-mapped when read. One row is one example; position i is the lattice that stands before output
token i, i = 0..t-1, with entry [i, 0, 0] = output token i.

    id               string
    prompt           string
    references       list<string>
    prompt_ids       list<int32>   [prompt tokens]
    output_ids       list<int32>   [t]          greedy output, end-of-text included where it came
    token_ids        list<int32>   [t * h * K]  lattice token ids, each slot by falling log-probability
    logps            list<float32> [t * h * K]  natural-log probabilities
    entropies        list<float32> [t * h]      nats
    margins          list<float32> [t]          logit of the greedy token less the runner-up's

A trace made elsewhere (Medusa, EAGLE, MTP, DFlash ...) needs the same folder; `load_trace` checks everything.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lattices.lattice import Lattice
from lm.base import BaseLM
from lm.block_heads import BlockHeads
from lm.files import atomic_folder, write_json
from lm.generation import Greedy, generate_greedy
from rescore.tasks.base import Example

SCHEMA = "rescore.trace/1"
HEADER_FILE = "trace.json"
LATTICE_ROWS = 16  # positions whose full-vocabulary logits are alive at a time
DEFAULT_K = 32


@dataclass(frozen=True)
class TraceHeader:
    """What a trace was made of: `h`, `k` (lattice entries per slot, K), `vocab_size`, `eos_token_ids`, `settings`
    (base, heads, task, template, limits: free for traces made elsewhere), `parts` (folder names)."""

    h: int
    k: int
    vocab_size: int
    eos_token_ids: list[int]
    settings: dict[str, Any]
    parts: list[str]
    schema: str = SCHEMA


@dataclass(frozen=True)
class TracedExample:
    """One example of a trace; arrays as in the schema, `lattice` `[t, h, K]`."""

    id: str
    prompt: str
    references: tuple[str, ...]
    prompt_ids: np.ndarray
    output_ids: np.ndarray
    lattice: Lattice
    entropies: np.ndarray
    margins: np.ndarray


@dataclass(frozen=True)
class Trace:
    """A loaded trace."""

    header: TraceHeader
    examples: tuple[TracedExample, ...]


def record_trace(
    base: BaseLM,
    heads: BlockHeads,
    examples: Sequence[Example],
    folder: Path,
    *,
    settings: dict[str, Any],
    chat: bool,
    max_new_tokens: int = 64,
    max_prompt_tokens: int | None = None,
    k: int = DEFAULT_K,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Records what `folder` lacks of the examples and returns the trace of exactly these, in their order.

    A part is written after every batch, so a killed recording goes on where it stopped. Raises `IncompatibleError` if
    the folder holds a trace with other settings.
    """
    header = TraceHeader(heads.h, k, base.vocab_size, sorted(base.eos_token_ids), settings, [])
    if (folder / HEADER_FILE).is_file():
        header = _same_settings(folder, header)
        done = {e.id for e in load_trace(folder).examples} if header.parts else set()
    else:
        done = set()
    missing = [e for e in examples if e.id not in done]
    # Long prompts first would need the largest cache at once; batches of similar length come from `generate_greedy`.
    encoded = [base.encode_prompt(e.prompt, chat=chat, max_tokens=max_prompt_tokens) for e in missing]
    for example, ids in zip(missing, encoded, strict=True):
        if len(ids) + max_new_tokens > base.context_length:
            raise RescoreError(
                f"example {example.id}: a prompt of {len(ids)} tokens and {max_new_tokens} new ones do not fit into "
                f"the context of {base.context_length}; cut prompts with --max-prompt-tokens"
            )
    made = 0
    for batch in _batches(generate_greedy(
        base, encoded, max_new_tokens=max_new_tokens, batch_size=batch_size, with_hidden=True
    ), batch_size):
        rows = [_row(base, heads, missing[g.index], encoded[g.index], g, k) for g in batch]
        name = f"part-{len(header.parts):05d}"
        _write_part(folder / name, rows)
        header = dataclasses.replace(header, parts=[*header.parts, name])
        write_json(folder / HEADER_FILE, dataclasses.asdict(header))
        made += len(batch)
        if progress:
            progress(len(examples) - len(missing) + made, len(examples))
    trace = load_trace(folder)
    by_id = {e.id: e for e in trace.examples}
    return Trace(trace.header, tuple(by_id[e.id] for e in examples))


def trace_key(settings: dict[str, Any]) -> str:
    """A folder name for a trace of these settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]


def _batches(generated: Iterator[Greedy], size: int) -> Iterator[list[Greedy]]:
    batch: list[Greedy] = []
    for greedy in generated:
        batch.append(greedy)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@torch.inference_mode()
def _row(
    base: BaseLM, heads: BlockHeads, example: Example, prompt_ids: list[int], greedy: Greedy, k: int
) -> dict[str, Any]:
    assert greedy.hidden is not None and greedy.margins is not None
    ids, logps, entropies = [], [], []
    for start in range(0, len(greedy.output_ids), LATTICE_ROWS):
        hidden = torch.from_numpy(greedy.hidden[start : start + LATTICE_ROWS]).to(base.device, base.dtype)
        lattice, entropy = heads.lattice(base, hidden, base.project(hidden), k)
        ids.append(lattice.token_ids)
        logps.append(lattice.logps)
        entropies.append(entropy)
    token_ids, scores = np.concatenate(ids), np.concatenate(logps)
    _put_first(token_ids[:, 0], scores[:, 0], greedy.output_ids)
    return {
        "id": example.id,
        "prompt": example.prompt,
        "references": list(example.references),
        "prompt_ids": np.asarray(prompt_ids, dtype=np.int32),
        "output_ids": greedy.output_ids.astype(np.int32),
        "token_ids": token_ids.ravel(),
        "logps": scores.ravel(),
        "entropies": np.concatenate(entropies).ravel(),
        "margins": greedy.margins,
    }


def _put_first(token_ids: np.ndarray, logps: np.ndarray, chosen: np.ndarray) -> None:
    """Makes the greedy token the first of slot 1, in place, where a near-tie was rounded the other way.

    The projection of one state and of many differ in the last bits; the token that was really chosen stays.
    """
    for position in np.flatnonzero(token_ids[:, 0] != chosen):
        place = np.flatnonzero(token_ids[position] == chosen[position])
        end = int(place[0]) if len(place) else token_ids.shape[1] - 1
        token_ids[position, 1 : end + 1] = token_ids[position, :end].copy()
        logps[position, 1 : end + 1] = logps[position, :end].copy()
        token_ids[position, 0] = chosen[position]


def _features() -> Any:
    from datasets import Features, List, Value

    ints, floats = List(Value("int32")), List(Value("float32"))
    return Features({
        "id": Value("string"), "prompt": Value("string"), "references": List(Value("string")),
        "prompt_ids": ints, "output_ids": ints, "token_ids": ints,
        "logps": floats, "entropies": floats, "margins": floats,
    })  # fmt: skip


def _write_part(folder: Path, rows: list[dict[str, Any]]) -> None:
    import datasets

    columns = {name: [row[name] for row in rows] for name in rows[0]}
    with _quiet(datasets), atomic_folder(folder) as temporary:
        datasets.Dataset.from_dict(columns, features=_features()).save_to_disk(temporary)


def _quiet(datasets: Any) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def without_bars() -> Iterator[None]:
        shown = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            if not shown:
                datasets.enable_progress_bars()

    return without_bars()


def _same_settings(folder: Path, wanted: TraceHeader) -> TraceHeader:
    header = read_header(folder)
    old, new = dataclasses.asdict(header), json.loads(json.dumps(dataclasses.asdict(wanted)))
    changed = [f"{key}: {old[key]} -> {new[key]}" for key in new if key != "parts" and old[key] != new[key]]
    if changed:
        raise IncompatibleError(f"{folder} holds a trace with other settings ({'; '.join(changed)}); use another --out")
    return header


def read_header(folder: Path) -> TraceHeader:
    """`trace.json` of a trace folder, checked."""
    path = folder / HEADER_FILE
    try:
        fields = json.loads(path.read_text())
    except OSError as error:
        raise RescoreError(f"no trace in {folder}: can't read {HEADER_FILE} ({error.strerror})") from error
    except ValueError as error:
        raise InvalidDataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
        found = fields.get("schema") if isinstance(fields, dict) else type(fields).__name__
        raise InvalidDataError(f"{path} has schema {found!r}; this version reads {SCHEMA!r}")
    try:
        header = TraceHeader(**fields)
    except TypeError as error:
        raise InvalidDataError(f"{path}: {str(error).removeprefix('TraceHeader.__init__() ')}") from error
    for name in ("h", "k", "vocab_size"):
        if not isinstance(getattr(header, name), int) or getattr(header, name) < 1:
            raise InvalidDataError(f"{path}: {name} must be a positive whole number")
    return header


def load_trace(folder: Path) -> Trace:
    """Opens a trace and checks it: columns and types, lengths, ids, log-probabilities, order.

    Raises `InvalidDataError` naming the example and what is wrong with it.
    """
    header = read_header(folder)
    if not header.parts:
        raise InvalidDataError(f"the trace in {folder} is empty")
    examples: dict[str, TracedExample] = {}
    for part in header.parts:
        for example in _read_part(folder / part, header):
            examples.setdefault(example.id, example)
    return Trace(header, tuple(examples.values()))


def _read_part(folder: Path, header: TraceHeader) -> Iterator[TracedExample]:
    import datasets
    import pyarrow

    try:
        table = datasets.load_from_disk(str(folder)).data.table
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pyarrow.ArrowException) as error:
        raise InvalidDataError(f"can't read the trace part {folder}: {str(error).splitlines()[0]}") from error
    expected = _features().arrow_schema
    for field in expected:
        if field.name not in table.column_names:
            raise InvalidDataError(f"{folder} has no column {field.name!r}")
        if table.schema.field(field.name).type != field.type:
            found = table.schema.field(field.name).type
            raise InvalidDataError(f"{folder}: column {field.name!r} is {found}, not {field.type}")
    for batch in table.to_batches():
        columns = {name: batch.column(name) for name in expected.names}
        for row in range(batch.num_rows):
            yield _checked_example(folder, header, columns, row)


def _checked_example(folder: Path, header: TraceHeader, columns: dict[str, Any], row: int) -> TracedExample:
    name = columns["id"][row].as_py()

    def array(column: str) -> np.ndarray:
        values = columns[column][row].values
        if values is None or values.null_count:
            raise InvalidDataError(f"{folder}: example {name!r} has an empty entry in {column!r}")
        found: np.ndarray = values.to_numpy(zero_copy_only=True)
        return found

    output_ids, h, k = array("output_ids"), header.h, header.k
    t = len(output_ids)
    sizes = {"token_ids": t * h * k, "logps": t * h * k, "entropies": t * h, "margins": t}
    for column, size in sizes.items():
        if len(array(column)) != size:
            raise InvalidDataError(
                f"{folder}: example {name!r} has {len(array(column))} values in {column!r}; "
                f"{t} output tokens, h = {h} and k = {k} need {size}"
            )
    if t == 0:
        raise InvalidDataError(f"{folder}: example {name!r} has no output tokens")
    for column in ("prompt_ids", "output_ids"):
        ids = array(column)
        if len(ids) and (ids.min() < 0 or ids.max() >= header.vocab_size):
            raise InvalidDataError(f"{folder}: example {name!r} has ids outside the vocabulary in {column!r}")
    lattice = Lattice(array("token_ids").reshape(t, h, k), array("logps").reshape(t, h, k))
    try:
        lattice.validate(header.vocab_size)
    except InvalidDataError as error:
        raise InvalidDataError(f"{folder}: example {name!r}: {error}") from error
    wrong = np.flatnonzero(lattice.token_ids[:, 0, 0] != output_ids)
    if len(wrong):
        raise InvalidDataError(
            f"{folder}: example {name!r}: the first entry of slot 1 at position {wrong[0]} is not the output token"
        )
    return TracedExample(
        id=name,
        prompt=columns["prompt"][row].as_py(),
        references=tuple(columns["references"][row].as_py()),
        prompt_ids=array("prompt_ids"),
        output_ids=output_ids,
        lattice=lattice,
        entropies=array("entropies").reshape(t, h),
        margins=array("margins"),
    )
