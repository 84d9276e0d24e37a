"""Drafts as a fork of llama.cpp logs them with `LLAMA_SPEC_DUMP`, and the outputs they led to, as a trace.

A line of the dump is a verify step, in order: `{"step", "seq", "n_draft", "n_accepted", "pos": [{"i", "tok", "p",
"top": [{"tok", "p"}]}]}`, drafted tokens with the drafter's top candidates. It lacks the token that the target adds at
each step, so a dump alone says neither what the output was nor what a rejected draft should have been: the tokens that
the server gave back are needed, `{"seq", "output_ids"}` a line, in the order in which each sequence's slot served them.
Of a sequence, a step begins where the one before ended, and must agree with the output there.

Known are lattices at positions where steps began. Elsewhere the trace proposes nothing: entries that were not logged
are ids beyond the vocabulary, which no output has. Source: docs/interop.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lattices.lattice import put_first
from lm.files import read_json_lines, sha256_of_file
from lm.records import Count, convert_record
from rescore.checks import check_k
from rescore.imports.importing import Imported, Row
from rescore.tasks.groups import digest
from rescore.tracing import TraceHeader

ADVICE = "get or make it again"
NOT_LOGGED = -100.0  # log-probability of entries that stand for nothing
MISSING = ("entropies", "margins", "other entries of slot 1", "lattices at positions where no step began")
NOTICE = (
    "the lattices of this trace were logged where steps began only: none replays these steps, and what accepts more "
    "lands where nothing is known, so it reads as a lower bound"
)


class Candidate(msgspec.Struct, frozen=True):
    """A token that the drafter thought of."""

    tok: Count
    p: float


class Drafted(msgspec.Struct, frozen=True):
    """A drafted token, number i of its step from 0, with the drafter's top candidates there."""

    i: Count
    tok: Count
    p: float
    top: list[Candidate] = []


class Step(msgspec.Struct, frozen=True):
    """A verify step of a sequence."""

    step: Count
    seq: Count
    n_draft: Count
    n_accepted: Count
    pos: list[Drafted]


