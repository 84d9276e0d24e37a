"""One example of finished results, block by block: what the lattice held, what each rescorer drafted, what was
accepted, and what the base LM wanted instead.

A block is a position of the output where a decode began a step. Rescorers that accept different lengths begin their
steps at different positions; a block lists those that began one there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lattices.errors import InvalidDataError, RescoreError, UnknownNameError
from rescore.report.token_text import token_texts, tokenizer_of
from rescore.runs.evaluated import Evaluation, load_runs
from rescore.runs.records import ExampleRecord, Result
from rescore.tracing import TracedExample

SHOWN_BLOCKS = 5
SHOWN_TOKENS = 3


@dataclass(frozen=True)
class Slot:
    """One slot of a block: the token that the base LM `wanted` there (None behind the end of the output), its `rank` in
    the slot of the lattice from 1 (None: not among the k), and the lattice's best tokens with their probabilities."""

    wanted: int | None
    rank: int | None
    best: list[tuple[int, float]]


@dataclass(frozen=True)
class Draft:
    """What one rescorer put up for a block: the winning draft of its step, and how many tokens of it were accepted."""

    rescorer: str
    p: int
    tokens: list[int]
    accepted: int


@dataclass(frozen=True)
class Block:
    """`number` from 1 in the order of `position`, the output tokens before it; `slots` 1 to h; drafts that began here.
    `slots` have no lattice where the trace is gone."""

    number: int
    position: int
    slots: list[Slot]
    drafts: list[Draft]


@dataclass(frozen=True)
class Decode:
    """One rescorer's decode of the example."""

    rescorer: str
    p: int
    alpha: float | None
    steps: int
    tokens: int


@dataclass
class Inspection:
    """All that is known of one example; `texts` of every token id that occurs; `number` of `examples` from 1; `total`
    blocks, of which `blocks` are those asked for; `prompt`, `output` and `references` None or empty where the trace is
    gone."""

    task: str
    id: str
    number: int
    examples: int
    h: int
    k: int
    prompt: str | None
    references: list[str]
    output: str | None
    decodes: list[Decode]
    total: int
    blocks: list[Block]
    texts: dict[int, str]
    notices: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return dataclasses.asdict(self)


def inspect_example(
    folder: Path,
    example: str = "1",
    *,
    task: str | None = None,
    rescorers: Collection[str] = (),
    p: int | None = None,
    k: int | None = None,
    h: int | None = None,
    steps: str = f"1-{SHOWN_BLOCKS}",
    top: int = SHOWN_TOKENS,
) -> Inspection:
    """One example of the results in a folder (of `rescore eval --out` or `rescore suite`).

    `example`: its id, or its number from 1; `task`, `k`, `h`: needed where there are several; `rescorers` as typed and
    `p` (all by default); `steps`: the blocks wanted, `3`, `1-5`, `6-` or `all`; `top`: the best so many tokens of each
    slot. Raises `RescoreError` for what is not there, and what `load_runs` raises.
    """
    if top < 1:
        raise RescoreError(f"--top {top}; show at least one token of each slot")
    run, task = _choose_run(folder, load_runs(folder), task, {"k": k, "h": h})
    results = _choose_results(run, task, rescorers, p)
    records = {(r.rescorer, r.p): run.records(task, r.rescorer, r.p) for r in results}
    ids = list(dict.fromkeys(record.id for found in records.values() for record in found))
    name = _choose_example(ids, example, task, folder)
    decodes = {side: record for side, found in records.items() for record in found if record.id == name}
    for (rescorer, _), record in decodes.items():
        _check(record, rescorer, folder)
    notices: list[str] = []
    traced = _traced(run, task, name, notices)
    output = traced.output_ids.tolist() if traced else next(iter(decodes.values())).output_ids
    h_of_run = results[0].h
    drafts = _drafts(decodes, output, notices)
    wanted = _wanted_steps(steps, len(drafts))
    blocks = [
        Block(number, position, _slots(output, position, h_of_run, results[0].k, traced, top), drafts[position])
        for number, position in enumerate(sorted(drafts), start=1)
        if number in wanted
    ]
    tokenizer, trouble = tokenizer_of(run.config.traces[task].get("base"))
    if trouble:
        notices.append(trouble)
    return Inspection(
        task=task,
        id=name,
        number=ids.index(name) + 1,
        examples=len(ids),
        h=h_of_run,
        k=results[0].k,
        prompt=traced.prompt if traced else None,
        references=list(traced.references) if traced else [],
        output=traced.output if traced else None,
        decodes=[
            Decode(r.rescorer, r.p, r.alpha, len(found.accepted), sum(found.accepted))
            for r in results
            if (found := decodes.get((r.rescorer, r.p)))
        ],
        total=len(drafts),
        blocks=blocks,
        texts=token_texts(tokenizer, _ids(blocks)),
        notices=notices,
    )


def _choose_run(
    folder: Path, runs: Sequence[Evaluation], task: str | None, wanted: dict[str, int | None]
) -> tuple[Evaluation, str]:
    """The run of a task with the k and h that are wanted (None: the only one there is)."""
    tasks = list(dict.fromkeys(name for run in runs for name in run.tasks))
    if task is None:
        if len(tasks) > 1:
            raise RescoreError(f"{folder} has several tasks; choose one with --task: {', '.join(tasks)}")
        task = tasks[0]
    elif task not in tasks:
        raise UnknownNameError("task of these results", task, tasks)
    found = [(run, _shape(run, task)) for run in runs if task in run.tasks]
    for name, value in wanted.items():
        held = sorted({shape[name] for _, shape in found})
        of_it = ", ".join(map(str, held))
        if value is None and len(held) > 1:
            raise RescoreError(f"{folder} has several {name} of {task}; choose one with --{name}: {of_it}")
        if value is not None and value not in held:
            raise RescoreError(f"{folder} has no results of {task} with {name} = {value}, only {of_it}")
        found = [(run, shape) for run, shape in found if value in (None, shape[name])]
    return found[0][0], task


