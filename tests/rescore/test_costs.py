"""Costs of a step, and trees that are cut where they pay no more."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import make_heads, refused, save_tiny_base
from evaluating import Options, evaluated, opened
from hypothesis import given, settings
from hypothesis import strategies as st
from made_costs import costs_for, costs_of, options_fixture  # noqa: F401
from made_records import example_record
from test_ngram_rescorer import bigram_model, save

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
from rescore.decoding import decode
from rescore.drafters import load_drafter
from rescore.drafters.drafting import Drafting
from rescore.drafters.heads import Heads
from rescore.generation.live import Generator
from rescore.rescorers import load_rescorer
from rescore.rescorers.joint import of_best_branches
from rescore.rescorers.joint_plan import PATIENCE, Plan, Planner, best_size
from rescore.runs.evaluated import load_run
from rescore.runs.inputs import Inputs
from rescore.runs.records import Identical
from rescore.runs.run import Run, runs_of
from rescore.runs.tuning import fit_joint
from rescore.studies import block_length
from rescore.studies import verify_curve as verify_curves
from rescore.studies.until_divergence import until_divergence

TOOK = Plan.took


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


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=12), st.integers(0, 1000))
def test_the_best_size_has_the_highest_rate(factors: list[float], seed: int):
    logps = np.concatenate([[0.0], np.log(np.sort(factors)[::-1])])
    milliseconds = np.cumsum(np.random.default_rng(seed).uniform(0.1, 3, 20)) + 5
    rate, nodes = best_size(logps, milliseconds)
    rates = [np.exp(logps[:n]).sum() / milliseconds[n - 1] for n in range(1, len(logps) + 1)]
    assert rate == pytest.approx(max(rates)) and rates[nodes - 1] == pytest.approx(rate)


def test_heads_are_asked_where_text_promises_less_and_now_and_then():
    plan = Plan()
    assert plan.asks(9.0), "nothing is known of them"
    plan.took(heads=True, rate=2.0)
    assert plan.asks(1.9) and not plan.asks(2.1)
    for _ in range(PATIENCE):
        assert not plan.asks(3.0)
        plan.took(heads=False)
    assert plan.asks(3.0)
    plan.took(heads=True, rate=1.0)
    assert plan.rate == pytest.approx(1.8) and plan.since == 0 and not plan.asks(3.0)
    refused(lambda: Run("joint:nodes=some").load(), "joint: give tokens of 1 to", RescoreError)


@pytest.mark.parametrize("cheap", [False, True])
def test_live_plans_as_replay_and_the_output_is_greedy_s(options: Options, tmp_path: Path, cheap: bool):
    ngram = save(tmp_path / "ngram", bigram_model())
    for drafters in (["heads", "lookup"], ["lookup"]) if cheap else (["heads", "lookup"],):
        fit_joint(opened(options), tmp_path / "w", f"joint:ngram={ngram}", drafters=drafters, k=8, held_out=2)
    costs = costs_for(options, [[10, 12, 20], [11, 13, 22]], heads_ms=4.0)
    (run,) = runs_of([f"joint:{tmp_path / 'w'},ngram={ngram}"], ks=(8,), nodes="auto")
    chosen = options | {"rescorers": ["none", run]}
    replayed, live = (evaluated(chosen | {"mode": mode}, costs=costs) for mode in ("replay", "live"))
    assert [r.identical for r in live] == [Identical(n=6, identical=6)] * 2
    assert [r.accepted_histogram for r in live] == [r.accepted_histogram for r in replayed]
    drafted = [len(draft) for e in replayed.records("squad", run.label, run.p) for draft in e.drafts]
    assert 1 <= min(drafted) < max(drafted), "no two steps are alike"


def test_where_nothing_pays_nothing_is_drafted(options: Options, tmp_path: Path):
    ngram = save(tmp_path / "ngram", bigram_model())
    fit_joint(opened(options), tmp_path / "w", f"joint:ngram={ngram}", drafters=["lookup"], k=8, held_out=2)
    costs = costs_for(options, [[1, 1000, 9000]], contexts=(64,))
    run = Run(f"joint:{tmp_path / 'w'},ngram={ngram},nodes=auto", p=32, k=8, drafters=("lookup",))
    (result,) = evaluated(options | {"rescorers": [run]}, costs=costs).results
    assert result.block_efficiency == 1.0
    keep_costs(costs)
    refused(lambda: evaluated(options | {"rescorers": [run]}), "no costs of", "are measured on this machine (with")


def test_generation_plans_by_what_was_measured_here(options: Options, tmp_path: Path):
    ngram = save(tmp_path / "ngram", bigram_model())
    for drafters in (["heads", "lookup"], ["lookup"]):
        fit_joint(opened(options), tmp_path / "w", f"joint:ngram={ngram}", drafters=drafters, k=8, held_out=2)
    base = load_base(options["base"], dtype="float64", device="cpu")
    heads = load_heads(base, options["heads"])
    (run,) = runs_of([f"joint:{tmp_path / 'w'},ngram={ngram}"], ks=(8,), nodes="auto")
    refused(lambda: Generator.of(base, heads, run), "with these heads are measured on this machine")
    keep_costs(measure_costs(base, heads, contexts=(8, 64), nodes=(1, 2, 8), repeats=1))
    prompt = list(b"the bridge was built in the bridge was")
    decoded = Generator.of(base, heads, run).decode(prompt, 24)
    assert decoded.output_ids == decode(base, None, prompt, max_new_tokens=24).output_ids
    text = Run(f"joint:{tmp_path / 'w'},ngram={ngram},nodes=auto", p=32, k=8, drafters=("lookup",))
    assert Generator.of(base, None, text).decode(prompt, 24).output_ids == decoded.output_ids, "it needs no heads"
    cut = heads.first(2)
    assert cut.sha256 == heads.sha256, "how many are used is told apart"
    few = Run("joint:nodes=auto", p=32, k=8, drafters=("heads:vocabulary=40", "lookup"))  # whose spec is not `heads`
    for other in (run, few):
        refused(lambda other=other: Generator.of(base, cut, other), "with these heads are measured on this machine")


def test_one_draft_is_planned_as_one(options: Options, tmp_path: Path):
    """With p = 1 other branches would be paid for in vain; as a batch, which is all that some bases verify, twice."""
    ngram, drafters = save(tmp_path / "ngram", bigram_model()), ("heads", "lookup")
    fit_joint(opened(options), tmp_path / "w", f"joint:ngram={ngram}", drafters=drafters, k=8, held_out=2)
    spec, found = f"joint:{tmp_path / 'w'},ngram={ngram},nodes=auto", []
    for p, tree_ms in ((1, 0.5), (32, None), (32, 0.5)):
        costs = costs_for(options, [[10, 10.01, 10.1]], contexts=(64,), tree_ms=tree_ms, heads_ms=0.1)
        run = Run(spec, p=p, k=8, drafters=drafters)
        found.append([record.calls for record in evaluated(options | {"rescorers": [run]}, costs=costs).examples])
    of_one, without_trees, of_trees = found
    assert of_one == without_trees and {call.drafts for calls in of_one for call in calls} <= {0, 1}
    assert max(call.drafts for calls in of_trees for call in calls) > 1
    assert max(call.tokens for calls in of_one for call in calls) > 4


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(0, 1000), st.integers(1, 5))
def test_what_is_planned_has_no_more_branches_than_drafts(above: list[int], seed: int, p: int):
    """However much of it is taken; its paths are the tree's."""
    parents = np.array([-1, *(min(parent, place) for place, parent in enumerate(above))], dtype=np.int32)
    shares = np.sort(np.random.default_rng(seed).uniform(0.01, 1, len(above)))[::-1]
    logps, ids = np.concatenate([[0.0], np.log(shares)]), np.arange(len(parents), dtype=np.int32)
    token_ids, kept, depths, kept_logps = of_best_branches((ids, parents, ids + 1, logps), p)
    assert kept.dtype == parents.dtype and (depths == token_ids + 1).all() and (kept_logps == logps[token_ids]).all()
    assert [-1, *token_ids[kept[1:]].tolist()] == parents[token_ids].tolist()
    for n in range(1, len(kept) + 1):
        assert len(set(range(n)) - set(kept[:n].tolist())) <= p
    if p >= len(set(ids.tolist()) - set(parents.tolist())):
        assert len(kept) == len(parents), "nothing is lost where all fit"


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(0, 1000), st.sampled_from([0.0, 0.5, 9.0]))
def test_a_tree_s_mask_counts_from_where_it_branches(above: list[int], seed: int, tree_ms: float):
    """Against the rates of all sizes."""
    random = np.random.default_rng(seed)
    parents = np.array([-1, *(min(parent, place) for place, parent in enumerate(above))], dtype=np.int32)
    logps = np.concatenate([[0.0], np.log(np.sort(random.uniform(0.01, 1, len(above)))[::-1])])
    milliseconds = np.cumsum(random.uniform(0.1, 3, 32)) + 5
    planner = Planner(costs_of([[10, 12, 20], [11, 13, 22]], tree_ms=tree_ms))
    rate, nodes = planner.best_size((parents, parents, parents, logps), milliseconds)
    rates = []
    for n in range(1, len(parents) + 1):
        leaves = set(range(n)) - set(parents[:n].tolist())
        rates.append(np.exp(logps[:n]).sum() / (milliseconds[n - 1] + (tree_ms if len(leaves) > 1 else 0.0)))
    assert rate == pytest.approx(max(rates)) and rates[nodes - 1] == pytest.approx(rate)


