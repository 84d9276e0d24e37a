"""A trace of what another program left: stored hidden states, or drafts as they were verified (docs/interop.md)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from lattices.errors import InvalidDataError, OutputError, RescoreError
from lattices.paths import user_path
from lm.files import atomic_folder, write_json
from lm.options import Base, Device, Dtype, Heads
from lm.records import plain
from rescore.runs.inputs import DEFAULT_BASE, Inputs, Notify, Progress
from rescore.tracing import HEADER_FILE, PART_EXAMPLES, TRACE_K, Trace, TraceHeader, read_trace, write_part

SourceFormat = Literal["llama-cpp", "speculators", "model-optimizer", "specforge"]
ENDINGS = {"llama-cpp": ".jsonl", "speculators": ".safetensors", "model-optimizer": ".pt", "specforge": ".ckpt"}
Row = dict[str, Any]  # of a trace, by column


@dataclass(frozen=True)
class Imported:
    """What an importer gives.

    rows: of the trace, made when they are asked for; count: how many there will be, at most.
    header: of the trace, asked for once all rows are made.
    """

    rows: Iterator[Row]
    count: int
    header: Callable[[], TraceHeader]


def import_trace(
    dump: Annotated[Path, "File, or folder of files, that the other program wrote.", "DUMP"],
    source: Annotated[SourceFormat, "What wrote it.", "--from"],
    out: Annotated[str | Path, "Folder for the trace."],
    *,
    base: Annotated[Base, "Base LM of the stored states: its projection and final norm are used."] = DEFAULT_BASE,
    heads: Heads = None,
    k: Annotated[int, "Lattice entries kept per head."] = TRACE_K,
    prompt_tokens: Annotated[
        int | None, "The first N tokens of each file are its prompt. Default: what its loss mask says."
    ] = None,
    outputs: Annotated[
        Path | None, "Of llama-cpp: JSON lines with seq and output_ids, the tokens that the server gave back."
    ] = None,
    limit: Annotated[int | None, "Only the first N examples."] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> Trace:
    """Writes the trace folder `out` and reads it back, checked.

    Of stored states (speculators, model-optimizer, specforge) the lattices are what block heads make of them; every
    output must be what these states choose (`rescore.imports.states.LEAST_AGREEMENT`). Of a dump of llama.cpp they are
    the drafts that it logged; what it did not log, the trace's settings name.

    Raises `RescoreError` for what is not enough to make a trace of, `InvalidDataError` for a file that breaks its
    format, `IncompatibleError` for states of another base, `OutputError` if the folder is not empty or can't be
    written.
    """
    of_states = source != "llama-cpp"
    for name, value, fits in (("outputs", outputs, not of_states), ("prompt-tokens", prompt_tokens, of_states),
                              ("heads", heads, of_states)):  # fmt: skip
        if value is not None and not fits:
            raise RescoreError(f"--{name} is of no use for --from {source}; drop it")
    if limit is not None and limit < 1:
        raise RescoreError(f"--limit {limit}; at least one example is needed")
    folder = user_path(out, "--out")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} is there already and not empty; give another --out")
    files = _files(dump, ENDINGS[source])
    if of_states:
        from rescore.imports.states import StatesImport

        inputs = Inputs(base=base, heads=heads, dtype=dtype, device=device)
        reading = StatesImport(source, inputs, k=k, prompt_tokens=prompt_tokens)
        imported = reading.of_files(files, limit=limit)
        if notify and (line := reading.models.about_heads()):
            notify(line)
    else:
        from rescore.imports.llama_cpp import of_dump

        if len(files) > 1:
            raise RescoreError(f"{dump} holds several files; give the one that belongs to --outputs")
        imported = of_dump(files[0], outputs, k=k, limit=limit)
    _write(folder, imported, progress)
    return read_trace(folder)


def _files(dump: Path, ending: str) -> list[Path]:
    """The file itself, or those with the ending in a folder, numbers in their names in order."""
    if dump.is_file():
        return [dump]
    if not dump.is_dir():
        raise RescoreError(f"no such file or folder: {dump}; give what the other program wrote")
    files = [path for path in dump.rglob(f"*{ending}") if path.is_file()]
    if not files:
        raise RescoreError(
            f"{dump} holds no *{ending}; give the folder that the other program wrote, or another --from"
        )
    return sorted(
        files, key=lambda path: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]
    )


def _write(folder: Path, imported: Imported, progress: Progress | None) -> None:
    """The whole folder, or nothing."""

    def counted() -> Iterator[Row]:
        for done, row in enumerate(imported.rows, start=1):
            if progress:
                progress("import", done, max(done, imported.count))
            yield row

    with atomic_folder(folder) as temporary:
        names: list[str] = []
        rows = counted()
        while part := list(islice(rows, PART_EXAMPLES)):
            names.append(f"part-{len(names):05d}")
            write_part(temporary / names[-1], part)
        if not names:
            raise InvalidDataError("there is no output to make a trace of; give other files or another split")
        header = msgspec.structs.replace(imported.header(), parts=names)
        write_json(temporary / HEADER_FILE, plain(header))
