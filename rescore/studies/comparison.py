"""Two finished results against each other, paired by example: is B really better than A, and by how much.

Only what decodes the same outputs is compared: results of other base weights, tokenizers, prompts, limits or h are
refused with the difference. Heads, k, rescorers, p and alpha are what a comparison is about.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError, UnknownNameError
from rescore.accounting import Difference, paired_difference
from rescore.bootstrap import LEAST_GROUPS
from rescore.decoding import first_difference
from rescore.runs.evaluated import Evaluation, load_runs
from rescore.runs.records import Result
from rescore.terminal import shortened

SCHEMA = "rescore.comparison/1"
OF_BASE = ("weights_sha256", "tokenizer_sha256", "config_sha256", "tokenization_sha256")
HASHES = (*(f"base.{name}" for name in OF_BASE), "data_sha256")
SAME = (*HASHES, "base.dtype", "template", "chat", "chat_template", "max_new_tokens", "max_prompt_tokens")
PROOF = ("base.weights_sha256", "data_sha256")  # settings that both must name, or else the outputs have to tell
NEAR_TIE = {"float64": 1e-6, "float32": 1e-2, "float16": 0.1, "bfloat16": 0.5}  # of logits, in this precision
Side = tuple[str, int]  # a rescorer as typed, and p


@dataclass(frozen=True)
class Selection:
    """What to compare of two results: `rescorer` and `p` of both (None: all that both have), or those of one side."""

    rescorer: Annotated[str | None, "Compare this rescorer only; default: all that both have."] = None
    p: Annotated[int | None, "Compare results with this p only."] = None
    a_rescorer: Annotated[str | None, "Rescorer of A, as it was given."] = None
    a_p: Annotated[int | None, "Drafts a step (p) of A."] = None
    b_rescorer: Annotated[str | None, "Rescorer of B, as it was given."] = None
    b_p: Annotated[int | None, "Drafts a step (p) of B."] = None

    @property
    def of_a(self) -> tuple[str | None, int | None]:
        """Rescorer and p of A, None for any."""
        return self.a_rescorer or self.rescorer, self.p if self.a_p is None else self.a_p

    @property
    def of_b(self) -> tuple[str | None, int | None]:
        """Rescorer and p of B, None for any."""
        return self.b_rescorer or self.rescorer, self.p if self.b_p is None else self.b_p


@dataclass(frozen=True)
class SideResult:
    """One side of a row: what was run, and its block efficiency on the compared examples."""

    rescorer: str
    k: int
    p: int
    alpha: float | None
    block_efficiency: float


@dataclass(frozen=True)
class ComparedRow:
    """B against A on the `n` examples (of so many `groups`) of a task that both have; `only_a`, `only_b`: how many one
    of them lacks."""

    task: str
    h: int
    n: int
    groups: int
    only_a: int
    only_b: int
    a: SideResult
    b: SideResult
    difference: Difference


@dataclass
class Comparison:
    """All rows, and what the user should know of them (`notices`)."""

    a: str
    b: str
    rows: list[ComparedRow] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    def notice(self, line: str) -> None:
        """Adds a notice once."""
        if line not in self.notices:
            self.notices.append(line)


def compare(
    a: Annotated[Path, "Results folder of rescore eval --out or rescore suite.", "A"],
    b: Annotated[Path | None, "Another; default: A, with two rescorers or p of it.", "B"] = None,
    *,
    selection: Selection = Selection(),
    seed: Annotated[int, "Seed of the bootstrap intervals."] = 0,
) -> Comparison:
    """Compares the results in folder `b` with those in `a` (None: two rescorers of `a`), task by task.

    `seed` is the bootstrap's. Raises `IncompatibleError` with the difference for results that don't compare,
    `RescoreError` if nothing is in both, and what `load_runs` raises.
    """
    if seed < 0:
        raise RescoreError(f"--seed {seed}; a seed is 0 or more")
    chosen = selection
    other = a if b is None else b
    runs_a = load_runs(a)
    _check_known(runs_a, "A", chosen.of_a)
    if a.resolve() == other.resolve() and chosen.of_a == chosen.of_b:
        raise RescoreError(f"{a} would be compared with itself; {_advice(runs_a)}")
    runs_b = load_runs(other)
    comparison = Comparison(str(a), str(other))
    _check_known(runs_b, "B", chosen.of_b)
    for task, run_a, run_b in _run_pairs(runs_a, runs_b, comparison):
        _check_same(task, run_a, run_b, comparison)
        for side_a, side_b in _side_pairs(task, run_a, run_b, chosen, comparison):
            if row := _row(task, (run_a, side_a), (run_b, side_b), comparison, seed):
                comparison.rows.append(row)
    if not comparison.rows:
        facts = "; ".join(comparison.notices)
        raise RescoreError(f"{a} and {other} have nothing in common to compare{f' ({facts})' if facts else ''}")
    return comparison


def _advice(runs: Sequence[Evaluation]) -> str:
    """What of one folder's results can be compared with what."""
    names = list(dict.fromkeys(name for run in runs for name, _ in run.rescorers))
    ps = sorted({p for run in runs for _, p in run.rescorers})
    if len(names) > 1:
        return f"name two results, or two rescorers of it, like --a-rescorer {names[0]} --b-rescorer {names[1]}"
    if len(ps) > 1:
        return f"name two results, or two p of it, like --a-p {ps[0]} --b-p {ps[-1]}"
    return "name two results"


