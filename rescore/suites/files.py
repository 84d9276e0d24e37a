"""Where a suite keeps what: names of its files, and its document."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lattices.errors import InvalidDataError
from lm.files import read_json_object
from lm.records import convert_record
from rescore.runs.records import Result, Tuned

SCHEMA = "rescore.suite/3"
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
    fields = read_json_object(path, missing=f"no suite in {folder}", advice=advice)
    if (schema := fields.get("schema")) != SCHEMA:
        raise InvalidDataError(f"{path} has schema {schema!r}; this version reads {SCHEMA!r}; {advice}")
    return convert_record(fields, SuiteDocument, where=str(path), advice=advice)
