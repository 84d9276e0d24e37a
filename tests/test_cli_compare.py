"""`rescore compare`, `suite` and `inspect` as commands: documents on stdout, one line per mistake, exit codes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import write_lines
from test_cli import Command, model, rescore

__all__ = ["model", "rescore"]  # fixtures


@pytest.fixture
def results(rescore: Command, model: list[object], tmp_path: Path) -> Path:
    """Results of the unrescored drafts and the oracle on six examples."""
    asked = ["eval", *model, "--rescorer", "none", "--rescorer", "oracle", "--p", "1,2", "--out", tmp_path / "results"]
    assert rescore(*asked).code == 0
    return tmp_path / "results"


class TestCompare:
    def test_two_rescorers_in_one_table(self, rescore: Command, results: Path):
        run = rescore("compare", results, "--a-rescorer", "none", "--b-rescorer", "oracle", "--a-p", 1)
        assert (run.code, run.err) == (0, "")
        interval = r"[+-]\d\.\d{3} to [+-]\d\.\d{3}"
        assert re.search(
            rf"\nsquad  none p=1 +oracle p=1 +6 +1\.\d{{3}} +\d\.\d{{3}} +\+\d\.\d{{3}}  {interval} ", run.out
        )

    def test_the_document(self, rescore: Command, model: list[object], results: Path, tmp_path: Path):
        assert rescore("eval", *model, "--limit", 4, "--out", tmp_path / "other").code == 0
        run = rescore("compare", results, tmp_path / "other", "--rescorer", "none", "--p", 1, "--json")
        assert run.code == 0 and "of 6 in A and 4 in B" in run.err
        document: dict[str, Any] = run.document
        assert list(document) == ["schema", "a", "b", "rows", "notices"]
        (row,) = document["rows"]
        assert (row["n"], row["difference"]["tied"], row["a"]["p"]) == (4, 4, 1)

    def test_mistakes(self, rescore: Command, results: Path, tmp_path: Path):
        rescore("compare", results).refused("would be compared with itself")
        rescore("compare", results, tmp_path / "none").refused("no results in .*; rescore eval --out")
        rescore("compare", results, "--a-rescorer", "none", "--b-rescorer", "orcale").refused("did you mean oracle")
        (results / "results.json").unlink()
        rescore("compare", results, "--a-p", 1, "--b-p", 2).refused("has not finished")
        write_lines(results / "results.json", [[]])
        rescore("compare", results, "--a-p", 1, "--b-p", 2).refused("is not a JSON object")
