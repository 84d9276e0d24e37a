"""The commands `analyse` and `cost`, as a user runs them."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path

import pytest
from conftest import Command
from evaluating import evaluated, recorded_trace


@pytest.fixture
def folders(tiny_folder: Path, tiny_heads_folder: Path, squad_file: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A trace and a finished run of it."""
    made = {
        "base": str(tiny_folder), "heads": str(tiny_heads_folder), "data": str(squad_file), "device": "cpu", "k": 4,
        "max_new_tokens": 6, "limit": 2,
    }  # fmt: skip
    recorded_trace(dict(**made), tmp_path / "trace")
    given = {"trace": str(tmp_path / "trace"), "k": 4, "device": "cpu", "rescorers": ("none", "oracle"), "p": (1, 16)}
    evaluated(dict(**given), out=tmp_path / "run")
    return tmp_path / "trace", tmp_path / "run"


def test_a_trace(rescore: Command, folders):
    code, out, _ = astuple(rescore("analyse", "--trace", folders[0]))
    assert code == 0 and "squad: 2 examples" in out and "h_max" in out and "calibration of head" in out
    code, out, _ = astuple(rescore("analyse", "--trace", folders[0], "--only", "ranks,entropy", "--json"))
    found = json.loads(out)["traces"][0]
    assert code == 0 and found["ranks"]["heads"][0]["recall"][0] == 1.0 and found["oracle"] is None


def test_results(rescore, folders):
    code, out, _ = astuple(rescore("analyse", "--results", folders[1], "--against", "oracle=none", "--only", "oracle"))
    assert code == 0 and "regress" in out and "other's" in out
    code, out, _ = astuple(rescore("analyse", "--results", folders[1], "--json"))
    assert code == 0 and json.loads(out)["runs"][0]["rescorers"][0]["rescorer"] == "none"


def test_costs(rescore, folders, tiny_folder, tiny_heads_folder):
    code, out, _ = astuple(
        rescore("cost", "--base", "paper-1.5b", "--block-efficiency", "unrescored=1.5", "--cached", "128")
    )
    assert code == 0 and "ASSUMED" in out and "float16" in out and "float32" in out
    code, out, _ = astuple(rescore("cost", "--results", folders[1], "--heads", tiny_heads_folder, "--json"))
    found = json.loads(out)[0]
    assert (found["h"], found["base"]["name"], found["heads"]["projection_reads"]) == (4, str(tiny_folder), 1)
    costs = found["costs"]
    known = {cost["method"] for cost in costs if cost["block_efficiency"] is not None}
    assert code == 0 and known == {"autoregressive", "unrescored", "16-best 0-gram"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("analyse",), "give trace folders (--trace) or folders of rescore eval (--results)"),
        (("analyse", "--trace", "x", "--results", "y"), "traces and results are analysed apart; drop --trace or"),
        (("analyse", "--trace", "nowhere"), "no trace in nowhere"),
        (("analyse", "--trace", "nowhere"), "; rescore trace --out nowhere records it"),
        (("analyse", "--trace", "{trace}", "--only", "rank"), "did you mean ranks"),
        (("analyse", "--results", "{run}", "--against", "oracle"), "--against oracle: give RESCORER=RESCORER"),
        (("analyse", "--results", "{run}", "--against", "oracle=ngram"), "unknown rescorer of these results"),
        (("analyse", "--results", "{run}", "--limit", "1"), "--limit is for traces"),
        (("cost", "--results", "{run}", "--h", "3"), "drop --h"),
        (("cost", "--results", "{run}"), "give their folder: --heads"),
        (("cost", "--base", "x", "--config", "y"), "give --base or --config, not both"),
        (("cost", "--base", "paper-1.5b", "--block-efficiency", "1.5"), "--block-efficiency 1.5: give METHOD=NUMBER"),
        (("cost", "--base", "paper-1.5b", "--block-efficiency", "unrescored=many"), "give METHOD=NUMBER"),
        (("cost", "--base", "paper-1.5b", "--results", "{run}", "--task", "xsum"), "has no task xsum"),
    ],
)
def test_what_the_user_can_mend_is_one_line(rescore, folders, arguments, message):
    places = {"trace": folders[0], "run": folders[1]}
    code, out, err = astuple(rescore(*(a.format(**places) for a in arguments)))
    assert code == 2 and out == "" and message in err and err.count("\n") == 1
