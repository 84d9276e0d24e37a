"""One example block by block: what was drafted, accepted and wanted; text of others can't control the terminal."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import refused, squad_records, write_lines
from evaluating import evaluated

from lattices.errors import InvalidDataError, UnknownNameError
from rescore.acceptance import Rule, load_rule
from rescore.acceptance.sampling import Sampling
from rescore.decoding import GREEDY
from rescore.reports.inspection import Inspection, inspect_example
from rescore.reports.inspection_view import inspection_lines
from rescore.runs.evaluated import load_run

NASTY = "\x1b[2J\x9b31m\u202e<script>alert(1)</script> [red]x[/red] \u05e9\u05dc\u05d5\u05dd 👩\u200d👧 \u2028end"


@pytest.fixture
def make(tiny_folder: Path, tiny_heads_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Results of two rescorers on three examples, one of them nasty, one long."""
    records = squad_records(3)
    records[1]["context"], records[1]["answers"] = NASTY, {"text": [NASTY]}
    records[2]["context"] = "x " * 50_000
    data = write_lines(tmp_path / "squad.jsonl", records)

    def made(*, rule: Rule = GREEDY, **changes: Any) -> Path:
        options: dict[str, Any] = {
            "base": str(tiny_folder), "heads": str(tiny_heads_folder), "data": str(data), "device": "cpu", "k": 4,
            "max_new_tokens": 10, "max_prompt_tokens": 60, "rescorers": ("none", "oracle"), "p": (1, 2),
        }  # fmt: skip
        evaluated({**options, **changes}, rule=rule, out=tmp_path / "run")
        return tmp_path / "run"

    return made


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (Sampling(3.0), "!token! not accepted: another was drawn"), (load_rule("top-k:2"), "it does not fit"),
        (load_rule("greedy"), "!token! rejected: the base wanted another"),
    ],
)  # fmt: skip
def test_a_draft_stops_by_its_rule(make: Callable[..., Path], rule: Rule, reason: str):
    run = make(mode="live", rescorers=("none",), rule=rule)
    shown = text(inspect_example(run, steps="all"))
    assert reason in shown
    assert ("greedy decoding's token" in shown) == (rule.name != "greedy") != ("base wanted" in shown)


def text(inspection: Inspection, width: int = 120) -> str:
    return "\n".join(line.plain for line in inspection_lines(inspection, width=width))


def test_blocks_say_what_was_drafted_accepted_and_wanted(make: Callable[..., Path]):
    folder = make()
    found = inspect_example(folder, "q0", steps="all")
    run = load_run(folder)
    trace = run.trace("squad")
    assert trace is not None
    example = trace.examples[0]
    output = example.output_ids.tolist()
    assert (found.task, found.id, found.number, found.examples, found.h, found.k) == ("squad", "q0", 1, 3, 4, 4)
    assert found.prompt == example.prompt and found.output == example.output and found.references == ["1900"]
    assert [(d.rescorer, d.p, d.tokens) for d in found.decodes] == [("none", 1, 10), ("none", 2, 10), ("oracle", 1, 10)]
    assert [b.number for b in found.blocks] == list(range(1, found.total + 1))
    for block in found.blocks:
        for i, slot in enumerate(block.slots):
            ids = example.lattice.token_ids[block.position, i, :4].tolist()
            assert slot.wanted == (output[block.position + i] if block.position + i < 10 else None)
            assert slot.rank == (ids.index(slot.wanted) + 1 if slot.wanted in ids else None)
            assert [token for token, _ in slot.best] == ids[:3] and all(0 < p <= 1 for _, p in slot.best)
        for draft in block.drafts:
            assert draft.tokens[: draft.accepted] == output[block.position : block.position + draft.accepted]
    for side in (("none", 1), ("none", 2), ("oracle", 1)):
        steps = [(b.position, d.tokens) for b in found.blocks for d in b.drafts if (d.rescorer, d.p) == side]
        (record,) = [r for r in run.records("squad", *side) if r.id == "q0"]
        assert [tokens for _, tokens in steps] == record.drafts


def test_the_view_marks_what_the_colours_say(make: Callable[..., Path]):
    found = inspect_example(make(), "1", steps="1-2", rescorers=("none",), p=1)
    lines = inspection_lines(found, width=120)
    assert re.search(r"^block 1, output token 1: none p=1 accepts \d", text(found), re.M)
    (draft,), slots = found.blocks[0].drafts, found.blocks[0].slots
    title = next(i for i, line in enumerate(lines) if line.plain.startswith("block 1"))
    for place, token in enumerate(draft.tokens):
        line = lines[title + 2 + place]
        shown = found.texts[token]
        if place < draft.accepted:
            mark, style = f"[{shown}]", "green"
        elif place == draft.accepted:
            mark, style = f"!{shown}!", "bold red"
        else:
            mark, style = shown, "dim"
        assert mark in line.plain
        assert any(s.style == style and mark in line.plain[s.start : s.end] for s in line.spans)
        wanted = slots[place].wanted
        assert wanted is not None and any(
            s.style == "cyan" and line.plain[s.start : s.end] == found.texts[wanted] for s in line.spans
        )
    assert f"2 of {found.total} blocks; --show 3- shows more" in text(found)


