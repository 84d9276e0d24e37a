"""Analyses of a trace that is small enough to be worked out by hand (see `analysis_traces.small_trace`)."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from analysis_traces import example, small_trace, trace_of

from lattices.errors import RescoreError, UnknownNameError
from lattices.lattice import Lattice
from lattices.oracle import oracle_accepted
from rescore.accounting import account
from rescore.replaying import replay
from rescore.rescorers import load_rescorer
from rescore.studies.analysis import correlate_h_max
from rescore.studies.analysis.heads import doubling
from rescore.studies.analysis.positions import Positions
from rescore.studies.analysis.text import h_max
from rescore.studies.analysis.traces import ANALYSES, HmaxPoint, analyse_trace, correlation
from rescore.tracing import Trace, TracedExample


@pytest.fixture(scope="module")
def found():
    return analyse_trace(small_trace())


def random_trace(seed: int, *, examples: int = 4, h: int = 4, k: int = 5, vocab: int = 9) -> Trace:
    """Outputs and lattices drawn over few tokens, so that many are accepted; slot 1 is right."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(examples):
        t = int(rng.integers(1, 15))
        output = rng.integers(0, vocab, t).astype(np.int32)
        ids = np.argsort(rng.random((t, h, vocab)), axis=-1)[..., :k].astype(np.int32)
        for position, token in enumerate(output):
            row = ids[position, 0]
            row[np.flatnonzero(row == token)] = row[0]
            row[0] = token
        logps = np.sort(np.log(rng.random((t, h, k)) / k).astype(np.float32))[..., ::-1].copy()
        made.append(
            TracedExample(
                id=str(number), prompt="", references=(), output=None, prompt_ids=np.array([0], np.int32),
                output_ids=output, lattice=Lattice(ids, logps), entropies=rng.random((t, h)).astype(np.float32),
                margins=np.ones(t, np.float32),
            )
        )  # fmt: skip
    return trace_of(made, h=h, k=k)


def test_what_it_is_of(found):
    assert (found.name, found.examples, found.positions, found.h, found.k, found.entries) == ("hand", 1, 5, 3, 3, 3)
    json.dumps(found.as_dict(), allow_nan=False)


def test_repetition(found):
    # Drafts 1 1 1, 2 3 3, 3 8 5, 4 5 5, 5 5 8: pairs (1, 2) equal in two of 5, pairs (2, 3) in three of 5.
    every = found.repetition.every_position
    assert every.share == pytest.approx(5 / 10) and every.by_pair == pytest.approx((2 / 5, 3 / 5))
    assert every.repeating == pytest.approx(4 / 5)
    assert every.mean_longest_run == pytest.approx((3 + 2 + 1 + 2 + 2) / 5)
    # The decode steps at 0, 1 and 3: 1 1 1, 2 3 3, 4 5 5.
    decode = found.repetition.decode
    assert decode.drafts == 3 and decode.share == pytest.approx(4 / 6) and decode.by_pair == pytest.approx((1 / 3, 1))
    assert decode.mean_longest_run == pytest.approx(7 / 3)
    # The output 1 2 3 4 5 repeats nothing.
    assert found.repetition.output.share == 0 and found.repetition.output.mean_longest_run == 1


def test_windows_of_the_output_that_its_end_cuts_do_not_count():
    """Output 7 7 7 3 3, h = 3: the windows are 7 7 7, 7 7 3, 7 3 3; 3 3 - and 3 - - are no windows of 3 tokens. Pairs:
    2, 1, 1 of 2 each; with the cut ones it would be 5 of 7 pairs, 4 of 5 windows, and runs of 11 / 5."""
    slots = [[[token, 8, 9]] * 3 for token in (7, 7, 7, 3, 3)]
    output = analyse_trace(trace_of([example("a", [7, 7, 7, 3, 3], slots, [0.1, 0.2, 0.3])])).repetition.output
    assert output.drafts == 3
    assert output.share == pytest.approx(4 / 6) and output.by_pair == pytest.approx((2 / 3, 2 / 3))
    assert output.repeating == pytest.approx(1.0)
    assert output.mean_longest_run == pytest.approx((3 + 2 + 2) / 3)
    short = analyse_trace(trace_of([example("a", [7, 7], slots[:2], [0.1, 0.2, 0.3])])).repetition
    assert short.output.drafts == 0 and short.output.share is None and short.every_position.drafts == 2