class ServedOutput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a slot of the server gave back for a prompt."""

    output_ids: list[Count]
    seq: Count = 0
    id: str | None = None
    prompt: str = ""
    prompt_ids: list[Count] = []
    output: str | None = None
    references: list[str] = []


Placed = dict[int, Step]  # steps of an output by the position of its token where they began


def of_dump(dump: Path, outputs: Path | None, *, k: int, limit: int | None) -> Imported:
    """The outputs with the lattices that the dump has of them; k: entries of a slot, at most.

    Raises `RescoreError` without outputs, `InvalidDataError` for lines that break the format, `IncompatibleError` for
    outputs that the steps do not fit.
    """
    if outputs is None:
        raise RescoreError(
            f"{dump} lacks the tokens that the target chose, so it is not enough; give --outputs FILE, JSON lines with "
            "seq and output_ids (llama-server gives them for return_tokens)"
        )
    check_k(k)
    steps = list(_steps(dump))
    served = [
        convert_record(fields, ServedOutput, where=f"{outputs} line {number}", advice=ADVICE)
        for number, fields in read_json_lines(outputs)
    ]
    if not steps or not served:
        raise InvalidDataError(f"{outputs if steps else dump} is empty; {ADVICE}")
    if empty := [place for place, each in enumerate(served) if not each.output_ids]:
        raise InvalidDataError(f"{outputs}: output {empty[0]} has no tokens; {ADVICE}")
    placed = _placed(steps, served, dump)
    ids = [max(each.output_ids + each.prompt_ids) for each in served]
    vocab_size = 1 + max(ids + [max([d.tok, *(c.tok for c in d.top)]) for step in steps for d in step.pos])
    h = 1 + max(step.n_draft for step in steps)
    k = min(k, max([1, *(len({d.tok, *(c.tok for c in d.top)}) for step in steps for d in step.pos)]))
    names = [each.id or f"{dump.stem}:{place}" for place, each in enumerate(served)]
    rows = (
        _row(name, each, of, h=h, k=k, vocab_size=vocab_size)
        for name, each, of in list(zip(names, served, placed, strict=True))[:limit]
    )
    settings: dict[str, Any] = {
        "data_sha256": digest(sha256_of_file(dump) + sha256_of_file(outputs)),
        "imported": {"from": "llama-cpp", "steps": len(steps), "missing": list(MISSING)},
        "notice": NOTICE,
    }
    # Beyond the vocabulary there is an id for every entry of a slot that was not logged.
    return Imported(rows, len(served), lambda: TraceHeader(h, k, vocab_size + k, [], settings, []))


def _steps(dump: Path) -> Iterator[Step]:
    for number, fields in read_json_lines(dump):
        where = f"{dump} line {number}"
        step = convert_record(fields, Step, where=where, advice=ADVICE)
        if len(step.pos) != step.n_draft or not step.n_accepted <= step.n_draft:
            raise InvalidDataError(
                f"{where}: {step.n_draft} drafted tokens, {len(step.pos)} in pos, {step.n_accepted} accepted; {ADVICE}"
            )
        if any(each.i != place for place, each in enumerate(step.pos)):
            raise InvalidDataError(f"{where}: pos is not in order; {ADVICE}")
        if any(not 0 <= p <= 1 for each in step.pos for p in (each.p, *(c.p for c in each.top))):
            raise InvalidDataError(f"{where}: a p is no probability; {ADVICE}")
        yield step


def _placed(steps: Sequence[Step], served: Sequence[ServedOutput], dump: Path) -> list[Placed]:
    """The steps of each output. Raises `IncompatibleError` for the first that does not fit."""
    placed: list[Placed] = [{} for _ in served]
    waiting = {seq: [i for i, each in enumerate(served) if each.seq == seq] for seq in {each.seq for each in served}}
    place = dict.fromkeys(waiting, 0)

    def next_output(seq: int) -> int | None:
        """The output that goes on; one whose last token has been reached takes no step more."""
        while waiting[seq] and place[seq] >= len(served[waiting[seq][0]].output_ids) - 1:
            waiting[seq].pop(0)
            place[seq] = 0
        return waiting[seq][0] if waiting[seq] else None

    for step in steps:
        number = next_output(step.seq) if step.seq in waiting else None
        if number is None:
            raise IncompatibleError(
                f"{dump}: step {step.step} of seq {step.seq} belongs to no output; give --outputs that hold them all"
            )
        at = place[step.seq]
        ahead = served[number].output_ids[at + 1 :]
        drafted = [each.tok for each in step.pos]
        # The last step may have accepted tokens that the server dropped: it had reached its end.
        accepted = drafted[: step.n_accepted][: len(ahead)]
        rejected = drafted[step.n_accepted : step.n_accepted + 1]
        if accepted != ahead[: len(accepted)] or (
            rejected and rejected == ahead[step.n_accepted : step.n_accepted + 1]
        ):
            raise IncompatibleError(
                f"{dump}: step {step.step} of seq {step.seq} accepted {step.n_accepted} drafted tokens, which are not "
                f"those of output {number} from token {at + 1} on: outputs in another order, sampled ones, or steps "
                "that were not logged"
            )
        placed[number][at] = step
        place[step.seq] = at + step.n_accepted + 1
    if left := [seq for seq in waiting if next_output(seq) is not None]:
        raise IncompatibleError(
            f"{dump} ends before the outputs of seq {left[0]} do; it is cut short, or of other outputs"
        )
    return placed


def _row(name: str, served: ServedOutput, steps: Placed, *, h: int, k: int, vocab_size: int) -> Row:
    t = len(served.output_ids)
    token_ids = np.tile(
        np.arange(vocab_size, vocab_size + k, dtype=np.int32), (t, h, 1)
    )  # entries that stand for nothing
    logps = np.full((t, h, k), NOT_LOGGED, dtype=np.float32)
    token_ids[:, 0, 0], logps[:, 0, 0] = served.output_ids, 0.0  # its probability is not known
    for at, step in steps.items():
        for slot, drafted in enumerate(step.pos, start=1):
            by_token = {c.tok: c.p for c in drafted.top} | {drafted.tok: drafted.p}
            entries = sorted(by_token.items(), key=lambda entry: (-entry[1], entry[0]))[:k]
            for entry, (token, p) in enumerate(entries):
                token_ids[at, slot, entry] = token
                logps[at, slot, entry] = max(math.log(p), NOT_LOGGED) if p else NOT_LOGGED
            put_first(token_ids[at, slot][None], logps[at, slot][None], np.array([drafted.tok]))
    return {
        "id": name, "prompt": served.prompt, "references": served.references, "output": served.output,
        "prompt_ids": np.asarray(served.prompt_ids, dtype=np.int32),
        "output_ids": np.asarray(served.output_ids, dtype=np.int32), "token_ids": token_ids.ravel(),
        "logps": logps.ravel(), "entropies": np.zeros(t * h, dtype=np.float32),
        "margins": np.zeros(t, dtype=np.float32), "group": digest(served.prompt or name),
    }  # fmt: skip
