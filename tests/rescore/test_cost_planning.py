"""Trees that are cut where they pay no more, and drafters that are asked where they pay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import refused, save_tiny_base
from evaluating import Options, evaluated, opened
from hypothesis import given, settings
from hypothesis import strategies as st
from made_costs import costs_for, costs_of, options_fixture  # noqa: F401
from test_ngram_rescorer import bigram_model, save

from lattices.errors import RescoreError
from lm.base.catalog import load_base
from lm.heads.block_heads import load_heads
from rescore.costs.kept import keep_costs
from rescore.costs.measuring import measure_costs
from rescore.costs.table import ChoiceCost
from rescore.decoding import decode
from rescore.drafters import load_drafter
from rescore.drafters.drafting import Drafting
from rescore.drafters.heads import Heads
from rescore.generation.live import Generator
from rescore.rescorers import load_rescorer
from rescore.rescorers.joint import of_best_branches
from rescore.rescorers.joint_plan import PATIENCE, Plan, Planner
from rescore.runs.records import Identical
from rescore.runs.run import Run, runs_of
from rescore.runs.tuning import fit_joint

TOOK = Plan.took


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=12), st.integers(0, 1000))
def test_the_best_size_has_the_highest_rate(factors: list[float], seed: int):
    logps = np.concatenate([[0.0], np.log(np.sort(factors)[::-1])])
    milliseconds = np.cumsum(np.random.default_rng(seed).uniform(0.1, 3, 20)) + 5
    parents = np.arange(-1, len(logps) - 1)
    planner = Planner(costs_of([[10, 12, 20], [11, 13, 22]]))
    rate, nodes = planner.best_size((parents, parents, parents, logps), milliseconds)
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