def test_intervals_are_by_group():
    each = [dataclasses.replace(random_trace(i, examples=1).examples[0], id=f"{i}", group=f"g{i}") for i in range(5)]
    copies = [dataclasses.replace(e, id=f"{e.id}-{n}") for n in range(6) for e in each]
    one, many = (analyse_trace(trace_of(list(of), h=4, k=5)) for of in (each, copies))
    assert (one.groups, many.groups, many.examples) == (5, 5, 30)
    assert one.oracle.by_k[1].block_efficiency_ci95 is not None
    for a, b in zip((*one.oracle.by_k, one.oracle.unrescored, *one.p_curve.points),
                    (*many.oracle.by_k, many.oracle.unrescored, *many.p_curve.points), strict=True):  # fmt: skip
        assert b.block_efficiency_ci95 == pytest.approx(a.block_efficiency_ci95)


def test_entropy(found):
    # 0.25, 1.0, 0.75: it rises to head 2 and then falls.
    assert found.entropy.h_max == 2
    assert [head.mean for head in found.entropy.heads] == pytest.approx([0.25, 1.0, 0.75])
    assert [head.std for head in found.entropy.heads] == pytest.approx([0, 0, 0])
    # Bins of half a nat up to log(10) = 2.3: 0.25 is in the first, 0.75 in the second, 1.0 in the third.
    assert len(found.entropy.edges) == 6
    assert [head.histogram for head in found.entropy.heads] == [(5, 0, 0, 0, 0), (0, 0, 5, 0, 0), (0, 5, 0, 0, 0)]


def test_oracle(found):
    oracle = found.oracle
    assert oracle.ks == (1, 2, 3)
    assert oracle.unrescored.block_efficiency == pytest.approx(5 / 3) and oracle.unrescored.steps == 3
    assert [point.steps for point in oracle.by_k] == [3, 3, 2]
    assert oracle.by_k[2].block_efficiency == pytest.approx(5 / 2) and oracle.by_k[2].block_efficiency_ci95 is None
    # k = 3, slot 2 only: position 0 accepts 1 2 and stops (slot 3 is 1), position 2 accepts 3 4 5 (slot 3 is 5):
    # 0 (2) 2 (3): 2 steps as well. k = 2, slot 2 only: 0 (2) 2 (1) 3 (2).
    assert oracle.by_refined[2] == pytest.approx((5 / 3, 5 / 2, 5 / 2))
    assert oracle.by_refined[1] == pytest.approx((5 / 3, 5 / 3, 5 / 3))
    assert oracle.gain_by_refined[2] == pytest.approx((0, 0.5, 0.5))
    # Blocks of 1: one token a step. Of 2, arg-max: 0 (1) 1 (2) 3 (2); k = 3: 0 (2) 2 (2) 4 (1).
    assert oracle.by_heads_unrescored == pytest.approx((1, 5 / 3, 5 / 3))
    assert oracle.by_heads_oracle[2] == pytest.approx((1, 5 / 3, 5 / 2))


