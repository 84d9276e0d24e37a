"""Data of the lattice explorer: of some examples of every task, what each step of each decode proposed and accepted.

Built for a page: JSON-ready, small (ranks instead of ids where a token is among those shown), texts made harmless.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lattices.oracle import target_ranks
from rescore.report.charts.style import Look, decode_name
from rescore.report.sources import TaskView
from rescore.report.token_text import excerpt, harmless, token_texts
from rescore.runs.records import ExampleRecord, Result
from rescore.tracing import TracedExample

SHOWN = 8  # entries of a slot that are shown
PROBABILITY = 10_000  # probabilities are whole numbers of this
MOST_REFERENCES = 3


def explorer_data(view: TaskView, looks: Mapping[str, Look], tokenizer: Any, *, examples: int) -> dict[str, Any]:
    """What the page's script reads of one view.

    `decodes`: name, p, colour of each; `vocabulary`: id -> text; `h`, `k`, `shown`; `lattices`: whether the trace is
    there; `chosen`: a sentence on which examples these are; `examples`, each with `output` (ids), `accepted[d]` and
    `drafts[d]` of decode d (null where it did not run it), `same[d]` (tokens that its output shares with `output`) and
    `lattice`: by position `t` (ids `[h][shown]`), `p` (probabilities), `r` (the entry, from 0, at which each slot has
    what the base chose, -1: not in the top k). A token of a draft is a rank (0..shown-1) or -(id + 1).
    """
    trace = view.run.trace(view.task)
    traced = {e.id: e for e in trace.examples} if trace else {}
    decodes = [(r.rescorer, r.p) for r in view.results]
    by_id: dict[str, dict[tuple[str, int], ExampleRecord]] = {}
    for rescorer, p in decodes:
        for record in view.run.records(view.task, rescorer, p):
            if record.accepted:
                by_id.setdefault(record.id, {})[rescorer, p] = record
    walked = _most_telling(view.results)
    ids, chosen = _choose(by_id, walked, examples)
    k = int(view.results[0].k)
    shown = min(SHOWN, k)
    seen: set[int] = set()
    found = [_example(name, by_id[name], decodes, traced.get(name), k, shown, seen) for name in ids]
    return {
        "label": harmless(view.label),
        "decodes": [
            {
                "name": harmless(decode_name(rescorer, p)),
                "rescorer": harmless(rescorer),
                "p": p,
                "colour": looks[rescorer].colour,
            }
            for rescorer, p in decodes
        ],
        "walked": decodes.index(walked),
        "h": view.analysis.h,
        "k": k,
        "shown": shown,
        "lattices": trace is not None,
        "chosen": harmless(chosen),
        "vocabulary": token_texts(tokenizer, seen),
        "examples": found,
    }


def _most_telling(results: Sequence[Result]) -> tuple[str, int]:
    """The decode that the explorer begins with: the best rescored one with the fewest drafts."""
    rescored = [r for r in results if r.rescorer not in ("none", "oracle")] or results
    best = min(rescored, key=lambda r: (r.p, -r.block_efficiency))
    return best.rescorer, best.p


def _choose(
    by_id: Mapping[str, Mapping[tuple[str, int], ExampleRecord]], walked: tuple[str, int], examples: int
) -> tuple[list[str], str]:
    """Examples spread from the least to the most that a step accepts, with a sentence that says so."""

    def efficiency(name: str) -> float:
        accepted = by_id[name].get(walked, next(iter(by_id[name].values()))).accepted
        return float(sum(accepted) / len(accepted))

    ranked = sorted(by_id, key=efficiency)  # stable: equals in the order of the data
    if len(ranked) <= examples:
        return (
            ranked,
            f"All {len(ranked)} examples, from the fewest tokens a step to the most ({decode_name(*walked)}).",
        )
    places = np.unique(np.linspace(0, len(ranked) - 1, max(examples, 1)).round().astype(int))
    return (
        [ranked[place] for place in places],
        f"{len(places)} of {len(ranked)} examples, spread evenly from the fewest to the most tokens a step "
        f"({decode_name(*walked)}); rescore report --examples N takes more.",
    )


def _example(
    name: str,
    records: Mapping[tuple[str, int], ExampleRecord],
    decodes: Sequence[tuple[str, int]],
    traced: TracedExample | None,
    k: int,
    shown: int,
    seen: set[int],
) -> dict[str, Any]:
    first = next(iter(records.values()))
    output = [int(token) for token in (traced.output_ids if traced is not None else first.output_ids)]
    accepted, same = [], []
    drafts: list[list[list[int]] | None] = []
    positions: set[int] = set()
    starts: list[list[int]] = []
    for key in decodes:
        record = records.get(key)
        begun = [0, *np.cumsum(record.accepted).tolist()[:-1]] if record else []
        starts.append(begun)
        shared = _shared(output, record.output_ids) if record else 0
        same.append(shared)
        positions |= {start for start in begun if start <= shared and start < len(output)}
        accepted.append(record.accepted if record else None)
    lattice: dict[int, dict[str, Any]] = {}
    if traced is not None:
        k = min(k, traced.lattice.k)
        for position in sorted(positions):
            lattice[position] = _slots(traced, position, k, shown)
    for place, key in enumerate(decodes):
        record = records.get(key)
        if record is None:
            drafts.append(None)
            continue
        coded = []
        for start, draft in zip(starts[place], record.drafts, strict=True):
            tops = lattice[start]["t"] if start in lattice and start <= same[place] else None
            coded.append([_coded(token, tops[j] if tops else ()) for j, token in enumerate(draft)])
            seen.update(draft)
        drafts.append(coded)
    seen.update(output)
    others = {
        place: records[key].output_ids
        for place, key in enumerate(decodes)
        if key in records and same[place] < max(len(output), len(records[key].output_ids))
    }
    for ids in others.values():
        seen.update(ids)
    for slots in lattice.values():
        seen.update(token for slot in slots["t"] for token in slot)
    prompt = excerpt(traced.prompt) if traced is not None else None
    return {
        "id": harmless(name),
        "prompt": {"head": prompt.head, "tail": prompt.tail, "leftOut": prompt.left_out} if prompt else None,
        "references": [excerpt(text).head for text in traced.references[:MOST_REFERENCES]] if traced else [],
        "output": output,
        "others": others,
        "same": same,
        "accepted": accepted,
        "drafts": drafts,
        "lattice": lattice,
    }


def _shared(output: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two outputs begin with."""
    shared = 0
    for a, b in zip(output, other, strict=False):
        if a != b:
            break
        shared += 1
    return shared


def _coded(token: int, slot: Sequence[int]) -> int:
    return slot.index(token) if token in slot else -(int(token) + 1)


def _slots(traced: TracedExample, position: int, k: int, shown: int) -> dict[str, Any]:
    ids, logps = traced.lattice.token_ids[position, :, :k], traced.lattice.logps[position, :, :k]  # [h, k]
    targets = np.full((1, ids.shape[0]), -1, dtype=np.int32)
    ahead = traced.output_ids[position : position + ids.shape[0]]
    targets[0, : len(ahead)] = ahead
    ranks = target_ranks(ids[None], targets)[0]
    probabilities = np.exp(logps[:, :shown]) * PROBABILITY
    return {
        "t": ids[:, :shown].tolist(),
        "p": probabilities.round().astype(int).tolist(),
        "r": [int(rank) if rank < k else -1 for rank in ranks],
    }
