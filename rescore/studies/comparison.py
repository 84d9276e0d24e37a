"""Two finished results against each other, paired by example: is B really better than A, and by how much.

Only what decodes the same outputs is compared: results of other base weights, tokenizers, prompts, limits or h are
refused with the difference. Heads, k, rescorers, p and alpha are what a comparison is about. Results by another
acceptance rule have other outputs: they are compared where they are named, and told apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError, UnknownNameError
from lm.records import object_of
from rescore.acceptance import first_difference
from rescore.acceptance.rules import is_lossy, mark_of
from rescore.accounting import Difference, block_efficiency, paired_difference
from rescore.bootstrap import LEAST_GROUPS
from rescore.checks import NEAR_TIE
from rescore.runs.evaluated import Evaluation
from rescore.runs.inputs import add_notice
from rescore.runs.records import Result
from rescore.studies.records import Record, record_of
from rescore.studies.tables import comparison_table
from rescore.suites.files import load_runs
from rescore.table import Table, joined
from rescore.terminal import shortened

SCHEMA = "rescore.comparison/1"
OF_BASE = ("weights_sha256", "tokenizer_sha256", "config_sha256", "tokenization_sha256")
HASHES = (*(f"base.{name}" for name in OF_BASE), "data_sha256")
SAME = (*HASHES, "base.dtype", "template", "chat", "chat_template", "max_new_tokens", "max_prompt_tokens")
PROOF = ("base.weights_sha256", "data_sha256")  # settings that both must name, or else the outputs have to tell
Choice = tuple[str | None, int | None]  # a rescorer and p, None for any


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
    def of_a(self) -> Choice:
        """Rescorer and p of A."""
        return self.a_rescorer or self.rescorer, self.p if self.a_p is None else self.a_p

    @property
    def of_b(self) -> Choice:
        """Rescorer and p of B."""
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
class Comparison(Record):
    """All rows, and what the user should know of them (`notices`)."""

    a: str
    b: str
    rows: list[ComparedRow] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {"schema": SCHEMA, **super().as_dict()}

    def tables(self) -> list[Table]:
        """One table, a line for each row."""
        return [comparison_table(self)]

    def __str__(self) -> str:
        return joined(self.tables())

    def notice(self, line: str) -> None:
        """Adds a notice once."""
        add_notice(self.notices, None, line)


def compare(
    a: Evaluation, b: Evaluation | None = None, *, selection: Selection = Selection(), seed: int = 0
) -> Comparison:
    """Compares the results of `b` with those of `a` (None: two rescorers of `a`), task by task.

    `seed` is the bootstrap's. Raises `IncompatibleError` with the difference for results that don't compare,
    `RescoreError` if nothing is in both.
    """
    runs_a = a.at_each_k()
    runs_b = runs_a if b is None or b is a else b.at_each_k()
    name_a, name_b = (str(side.folder or "results in memory") for side in (a, b or a))
    comparison = Comparison(name_a, name_b)
    return _compare(comparison, runs_a, runs_b, selection, seed)


def compare_folders(
    a: Annotated[Path, "Results folder of rescore eval --out or rescore suite.", "A"],
    b: Annotated[Path | None, "Another; default: A, with two rescorers or p of it.", "B"] = None,
    *,
    selection: Selection = Selection(),
    seed: Annotated[int, "Seed of the bootstrap intervals."] = 0,
) -> Comparison:
    """Compares the results in folder `b` with those in `a` (None: two rescorers of `a`), task by task.

    Raises as `compare` and `load_runs`.
    """
    other = a if b is None else b
    runs_a = load_runs(a)
    runs_b = runs_a if a.resolve() == other.resolve() else load_runs(other)
    return _compare(Comparison(str(a), str(other)), runs_a, runs_b, selection, seed)


def _compare(
    comparison: Comparison, runs_a: Sequence[Evaluation], runs_b: Sequence[Evaluation], chosen: Selection, seed: int
) -> Comparison:
    if seed < 0:
        raise RescoreError(f"--seed {seed}; a seed is 0 or more")
    _check_choice(runs_a, "A", *chosen.of_a)
    if runs_a is runs_b and chosen.of_a == chosen.of_b:
        raise RescoreError(f"{comparison.a} would be compared with itself; {_advice(runs_a)}")
    _check_choice(runs_b, "B", *chosen.of_b)
    marks = tuple(None if name is None else mark_of(name) for name, _ in (chosen.of_a, chosen.of_b))
    for task, run_a, run_b in _run_pairs(runs_a, runs_b, marks, comparison):
        _check_same(task, run_a, run_b, comparison)
        for result_a, result_b in _result_pairs(task, run_a, run_b, chosen, comparison):
            of_a, of_b = _drafters(run_a, result_a), _drafters(run_b, result_b)
            if result_a.rescorer == result_b.rescorer and of_a != of_b:
                comparison.notice(f"{task}: {result_a.rescorer} chose among other drafters in A than in B")
            if row := compared_row((run_a, result_a), (run_b, result_b), comparison, seed):
                comparison.rows.append(row)
    if not comparison.rows:
        facts = f" ({'; '.join(comparison.notices)})" if comparison.notices else ""
        raise RescoreError(f"{comparison.a} and {comparison.b} have nothing in common to compare{facts}")
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


def _check_choice(runs: Sequence[Evaluation], letter: str, rescorer: str | None, p: int | None) -> None:
    evaluated = {pair for run in runs for pair in run.rescorers}
    if rescorer is not None and rescorer not in {name for name, _ in evaluated}:
        raise UnknownNameError(f"rescorer of {letter}", rescorer, {name for name, _ in evaluated})
    ps = sorted({drafts for name, drafts in evaluated if rescorer in (None, name)})
    if p is not None and p not in ps and ps != [1]:
        raise RescoreError(f"{letter} has no p = {p} of {rescorer or 'any rescorer'}, only {', '.join(map(str, ps))}")


def _run_pairs(
    runs_a: Sequence[Evaluation],
    runs_b: Sequence[Evaluation],
    marks: tuple[str | None, ...],
    comparison: Comparison,
) -> Iterator[tuple[str, Evaluation, Evaluation]]:
    """The runs of each task that belong together: of the same k, h and acceptance rule, or the only ones there are.

    marks: of the rules of A and B, where their rescorers are named, which may then be two.
    """
    # Of A and B: task -> k, h and rule -> run
    by_task: list[dict[str, dict[tuple[int, int, str], Evaluation]]] = [{}, {}]
    for runs, tasks, mark in zip((runs_a, runs_b), by_task, marks, strict=True):
        for run in runs:
            for result in run.results:
                if mark in (None, result.mark):
                    rule = result.mark if None in marks else ""
                    tasks.setdefault(result.task, {})[result.k, result.h, rule] = run
    for task in dict.fromkeys([*by_task[0], *by_task[1]]):
        of_a, of_b = (tasks.get(task, {}) for tasks in by_task)
        if not of_a or not of_b:
            comparison.notice(f"{task} is only in {'A' if of_a else 'B'}: left out")
        elif both := [key for key in of_a if key in of_b]:
            for key in both:
                yield task, of_a[key], of_b[key]
            for letter, keys in (("A", of_a), ("B", of_b)):
                for k, h, rule in (key for key in keys if key not in both):
                    comparison.notice(f"{task} with k = {k}, h = {h}{rule} is only in {letter}: left out")
        elif len(of_a) == len(of_b) == 1:
            ((k_a, h_a, _), run_a), ((k_b, h_b, _), run_b) = *of_a.items(), *of_b.items()
            if h_a != h_b:
                raise IncompatibleError(f"A and B don't compare on {task}: h: {h_a} -> {h_b}; evaluate both with one h")
            if k_a != k_b:
                comparison.notice(f"{task}: k = {k_a} in A and {k_b} in B")
            yield task, run_a, run_b
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
    rules = [next(r.mark for r in run.results if r.task == task) for run in (run_a, run_b)]
    for letter, rule in zip("AB", rules, strict=True):
        if rule:  # so that nobody takes the sides for decodes of the same text
            what = "LOSSY, its outputs are not the base's" if is_lossy(rule) else "its outputs are drawn"
            comparison.notice(f"{task}: {letter} is{rule}: {what}; the sides decode other texts")
    if any(rules):
        return
    outputs_a, outputs_b = _outputs(run_a, task), _outputs(run_b, task)
    common = [name for name in outputs_a if name in outputs_b]
    if not (differ := [name for name in common if outputs_a[name] != outputs_b[name]]):
        return
    if not set(PROOF) <= set(both):
        raise IncompatibleError(
            f"A and B don't compare on {task}: the example {differ[0]!r} has another output in B than in A, and not "
            "both say which base and data they are of; evaluate both with the same base, data and limits"
        )
    places = {name: first_difference(outputs_a[name], outputs_b[name]) or 0 for name in differ}
    leads = [*_leads(task, run_a, outputs_a, places), *_leads(task, run_b, outputs_b, places)]
    cause = _cause(leads, a.get("base.dtype", "float32"))
    comparison.notice(f"{task}: {len(differ)} of {len(common)} outputs differ between A and B ({cause})")


def _drafters(run: Evaluation, result: Result) -> list[str]:
    """What a result's rescorer chose among, with hashes."""
    key = (result.rescorer, result.p, result.k)
    runs = run.config.runs.get(result.task, ())
    return next((of.drafters for of in runs if (of.rescorer, of.p, of.k) == key), [])