def test_p_best(found):
    # p = 1 is unrescored. Of 9 paths p = 8 leaves out that of two third entries (0.1 x 0.1), which no position needs:
    # position 0 wants second and third (0.3 x 0.1), position 2 third and first.
    assert found.p_curve.ps == (1, 2, 4, 8, 16) and found.p_curve.rescorer == "none"
    assert found.p_curve.points[0].block_efficiency == pytest.approx(5 / 3)
    # p = 2: the second best changes one slot to its second entry; of equals (slot 2 or slot 3) the lower ids: at
    # position 0 1 1 9 against 1 2 1: 1 1 9. So position 0 still accepts 1.
    # Position 1: 2 3 4 against 2 8 3: 2 3 4 is lower and accepts 3: 0 (1) 1 (3) 4 (1).
    assert found.p_curve.points[1].steps == 3
    assert [p.steps for p in found.p_curve.points[3:]] == [2, 2]  # as the oracle: 0 (3) 3 (2)


def test_ranks(found):
    # Slot 2: ranks 1 0 2 0 and one position without a target; slot 3: 2 1 0.
    assert [head.counts for head in found.ranks.heads] == [(5, 0, 0, 0), (2, 1, 1, 0), (1, 1, 1, 0)]
    assert [head.positions for head in found.ranks.heads] == [5, 4, 3]
    assert found.ranks.ks == (1, 2, 3)
    assert found.ranks.heads[1].recall == pytest.approx((2 / 4, 3 / 4, 1))
    assert found.ranks.heads[1].mean_reciprocal_rank == pytest.approx((2 + 1 / 2 + 1 / 3) / 4)


def test_acceptance(found):
    first, second, third = found.acceptance
    assert first.unconditional == first.conditional == first.marginal == 1
    assert second.unconditional == second.conditional == pytest.approx(2 / 4) and second.reached == 4
    # Slot 3 is right at position 2 only, whose slot 2 is wrong; position 1 reaches it and is wrong, 3 has no target.
    assert third.unconditional == pytest.approx(1 / 3) and third.reached == 1 and third.conditional == 0
    # Steps accepted 1, 2, 2.
    assert second.marginal == second.conditional_decode == pytest.approx(2 / 3)
    assert third.marginal == third.conditional_decode == 0


def test_calibration(found):
    # Every arg-max has the probability 0.5; heads 2 and 3 are right in 2 of 4 and 1 of 3.
    first, second, third = found.calibration
    assert second.ece == pytest.approx(0, abs=1e-6) and third.ece == pytest.approx(0.5 - 1 / 3)
    assert first.accuracy == 1 and first.ece == pytest.approx(0.5)
    assert third.brier == pytest.approx(0.25) and third.confidence == pytest.approx(0.5)
    filled = [b for b in third.bins if b.count]
    assert len(third.bins) == 15 and len(filled) == 1 and filled[0].low < 0.5 <= filled[0].high
    assert (filled[0].count, filled[0].accuracy) == (3, pytest.approx(1 / 3))


@pytest.mark.parametrize("seed", range(8))
def test_curves_are_what_replay_decodes(seed):
    trace = random_trace(seed)
    found = analyse_trace(trace, k=4)

    def decoded(name: str, *, k: int, p: int = 1, of: Trace = trace) -> float:
        return account(replay(of.examples, load_rescorer(name), k=k, p=p), of.header.h).block_efficiency

    assert found.oracle.unrescored.block_efficiency == pytest.approx(decoded("none", k=1))
    for k, point in zip(found.oracle.ks, found.oracle.by_k, strict=True):
        assert point.block_efficiency == pytest.approx(decoded("oracle", k=k))
    for p, point in zip(found.p_curve.ps, found.p_curve.points, strict=True):
        assert point.block_efficiency == pytest.approx(decoded("none", k=4, p=p))
    for heads in range(1, 5):
        cut = trace.first_heads(heads)
        assert found.oracle.by_heads_oracle[-1][heads - 1] == pytest.approx(decoded("oracle", k=5, of=cut))
        assert found.oracle.by_heads_unrescored[heads - 1] == pytest.approx(decoded("none", k=1, of=cut))


