"""Costs of a step, and trees that are cut where they pay no more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import make_heads, refused
from evaluating import Options, evaluated, opened
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ngram_rescorer import bigram_model, save

from lattices.errors import RescoreError
from lm.base.catalog import load_base
from rescore.costs import Costs, keep_costs, load_costs, measure_costs
from rescore.rescorers.joint_plan import PATIENCE, Plan, best_size
from rescore.runs.records import Identical
from rescore.runs.run import Run, runs_of
from rescore.runs.tuning import fit_joint


def costs_of(verify: list[list[float]], *, heads: float | None = 10.0, contexts=(64, 256), nodes=(1, 4, 16)) -> Costs:
    return Costs(
        base="tiny", dtype="float32", device="cpu", machine="m", threads=1, contexts=list(contexts), nodes=list(nodes),
        verify_ms=verify, heads_ms=heads,
    )  # fmt: skip


def test_between_and_beyond_what_was_measured_are_straight_lines():
    costs = costs_of([[10, 13, 25], [20, 23, 35]])
    assert costs.curve(64, 4).tolist() == [10, 11, 12, 13] and costs.curve(160, 1).tolist() == [15]
    assert costs.curve(256, 18)[[15, 17]].tolist() == [35, 37] and costs.curve(448, 1).tolist() == [30]
    assert costs.curve(1, 1).tolist() == [10]
    noisy = costs_of([[10, 9, 25]], contexts=(64,))
    assert (np.diff(noisy.curve(64, 16)) >= 0).all(), "a larger forward never costs less"


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


@pytest.mark.parametrize("cheap", [False, True])
def test_live_plans_as_replay_and_the_output_is_greedy_s(options: Options, tmp_path: Path, cheap: bool):
    ngram = save(tmp_path / "ngram", bigram_model())
    for drafters in (["heads", "lookup"], ["lookup"]) if cheap else (["heads", "lookup"],):
        fit_joint(opened(options), tmp_path / "w", f"joint:ngram={ngram}", drafters=drafters, k=8, held_out=2)
    table = tmp_path / "costs.json"
    base = load_base(options["base"])
    keep_costs(costs_of([[10, 12, 20], [11, 13, 22]], heads=4.0), base.identity, table)
    (run,) = runs_of([f"joint:{tmp_path / 'w'},ngram={ngram},costs={table}"], ks=(8,), nodes="auto")
    chosen = options | {"rescorers": ["none", run]}
    replayed, live = (evaluated(chosen | {"mode": mode}) for mode in ("replay", "live"))
    assert [r.identical for r in live] == [Identical(n=6, identical=6)] * 2
    assert [r.accepted_histogram for r in live] == [r.accepted_histogram for r in replayed]
    drafted = [len(draft) for e in replayed.records("squad", run.label, run.p) for draft in e.drafts]
    assert 1 <= min(drafted) < max(drafted), "no two steps are alike"


def test_where_nothing_pays_nothing_is_drafted(options: Options, tmp_path: Path):
    ngram = save(tmp_path / "ngram", bigram_model())
    fit_joint(opened(options), tmp_path / "w", f"joint:ngram={ngram}", drafters=["lookup"], k=8, held_out=2)
    table = tmp_path / "costs.json"
    keep_costs(costs_of([[1, 1000, 9000]], contexts=(64,)), load_base(options["base"]).identity, table)
    run = Run(f"joint:{tmp_path / 'w'},ngram={ngram},nodes=auto,costs={table}", p=32, k=8, drafters=("lookup",))
    (result,) = evaluated(options | {"rescorers": [run]}).results
    assert result.block_efficiency == 1.0


def test_a_table_is_found_again_on_this_machine_for_this_base(tiny_base, options: Options):
    refused(lambda: load_costs(identity=tiny_base.identity), "are measured on this machine; run: rescore bench costs")
    refused(lambda: load_costs(), "does not name its base LM")
    heads = make_heads(tiny_base)
    costs = measure_costs(tiny_base, heads, contexts=(8, 16), nodes=(1, 2, 4), repeats=1)
    keep_costs(costs, tiny_base.identity)
    assert load_costs(identity=tiny_base.identity) == costs and costs.heads_ms is not None
    refused(lambda: load_costs("/nowhere/costs.json"), "no costs in /nowhere/costs.json; measure them")
    refused(lambda: Run("joint:nodes=some").load(), "joint: give tokens of 1 to", RescoreError)