def test_what_drafters_take_is_what_the_table_has_of_them():
    choices = [
        ChoiceCost(rescorer=spec, k=k, p=p, ms=ms)
        for spec, k, p, ms in (
            ("draft-model:neural-61m", 8, 1, 30.0), ("draft-model:neural-61m", 8, 4, 33.0), ("lookup", 8, 1, 0.2),
            ("joint:nodes=auto", 8, 32, 1.0),
        )
    ]  # fmt: skip
    without = costs_of([[10, 12, 20], [11, 13, 22]], heads_ms=4.0, vocabulary_ms={100: 1.0, 200: 4.0})
    planner = Planner(msgspec.structs.replace(without, choices=choices))
    model, heads, lookup = (load_drafter(spec) for spec in ("draft-model:neural-61m", "heads", "lookup"))
    assert planner.drafting_ms([model, heads, lookup], 8) == 34.0
    assert planner.drafting_ms([load_drafter("heads:vocabulary=150"), lookup], 8) == 2.5
    assert planner.drafting_ms([model, lookup], 4) == planner.drafting_ms([lookup], 8) == 0.0, "not measured"
    assert planner.identity != Planner(without).identity
    later = msgspec.structs.replace(without, choices=choices[1:])
    assert Planner(later).identity == Planner(without).identity, "plans do not follow from it"