def _outputs(run: Evaluation, task: str) -> dict[str, list[int]]:
    """The output of each example, by the first rescorer that decoded it."""
    outputs: dict[str, list[int]] = {}
    for record in run.examples:
        if record.task == task:
            outputs.setdefault(record.id, record.output_ids)
    return outputs


def _leads(task: str, run: Evaluation, outputs: dict[str, list[int]], places: dict[str, int]) -> list[float]:
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


def _cause(leads: Sequence[float], dtype: str) -> str:
    """Why outputs differ, as far as the margins tell where they part."""
    if not leads:
        return "how near the choices were where they part is not known: the traces are gone"
    measured = f"where they part, the base's best logit leads by {max(leads):.4g} at most"
    if max(leads) <= NEAR_TIE.get(dtype, NEAR_TIE["float32"]):
        return f"{measured}: near-ties, decided otherwise on another device or in half precision"
    return f"{measured}, which is no near-tie in {dtype}: something else than rounding differs"


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a trace with those of its base beside the others, `base.` before their names."""
    return {**settings, **{f"base.{name}": value for name, value in object_of(settings, "base").items()}}


def _brief(name: str, value: Any) -> str:
    return str(value)[:12] if name in HASHES else shortened(str(value), head=60, tail=0)


def _result_pairs(
    task: str, run_a: Evaluation, run_b: Evaluation, chosen: Selection, comparison: Comparison
) -> list[tuple[Result, Result]]:
    """What of A is compared with what of B: the same rescorer and p, unless one side was named."""
    of_a = [r for r in run_a.results if r.task == task and _is_chosen(r, chosen.of_a)]
    of_b = [r for r in run_b.results if r.task == task and _is_chosen(r, chosen.of_b)]
    any_p = chosen.a_p is not None or chosen.b_p is not None
    if any_p or chosen.a_rescorer or chosen.b_rescorer:
        same_name = chosen.of_a[0] is None or chosen.of_b[0] is None
        return [
            (a, b)
            for a in of_a
            for b in of_b
            if (any_p or a.p == b.p or a.is_oracle or b.is_oracle) and (not same_name or a.rescorer == b.rescorer)
        ]
    by_side = [{(r.rescorer, r.p): r for r in results} for results in (of_a, of_b)]
    for letter, sides, others in (("A", *by_side), ("B", *by_side[::-1])):
        for rescorer, p in (side for side in sides if side not in others):
            comparison.notice(f"{task}: {rescorer} with p = {p} is only in {letter}: left out")
    return [(result, by_side[1][side]) for side, result in by_side[0].items() if side in by_side[1]]


def _is_chosen(result: Result, choice: Choice) -> bool:
    rescorer, p = choice
    # The oracle verifies one draft whatever p is asked for.
    return rescorer in (None, result.rescorer) and (p in (None, result.p) or result.is_oracle)


def compared_row(
    a: tuple[Evaluation, Result], b: tuple[Evaluation, Result], comparison: Comparison, seed: int
) -> ComparedRow | None:
    """One result of a task against another, on the examples that both have; None, and a notice, where there are none.

    Raises `InvalidDataError` for steps that make no sense.
    """
    result_a, result_b = a[1], b[1]
    task = result_a.task
    steps_a, steps_b = _steps(*a, comparison), _steps(*b, comparison)
    common = [name for name in steps_a if name in steps_b]
    if not common:
        comparison.notice(f"{task}: A and B have no example in common: left out")
        return None
    if len(common) < max(len(steps_a), len(steps_b)):
        comparison.notice(
            f"{task}: the {len(common)} examples that both have are compared, of {len(steps_a)} in A and "
            f"{len(steps_b)} in B"
        )
    accepted_a, accepted_b = ([steps[name][0] for name in common] for steps in (steps_a, steps_b))
    groups = [steps_a[name][1] for name in common]
    difference = paired_difference(accepted_a, accepted_b, groups=groups, seed=seed)
    if difference.groups < LEAST_GROUPS:
        comparison.notice(f"{task}: too few groups for an interval ({difference.groups}; {LEAST_GROUPS} are needed)")
    return ComparedRow(
        task=task,
        h=result_a.h,
        n=len(common),
        groups=difference.groups,
        only_a=len(steps_a) - len(common),
        only_b=len(steps_b) - len(common),
        a=record_of(SideResult, result_a, block_efficiency=block_efficiency(accepted_a)),
        b=record_of(SideResult, result_b, block_efficiency=block_efficiency(accepted_b)),
        difference=difference,
    )


def _steps(run: Evaluation, result: Result, comparison: Comparison) -> dict[str, tuple[list[int], str]]:
    steps: dict[str, tuple[list[int], str]] = {}
    for record in run.records(result.task, result.rescorer, result.p):
        if not all(n >= 1 for n in record.accepted):
            raise InvalidDataError(
                f"{run.folder}: example {record.id!r} of {result.task} has steps that accepted no token"
            )
        if record.accepted:
            steps[record.id] = record.accepted, record.group
        else:
            comparison.notice(f"{result.task}: example {record.id!r} has no steps in {run.folder}: left out")
    return steps
