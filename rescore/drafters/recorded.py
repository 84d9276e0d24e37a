"""What drafters with a model of their own propose at every position of a trace: recorded once, as a trace itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lattices.errors import RescoreError
from lattices.lattice import Lattice
from lm.files import write_json
from lm.locks import making
from lm.records import plain
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
        elif isinstance(drafter, LatticeDrafter) and not isinstance(drafter, Heads):
            found[drafter.name] = _recorded(trace, drafter, task, settings, progress)
    return found


def _recorded(
    trace: Trace, drafter: LatticeDrafter, task: str, settings: dict[str, Any], progress: Progress | None
) -> dict[str, Lattice]:
    k = trace.header.k
    folder, settings = _place(trace, drafter, task, settings)
    with making(folder, f"what {drafter.name} drafts for {task}"):
        parts, known = _known(folder, k, settings)
        missing = [example for example in trace.examples if example.id not in known]
        header = TraceHeader(
            drafter.longest or trace.header.h, k, trace.header.vocab_size, trace.header.eos_token_ids, settings,
            parts,
        )  # fmt: skip
        for start in range(0, len(missing), PART_EXAMPLES):
            rows = []
            for example in missing[start : start + PART_EXAMPLES]:
                rows.append(_row(example, drafter, k))
                if progress:
                    done = len(trace.examples) - len(missing) + start + len(rows)
                    progress(f"draft {task}", done, len(trace.examples))
                known[example.id] = Lattice(
                    rows[-1]["token_ids"].reshape(-1, header.h, k), rows[-1]["logps"].reshape(-1, header.h, k)
                )
            name = f"part-{len(header.parts):05d}"
            write_part(folder / name, rows)
            header.parts.append(name)
            write_json(folder / HEADER_FILE, plain(header))
    return known


def recorded_already(
    trace: Trace, drafter: LatticeDrafter, *, task: str, settings: dict[str, Any]
) -> dict[str, Lattice] | None:
    """What `drafted` would give of a drafter with a model of its own (by its identity), without that model; None where
    some of it is not recorded."""
    folder, settings = _place(trace, drafter, task, settings)
    _, known = _known(folder, trace.header.k, settings)
    return known if all(example.id in known for example in trace.examples) else None


def _place(trace: Trace, drafter: LatticeDrafter, task: str, settings: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The folder of what is recorded, and what that is of."""
    # The task belongs to the settings of a trace that was recorded here, and need not to those of others.
    settings = {**settings, "task": task, "drafter": drafter.identity}
    return trace_folder(f"{task}-draft", settings, trace.header.k), settings


def _known(folder: Path, k: int, settings: dict[str, Any]) -> tuple[list[str], dict[str, Lattice]]:
    """Parts and lattices that are recorded already; a broken trace in the cache counts as none."""
    with suppress(RescoreError):
        recorded = read_trace(folder)
        check_settings(folder, recorded.header, k=k, settings=settings)
        return list(recorded.header.parts), {example.id: example.lattice for example in recorded.examples}
    return [], {}


def _row(example: TracedExample, drafter: LatticeDrafter, k: int) -> dict[str, Any]:
    lattice, entropies = drafter.record(example.prompt_ids, example.output_ids, k)
    return {
        "id": example.id, "prompt": example.prompt, "references": list(example.references), "output": example.output,
        "prompt_ids": example.prompt_ids, "output_ids": example.output_ids, "token_ids": lattice.token_ids.ravel(),
        "logps": lattice.logps.ravel(), "entropies": entropies.ravel(), "margins": example.margins,
        "group": example.group,
    }  # fmt: skip