def _shape(run: Evaluation, task: str) -> dict[str, int]:
    result = next(r for r in run.results if r.task == task)
    return {"k": result.k, "h": result.h}


def _choose_results(run: Evaluation, task: str, rescorers: Collection[str], p: int | None) -> list[Result]:
    of_task = [result for result in run.results if result.task == task]
    known = {result.rescorer for result in of_task}
    for name in rescorers:
        if name not in known:
            raise UnknownNameError("rescorer of these results", name, known)
    named = [r for r in of_task if not rescorers or r.rescorer in rescorers]
    found = [r for r in named if p in (None, r.p) or r.rescorer == "oracle"]
    if not found:
        held = sorted({r.p for r in named})
        raise RescoreError(f"no results of {task} with p = {p}, only {', '.join(map(str, held))}; choose another --p")
    return found


def _choose_example(ids: Sequence[str], example: str, task: str, folder: Path) -> str:
    if example in ids:
        return example
    if example.isdecimal() and 1 <= int(example) <= len(ids):
        return ids[int(example) - 1]
    if example.isdecimal():
        raise RescoreError(f"{task} has {len(ids)} examples in {folder}; give --example from 1 to {len(ids)}, or an id")
    raise UnknownNameError("example", example, ids[:200], hint=f"or give a number from 1 to {len(ids)}")


def _check(record: ExampleRecord, rescorer: str, folder: Path) -> None:
    accepted, drafts, output = record.accepted, record.drafts, record.output_ids
    where = f"{folder}: example {record.id!r} of {rescorer}"
    if len(drafts) != len(accepted):
        raise InvalidDataError(f"{where} has no draft for each of its steps; run the evaluation again")
    if sum(accepted) != len(output) or any(n < 1 or n > len(d) for n, d in zip(accepted, drafts, strict=True)):
        raise InvalidDataError(f"{where} has steps that don't add up to its output; run the evaluation again")


def _traced(run: Evaluation, task: str, name: str, notices: list[str]) -> TracedExample | None:
    trace = run.trace(task)
    if trace is None:
        notices.append("the trace of these results is gone: there are no prompt and no lattices to show")
        return None
    return next(example for example in trace.examples if example.id == name)


def _drafts(
    decodes: dict[tuple[str, int], ExampleRecord], output: Sequence[int], notices: list[str]
) -> dict[int, list[Draft]]:
    """What was drafted at each position of the output, as far as a decode's output is this one."""
    found: dict[int, list[Draft]] = {}
    for (rescorer, p), record in decodes.items():
        own, position = record.output_ids, 0
        same = next(
            (i for i, (a, b) in enumerate(zip(own, output, strict=False)) if a != b), min(len(own), len(output))
        )
        if same < max(len(own), len(output)):
            notices.append(f"{rescorer} (p = {p}) decoded another output from token {same} on; that part is not shown")
        for n, tokens in zip(record.accepted, record.drafts, strict=True):
            if position < len(output) and position <= same:
                found.setdefault(position, []).append(Draft(rescorer, p, tokens, n))
            position += n
    return found


def _slots(output: Sequence[int], position: int, h: int, k: int, traced: TracedExample | None, top: int) -> list[Slot]:
    slots = []
    for slot in range(h):
        wanted = output[position + slot] if position + slot < len(output) else None
        if traced is None:
            slots.append(Slot(wanted, None, []))
            continue
        ids = traced.lattice.token_ids[position, slot, :k].tolist()
        probabilities = np.exp(traced.lattice.logps[position, slot, :top].astype(np.float64)).tolist()
        rank = ids.index(wanted) + 1 if wanted in ids else None
        slots.append(Slot(wanted, rank, list(zip(ids[:top], probabilities[: len(ids)], strict=False))))
    return slots


def _wanted_steps(text: str, total: int) -> range:
    """The numbers of blocks that `3`, `1-5`, `6-` or `all` stand for."""
    if text.strip() == "all":
        return range(1, total + 1)
    first, dash, last = (part.strip() for part in text.partition("-"))
    if not first.isdecimal() or (last and not last.isdecimal()) or len(first + last) > 12:
        raise RescoreError(f"--steps {text}: give a number, a range like 1-5 or 6-, or all")
    begin = int(first)
    end = int(last) if last else total if dash else begin
    if last and int(last) < begin:
        raise RescoreError(f"--steps {text}: the range ends before it begins; give {last}-{first}")
    if begin < 1 or end < begin or begin > total:
        raise RescoreError(f"--steps {text}: the example has the blocks 1 to {total}; choose from these")
    return range(begin, min(end, total) + 1)


def _ids(blocks: Sequence[Block]) -> set[int]:
    found: set[int] = set()
    for block in blocks:
        found.update(token for draft in block.drafts for token in draft.tokens)
        for slot in block.slots:
            found.update(token for token, _ in slot.best)
            found.update(() if slot.wanted is None else (slot.wanted,))
    return found