def test_room_is_made_for_the_largest_tree_there_can_be():
    for spec, p, most in (("joint:nodes=auto", 32, 32), ("joint:nodes=12", 12, 12), ("joint:nodes=100,tokens=3", 2, 8)):
        assert Drafting(load_rescorer(spec), (Heads(),), 8, p).most_tokens(9) == most
    assert Drafting(load_rescorer("joint"), (Heads(),), 8, 3).most_tokens(9) == 48
    assert Drafting(load_rescorer("none"), (Heads(),), 8, 3).most_tokens(9) == 27


def test_a_tree_that_costs_more_than_it_brings_is_one_draft(options: Options, tmp_path: Path):
    ngram, drafters = save(tmp_path / "ngram", bigram_model()), ("heads", "lookup")
    fit_joint(opened(options), tmp_path / "w", f"joint:ngram={ngram}", drafters=drafters, k=8, held_out=2)
    run, found = Run(f"joint:{tmp_path / 'w'},ngram={ngram},nodes=auto", p=32, k=8, drafters=drafters), []
    for tree_ms in (0.0, 1000.0):
        costs = costs_for(options, [[10, 10.01, 10.1]], contexts=(64,), tree_ms=tree_ms, heads_ms=0.1)
        examples = evaluated(options | {"rescorers": [run]}, costs=costs).examples
        found.append([call for record in examples for call in record.calls])
    free, dear = found
    assert max(call.drafts for call in free) > 1 and max(call.drafts for call in dear) == 1
    assert max(call.tokens for call in dear) > 4


def test_a_draft_model_that_costs_more_than_text_is_not_asked(options: Options, tmp_path: Path):
    """But for the first step, and every `PATIENCE` after it."""
    ngram = save(tmp_path / "ngram", bigram_model())
    spec = f"draft-model:{save_tiny_base(tmp_path / 'small', seed=3, hidden_size=16)}"
    for drafters in ((spec, "lookup"), ("lookup",)):
        fit_joint(opened(options), tmp_path / "w", f"joint:ngram={ngram}", drafters=drafters, k=8, held_out=2)
    run = Run(f"joint:{tmp_path / 'w'},ngram={ngram},nodes=auto", p=32, k=8, drafters=(spec, "lookup"))
    asked = []
    for ms in (None, 1000.0):
        choices = [] if ms is None else [ChoiceCost(rescorer=spec, k=8, p=1, ms=ms)]
        costs = costs_for(options, [[10, 12, 20], [11, 13, 22]], heads_ms=None, choices=choices)
        plans = list[bool]()
        with pytest.MonkeyPatch.context() as patch:

            def took(plan: Plan, plans: list[bool] = plans, **how: Any) -> None:
                plans.append(how["heads"])
                TOOK(plan, **how)

            patch.setattr(Plan, "took", took)
            evaluated(options | {"rescorers": [run]}, costs=costs)
        asked.append(sum(plans) / len(plans))
    assert asked[1] < asked[0] and asked[1] <= 0.2


def test_what_heads_cost_counts_only_where_heads_are_asked(options: Options, tmp_path: Path):
    """A table may be of heads that nothing drafts with: those that were measured last."""
    ngram = save(tmp_path / "ngram", bigram_model())
    drafters = (f"draft-model:{save_tiny_base(tmp_path / 'small', seed=3, hidden_size=16)}", "lookup")
    fit_joint(opened(options), tmp_path / "w", f"joint:ngram={ngram}", drafters=drafters, k=8, held_out=2)
    run = Run(f"joint:{tmp_path / 'w'},ngram={ngram},nodes=auto", p=32, k=8, drafters=drafters)
    found = []
    for heads_ms in (None, 1000.0):
        costs = costs_for(options, [[10, 12, 20], [11, 13, 22]], heads_ms=heads_ms)
        (result,) = evaluated(options | {"rescorers": [run]}, costs=costs).results
        found.append(result.accepted_histogram)
    assert found[0] == found[1]


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

        for place in (catalog, verify_curves, block_length):
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
        refused(lambda: verify_curves.verify_curve_of(Inputs(), repeats=0), "--repeats 0", RescoreError)
        refused(lambda: verify_curves.verify_curve_of(Inputs(), cached=-1), "--cached -1", RescoreError)
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
