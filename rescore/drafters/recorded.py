"""What drafters with a model of their own propose at every position of a trace: recorded once, as a trace itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lattices.errors import IncompatibleError, RescoreError
from lattices.lattice import Lattice
from lm.files import write_json
from lm.locks import making, writing_to
from lm.records import plain
from rescore.drafters.asked import recorded_of
from rescore.drafters.base import Drafter, LatticeDrafter
from rescore.drafters.heads import Heads
from rescore.drafters.traced import Traced
from rescore.tracing import (
    HEADER_FILE,
    PART_EXAMPLES,
    Trace,
    TracedExample,
    TraceHeader,
    check_settings,
    read_trace,
    trace_folder,
    write_part,
)

Progress = Callable[[str, int, int], None]


def drafted(
    trace: Trace, drafters: Iterable[Drafter], *, task: str, settings: dict[str, Any], progress: Progress | None = None
) -> dict[str, dict[str, Lattice]]:
    """By drafter and example, lattices `[t, h, K]` beside the trace's own; what is not recorded is recorded now.

    drafters: fitted to the trace's base; settings: all that the trace is of.
    """
    found = {}
    for drafter in drafters:
        if isinstance(drafter, Traced):
            found[drafter.name] = drafter.lattices_of(trace)
        elif isinstance(drafter, Heads) and drafter.draws_on_all:
            found[drafter.name] = {example.id: example.lattice for example in trace.examples}
        elif isinstance(drafter, LatticeDrafter):
            recorded = record_drafter(trace, drafter, task=task, settings=settings, progress=progress)
            found[drafter.name] = {example.id: example.lattice for example in recorded.examples}
    return found


def record_drafter(
    trace: Trace,
    drafter: LatticeDrafter,
    *,
    task: str,
    settings: dict[str, Any],
    k: int | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Trace:
    """The trace of what a (fitted) drafter proposes at every position of a trace; what `folder` lacks is recorded now.

    k: lattice entries of a slot (None: as the trace has); folder: of the user (None: in the cache).
    """
    k = k or trace.header.k
    cached, settings = _place(trace, task, drafter, settings, k)
    place = folder or cached
    with writing_to(place) if folder else making(place, f"what {drafter.name} drafts for {task}"):
        header = TraceHeader(
            drafter.longest or trace.header.h, k, trace.header.vocab_size, trace.header.eos_token_ids, settings, []
        )
        known: dict[str, TracedExample] = {}
        with suppress(*(() if folder else (RescoreError,))):  # a broken one in the cache counts as none
            if (place / HEADER_FILE).is_file():
                header, known = _read(place, trace, h=header.h, settings=settings)
        missing = [example for example in trace.examples if example.id not in known]
        for start in range(0, len(missing), PART_EXAMPLES):
            rows: list[dict[str, Any]] = []
            try:
                for example in missing[start : start + PART_EXAMPLES]:
                    lattice, entropies = recorded_of(drafter, example.prompt_ids, example.output_ids, k, header.h)
                    if not rows and not header.parts:  # a drafter may have fewer entries than were asked for
                        header = msgspec.structs.replace(header, k=lattice.k)
                    if lattice.k != header.k:
                        raise RescoreError(
                            f"the drafter {drafter.name} gave {lattice.k} entries a slot for {example.id}, and "
                            f"{header.k} before; a trace needs the same number everywhere"
                        )
                    rows.append(_row(example, lattice, entropies))
                    if progress:
                        done = len(trace.examples) - len(missing) + start + len(rows)
                        progress(f"draft {task}", done, len(trace.examples))
            finally:  # what was drafted before Ctrl-C or an error is kept
                if rows:
                    name = f"part-{len(header.parts):05d}"
                    write_part(place / name, rows)
                    header.parts.append(name)
                    write_json(place / HEADER_FILE, plain(header))
        if missing:
            known = {example.id: example for example in read_trace(place).examples}
    return Trace(header, tuple(known[example.id] for example in trace.examples))


def recorded_already(
    trace: Trace, drafter: LatticeDrafter, *, task: str, settings: dict[str, Any]
) -> dict[str, Lattice] | None:
    """What `drafted` would give of a drafter with a model of its own (by its identity), without that model; None where
    some of it is not recorded."""
    if isinstance(drafter, Heads) and drafter.draws_on_all:
        return {example.id: example.lattice for example in trace.examples}
    folder, settings = _place(trace, task, drafter, settings, trace.header.k)
    with suppress(RescoreError):
        _, known = _read(folder, trace, settings=settings)
        if all(example.id in known for example in trace.examples):
            return {name: example.lattice for name, example in known.items()}
    return None


def _read(folder: Path, trace: Trace, **expected: Any) -> tuple[TraceHeader, dict[str, TracedExample]]:
    """What is recorded, by example. Raises `IncompatibleError` if its header is not the expected one, or for other
    prompts and outputs than the trace has now: what makes these is no part of any settings."""
    recorded = read_trace(folder)
    check_settings(folder, recorded.header, **expected)
    known = {example.id: example for example in recorded.examples}
    for own in trace.examples:
        there = known.get(own.id, own)
        if not (np.array_equal(there.prompt_ids, own.prompt_ids) and np.array_equal(there.output_ids, own.output_ids)):
            raise IncompatibleError(
                f"{folder} holds drafts for another prompt or output of the example {own.id!r} than the trace has; use "
                "another --out"
            )
    return recorded.header, known


def _place(
    trace: Trace, task: str, drafter: LatticeDrafter, settings: dict[str, Any], k: int
) -> tuple[Path, dict[str, Any]]:
    """The folder in the cache of what is recorded, and what that is of. Raises `RescoreError` for a drafter without
    identity."""
    if not drafter.identity:
        raise RescoreError(
            f"what {type(drafter).__name__} drafts would not be known again: set its `identity`, a hash of what it "
            "drafts with"
        )
    # The task belongs to the settings of a trace that was recorded here, and need not to those of others.
    settings = {**settings, "task": task, "drafter": drafter.identity, "k": k}
    if drafter.longest is None:  # as long as the heads that are used, which need not be all
        settings["h"] = trace.header.h
    return trace_folder(f"{task}-draft", settings, k), settings


def _row(example: TracedExample, lattice: Lattice, entropies: np.ndarray) -> dict[str, Any]:
    return {
        "id": example.id, "prompt": example.prompt, "references": list(example.references), "output": example.output,
        "prompt_ids": example.prompt_ids, "output_ids": example.output_ids, "token_ids": lattice.token_ids.ravel(),
        "logps": lattice.logps.ravel(), "entropies": entropies.ravel(), "margins": example.margins,
        "group": example.group,
    }  # fmt: skip