def _check_known(runs: Sequence[Evaluation], letter: str, wanted: tuple[str | None, int | None]) -> None:
    rescorer, p = wanted
    held = {side for run in runs for side in run.rescorers}
    if rescorer is not None and rescorer not in {name for name, _ in held}:
        raise UnknownNameError(f"rescorer of {letter}", rescorer, {name for name, _ in held})
    of_it = sorted({found for name, found in held if rescorer in (None, name)})
    if p is not None and p not in of_it and of_it != [1]:
        raise RescoreError(
            f"{letter} has no p = {p} of {rescorer or 'any rescorer'}, only {', '.join(map(str, of_it))}"
        )


def _run_pairs(
    runs_a: Sequence[Evaluation], runs_b: Sequence[Evaluation], comparison: Comparison
) -> Iterator[tuple[str, Evaluation, Evaluation]]:
    """The runs of each task that belong together: of the same k and h, or the only ones there are."""
    by_task: list[dict[str, dict[tuple[int, int], Evaluation]]] = [{}, {}]
    for held, runs in zip(by_task, (runs_a, runs_b), strict=True):
        for run in runs:
            for result in run.results:
                held.setdefault(result.task, {})[result.k, result.h] = run
    for task in dict.fromkeys([*by_task[0], *by_task[1]]):
        of_a, of_b = (held.get(task, {}) for held in by_task)
        if not of_a or not of_b:
            comparison.notice(f"{task} is only in {'A' if of_a else 'B'}: left out")
            continue
        if both := [key for key in of_a if key in of_b]:
            for key in both:
                yield task, of_a[key], of_b[key]
            for letter, keys in (("A", of_a), ("B", of_b)):
                for k, h in (key for key in keys if key not in both):
                    comparison.notice(f"{task} with k = {k}, h = {h} is only in {letter}: left out")
        elif len(of_a) == len(of_b) == 1:
            ((k_a, h_a),), ((k_b, h_b),) = of_a, of_b
            if h_a != h_b:
                raise IncompatibleError(f"A and B don't compare on {task}: h: {h_a} -> {h_b}; evaluate both with one h")
            comparison.notice(f"{task}: k = {k_a} in A and {k_b} in B")
            yield task, of_a[k_a, h_a], of_b[k_b, h_b]
        else:
            comparison.notice(f"{task}: A and B have no k and h in common: left out")


