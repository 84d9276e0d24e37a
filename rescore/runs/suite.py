"""Runs a whole table of evaluations, and goes on where it was stopped, at the next example.

Each task, k and h has a results folder of its own, as `rescore eval --out` writes them; weights are tuned first and
kept; every trace is recorded once. The tables and the manifest are written when all is finished.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lattices.errors import IncompatibleError, RescoreError
from lm.files import (
    append_json_line,
    atomic_file,
    open_appending,
    read_json_lines,
    read_json_object,
    write_json,
    writing,
)
from lm.keys import key_of
from lm.locks import writing_to
from lm.records import convert_record, plain
from rescore.rescorers import load_rescorer
from rescore.runs.environment import environment
from rescore.runs.evaluation import evaluate
from rescore.runs.finished import load_run
from rescore.runs.inputs import Models, TaskInput, prepare
from rescore.runs.options import EvalOptions, Progress, Run, resolve
from rescore.runs.records import Alpha, Result, RunConfig
from rescore.runs.results import RESULTS_FILE
from rescore.runs.suite_files import (
    CSV_FILE,
    MANIFEST_FILE,
    PLAN_FILE,
    RUNS_FOLDER,
    TABLE_FILE,
    TUNED_FILE,
    SuiteDocument,
    SuiteRun,
    SuiteSweep,
)  # fmt: skip
from rescore.runs.suite_page import suite_page
from rescore.runs.suite_plan import Plan, SuiteTask
from rescore.runs.tables import results_csv
from rescore.runs.tuning import tune
from rescore.tracing import DEFAULT_K

Notify = Callable[[str], None]


@dataclass
class Suite:
    """What `run_suite` gives: its document, and whether Ctrl-C cut it short."""

    plan: Plan
    document: SuiteDocument
    interrupted: bool = False


@dataclass(frozen=True)
class _Part:
    """One evaluation of the suite."""

    task: SuiteTask
    input: TaskInput
    k: int
    h: int | None
    folder: str
    options: EvalOptions


def run_suite(
    plan: Plan, out: Path, *, source: str = "", progress: Progress | None = None, notify: Notify | None = None
) -> Suite:
    """Runs what `out` lacks of a plan; `source` is the name of its file.

    Everything that can be refused is refused before the first model runs. Ctrl-C keeps what is finished and returns it
    with `interrupted` set. Raises `IncompatibleError` with the difference if `out` belongs to another plan,
    `OutputError` if another process is writing to it.
    """
    with writing_to(out):
        return _run(plan, out, source, progress, notify)


def _run(plan: Plan, out: Path, source: str, progress: Progress | None, notify: Notify | None) -> Suite:
    _claim(out, plan)
    suite = SuiteDocument(source=source, plan=plain(plan.as_dict()), **environment())
    interrupted = False

    def tell(line: str) -> None:
        if line not in suite.notices:
            suite.notices.append(line)
            if notify:
                notify(line)

    parts = _parts(plan)
    trace_k = max(plan.k) if max(plan.k) > DEFAULT_K else None  # one trace for all k
    with _Weights(out / TUNED_FILE) as weights:
        try:
            for part in parts:
                chosen = {**plan.defaults, **plan.fixed, **_tune(plan, part, weights, trace_k, progress, tell)}
                results, interrupted = _evaluate(part, out, chosen, trace_k, progress, tell)
                suite.results += results
                if interrupted:
                    break
                suite.runs.append(SuiteRun(task=part.input.name, k=part.k, h=part.h, folder=part.folder))
        except KeyboardInterrupt:
            interrupted = True
        suite.tuned = weights.latest
    if not interrupted:
        with atomic_file(out / TABLE_FILE) as temporary:
            temporary.write_text(suite_page(suite.results, plan, source), encoding="utf-8")
        with atomic_file(out / CSV_FILE) as temporary:
            temporary.write_text(results_csv(suite.results).csv(), encoding="utf-8", newline="")
        write_json(out / MANIFEST_FILE, plain(suite))
    return Suite(plan, suite, interrupted)


def _claim(out: Path, plan: Plan) -> None:
    """Writes `plan.json`, or compares with the one that is there."""
    path, wanted = out / PLAN_FILE, plain(plan.as_dict())
    if path.is_file():
        found = read_json_object(path, missing=f"can't tell whose suite {out} holds", advice="use another --out")
        if changed := _differences(found, wanted):
            shown = "; ".join(changed[:6]) + (f"; and {len(changed) - 6} more" if len(changed) > 6 else "")
            raise IncompatibleError(f"{out} holds a suite of another plan ({shown}); use another --out")
        return
    with writing(out):
        # A killed writer's temporary file begins with a dot.
        if out.exists() and (not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())):
            raise RescoreError(f"{out} holds something else than a suite; use another --out")
    write_json(path, wanted)


def _differences(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """`name: found -> wanted` for everything that differs, names dotted; also what only one of them has."""
    changed = []
    for key in dict.fromkeys([*found, *wanted]):
        before, after = found.get(key), wanted.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changed += _differences(before, after, f"{prefix}{key}.")
        elif key not in wanted or key not in found:
            changed.append(f"{prefix}{key}: {'removed' if key in found else 'added'}")
        elif before != after:
            changed.append(f"{prefix}{key}: {before} -> {after}")
    return changed


def _parts(plan: Plan) -> list[_Part]:
    """All evaluations, each of them checked."""
    parts: list[_Part] = []
    taken: set[str] = set()
    for task in plan.tasks:
        for h in plan.h:
            # The largest k and each h are what data, models and heads can refuse.
            options = resolve(plan.options(task, k=max(plan.k), h=h))
            held = dataclasses.replace(prepare(options, Models(options))[0], data=None, given=None)
            for k in plan.k:
                name = "-".join([re.sub(r"[^\w.-]", "_", held.name), f"k{k}", *([f"h{h}"] if h else [])])
                if name in taken:
                    raise RescoreError(f"two of the tasks are called {held.name}; give one of them another name")
                taken.add(name)
                options = resolve(plan.options(task, k=k, h=h))
                parts.append(_Part(task, held, k, h, f"{RUNS_FOLDER}/{name}", options))
    return parts


class _Weights:
    """Tuned weights, kept line by line: a sweep that is finished is not run again, and no later one changes it."""

    def __init__(self, path: Path) -> None:
        with writing(path):
            self._stream = open_appending(path)
        self.kept = [
            convert_record(
                fields, SuiteSweep, where=f"{path} line {number} is no tuned weight", advice="use another --out"
            )
            for number, fields in read_json_lines(path)
        ]

    def __enter__(self) -> _Weights:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    @property
    def latest(self) -> list[SuiteSweep]:
        """The last sweep of each task, rescorer, k, h and p: one of other data or of another model is passed."""
        return list({(s.task, s.rescorer, s.k, s.h, s.p): s for s in self.kept}.values())

    def find(self, **key: Any) -> SuiteSweep | None:
        """The sweep that has these fields."""
        return next((s for s in self.kept if all(getattr(s, name) == value for name, value in key.items())), None)

    def add(self, sweep: SuiteSweep) -> None:
        """Keeps a sweep. Raises `OutputError`."""
        with writing(Path(self._stream.name)):
            append_json_line(self._stream, plain(sweep))
        self.kept.append(sweep)


def _tune(
    plan: Plan, part: _Part, weights: _Weights, trace_k: int | None, progress: Progress | None, notify: Notify
) -> dict[Run, Alpha]:
    """The tuned weights of one evaluation, those that are missing tuned now: also where the model, the data or the
    rescorer is another one than when they were tuned."""
    chosen: dict[Run, Alpha] = {}
    for rescorer, tuning in plan.tuned:
        made_of = key_of([part.input.settings, _identities([rescorer.name])], 24)
        options = dataclasses.replace(part.options, rescorers=(rescorer.name,), own_p=(), limit=tuning.limit)
        for p in rescorer.p:
            sweep = weights.find(task=part.input.name, rescorer=rescorer.name, k=part.k, h=part.h, p=p, made_of=made_of)
            if sweep is None:
                (tuned,) = tune(
                    options, alphas=tuning.alphas, ks=(part.k,), ps=(p,), trace_k=trace_k,
                    evaluated=set(part.input.groups), keep=False, progress=progress, notify=notify,
                )  # fmt: skip
                if part.options.trace is None:  # a sweep of other files must not be kept under this key
                    Models(part.options).check_unchanged(part.input.settings)
                sweep = SuiteSweep(**{f.name: getattr(tuned, f.name) for f in fields(tuned)}, h=part.h, made_of=made_of)
                weights.add(sweep)
            chosen[rescorer.name, p] = Alpha(
                alpha=sweep.alpha, source="tuned", held_out=sweep.held_out, held_out_groups=sweep.held_out_groups
            )
    return chosen


def _evaluate(
    part: _Part,
    out: Path,
    weights: dict[Run, Alpha],
    trace_k: int | None,
    progress: Progress | None,
    notify: Notify,
) -> tuple[list[Result], bool]:
    """The results of one evaluation, and whether Ctrl-C cut it short."""
    folder = out / part.folder
    if (folder / RESULTS_FILE).is_file():
        run = load_run(folder)
        if _is_finished(part, run.config):
            for line in run.config.notices:
                notify(line)
            return run.results, False
    found = evaluate(part.options, out=folder, weights=weights, trace_k=trace_k, progress=progress, notify=notify)
    return found.document.results, found.interrupted


def _is_finished(part: _Part, config: RunConfig) -> bool:
    """Whether these results are of the data, base and heads that are there now; if not, `evaluate` tells the change."""
    trace, name = config.traces.get(part.input.name, {}), part.input.name
    return (
        plain(config.options) == plain(part.options)
        and config.data == plain({name: part.input.source})
        and {**trace, "k": None} == plain({**part.input.settings, "k": None})
        and config.rescorers == _identities(part.options.rescorers)
    )


def _identities(names: Sequence[str]) -> dict[str, str]:
    """What rescorers with a weight score with, by name, as `evaluate` has it."""
    rescorers = {name: load_rescorer(name) for name in names}
    return {name: r.identity for name, r in rescorers.items() if r.alpha is not None}
