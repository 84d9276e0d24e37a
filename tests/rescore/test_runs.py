"""Finished runs are read back: results, records, and the trace that they were replayed from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import refused, write_lines
from evaluating import evaluated, recorded_trace, swept

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from rescore.rescorers.unrescored import Unrescored
from rescore.runs.evaluated import load_run
from rescore.runs.records import Result
from rescore.runs.run import Run


@pytest.fixture
def options(tiny_folder: Path, tiny_heads_folder: Path, squad_file: Path) -> dict:
    return {
        "base": str(tiny_folder), "heads": str(tiny_heads_folder), "data": str(squad_file), "device": "cpu", "k": 4,
        "max_new_tokens": 8, "limit": 3, "rescorers": ("none", "oracle"), "p": (1, 2),
    }  # fmt: skip


@pytest.fixture
def folder(options, tmp_path: Path, cache_folder: Path) -> Path:
    evaluated(dict(**options), out=tmp_path / "run")
    return tmp_path / "run"


def test_what_was_evaluated_is_there(folder):
    run = load_run(folder)
    assert run.tasks == ["squad"] and run.rescorers == [("none", 1), ("none", 2), ("oracle", 1)]
    for result in run.results:
        records = run.records("squad", result.rescorer, result.p)
        assert sum(len(r.accepted) for r in records) == result.steps and len(records) == result.n == 3
        for record in records:
            assert len(record.drafts) == len(record.accepted)
            position = 0
            for n, draft in zip(record.accepted, record.drafts, strict=True):
                assert len(draft) == 4 and draft[:n] == record.output_ids[position : position + n]
                position += n


@pytest.mark.parametrize("h", [None, 2])
def test_the_trace_is_found_in_the_cache_and_cut(options, tmp_path, cache_folder, h):
    evaluated(dict(**{**options, "limit": 4}))  # the cache holds more than the run
    evaluated(dict(**{**options, "h": h}), out=tmp_path / "run")
    trace = load_run(tmp_path / "run").trace("squad")
    assert trace is not None and len(trace.examples) == 3 and trace.header.h == (h or 4)


def test_a_given_trace_is_found_where_it_was(options, tmp_path, cache_folder):
    recorded_trace(dict(**{**options, "rescorers": ("none",), "p": 1}), tmp_path / "trace")
    given = dict(trace=str(tmp_path / "trace"), rescorers=("none",), k=4, device="cpu")
    evaluated(given, out=tmp_path / "run")
    run = load_run(tmp_path / "run")
    found = run.trace("squad")
    assert found is not None and len(found.examples) == 3
    (tmp_path / "trace" / "trace.json").unlink()
    assert load_run(tmp_path / "run").trace("squad") is None and run.trace("squad") is found, "it is read once"


class TestTrouble:
    def test_no_folder_and_no_results(self, tmp_path):
        assert "rescore eval --out" in refused(lambda: load_run(tmp_path / "none"))
        assert "rescore eval --out" in refused(lambda: load_run(tmp_path))

    def test_a_run_still_going_on(self, folder):
        (folder / "results.json").unlink()
        assert "has not finished" in refused(lambda: load_run(folder))

    def test_an_older_schema(self, folder):
        document = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps({**document, "schema": "rescore.results/1"}))
        assert "rescore.results/1" in refused(lambda: load_run(folder), InvalidDataError)

    def test_records_that_are_gone(self, folder):
        lines = (folder / "examples.jsonl").read_text().splitlines(keepends=True)
        (folder / "examples.jsonl").write_text("".join(lines[:-1]))
        assert "has 2 of the 3 examples of" in refused(lambda: load_run(folder), InvalidDataError)

    def test_results_and_examples_of_two_runs(self, folder):
        """Of as many examples: the table would be one run's and the comparison another's."""
        path = folder / "examples.jsonl"
        *others, last = path.read_text().splitlines()
        record = json.loads(last)
        changed = {**record, "accepted": [1] * sum(record["accepted"]) + [1]}
        path.write_text("\n".join([*others, json.dumps(changed)]) + "\n")
        assert "examples.jsonl beside it are not of one run" in refused(lambda: load_run(folder), InvalidDataError)

    def test_broken_lines_and_results(self, folder):
        lines = (folder / "examples.jsonl").read_text()
        (folder / "examples.jsonl").write_text('{"task": "squad"}\n' + lines)
        assert "line 1 is not a finished example" in refused(lambda: load_run(folder), InvalidDataError)
        (folder / "examples.jsonl").write_text(lines)
        document = json.loads((folder / "results.json").read_text())
        for results, place in ((7, "`results`"), ([7], "`results[0]`"), ([{"task": "squad"}], "`results[0]`")):
            (folder / "results.json").write_text(json.dumps({**document, "results": results}))
            said = refused(lambda: load_run(folder), InvalidDataError)
            assert "results.json: " in said and f" - at {place}; " in said
            assert said.endswith("; run the evaluation again")
        (folder / "results.json").write_text(json.dumps({**document, "results": []}))
        assert "results.json holds no results; run the" in refused(lambda: load_run(folder), InvalidDataError)

    @pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Result)])
    def test_every_field_of_a_result_is_needed(self, folder, name):
        document = json.loads((folder / "results.json").read_text())
        value = document["results"][1].pop(name)
        (folder / "results.json").write_text(json.dumps(document))
        assert f"required field `{name}` - at `results[1]`" in refused(lambda: load_run(folder), InvalidDataError)
        infinite = {"block_efficiency": float("nan"), "gain": float("inf")}
        document["results"][1][name] = infinite.get(name, {"a": value})
        (folder / "results.json").write_text(json.dumps(document))
        assert f"at `results[1].{name}" in refused(lambda: load_run(folder), InvalidDataError)

    @pytest.mark.parametrize(
        ("path", "value", "named"),
        [("inputs", None, "`config.inputs`"), ("inputs.squad.h", "4", "`config.inputs[...].h`"),
         ("inputs", {}, "inputs.squad"), ("seed", -1, "`config.seed`"), ("mode", None, "`config.mode`"),
         ("traces", {}, "traces.squad"), ("traces.squad", [], "`config.traces[...]`"),
         ("traces.squad.k", None, "traces.squad.k"),
         ("runs", {"squad": [2.0]}, "`config.runs[...][0]`"),
         ("runs", {"squad": [{"rescorer": "ngram", "k": 4, "p": "x"}]}, "`config.runs[...][0].p`"),
         ("notices", "a", "`config.notices`")],
    )  # fmt: skip
    def test_what_is_read_of_the_configuration(self, folder, path, value, named):
        document = json.loads((folder / "results.json").read_text())
        *outer, last = path.split(".")
        place = document["config"]
        for part in outer:
            place = place[part]
        place[last] = value
        (folder / "results.json").write_text(json.dumps(document))
        said = refused(lambda: load_run(folder), InvalidDataError)
        assert "results.json" in said and said.endswith("; run the evaluation again")
        assert named in said

    @pytest.mark.parametrize("change", [{"accepted": [1.5]}, {"drafts": [7]}, {"output_ids": None}])
    def test_examples_with_something_else_in_them(self, folder, change):
        lines = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
        write_lines(folder / "examples.jsonl", [{**lines[0], **change}, *lines[1:]])
        assert "line 1 is not a finished example" in refused(lambda: load_run(folder), InvalidDataError)

    def test_another_trace_in_its_place(self, options, tmp_path, cache_folder):
        recorded_trace(dict(**{**options, "rescorers": ("none",), "p": 1}), tmp_path / "trace")
        evaluated(dict(trace=str(tmp_path / "trace"), rescorers=("none",), k=4, device="cpu"), out=tmp_path / "r")
        for line in (lines := (tmp_path / "r" / "examples.jsonl").read_text().splitlines()):
            assert json.loads(line)["id"]
        lines[0] = json.dumps({**json.loads(lines[0]), "id": "another"})
        (tmp_path / "r" / "examples.jsonl").write_text("\n".join(lines) + "\n")
        assert "another trace" in refused(lambda: load_run(tmp_path / "r").trace("squad"), IncompatibleError)


class Turned(Unrescored):
    """A rescorer as an object: the unrescored drafts, the last token turned to that of another rank."""

    alpha = 0.5

    def __init__(self, rank: int, identity: str = "") -> None:
        self.rank, self.identity = rank, identity

    def draft(self, lattices, contexts, p):
        drafts = super().draft(lattices, contexts, p)
        drafts[:, :, -1] = lattices.token_ids[:, None, -1, self.rank]
        return drafts


class TestObjects:
    """Rescorers that are given as objects: their class is their label, whatever is in them."""

    def test_two_of_one_label_are_refused(self, options, cache_folder):
        runs = (Run(Turned(0), k=4), Run(Turned(1), p=2, k=4))
        refused(lambda: evaluated({**options, "rescorers": runs}), "two rescorers are called Turned", RescoreError)
        both = {**options, "rescorers": (Turned(0), Turned(1))}
        refused(lambda: swept(both, ks=(4,), keep=False), "two rescorers are called Turned", RescoreError)

    def test_a_folder_does_not_take_one_for_the_other(self, options, tmp_path, cache_folder):
        def run(rescorer: Turned) -> None:
            evaluated({**options, "rescorers": (rescorer,)}, out=tmp_path / "run")

        refused(lambda: run(Turned(0)), "set its `identity` (and", RescoreError)
        run(Turned(0, "first"))
        run(Turned(0, "first"))
        refused(lambda: run(Turned(1, "second")), "holds results of another configuration", IncompatibleError)

    def test_a_saved_one_is_not_mixed_with_another(self, options, tmp_path, cache_folder):
        first, second = (evaluated({**options, "rescorers": (Turned(rank),)}) for rank in (0, 3))
        assert first.examples != second.examples
        first.save(tmp_path / "run")
        first.save(tmp_path / "run")
        refused(lambda: second.save(tmp_path / "run"), "holds another evaluation of the same runs", IncompatibleError)
        assert load_run(tmp_path / "run").examples == first.examples

    def test_a_weight_is_kept_for_what_is_known_again(self, options, cache_folder):
        one = {**options, "rescorers": (Turned(0),)}
        refused(lambda: swept(one, ks=(4,), ps=(1,)), "would not be known again: set its `identity`", RescoreError)
        assert swept(one, ks=(4,), ps=(1,), keep=False)[0].rescorer == "Turned"