def _check_same(task: str, run_a: Evaluation, run_b: Evaluation, comparison: Comparison) -> None:
    """Raises `IncompatibleError` if the two decoded other prompts or with another base."""
    a, b = _flat(run_a.config.traces[task]), _flat(run_b.config.traces[task])
    both = [name for name in SAME if name in a and name in b]
    if changed := [
        f"{name}: {_brief(name, a[name])} -> {_brief(name, b[name])}" for name in both if a[name] != b[name]
    ]:
        raise IncompatibleError(
            f"A and B don't compare on {task}: {'; '.join(changed)}; evaluate both with the same base, data and limits"
        )
    if a.get("heads_sha256") != b.get("heads_sha256"):
        comparison.notice(f"{task}: A and B have different block heads")
    _check_outputs(task, run_a, run_b, comparison, proven=set(PROOF) <= set(both))


def _check_outputs(task: str, run_a: Evaluation, run_b: Evaluation, comparison: Comparison, *, proven: bool) -> None:
    """The base's own output of an example is the same in both, whatever drafted it."""
    outputs: list[dict[str, Any]] = [{}, {}]
    for held, run in zip(outputs, (run_a, run_b), strict=True):
        for record in run.examples:
            if record.task == task:
                held.setdefault(record.id, record.output_ids)
    common = [name for name in outputs[0] if name in outputs[1]]
    if not (differ := [name for name in common if outputs[0][name] != outputs[1][name]]):
        return
    if not proven:
        raise IncompatibleError(
            f"A and B don't compare on {task}: the example {differ[0]!r} has another output in B than in A, and not "
            "both say which base and data they are of; evaluate both with the same base, data and limits"
        )
    sides = [(run, outputs[place]) for place, run in enumerate((run_a, run_b))]
    places = {name: first_difference(outputs[0][name], outputs[1][name]) or 0 for name in differ}
    leads = [lead for run, held in sides for lead in _leads(task, run, held, places)]
    comparison.notice(
        f"{task}: {len(differ)} of {len(common)} outputs differ between A and B ({_cause(task, run_a, leads)})"
    )


def _leads(task: str, run: Evaluation, outputs: dict[str, Any], places: dict[str, int]) -> list[float]:
    """By how much the base's best logit led at these places of a run's outputs, by example, as far as that is known."""
    with suppress(RescoreError):  # the trace is gone or broken, or another one: it says nothing
        trace = run.trace(task)
        return [
            float(example.margins[places[example.id]])
            for example in (trace.examples if trace else ())
            if example.id in places and len(example.output_ids) > (place := places[example.id])
            and example.output_ids[:place].tolist() == outputs[example.id][:place]
        ]  # fmt: skip
    return []


def _cause(task: str, run: Evaluation, leads: Sequence[float]) -> str:
    """Why outputs differ, as far as the margins tell where they part."""
    if not leads:
        return "how near the choices were where they part is not known: the traces are gone"
    dtype = _flat(run.config.traces[task]).get("base.dtype", "float32")
    measured = f"where they part, the base's best logit leads by {max(leads):.4g} at most"
    if max(leads) <= NEAR_TIE.get(dtype, NEAR_TIE["float32"]):
        return f"{measured}: near-ties, decided otherwise on another device or in half precision"
    return f"{measured}, which is no near-tie in {dtype}: something else than rounding differs"


def _side_pairs(
    task: str, run_a: Evaluation, run_b: Evaluation, chosen: Selection, comparison: Comparison
) -> list[tuple[Side, Side]]:
    """What of A is compared with what of B: the same rescorer and p, unless one side was named."""
    held = [
        [(r.rescorer, r.p) for r in run.results if r.task == task] for run in (run_a, run_b)
    ]  # in the order of the results
    named = chosen.a_rescorer or chosen.b_rescorer or chosen.a_p is not None or chosen.b_p is not None
    of_a = [side for side in held[0] if _wanted(side, chosen.of_a)]
    of_b = [side for side in held[1] if _wanted(side, chosen.of_b)]
    if named:
        any_p = chosen.a_p is not None or chosen.b_p is not None
        same_name = chosen.of_a[0] is None or chosen.of_b[0] is None
        return [
            (a, b)
            for a in of_a
            for b in of_b
            if (any_p or a[1] == b[1] or "oracle" in (a[0], b[0])) and (not same_name or a[0] == b[0])
        ]
    for letter, sides, others in (("A", of_a, of_b), ("B", of_b, of_a)):
        for rescorer, p in (side for side in sides if side not in others):
            comparison.notice(f"{task}: {rescorer} with p = {p} is only in {letter}: left out")
    return [(side, side) for side in of_a if side in of_b]


