"""Data of the lattice explorer: of some examples of every task, what each step of each decode proposed and accepted.

Built for a page: JSON-ready, texts made harmless.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rescore.acceptance.rules import kind_of, unmarked
from rescore.accounting import block_efficiency
from rescore.reports.charts.style import SOURCE_COLOURS, Palette, decode_name
from rescore.reports.joined import JoinedLattices
from rescore.reports.sources import TaskView
from rescore.reports.token_text import excerpt, harmless, token_texts
from rescore.reports.walks import Candidate, slots_at, walk_of
from rescore.runs.records import SOURCES, ExampleRecord
from rescore.tracing import TracedExample

SHOWN = 8  # entries of a slot that are shown
JOINED = 4  # candidates of each source that are shown
PROBABILITY = 10_000  # probabilities are whole numbers of this
MOST_REFERENCES = 3
Records = Mapping[int, ExampleRecord]  # of one example, by the place of the decode in the results


def explorer_data(view: TaskView, palette: Palette, tokenizer: Any, *, examples: int) -> dict[str, Any]:
    """What the page's script reads of one view.

    label; h, k; shown: entries of each slot; lattices: whether the trace is there.
    sources: name and colour of each kind of drafter, which the examples name by its place.
    decodes: name, rescorer, p, colour and kind of acceptance of each; walked: the one to begin with.
    vocabulary: id -> text.
    chosen: a sentence on which examples these are; examples: see `_example`.
    """
    trace = view.run.trace(view.task)
    traced = {example.id: example for example in trace.examples} if trace else {}
    by_id: dict[str, dict[int, ExampleRecord]] = {}
    for place, r in enumerate(view.results):
        for record in view.run.records(view.task, r.rescorer, r.p):
            if record.accepted:
                by_id.setdefault(record.id, {})[place] = record
    walked = _most_telling(view)
    ids, chosen = _choose(by_id, walked, decode_name(view.results[walked].rescorer, view.results[walked].p), examples)
    joined = JoinedLattices(view.run, view.task, view.analysis.k)
    shown = [_example(by_id[name], len(view.results), traced.get(name), view.analysis.k, joined) for name in ids]
    tokens: set[int] = set()
    for name, example in zip(ids, shown, strict=True):
        tokens.update(example["output"], *(ids for slots in example["lattice"].values() for ids in slots["t"]))
        steps = [step for by_position in example["joined"].values() for step in by_position.values()]
        tokens.update(token for step in steps for slot in step for token, _, _ in slot)
        for record in by_id[name].values():
            tokens.update(record.output_ids, *record.drafts)
    return {
        "label": harmless(view.label),
        "decodes": [
            {"name": harmless(decode_name(r.rescorer, r.p)), "rescorer": harmless(r.rescorer), "p": r.p,
             "colour": palette.looks[r.rescorer].colour, "kind": kind_of(r.rescorer)}
            for r in view.results
        ],
        "walked": walked,
        "h": view.analysis.h,
        "k": view.analysis.k,
        "shown": min(SHOWN, view.analysis.k),
        "lattices": trace is not None,
        "sources": [{"name": name, "colour": SOURCE_COLOURS[name]} for name in SOURCES.values()],
        "notices": [harmless(line) for line in joined.notices],
        "chosen": harmless(chosen),
        "vocabulary": token_texts(tokenizer, tokens),
        "examples": shown,
    }  # fmt: skip


def _most_telling(view: TaskView) -> int:
    """The decode that the explorer begins with: the best rescored one with the fewest drafts."""
    results = list(enumerate(view.results))
    own = [(place, r) for place, r in results if not r.is_peer]
    rescored = [(place, r) for place, r in own if unmarked(r.rescorer) != "none" and not r.is_oracle] or own
    return min(rescored, key=lambda choice: (choice[1].p, -choice[1].block_efficiency))[0]


def _choose(by_id: Mapping[str, Records], walked: int, name: str, examples: int) -> tuple[list[str], str]:
    """Examples spread from the least to the most that a step of the decode accepts, with a sentence that says so."""

    def efficiency(example: str) -> float:
        accepted = by_id[example].get(walked, next(iter(by_id[example].values()))).accepted
        return block_efficiency([accepted])

    ranked = sorted(by_id, key=efficiency)  # stable: equals in the order of the data
    if len(ranked) <= examples:
        return ranked, f"All {len(ranked)} examples, from the fewest tokens a step to the most ({name})."
    places = np.unique(np.linspace(0, len(ranked) - 1, examples).round().astype(int))
    return [ranked[place] for place in places], (
        f"{len(places)} of {len(ranked)} examples, spread evenly from the fewest to the most tokens a step "
        f"({name}); rescore report --examples N takes more."
    )


def _example(
    records: Records, decodes: int, traced: TracedExample | None, k: int, lattices: JoinedLattices
) -> dict[str, Any]:
    """One example as the page's script reads it; lists have an entry for each decode.

    output: ids; others: the outputs of decodes that differ; same: tokens that an output shares with `output`.
    accepted, drafts: of each step (null: a decode that did not run it).
    lattice: by position `t` (ids `[h][shown]`), `p` (probabilities), `r` (the entry, from 0, at which each slot has
    what the base chose, -1: not in the top k); empty without the trace.
    among: the drafters of each decode (null: not several, or not known); origins: by step, the sources of each accepted
    token.
    joined: by drafters and position, for each accepted token what was proposed after it: token, sources, probability
    (null: not by the heads).
    """
    first = next(iter(records.values()))
    output = traced.output_ids.tolist() if traced is not None else list(first.output_ids)
    by_decode = [records.get(place) for place in range(decodes)]
    walks = [walk_of(record, output) if record else None for record in by_decode]
    positions = {step.start for walk in walks if walk for step in walk.steps}
    lattice = {position: _lattice(output, position, k, traced) for position in sorted(positions) if traced}
    joined = lattices.along(traced, filter(None, walks), top=JOINED) if traced else {}
    return {
        "id": harmless(first.id),
        "prompt": dict(zip(("head", "tail", "leftOut"), excerpt(traced.prompt), strict=True)) if traced else None,
        "references": [excerpt(text)[0] for text in traced.references[:MOST_REFERENCES]] if traced else [],
        "output": output,
        "others": {place: records[place].output_ids for place, walk in enumerate(walks) if walk and walk.differs},
        "same": [walk.shared if walk else 0 for walk in walks],
        "accepted": [record and record.accepted for record in by_decode],
        "drafts": [record and record.drafts for record in by_decode],
        "lattice": lattice,
        "among": [harmless("+".join(walk.drafters)) if walk and walk.drafters else None for walk in walks],
        "origins": [
            [[_places(names) for names in step.sources] for step in walk.steps] if walk else None for walk in walks
        ],
        "joined": {
            harmless("+".join(drafters)): {
                position: [[_candidate(of) for of in slot] for slot in slots] for position, slots in steps.items()
            }
            for drafters, steps in joined.items()
        },
    }


def _places(sources: Sequence[str]) -> list[int]:
    names = list(SOURCES.values())
    return [names.index(name) for name in sources]


def _candidate(of: Candidate) -> list[Any]:
    probability = None if of.probability is None else round(of.probability * PROBABILITY)
    return [of.token, _places(of.sources), probability]


def _lattice(output: Sequence[int], position: int, k: int, traced: TracedExample) -> dict[str, Any]:
    slots = slots_at(output, position, h=traced.lattice.h, k=k, top=SHOWN, traced=traced)
    return {
        "t": [[token for token, _ in slot.best] for slot in slots],
        "p": [[round(share * PROBABILITY) for _, share in slot.best] for slot in slots],
        "r": [-1 if slot.rank is None else slot.rank - 1 for slot in slots],
    }