@pytest.mark.parametrize("seed", range(4))
def test_identities(seed):
    trace = random_trace(seed)
    positions = Positions.of(trace)
    found = analyse_trace(trace)
    assert sum(a.marginal for a in found.acceptance) == pytest.approx(found.oracle.unrescored.block_efficiency)
    for head, accepted in zip(found.ranks.heads, found.acceptance, strict=True):
        assert sum(head.counts) == head.positions == positions.known[:, head.head - 1].sum()
        assert head.recall[0] == accepted.unconditional
        assert list(head.recall) == sorted(head.recall)
    for k, row in zip(found.oracle.ks, found.oracle.by_refined, strict=True):
        assert row[0] == found.oracle.unrescored.block_efficiency
        everywhere = oracle_accepted(positions.ranks, k)
        assert row[-1] == pytest.approx(positions.block_efficiency(everywhere))


def test_no_examples_and_one_head():
    empty = analyse_trace(trace_of([]))
    json.dumps(empty.as_dict(), allow_nan=False)
    assert empty.positions == 0 and empty.repetition.decode.share is None and empty.entropy.h_max is None
    assert empty.oracle.by_k[0].block_efficiency is None and empty.calibration[1].ece is None
    assert empty.acceptance[0].marginal is None and correlate_h_max([empty]).points == ()
    single = analyse_trace(small_trace().first_heads(1))
    json.dumps(single.as_dict(), allow_nan=False)
    assert single.repetition.decode.share is None and single.oracle.by_k[-1].block_efficiency == 1


def test_only_what_is_asked_for():
    found = analyse_trace(small_trace(), only=("ranks",), name="mine")
    assert found.name == "mine" and found.ranks is not None
    assert all(getattr(found, name) is None for name in ANALYSES if name != "ranks")


def test_refused():
    with pytest.raises(UnknownNameError, match="did you mean entropy"):
        analyse_trace(small_trace(), only=("entropi",))
    with pytest.raises(RescoreError, match="the trace holds the top 3"):
        analyse_trace(small_trace(), k=4)
    with pytest.raises(RescoreError, match="at least 1"):
        analyse_trace(small_trace(), bins=0)


def test_h_max_over_tasks():
    # Deviations of h_max -1 0 1, of block efficiency -1 1 0: their product sums to 1, each one's squares to 2: R = 1/2.
    points = [HmaxPoint("a", 1, 1.0), HmaxPoint("b", 2, 3.0), HmaxPoint("c", 3, 2.0)]
    assert correlation(points).pearson == pytest.approx(0.5)
    assert correlation(points[:2]).pearson is None  # two points always lie on a line
    assert correlation([HmaxPoint(p.name, 2, p.block_efficiency) for p in points]).pearson is None
    assert correlate_h_max([analyse_trace(small_trace())] * 3).pearson is None
    assert correlate_h_max([analyse_trace(small_trace(), only=("entropy",))]).points == ()


def test_h_max_counts_a_task_once_and_at_one_h():
    found = analyse_trace(small_trace(), name="squad")
    at = {h: analyse_trace(small_trace().first_heads(h), name="squad") for h in (1, 2)}
    # Runs of one task with k in {2, 3} and h in {1, 2, 3}.
    once = correlate_h_max([found, dataclasses.replace(found, k=2), at[2], at[1], at[1]])
    assert (once.h, [p.name for p in once.points], once.pearson) == (3, ["squad"], None)
    # Two tasks have h = 2, one has 3; the trace of most positions stands for a task.
    more = dataclasses.replace(at[2], positions=9, entropy=dataclasses.replace(at[2].entropy, h_max=1))
    several = correlate_h_max([found, at[2], dataclasses.replace(at[2], name="xsum"), more])
    assert several.h == 2 and [(p.name, p.h_max) for p in several.points] == [("squad", 1), ("xsum", 2)]
    assert "h = 2: too few tasks" in h_max(several).text()


def test_doubling():
    assert [doubling(n) for n in (1, 2, 5, 16)] == [(1,), (1, 2), (1, 2, 4, 5), (1, 2, 4, 8, 16)]