def _wanted(side: Side, wanted: tuple[str | None, int | None]) -> bool:
    rescorer, p = wanted
    # The oracle verifies one draft whatever p is asked for.
    return rescorer in (None, side[0]) and (p in (None, side[1]) or side[0] == "oracle")


def _row(
    task: str, a: tuple[Evaluation, Side], b: tuple[Evaluation, Side], comparison: Comparison, seed: int
) -> ComparedRow | None:
    (run_a, side_a), (run_b, side_b) = a, b
    steps_a, steps_b = _steps(run_a, task, side_a, comparison), _steps(run_b, task, side_b, comparison)
    common = [name for name in steps_a if name in steps_b]
    if not common:
        comparison.notice(f"{task}: A and B have no example in common: left out")
        return None
    if len(common) < max(len(steps_a), len(steps_b)):
        comparison.notice(
            f"{task}: the {len(common)} examples that both have are compared, of {len(steps_a)} in A and "
            f"{len(steps_b)} in B"
        )
    kept_a, kept_b = [steps_a[name] for name in common], [steps_b[name] for name in common]
    groups = _groups(run_a, task, side_a, common)
    found = paired_difference(kept_a, kept_b, groups=groups, seed=seed)
    if found.groups < LEAST_GROUPS:
        comparison.notice(f"{task}: too few groups for an interval ({found.groups}; {LEAST_GROUPS} are needed)")
    return ComparedRow(
        task=task,
        h=_result(run_a, task, side_a).h,
        n=len(common),
        groups=found.groups,
        only_a=len(steps_a) - len(common),
        only_b=len(steps_b) - len(common),
        a=_side_result(run_a, task, side_a, kept_a),
        b=_side_result(run_b, task, side_b, kept_b),
        difference=found,
    )


def _steps(run: Evaluation, task: str, side: Side, comparison: Comparison) -> dict[str, list[int]]:
    """Accepted lengths by example."""
    found: dict[str, list[int]] = {}
    for record in run.records(task, *side):
        lengths = record.accepted
        if not all(n >= 1 for n in lengths):
            raise InvalidDataError(f"{run.folder}: example {record.id!r} of {task} has steps that accepted no token")
        if lengths:
            found[record.id] = lengths
        else:
            comparison.notice(f"{task}: example {record.id!r} has no steps in {run.folder}: left out")
    return found


def _groups(run: Evaluation, task: str, side: Side, ids: Sequence[str]) -> list[str]:
    """The groups of these examples, as A has them."""
    of_id = {record.id: record.group for record in run.records(task, *side)}
    return [of_id[name] for name in ids]


def _side_result(run: Evaluation, task: str, side: Side, kept: Sequence[Sequence[int]]) -> SideResult:
    result = _result(run, task, side)
    efficiency = sum(map(sum, kept)) / sum(map(len, kept))
    return SideResult(side[0], result.k, side[1], result.alpha, efficiency)


def _result(run: Evaluation, task: str, side: Side) -> Result:
    return next(r for r in run.results if (r.task, r.rescorer, r.p) == (task, *side))


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a trace with those of its base beside the others, `base.` before their names."""
    base = settings.get("base")
    return {**settings, **({f"base.{name}": value for name, value in base.items()} if isinstance(base, dict) else {})}


def _brief(name: str, value: Any) -> str:
    return str(value)[:12] if name in HASHES else shortened(str(value), head=60, tail=0)
