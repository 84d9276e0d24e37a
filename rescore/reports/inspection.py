"""One example of finished results, block by block: what the lattice had, what each rescorer drafted, what was
accepted, and what the base LM wanted instead.

A block is a position of the output where a decode began a step. Rescorers that accept different lengths begin their
steps at different positions; a block lists those that began one there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from lattices.errors import InvalidDataError, RescoreError, UnknownNameError
from rescore.acceptance.rules import mark_of, unmarked
from rescore.options import Spec
from rescore.reports.token_text import token_texts, tokenizer_of
from rescore.reports.walks import Candidate, Slot, slots_at, walk_of
from rescore.runs.evaluated import Evaluation
from rescore.runs.records import ExampleRecord, Result
from rescore.studies.records import Record
from rescore.suites.files import load_runs

SHOWN_BLOCKS = 5
SHOWN_TOKENS = 3


@dataclass(frozen=True)
class Draft:
    """What one rescorer put up for a block: the winning draft of its step, and how many tokens of it were accepted.

    sources: of each of these, which drafters had proposed it (empty: one drafter, or not known).
    """

    rescorer: str
    p: int
    tokens: list[int]
    accepted: int
    sources: list[tuple[str, ...]]


@dataclass(frozen=True)
class Joined:
    """What several drafters proposed together along the accepted tokens of a block.

    drafters: their specs; slots: from slot 2 on, the candidates after the tokens before.
    """

    drafters: list[str]
    slots: list[list[Candidate]]


@dataclass(frozen=True)
class Block:
    """One block.

    number: from 1 in the order of position; position: the output tokens before it.
    slots: 1 to h, or to the end of the longest draft; without a lattice beyond the heads, and where the trace is gone.
    drafts: those that began here; joined: of each set of several drafters that they chose among.
    """

    number: int
    position: int
    slots: list[Slot]
    drafts: list[Draft]
    joined: list[Joined]


@dataclass(frozen=True)
class Decode:
    """One rescorer's decode of the example."""

    rescorer: str
    p: int
    alpha: float | None
    steps: int
    tokens: int


@dataclass(frozen=True)
class Inspection(Record):
    """All that is known of one example.

    number: of the `examples`, from 1; total: number of blocks, of which `blocks` are those asked for.
    prompt, references, output: None or empty where the trace is gone.
    texts: of every token id that occurs.
    """

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


def inspect_example(
    folder: Annotated[Path, "Folder of rescore eval --out or rescore suite.", "RESULTS"],
    example: Annotated[str, "Id of the example, or its number from 1."] = "1",
    *,
    task: Annotated[str | None, "Task, where the results have several."] = None,
    steps: Annotated[str, "Blocks to show: 3, 1-5, 6- or all.", "--show"] = f"1-{SHOWN_BLOCKS}",
    rescorers: Annotated[Sequence[Spec], "Rescorer or drafter as given; several. Default: all.", "--rescorer"] = (),
    p: Annotated[int | None, "Only the drafts with this p."] = None,
    k: Annotated[int | None, "Of a suite with several k: this one."] = None,
    h: Annotated[int | None, "Of a suite with several h: this one."] = None,
    top: Annotated[int, "Tokens of each slot of the lattice to show."] = SHOWN_TOKENS,
) -> Inspection:
    """One example of the results in a folder. Raises `RescoreError` for what is not there, and as `load_runs`."""
    from rescore.reports.joined import JoinedLattices

    if top < 1:
        raise RescoreError(f"--top {top}; show at least one token of each slot")
    run, task = _choose_run(folder, task, rescorers, k=k, h=h)
    results = _choose_results(run, task, rescorers, p)
    records = [(r, {record.id: record for record in run.records(task, r.rescorer, r.p)}) for r in results]
    ids = list(dict.fromkeys(name for _, by_id in records for name in by_id))
    name = _choose_example(ids, example, task, folder)
    decodes = [(r, by_id[name]) for r, by_id in records if name in by_id]
    for r, record in decodes:
        _check(record, f"{folder}: example {name!r} of {r.rescorer}")
    notices = []
    trace = run.trace(task)
    traced = next(of for of in trace.examples if of.id == name) if trace else None
    if traced is None:
        notices.append("the trace of these results is gone: there are no prompt and no lattices to show")
    output = traced.output_ids.tolist() if traced else decodes[0][1].output_ids
    drafts: dict[int, list[Draft]] = {}  # by position
    walks = [walk_of(record, output) for _, record in decodes]
    for (r, _), walk in zip(decodes, walks, strict=True):
        for step in walk.steps:
            drafts.setdefault(step.start, []).append(Draft(r.rescorer, r.p, step.tokens, step.accepted, step.sources))
        if walk.differs:
            notices.append(
                f"{r.rescorer} (p = {r.p}) decoded another output from token {walk.shared} on; that part is not shown"
            )
    tokenizer, trouble = tokenizer_of(run.config.base(task))
    if trouble:
        notices.append(trouble)
    positions, (h, k) = sorted(drafts), (results[0].h, results[0].k)
    chosen = {positions[number - 1]: number for number in _chosen_blocks(steps, len(positions))}
    joined: dict[int, list[Joined]] = {}
    lattices = JoinedLattices(run, task, k)
    proposed = lattices.along(traced, walks, top=top, positions=chosen) if traced else {}
    for drafters, by_position in proposed.items():
        for position, slots_there in by_position.items():
            joined.setdefault(position, []).append(Joined(list(drafters), slots_there))
    notices += lattices.notices
    blocks = []
    for position, number in chosen.items():
        longest = max(h, *(len(draft.tokens) for draft in drafts[position]))
        slots = slots_at(output, position, h=longest, k=k, top=top, traced=traced)
        blocks.append(Block(number, position, slots, drafts[position], joined.get(position, [])))
    return Inspection(
        task=task,
        id=name,
        number=ids.index(name) + 1,
        examples=len(ids),
        h=h,
        k=k,
        prompt=traced.prompt if traced else None,
        references=list(traced.references) if traced else [],
        output=traced.output if traced else None,
        decodes=[Decode(r.rescorer, r.p, r.alpha, len(of.accepted), sum(of.accepted)) for r, of in decodes],
        total=len(positions),
        blocks=blocks,
        texts=token_texts(tokenizer, _tokens(blocks)),
        notices=notices,
    )


