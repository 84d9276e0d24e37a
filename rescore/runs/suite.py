"""Runs a whole table of evaluations, and goes on where it was stopped, at the next example.

Each task, k and h has a results folder of its own, as `rescore eval --out` writes them; weights are tuned first and
kept; every trace is recorded once. The tables and the manifest are written when all is finished.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
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
from rescore.rescorers import WeightedRescorer, load_rescorer
from rescore.runs.evaluation import evaluate
from rescore.runs.finished import load_run
from rescore.runs.inputs import EvalOptions, Models, Progress, Run, TaskInput, prepare, resolve
from rescore.runs.results import RESULTS_FILE, environment
from rescore.runs.suite_files import CSV_FILE, MANIFEST_FILE, PLAN_FILE, RUNS_FOLDER, SCHEMA, TABLE_FILE, TUNED_FILE
from rescore.runs.suite_plan import Plan, SuiteRescorer, SuiteTask, SuiteTuning
from rescore.runs.suite_table import csv_table, suite_page
from rescore.runs.tuning import tune
from rescore.tracing import DEFAULT_K

Notify = Callable[[str], None]
CHOSEN = ("alpha", "held_out", "held_out_groups")  # of a tuned weight: what a result says of it
SWEPT = ("alphas", "block_efficiency", *CHOSEN)  # what is kept of a sweep

RUN = ("task", "rescorer", "k", "h", "p")  # what a sweep is of, as far as its line says it


@dataclass
class Suite:
    """What `run_suite` gives: the plan, `runs` (task, k, h, folder below `out`), `results` of all (fields of
    `rescore.runs.results.Result`, and `h`), `tuned` weights, notices, and whether Ctrl-C cut it short."""

    plan: Plan
    source: str
    runs: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    tuned: list[dict[str, Any]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    interrupted: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The JSON document, `suite.json`."""
        return {
            "schema": SCHEMA, "source": self.source, "plan": self.plan.as_dict(), **environment(), "runs": self.runs,
            "results": self.results, "tuned": self.tuned, "notices": self.notices,
        }  # fmt: skip


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
    suite = Suite(plan, source)

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
                    raise KeyboardInterrupt
                suite.runs.append({"task": part.input.name, "k": part.k, "h": part.h, "folder": part.folder})
        except KeyboardInterrupt:
            suite.interrupted = True
        suite.tuned = weights.latest
    if not suite.interrupted:
        with atomic_file(out / TABLE_FILE) as temporary:
            temporary.write_text(suite_page(suite.results, suite.plan, suite.source), encoding="utf-8")
        with atomic_file(out / CSV_FILE) as temporary:
            temporary.write_text(csv_table(suite.results), encoding="utf-8", newline="")
        write_json(out / MANIFEST_FILE, suite.as_dict())
    return suite


def _claim(out: Path, plan: Plan) -> None:
    """Writes `plan.json`, or compares with the one that is there."""
    path, wanted = out / PLAN_FILE, json.loads(json.dumps(plan.as_dict()))
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
        self.kept = []
        for number, record in read_json_lines(path):
            if not isinstance(record.get("alpha"), float) or not isinstance(record.get("held_out"), list):
                raise InvalidDataError(f"{path} line {number} is no tuned weight; use another --out")
            self.kept.append(record)

    def __enter__(self) -> _Weights:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    @property
    def latest(self) -> list[dict[str, Any]]:
        """The last sweep of each task, rescorer, k, h and p: one of other data or of another model is passed."""
        by_run = {tuple(record.get(name) for name in RUN): record for record in self.kept}
        return list(by_run.values())

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The sweep of this task, rescorer, k, h and p."""
        return next((found for found in self.kept if all(found.get(k) == v for k, v in key.items())), None)

    def add(self, record: dict[str, Any]) -> None:
        """Keeps a sweep. Raises `OutputError`."""
        with writing(Path(self._stream.name)):
            append_json_line(self._stream, record)
        self.kept.append(json.loads(json.dumps(record)))


def _tune(
    plan: Plan, part: _Part, weights: _Weights, trace_k: int | None, progress: Progress | None, notify: Notify
) -> dict[Run, dict[str, Any]]:
    """The tuned weights of one evaluation, those that are missing tuned now: also where the model, the data or the
    rescorer is another one than when they were tuned."""
    chosen: dict[Run, dict[str, Any]] = {}
    for rescorer, tuning in plan.tuned:
        made_of = key_of([part.input.settings, _identities([rescorer.name])], 24)
        for p in rescorer.p:
            key = {
                "task": part.input.name, "rescorer": rescorer.name, "k": part.k, "h": part.h, "p": p,
                "made_of": made_of,
            }  # fmt: skip
            found = weights.find(key)
            if found is None:
                found = {**key, **_sweep(tuning, part, rescorer, p, trace_k, progress, notify)}
                weights.add(found)
            chosen[rescorer.name, p] = {"from": "tuned", **{name: found[name] for name in CHOSEN if name in found}}
    return chosen


def _sweep(
    tuning: SuiteTuning,
    part: _Part,
    rescorer: SuiteRescorer,
    p: int,
    trace_k: int | None,
    progress: Progress | None,
    notify: Notify,
) -> dict[str, Any]:
    options = dataclasses.replace(part.options, rescorers=(rescorer.name,), own_p=(), limit=tuning.limit)
    evaluated = set(part.input.groups)
    (found,) = tune(
        options, alphas=tuning.alphas, ks=(part.k,), ps=(p,), trace_k=trace_k, evaluated=evaluated, keep=False,
        progress=progress, notify=notify,
    )  # fmt: skip
    return {name: getattr(found, name) for name in SWEPT}


def _evaluate(
    part: _Part,
    out: Path,
    weights: dict[Run, dict[str, Any]],
    trace_k: int | None,
    progress: Progress | None,
    notify: Notify,
) -> tuple[list[dict[str, Any]], bool]:
    """The results of one evaluation, and whether Ctrl-C cut it short."""
    folder = out / part.folder
    if (folder / RESULTS_FILE).is_file():
        run = load_run(folder)
        if _is_finished(part, run.config):
            for line in run.config["notices"]:
                notify(line)
            return [_row(result, part) for result in run.results], False
    found = evaluate(part.options, out=folder, weights=weights, trace_k=trace_k, progress=progress, notify=notify)
    results = json.loads(json.dumps(found.document.as_dict()["results"]))  # as they are read back
    return [_row(result, part) for result in results], found.interrupted


def _is_finished(part: _Part, config: dict[str, Any]) -> bool:
    """Whether these results are of the data, base and heads that are there now; if not, `evaluate` tells the change."""
    wanted = json.loads(json.dumps({"options": dataclasses.asdict(part.options), "data": part.input.source}))
    found = config["traces"].get(part.input.name, {})
    settings = json.loads(json.dumps(part.input.settings))
    same = {**found, "k": None} == {**settings, "k": None}
    same = same and config.get("rescorers") == _identities(part.options.rescorers)
    return bool(config["options"] == wanted["options"] and config["data"] == {part.input.name: wanted["data"]} and same)


def _identities(names: Sequence[str]) -> dict[str, str]:
    """What rescorers with a weight score with, by name, as `evaluate` has it."""
    rescorers = {name: load_rescorer(name) for name in names}
    return {name: r.identity for name, r in rescorers.items() if isinstance(r, WeightedRescorer)}


def _row(result: dict[str, Any], part: _Part) -> dict[str, Any]:
    return {**result, "h": part.h or len(result["marginal"])}
