"""Where a suite keeps what: names of its files, its document, and the evaluations in its folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lattices.errors import RescoreError
from lm.records import read_record
from rescore.runs.evaluated import Evaluation, load_run
from rescore.runs.records import Result, Tuned

SCHEMA = "rescore.suite/4"
PLAN_FILE, MANIFEST_FILE, TUNED_FILE = "plan.json", "suite.json", "tuned.jsonl"
TABLE_FILE, CSV_FILE, RUNS_FOLDER = "table.md", "table.csv", "runs"


@dataclass(frozen=True, kw_only=True)
class SuiteRun:
    """One evaluation of a suite: its results folder below the suite's; h: None for all heads."""

    task: str
    h: int | None
    folder: str


@dataclass(frozen=True, kw_only=True)
class SuiteSweep(Tuned):
    """A line of `tuned.jsonl`; key: of the model, data and rescorer that it was tuned with."""

    h: int | None
    key: str


@dataclass(kw_only=True)
class SuiteDocument:
    """`suite.json`, written last; source: name of the YAML file; plan: what it says."""

    schema: str = SCHEMA
    source: str
    plan: dict[str, Any]
    versions: dict[str, str]
    git_revision: str | None
    runs: list[SuiteRun] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    tuned: list[SuiteSweep] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def read_manifest(folder: Path) -> SuiteDocument:
    """`suite.json`, checked. Raises `InvalidDataError` for one of another version or a broken one."""
    path, advice = folder / MANIFEST_FILE, "run the suite again"
    return read_record(path, SuiteDocument, missing=f"no suite in {folder}", advice=advice, schema=SCHEMA)


def load_runs(folder: Path) -> list[Evaluation]:
    """The evaluations in a folder of `rescore eval --out` or `rescore suite --out`, each k apart.

    Raises as `load_run`, and `RescoreError` for a suite that has not finished.
    """
    if (folder / MANIFEST_FILE).is_file():
        folders = [folder / run.folder for run in read_manifest(folder).runs]
    elif (folder / PLAN_FILE).is_file():
        raise RescoreError(f"the suite in {folder} has not finished; the command that began it goes on")
    else:
        folders = [folder]
    return [each for inside in folders for each in load_run(inside).at_each_k()]


def run_of_task(folder: Path, task: str | None, *, h: int | None = None) -> Evaluation:
    """The only evaluation in a folder as `load_runs` has it, or that of a task (and of blocks of h tokens).

    Raises as `load_runs`, and `RescoreError` where several are left.
    """
    runs = load_runs(folder)
    if len(runs) == 1:
        return runs[0]
    fitting = [run for run in runs if task is None or task in run.tasks]
    if h is not None:
        fitting = [run for run in fitting if run.results[0].h == h] or fitting
    if len(fitting) == 1:
        return fitting[0]
    tasks = ", ".join(dict.fromkeys(name for run in runs for name in run.tasks))
    if not fitting:
        raise RescoreError(f"{folder} has no task {task}; give one of {tasks}")
    if task is None and "," in tasks:
        raise RescoreError(f"{folder} has several runs; give one task with --task: {tasks}")
    shapes = ", ".join(f"{run.folder} (k = {run.results[0].k})" for run in fitting)
    raise RescoreError(f"{folder} has several runs of {task or tasks}; give the folder of one with one k: {shapes}")
