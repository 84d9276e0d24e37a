"""Costs of a step: measured, kept, predicted by."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import make_heads, refused
from evaluating import Options, evaluated, opened
from hypothesis import given, settings
from hypothesis import strategies as st
from made_costs import costs_for, costs_of, options_fixture  # noqa: F401
from made_records import example_record

from lattices.errors import InvalidDataError, RescoreError
from lm.base import catalog
from lm.base.catalog import load_base
from lm.base.model import BaseIdentity, BaseLM
from lm.files import cache_directory
from lm.heads.block_heads import load_heads
from rescore.acceptance.options import Acceptance
from rescore.calls import NO_CALL, Call
from rescore.costs import kept, measuring
from rescore.costs.kept import costs_here, keep_costs, read_costs, this_machine
from rescore.costs.measuring import measure_costs
from rescore.costs.predicting import predicted_speedup
from rescore.costs.table import ChoiceCost, Costs
from rescore.generation.live import Generator
from rescore.runs.evaluated import load_run
from rescore.runs.inputs import Inputs
from rescore.runs.run import Run
from rescore.studies import block_length
from rescore.studies.until_divergence import until_divergence


def kept_of(base: BaseIdentity | None, heads: tuple[str, int] | None) -> Costs:
    """The table that is kept for models on the CPU here, compiled where that gains."""
    return costs_here(base, heads, "cpu", compiles=True)


def test_between_and_beyond_what_was_measured_are_straight_lines():
    costs = costs_of([[10, 13, 25], [20, 23, 35]])
    assert costs.curves(4).tolist() == [[10, 11, 12, 13], [20, 21, 22, 23]]
    found = costs.steps(np.array([64, 64, 160, 256, 256, 448, 1]), np.array([2, 16, 1, 16, 18, 1, 1]))
    assert found.tolist() == [11, 25, 15, 35, 37, 30, 10]
    alone = costs_of([[10, 8, 25]], contexts=(64,))
    assert alone.steps(np.array([1, 900]), np.array([4, 4])).tolist() == [8, 8], (
        "as measured: a larger one may be faster"
    )
    assert costs_of([[3.0]], contexts=(64,), nodes=(1,)).steps(np.array([9]), np.array([5])).tolist() == [3]


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.sampled_from(["tree", "batch"]), st.booleans())
def test_a_predicted_speed_up_is_greedy_s_time_over_that_of_the_steps(seed: int, count: int, verify: str, trees: bool):
    """Against sums by hand, over records drawn at random."""
    random = np.random.default_rng(seed)
    tables = dict(tree_ms=0.5 if trees else None, heads_ms=4.0 if seed % 3 else None)
    costs = costs_of(np.sort(random.uniform(5, 50, (2, 3))).tolist(), **tables)
    records, greedy, spent = [], 0.0, 0.0

    def at(context: int, tokens: int) -> float:
        return float(costs.steps(np.array([context]), np.array([tokens]))[0])

    for _ in range(count):
        accepted = random.integers(1, 5, random.integers(1, 6)).tolist()
        calls = [
            Call(int(random.integers(1, 40)), int(random.integers(1, 4)), bool(random.integers(2))) for _ in accepted
        ]
        if random.integers(2):
            calls[-1] = NO_CALL
        output = list(range(sum(accepted)))
        records.append(example_record(prompt_tokens=100, accepted=accepted, calls=calls, output_ids=output))
        for place, (n, call) in enumerate(zip(accepted, calls, strict=True)):
            if call.tokens:
                spent += at(100 + sum(accepted[:place]), call.tokens) + 0.25
                spent += 0.5 if trees and verify == "tree" and call.drafts > 1 else 0.0
                spent += costs.heads.ms if costs.heads and call.heads else 0.0
            assert n
        greedy += sum(at(100 + place, 1) for place in range(len(output) - 1))
    found = predicted_speedup(records, costs, 0.25, verify=verify)
    assert found == (pytest.approx(greedy / spent) if spent else None)


class TestKept:
    """Which table is found: that of this base, precision, heads and machine."""

    @pytest.fixture(name="measured")
    def measured_fixture(self, tiny_base: BaseLM) -> Costs:
        return measure_costs(tiny_base, make_heads(tiny_base), contexts=(8, 16), nodes=(1, 2, 4), repeats=1)

    def test_by_the_heads_and_how_many_of_them(self, tiny_base: BaseLM, measured: Costs):
        identity = tiny_base.identity
        assert measured.heads is not None and measured.heads.h == 4 and measured.heads.ms > 0
        assert measured.tree_ms is not None and measured.machine == this_machine("cpu")
        heads = (measured.heads.sha256, 4)
        missing = "with these heads are measured on this machine"
        line = refused(lambda: kept_of(identity, heads), missing, "run: rescore bench costs --base")
        assert "again" not in line, "there is one thing to do"
        keep_costs(measured)
        assert kept_of(identity, heads) == kept_of(identity, None) == measured
        others = measure_costs(tiny_base, make_heads(tiny_base, seed=1), contexts=(8,), nodes=(1, 2), repeats=1)
        keep_costs(others)
        assert kept_of(identity, heads) == measured, "others do not take their place"
        cut = make_heads(tiny_base).first(2)
        assert cut.h == 2
        refused(lambda: kept_of(identity, (measured.heads.sha256, 2)), missing)
        refused(lambda: kept_of(None, None), "does not name its base LM", "--costs FILE")

    def test_by_whether_layers_are_compiled(self, tiny_base: BaseLM, measured: Costs, options: Options):
        assert tiny_base.compiles and measured.compiles
        keep_costs(msgspec.structs.replace(measured, compiles=False))
        refused(lambda: kept_of(tiny_base.identity, None), "no costs of", "are measured on this machine")
        keep_costs(measured)
        assert kept_of(tiny_base.identity, None) == measured
        other = {"rescorers": ["lookup"], "compile": "off", "dtype": "bfloat16"}
        refused(lambda: evaluated(options | other, costs="here"), "--dtype bfloat16 --device cpu --compile off")

    def test_by_the_machine(self, tiny_base: BaseLM, measured: Costs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        keep_costs(measured)
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text(
            "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nprocessor\t: 1\nmodel name\t: Some CPU @ 3 GHz\n"
        )
        monkeypatch.setattr(kept, "CPUINFO", cpuinfo)
        assert this_machine("cpu").cpu == "Some CPU @ 3 GHz"
        refused(lambda: kept_of(tiny_base.identity, None), "Some CPU @ 3 GHz")
        cpuinfo.write_text("processor\t: 0\n")
        assert this_machine("cpu").cpu, "by what the system says"
        monkeypatch.setattr(kept, "CPUINFO", tmp_path / "nowhere")
        assert this_machine("cpu").cpu

    def test_files(self, measured: Costs, tmp_path: Path):
        keep_costs(measured, tmp_path / "costs.json")
        assert read_costs(tmp_path / "costs.json") == measured
        refused(
            lambda: read_costs("/nowhere/costs.json"),
            "no costs in /nowhere/costs.json; measure them: rescore bench costs",
        )
        old = tmp_path / "old.json"
        old.write_text('{"schema": "rescore.costs/1", "base": "tiny"}')
        refused(lambda: read_costs(old), "has schema 'rescore.costs/1'", "measure them again: rescore bench costs")
        for broken in (
            dict(contexts=[64, 64]),
            dict(nodes=[1, 4]),
            dict(step_ms=[[1, 2, 3]]),
            dict(contexts=[256, 64]),
        ):
            keep_costs(msgspec.structs.replace(costs_of([[1, 2, 3], [4, 5, 6]]), **broken), tmp_path / "broken.json")
            refused(lambda: read_costs(tmp_path / "broken.json"), "has other sizes than it says", InvalidDataError)
        document = json.loads((tmp_path / "costs.json").read_text())
        for damage in (
            {"tree_ms": -1.0},
            {"tree_ms": 1e308},
            {"step_ms": [[1.0, -2.0, 3.0]] * 2},
            {"step_ms": [[1.0, 0.0, 3.0]] * 2},  # a step takes some time
            {"step_ms": "none"},
            {"nodes": []},
        ):
            old.write_text(json.dumps(document | damage))
            line = refused(lambda: read_costs(old), str(old), InvalidDataError)
            assert line.endswith("measure them again: rescore bench costs") and "\n" not in line

    def test_a_cache_that_cannot_be_written_loses_nothing(
        self, measured: Costs, tmp_path: Path, cache_folder: Path, caplog: pytest.LogCaptureFixture
    ):
        (cache_folder / "costs").write_text("in the way")
        keep_costs(measured, tmp_path / "costs.json")
        assert read_costs(tmp_path / "costs.json") == measured
        (line,) = [record.getMessage() for record in caplog.records if record.name == "rescore"]
        assert (
            line.startswith("these costs are not kept for --costs here") and "; set RESCORE_CACHE to a folder" in line
        )

    @pytest.mark.parametrize("damage", ["", "{", "[1]", '{"schema": "rescore.costs/3"}', "\xff"])
    def test_a_broken_one_in_the_cache_is_measured_again(self, tiny_base: BaseLM, measured: Costs, damage: str):
        keep_costs(measured)
        (place, _) = sorted((cache_directory() / "costs").iterdir())
        for each in place.parent.iterdir():
            each.write_bytes(damage.encode("latin-1"))
        line = refused(lambda: kept_of(tiny_base.identity, None), "measure them again: rescore bench costs --base")
        assert str(place.parent) in line and "\n" not in line
        keep_costs(measured)
        assert kept_of(tiny_base.identity, None) == measured


class TestRefusedBeforeAModelIsLoaded:
    """What needs no model to be refused."""

    @pytest.fixture(autouse=True)
    def no_base_fixture(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            pytest.fail("the base LM was loaded")

        for place in (catalog, measuring, block_length):
            monkeypatch.setattr(place, "load_base", fail)

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"repeats": 0}, "--repeats 0; it must be at least 1"),
            ({"cached": (64, 0)}, "--cached 0; it must be at least 1"),
            ({"k": (0,)}, "k = 0; a lattice"),
            ({"p": (0,)}, "p = 0; at least one draft"),
            ({"rescorer": ("nonee",)}, "unknown rescorer 'nonee'"),
            ({"rescorer": ("ngram:/nowhere",)}, "/nowhere"),
            ({"drafter": ("heads", "lookupp")}, "unknown drafter 'lookupp'"),
            ({"inputs": Inputs(h=1)}, "h = 1; a block has"),
        ],
    )
    def test_costs(self, given: dict[str, Any], said: str):
        refused(lambda: measuring.costs_of(**{"inputs": Inputs()} | given), said, RescoreError)

    def test_curves_and_block_lengths(self, options: Options, tmp_path: Path):
        refused(lambda: measuring.verify_curve_of(Inputs(), repeats=0), "--repeats 0", RescoreError)
        refused(lambda: measuring.verify_curve_of(Inputs(), cached=-1), "--cached -1", RescoreError)
        for wrong in ({"repeats": 0}, {"cached": 0}, {"limit": 0}):
            refused(lambda wrong=wrong: block_length.block_lengths_of_trace(tmp_path, **wrong), "--", RescoreError)


class TestEvaluated:
    """A table in an evaluation: what is predicted by it, and which ones are refused."""

    @pytest.fixture(name="costs")
    def costs_fixture(self, options: Options) -> Costs:
        choices = [
            ChoiceCost(rescorer=name, k=8, p=p, ms=0.25) for name, p in (("none", 1), ("none", 4), ("lookup", 1))
        ]
        return costs_for(options, [[10, 12, 20], [11, 13, 22]], heads_ms=4.0, choices=choices)

    def test_live_and_replay_predict_the_same(self, options: Options, costs: Costs):
        chosen = options | {"rescorers": ["none", "lookup", "oracle"]}
        replayed, live = (evaluated(chosen | {"mode": mode}, costs=costs) for mode in ("replay", "live"))
        predicted = [r.predicted_speedup for r in replayed]
        assert predicted == [r.predicted_speedup for r in live] and predicted[2] is None
        assert all(p is not None and 0 < p < r.block_efficiency for p, r in zip(predicted[:2], replayed, strict=False))
        assert replayed.config.costs == {"squad": costs} and not replayed.notices
        (table,) = live.tables()
        assert [c.heading for c in table.columns][-2:] == ["speed-up", "predicted"]
        assert "predicted = that speed-up by the costs of a step in float64 on a CPU, 2 cores, 1 thread," in " ".join(
            table.note.split()
        )
        assert evaluated(chosen).config.costs == {}, "nothing is predicted that was not asked for"

    def test_what_has_no_time_is_said_and_not_predicted(self, options: Options, costs: Costs, tmp_path: Path):
        chosen = options | {"rescorers": ["none", "lookup:tokens=8", "oracle"], "p": (1, 4)}
        found = evaluated(chosen, costs=costs, out=tmp_path / "run")
        assert [r.predicted_speedup is None for r in found] == [False, False, True, True, True]
        (line,) = found.notices
        assert line.startswith(
            "no predicted speed-up of lookup:tokens=8 (k = 8, p = 1), lookup:tokens=8 (k = 8, p = 4): the"
        )
        more = [ChoiceCost(rescorer="lookup:tokens=8", k=8, p=1, ms=0.5), *costs.choices]
        again = evaluated(chosen, costs=msgspec.structs.replace(costs, choices=more), out=tmp_path / "run")
        assert [r.predicted_speedup is None for r in again] == [False, False, False, True, True]
        assert load_run(tmp_path / "run").results == again.results

    def test_a_batch_costs_all_its_tokens(self, options: Options, costs: Costs):
        chosen = options | {"rescorers": ["none"], "p": 4}
        (tree,), (batch,) = (evaluated(chosen | {"verify": how}, costs=costs).results for how in ("tree", "batch"))
        without = msgspec.structs.replace(costs, tree_ms=None)
        (neither,) = evaluated(chosen, costs=without).results
        assert batch.predicted_speedup == neither.predicted_speedup < tree.predicted_speedup
        refused(lambda: evaluated(chosen | {"verify": "batch"}), "--verify batch is how live decoding verifies")

    def test_tables_of_other_models_are_refused(
        self, options: Options, costs: Costs, tiny_base: BaseLM, tmp_path: Path
    ):
        chosen = options | {"rescorers": ["none"]}
        of_other = msgspec.structs.replace(costs, weights_sha256="0" * 64, base="another")
        refused(
            lambda: evaluated(chosen, costs=of_other), "the costs are of another, and squad is decoded by", "--base"
        )
        assert costs.heads is not None
        for heads in (dataclasses.replace(costs.heads, sha256="0" * 64), dataclasses.replace(costs.heads, h=3), None):
            other = msgspec.structs.replace(costs, heads=heads)
            message = refused(lambda other=other: evaluated(chosen, costs=other), "rescore bench costs --heads --h")
            assert "no heads" in message if heads is None else "with others" in message
            (alone,) = evaluated(options | {"rescorers": ["lookup"]}, costs=other).results
            assert alone.predicted_speedup, "it needs no heads"
        refused(
            lambda: evaluated(chosen | {"h": 3}, costs=costs), "h = 4 heads, and squad is decoded with others, h = 3"
        )
        keep_costs(costs, tmp_path / "costs.json")
        assert evaluated(chosen, costs=str(tmp_path / "costs.json")).config.costs == {"squad": costs}
        refused(lambda: evaluated(chosen, costs="here"), "no costs of", "run: rescore bench costs --base", "--heads")

    def test_what_generates_takes_no_table_of_other_models(self, options: Options, costs: Costs):
        base = load_base(options["base"], dtype="float64", device="cpu")
        heads = load_heads(base, options["heads"])
        assert Generator.of(base, heads, Run("none"), costs=costs).drafters
        of_other = msgspec.structs.replace(costs, config_sha256="0" * 64, base="another")
        refused(lambda: Generator.of(base, heads, Run("none"), costs=of_other), "the costs are of another, and the")
        refused(lambda: Generator.of(base, heads.first(2), Run("none"), costs=costs), "with others, h = 2")
        assert Generator.of(base, None, Run("lookup"), costs=costs).drafters, "it needs no heads"

    def test_tables_of_another_precision_or_machine_are_told(self, options: Options, costs: Costs):
        chosen = options | {"rescorers": ["none"]}
        half = msgspec.structs.replace(costs, dtype="bfloat16")
        (line,) = evaluated(chosen, costs=half).notices
        assert line.startswith(
            "the costs are of decoding in bfloat16, and squad is decoded in float64: what is planned"
        )
        (line,) = evaluated(chosen | {"mode": "live"}, costs=costs).notices
        assert "in float64 on a CPU, 2 cores" in line and f"decoded in float64 on {this_machine('cpu')}: what" in line
        ours = msgspec.structs.replace(costs, machine=this_machine("cpu"))
        assert not evaluated(chosen | {"mode": "live"}, costs=ours).notices
        other = msgspec.structs.replace(ours, compiles=False)
        (line,) = evaluated(chosen | {"mode": "live"}, costs=other).notices
        assert line.count("layers not compiled") == 1
        (line,) = until_divergence(opened(chosen), ["none"], Acceptance("top-k:2").rule(), costs=half).notices
        assert "in bfloat16, and squad" in line

    def test_a_trace_that_does_not_name_its_heads_has_no_costs_of_them(
        self, options: Options, costs: Costs, tmp_path: Path
    ):
        (recording,) = opened(options, out=tmp_path / "trace")
        recording.trace()
        header = json.loads((tmp_path / "trace" / "trace.json").read_text())
        header["settings"] = {}
        (tmp_path / "trace" / "trace.json").write_text(json.dumps(header))
        given = {"trace": str(tmp_path / "trace"), "k": 8}
        refused(lambda: evaluated(given, costs=costs), "does not hold what block heads of a known base LM proposed")
        found = evaluated(given | {"rescorers": ["lookup"]}, costs=costs)
        assert found.results[0].predicted_speedup
        assert any("does not name its base LM; whether the costs, of tiny, are" in line for line in found.notices)