def test_narrow_terminals_get_the_columns_in_bands(make: Callable[..., Path]):
    found = inspect_example(make(), "1", steps="1")
    wide, narrow = text(found, 200).splitlines(), text(found, 50).splitlines()
    assert len(narrow) > len(wide)
    first = next(i for i, line in enumerate(narrow) if line.startswith("block 1"))
    rows = [line for line in narrow[first + 1 :] if line.startswith("  ")]
    assert max(map(len, rows)) <= 50 and sum("base wanted" in row for row in rows) > 1


def test_text_of_others_cannot_control_the_terminal(make: Callable[..., Path]):
    shown = text(inspect_example(make(), "2", steps="all"))
    assert not any(c in shown for c in "\x1b\x9b\u202e\u2028")
    assert "\\x1b[2J\\x9b31m\\u202e<script>alert(1)</script> [red]x[/red]" in shown
    assert "\u05e9\u05dc\u05d5\u05dd" in shown and "👩\u200d👧" in shown


def test_long_prompts_are_shortened(make: Callable[..., Path]):
    shown = text(inspect_example(make(), "3"))
    assert re.search(r"x  ?\.\.\. \(\d+,\d{3} characters\) \.\.\. ", shown) and len(shown) < 20_000


def test_without_its_trace_there_are_no_lattices(make: Callable[..., Path], cache_folder: Path):
    folder = make()
    shutil.rmtree(cache_folder / "traces")
    found = inspect_example(folder, "1")
    assert found.prompt is None and found.blocks[0].slots[0].best == [] and "is gone" in found.notices[0]
    assert found.blocks[0].drafts and "base wanted" in text(found) and "lattice 1" not in text(found)


def test_tokens_are_ids_where_the_tokenizer_is_gone(make: Callable[..., Path]):
    folder = make()
    document = json.loads((folder / "results.json").read_text())
    document["config"]["traces"]["squad"]["base"]["name"] = "/nowhere/model"
    (folder / "results.json").write_text(json.dumps(document))
    shutil.rmtree(folder.parent / "none", ignore_errors=True)
    found = inspect_example(folder, "1")
    assert any("/nowhere/model" in line for line in found.notices)
    assert all(shown == f"#{token}" for token, shown in found.texts.items())


def test_a_decode_that_went_another_way_is_shown_until_there(make: Callable[..., Path]):
    folder = make()
    lines = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    for record in lines:
        if (record["rescorer"], record["id"]) == ("oracle", "q0"):
            record["output_ids"] = [*record["output_ids"][:5], *[7] * 5]
    write_lines(folder / "examples.jsonl", lines)
    found = inspect_example(folder, "1", steps="all")
    assert "oracle (p = 1) decoded another output from token 5 on; that part is not shown" in found.notices
    assert all(d.rescorer != "oracle" for b in found.blocks for d in b.drafts if b.position > 5)


class TestRefused:
    def test_what_is_not_there(self, make: Callable[..., Path]):
        folder = make()
        refused(lambda: inspect_example(folder, "4"), "squad has 3 examples in")
        refused(lambda: inspect_example(folder, "q9"), "did you mean q", UnknownNameError)
        refused(lambda: inspect_example(folder, task="squat"), "did you mean squad?", UnknownNameError)
        refused(lambda: inspect_example(folder, rescorers=("orcale",)), "did you mean oracle?", UnknownNameError)
        refused(lambda: inspect_example(folder, rescorers=("none",), p=3), "with p = 3, only 1, 2")
        refused(lambda: inspect_example(folder, k=9), "no results of squad with k = 9, only 4")
        refused(lambda: inspect_example(folder, top=0), "at least one token")

    @pytest.mark.parametrize("steps", ["", "x", "0", "3-1", "1-x", "-3", "99", "1" * 20])
    def test_steps(self, make: Callable[..., Path], steps: str):
        refused(lambda: inspect_example(make(), steps=steps), f"--show {steps}:")

    def test_records_without_drafts(self, make: Callable[..., Path]):
        folder = make()
        lines = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
        for record in lines:
            record["drafts"] = record["drafts"][1:]
        write_lines(folder / "examples.jsonl", lines)
        refused(lambda: inspect_example(folder), "has no draft for each of its steps", InvalidDataError)

    def test_a_run_still_going_on(self, make: Callable[..., Path]):
        folder = make()
        (folder / "results.json").unlink()
        refused(lambda: inspect_example(folder), "has not finished")
