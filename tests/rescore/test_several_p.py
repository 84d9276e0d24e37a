"""Evaluations with several numbers of drafts at once: every p gives what it gives alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import pytest
from evaluating import evaluated, swept
from evaluation_runs import Make, Peek, make_fixture, peek_fixture, run, without_times  # noqa: F401 (fixtures)
from test_evaluation_goes_on import ctrl_c, examples_of

from lattices.errors import IncompatibleError, RescoreError
from rescore import rescorers
from rescore.rescorers import Rescorer
from rescore.rescorers.unrescored import Unrescored
from rescore.runs import evaluation
from rescore.runs.log import ExampleLog
from rescore.runs.records import ExampleRecord, Identical
from rescore.runs.run import Run


class HalfRight(Rescorer):
    """Right like `Peek` with the weight 1 at p = 1 and 2 at a larger p, else unrescored."""

    alpha, identity = 0.5, "weighted"

    def draft(self, lattices, contexts, p):
        return (Peek() if self.alpha == min(p, 2) else Unrescored()).draft(lattices, contexts, p)


class TestSeveralP:
    RUNS: ClassVar = [("none", 1), ("none", 4), ("oracle", 1), ("peek", 1), ("peek", 4)]

    @pytest.mark.parametrize("mode", ["replay", "live"])
    def test_every_p_gives_what_it_gives_alone(self, make: Make, mode: str):
        found = run(make(p=(1, 4, 1), mode=mode))
        assert [(r.rescorer, r.p) for r in found] == self.RUNS, "the oracle is run once"
        alone = {(r.rescorer, r.p): r for p in (1, 4) for r in run(make(p=p))}
        for r in without_times(found):
            assert dataclasses.replace(r, gain=None, gain_ci95=None) == dataclasses.replace(
                alone[r.rescorer, r.p], gain=None, gain_ci95=None
            )
        if mode == "live":
            assert [r.identical for r in found] == [Identical(n=6, identical=6)] * 5

    def test_a_number_is_the_same_as_a_tuple_of_one(self, make: Make, tmp_path: Path):
        one = evaluated(make(p=4), out=tmp_path)
        assert run(make(p=(4,)), out=tmp_path) == one.document.results

    def test_the_gain_is_over_none_at_p_1(self, make: Make):
        none, *others = run(make(p=(1, 4)))
        assert (none.gain, none.gain_ci95) == (None, None)
        for r in others:
            assert r.gain == pytest.approx(r.block_efficiency / none.block_efficiency - 1)
            assert r.gain_ci95 is not None and r.gain_ci95[0] <= r.gain <= r.gain_ci95[1]
        assert [r.gain for r in run(make(p=4))] == [None] * 3, "there is nothing to compare with"
        assert [r.gain_ci95 for r in run(make(p=(1, 4), limit=1))] == [None] * 5

    def test_weights_are_looked_up_for_each_p(self, make: Make, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(rescorers.RESCORERS.built_in, "weighted", HalfRight)
        chosen = make(rescorers=("none", "weighted"), p=(1, 4))
        before = evaluated(chosen)
        (line,) = before.notices
        assert line.startswith("weighted on squad, p = 1 and 4: alpha 0.5 by default")
        assert [r.gain for r in before.document.results][2] == 0.0
        tuned = swept(make(rescorers=("weighted",)), alphas=(1.0, 2.0), ks=(8,), ps=(1, 4))
        assert [(t.p, t.alpha) for t in tuned] == [(1, 1.0), (4, 2.0)]
        assert evaluated(chosen).document == before.document, "nothing is taken unasked"
        after = evaluated(dict(chosen, alpha="tuned"))
        found = [(r.rescorer, r.p, r.alpha) for r in after.document.results]
        assert found == [("none", 1, None), ("none", 4, None), ("weighted", 1, 1.0), ("weighted", 4, 2.0)]
        alphas = {run.p: run.alpha for run in after.config.runs["squad"] if run.alpha}
        assert {p: (a.alpha, a.source) for p, a in alphas.items()} == {1: (1.0, "tuned"), 4: (2.0, "tuned")}
        assert after.notices == ["weighted on squad, p = 1 and 4: alpha was tuned on 3 of these 6 examples"]
        peek = {r.p: r for r in run(make(rescorers=("peek",), p=(1, 4)))}
        for r in after.document.results[2:]:
            assert r.accepted_histogram == peek[r.p].accepted_histogram
        with pytest.raises(
            RescoreError, match=r"no weight of weighted is tuned .* p = 2; run: rescore tune --task squad"
        ):
            evaluated(make(rescorers=("weighted",), p=(1, 2), alpha="tuned"))
        with pytest.raises(RescoreError, match=r"no weight of mine is tuned .*--rescorer weighted "):
            evaluated(make(rescorers=(Run("weighted", p=2, k=8, alpha="tuned", label="mine"),)))
        with pytest.raises(RescoreError, match="weighted:alpha=3 says its weight, which is to be tuned; leave it out"):
            swept(make(rescorers=("weighted:alpha=3",)))

    def test_a_weight_that_is_tuned_later_is_another_configuration(self, make: Make, tmp_path: Path, monkeypatch):
        monkeypatch.setitem(rescorers.RESCORERS.built_in, "weighted", HalfRight)
        chosen = make(rescorers=("weighted",), p=4, alpha="tuned")
        swept(make(rescorers=("weighted",)), alphas=(1.0,), ks=(8,), ps=(4,))
        run(chosen, out=tmp_path)
        swept(make(rescorers=("weighted",)), alphas=(1.0, 2.0), ks=(8,), ps=(4,))
        with pytest.raises(IncompatibleError, match=r"\(weights.squad.weighted \(p = 4, k = 8\).alpha: 0.0 -> 2.0; "):
            run(chosen, out=tmp_path)

    @pytest.mark.parametrize("mode", ["replay", "live"])
    def test_it_goes_on_where_it_stopped(self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str):
        """One p of an example may be finished and the other not; the gain is over examples that both finished."""
        monkeypatch.setattr(evaluation, "SHARD_EXAMPLES", 2)
        options, add = make(p=(1, 4), mode=mode), ExampleLog.add

        def stop(self: ExampleLog, record: ExampleRecord) -> None:
            if (record.rescorer, record.p, record.id) == ("peek", 4, "q2"):
                ctrl_c()
            add(self, record)

        with monkeypatch.context() as stopping:
            stopping.setattr(ExampleLog, "add", stop)
            cut = evaluated(options, out=tmp_path)
        finished = 4 if mode == "replay" else 3
        assert cut.interrupted and [r.n for r in cut.document.results] == [finished] * 4 + [2]
        last, two = cut.document.results[-1], run(make(p=(1, 4), limit=2))[-1]
        assert without_times([last]) == [two] and two.gain is not None
        again = evaluated(options, out=tmp_path)
        assert without_times(again.document.results) == run(make(p=(1, 4)))
        assert len(examples_of(tmp_path)) == len(set(examples_of(tmp_path))) == 30
