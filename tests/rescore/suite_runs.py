"""What the tests of suites share: the YAML of one for the tiny model, its lines changed, and its run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import squad_records, write_lines

from rescore.suites.plan import read_plan
from rescore.suites.run import Suite, run_suite

BODY = """\
limit: 4
max_new_tokens: 8
k: [4, 2]
p: [1, 2]
device: cpu
tasks:
  - name: squad
    data: DATA/squad.jsonl
  - name: gsm8k
    data: DATA/gsm8k.jsonl
    limit: 3
rescorers:
  - none
  - name: context-ngram:none
    p: 1
    tune: {limit: 2, alphas: [0.5, 1]}
  - oracle
"""
Write = Callable[..., Path]


def writer(folder: Path, models: str, body: str) -> Write:
    """Writes a suite of these models into the folder, with lines of it replaced; its data are in the folder too."""
    given = body

    def written(*changes: tuple[str, str], body: str = given) -> Path:
        text = models + body.replace("DATA", str(folder))
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (folder / "table.yaml").write_text(text)
        return folder / "table.yaml"

    return written


def writer_in(folder: Path, base: Path, heads: Path) -> Write:
    """Of the suite for the tiny model, with its data, in a folder."""
    write_lines(folder / "squad.jsonl", squad_records(6))
    write_lines(folder / "gsm8k.jsonl", [r | {"answer": "42"} for r in squad_records(6)])
    return writer(folder, f"base: {base}\nheads: {heads}\n", BODY)


@pytest.fixture(name="write")
def write_fixture(tmp_path: Path, tiny_folder: Path, tiny_heads_folder: Path) -> Write:
    """The suite for the tiny model, with lines of it replaced."""
    return writer_in(tmp_path, tiny_folder, tiny_heads_folder)


def run(path: Path, out: Path, **more: Any) -> Suite:
    return run_suite(read_plan(path), out, source=path.name, **more)