def _choose_run(
    folder: Path, task: str | None, rescorers: Collection[str], **shape: int | None
) -> tuple[Evaluation, str]:
    """The run of a task with this k and h (None: the only one there is), by the acceptance rule of the rescorers."""
    runs = load_runs(folder)
    tasks = list(dict.fromkeys(name for run in runs for name in run.tasks))
    if task is None and len(tasks) > 1:
        raise RescoreError(f"{folder} has several tasks; choose one with --task: {', '.join(tasks)}")
    task = task or tasks[0]
    if task not in tasks:
        raise UnknownNameError("task of these results", task, tasks)
    choices = [(run, next(r for r in run.results if r.task == task)) for run in runs if task in run.tasks]
    for name, value in shape.items():
        there = sorted({getattr(result, name) for _, result in choices})
        listed = ", ".join(map(str, there))
        if value is None and len(there) > 1:
            raise RescoreError(f"{folder} has several {name} of {task}; choose one with --{name}: {listed}")
        if value is not None and value not in there:
            raise RescoreError(f"{folder} has no results of {task} with {name} = {value}, only {listed}")
        choices = [(run, result) for run, result in choices if value in (None, getattr(result, name))]
    rules = dict.fromkeys(map(mark_of, rescorers)) or dict.fromkeys(result.mark for _, result in choices)
    if len(rules) > 1:
        listed = ", ".join(rule.strip() or "greedy" for rule in rules)
        raise RescoreError(
            f"{folder} has several acceptance rules of {task} ({listed}); choose one with --rescorer, as in "
            f"--rescorer '{unmarked(choices[0][1].rescorer)}{list(rules)[-1]}'"
        )
    return next((run for run, result in choices if result.mark in rules), choices[0][0]), task


def _choose_results(run: Evaluation, task: str, rescorers: Collection[str], p: int | None) -> list[Result]:
    of_task = [result for result in run.results if result.task == task]
    known = {result.rescorer for result in of_task}
    for name in rescorers:
        if name not in known:
            raise UnknownNameError("rescorer of these results", name, known)
    named = [r for r in of_task if not rescorers or r.rescorer in rescorers]
    chosen = [r for r in named if p in (None, r.p) or r.is_oracle]
    if not chosen:
        there = ", ".join(map(str, sorted({r.p for r in named})))
        raise RescoreError(f"no results of {task} with p = {p}, only {there}; choose another --p")
    return chosen


def _choose_example(ids: Sequence[str], example: str, task: str, folder: Path) -> str:
    if example in ids:
        return example
    if example.isdecimal() and 1 <= int(example) <= len(ids):
        return ids[int(example) - 1]
    if example.isdecimal():
        raise RescoreError(f"{task} has {len(ids)} examples in {folder}; give --example from 1 to {len(ids)}, or an id")
    raise UnknownNameError("example", example, ids[:200], hint=f"or give a number from 1 to {len(ids)}")


def _check(record: ExampleRecord, where: str) -> None:
    accepted, drafts = record.accepted, record.drafts
    if len(drafts) != len(accepted):
        raise InvalidDataError(f"{where} has no draft for each of its steps; run the evaluation again")
    fit = all(1 <= n <= len(draft) for n, draft in zip(accepted, drafts, strict=True))
    if sum(accepted) != len(record.output_ids) or not fit:
        raise InvalidDataError(f"{where} has steps that don't add up to its output; run the evaluation again")


def _chosen_blocks(text: str, total: int) -> range:
    """The numbers of blocks that `3`, `1-5`, `6-` or `all` stand for."""
    if text.strip() == "all":
        return range(1, total + 1)
    first, dash, last = (part.strip() for part in text.partition("-"))
    if not first.isdecimal() or (last and not last.isdecimal()) or len(first + last) > 12:
        raise RescoreError(f"--show {text}: give a number, a range like 1-5 or 6-, or all")
    begin = int(first)
    end = int(last) if last else total if dash else begin
    if last and end < begin:
        raise RescoreError(f"--show {text}: the range ends before it begins; give {last}-{first}")
    if not 1 <= begin <= total:
        raise RescoreError(f"--show {text}: the example has the blocks 1 to {total}; choose from these")
    return range(begin, min(end, total) + 1)


def _tokens(blocks: Iterable[Block]) -> set[int]:
    tokens: set[int] = set()
    for block in blocks:
        tokens.update(*(draft.tokens for draft in block.drafts))
        tokens.update(of.token for joined in block.joined for slot in joined.slots for of in slot)
        for slot in block.slots:
            tokens.update(token for token, _ in slot.best)
            tokens.update(() if slot.wanted is None else (slot.wanted,))
    return tokens
