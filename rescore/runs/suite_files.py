"""Where a suite keeps what: names of its files, and its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lattices.errors import InvalidDataError
from lm.files import read_json_object

SCHEMA = "rescore.suite/1"
PLAN_FILE, MANIFEST_FILE, TUNED_FILE = "plan.json", "suite.json", "tuned.jsonl"
TABLE_FILE, CSV_FILE, RUNS_FOLDER = "table.md", "table.csv", "runs"


def read_manifest(folder: Path) -> dict[str, Any]:
    """`suite.json`, checked. Raises `InvalidDataError` for one of another version or a broken one."""
    path = folder / MANIFEST_FILE
    manifest = read_json_object(path, missing=f"no suite in {folder}", advice="run the suite again")
    if (found := manifest.get("schema")) != SCHEMA:
        raise InvalidDataError(f"{path} has schema {found!r}; this version reads {SCHEMA!r}")
    runs = manifest.get("runs")
    names = [entry.get("folder") if isinstance(entry, dict) else None for entry in runs or ()]
    if not isinstance(runs, list) or not all(isinstance(name, str) for name in names):
        raise InvalidDataError(f"{path} names no results folders; run the suite again")
    return manifest
