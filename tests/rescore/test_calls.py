"""What a step's verify call reads: the same live and in replay, and as the prefix tree has it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import make_heads
from evaluating import Options, evaluated, opened
from hypothesis import given, settings
from hypothesis import strategies as st
from made_costs import costs_for, options_fixture  # noqa: F401
from test_ngram_rescorer import bigram_model, save

from lattices.lattice import Lattice
from lattices.prefix_tree import build_prefix_tree
from lm.base.model import BaseLM
from rescore.calls import NO_CALL, Call, as_read, sizes
from rescore.costs.table import Costs
from rescore.decoding import decode
from rescore.drafters.drafting import Drafting
from rescore.replaying import Limits, replay_steps
from rescore.rescorers import load_rescorer
from rescore.runs.run import Run, runs_of
from rescore.runs.tuning import fit_joint
from rescore.tracing import TracedExample


@st.composite
def stepped(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Drafts of some steps `[n, p, l]` that share prefixes, some of them shorter or equal, and what remains `[n]`."""
    n, p, length = (draw(st.integers(1, most)) for most in (3, 5, 6))
    random = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    drafts = random.integers(0, 3, (n, p, length))
    drafts[:, :, 0] = random.integers(0, 9, (n, 1))  # the base's own token
    drafts[np.arange(length) >= random.integers(1, length + 1, (n, p, 1))] = -1
    return drafts, random.integers(1, 8, n)


@settings(deadline=None, max_examples=200)
@given(stepped())
def test_sizes_are_those_of_the_drafts_that_are_read(given: tuple[np.ndarray, np.ndarray]):
    drafts, remaining = given
    trees, different = sizes(drafts, remaining, "tree")
    batches, same = sizes(drafts, remaining, "batch")
    assert (different == same).all()
    for row, (each, left) in enumerate(zip(drafts, remaining.tolist(), strict=True)):
        read = as_read(each, left)
        expected = list(dict.fromkeys(tuple(t for t in draft[:left] if t >= 0) for draft in each.tolist()))
        assert [tuple(t for t in draft if t >= 0) for draft in read.tolist()] == expected, "each once, in their order"
        assert read.shape[1] == max(map(len, expected))
        assert (trees[row], batches[row], different[row]) == (len(build_prefix_tree(read).tokens), read.size, len(read))


@pytest.fixture(name="joint")
def joint_fixture(options: Options, tmp_path: Path) -> str:
    """The spec of a joint that is fitted for heads and lookup, and for lookup alone."""
    ngram = save(tmp_path / "ngram", bigram_model())
    for drafters in (["heads", "lookup"], ["lookup"]):
        fit_joint(opened(options), tmp_path / "w", f"joint:ngram={ngram}", drafters=drafters, k=8, held_out=2)
    return f"joint:{tmp_path / 'w'},ngram={ngram}"


@pytest.fixture(name="costs")
def costs_fixture(options: Options) -> Costs:
    return costs_for(options, [[10, 10.1, 10.5], [11, 11.1, 11.5]], heads_ms=1.0)


@pytest.mark.parametrize("p", [1, 4])
@pytest.mark.parametrize("verify", ["tree", "batch"])
def test_every_call_of_a_live_decode_is_replayed(options: Options, joint: str, costs: Costs, p: int, verify: str):
    runs = [
        *runs_of(["none", "lookup", joint], ks=(8,), ps=(p,)), *runs_of([joint], ks=(8,), ps=(p,), nodes="auto"),
        Run("none", p=p, k=8, drafters=("lookup", "heads"), label="shares"),
    ]  # fmt: skip
    how = options | {"rescorers": runs, "verify": verify}
    live, replayed = (evaluated(how | {"mode": mode}, costs=costs) for mode in ("live", "replay"))
    for run in runs:
        records = [each.records("squad", run.label, p) for each in (live, replayed)]
        steps = [[(e.id, e.prompt_tokens, e.accepted, e.calls) for e in of] for of in records]
        assert steps[0] == steps[1] and len(steps[0]) == 6
        calls = [call for e in records[1] for call in e.calls]
        asked = {call.heads for call in calls if call.tokens}
        assert asked == {run.needs_heads} or ("auto" in run.label and asked == {True, False})
        most = max(call.drafts for call in calls)
        assert most == 1 if p == 1 else most > 1, (run.label, most)
        for record in records[0]:
            tokens = [call.tokens for call in record.calls]
            assert len(tokens) == len(record.accepted)
            assert all(tokens[:-1]), "only the last step may need none"
    assert any(NO_CALL in e.calls for e in live.records("squad", "none", p)), "a token remained, or the end was known"


class TestEnds:
    """What is known of a step before it, and how long its drafts may be."""

    def test_a_last_token_needs_no_call_when_it_is_decoded(self, tiny_base: BaseLM):
        decoded = decode(tiny_base, make_heads(tiny_base), [5, 6], rescorer=load_rescorer("none"), max_new_tokens=1)
        assert decoded.calls == [NO_CALL]
        greedy = decode(tiny_base, None, [5, 6, 7], max_new_tokens=4)
        assert greedy.calls == [Call(1, 1, False)] * 3 + [NO_CALL]

    @pytest.mark.parametrize(
        ("limits", "tokens"),
        [
            (Limits(), [3, 2, 0]),  # cut where it ends, as far as is known
            (Limits((2,)), [3, 3, 0]),  # it ended by itself, at which limit is not known
            (Limits((2,), 3), [3, 2, 0]),
            (Limits((2,), 4), [3, 3, 0]),
            (Limits((), 4), [3, 3, 2]),
            (Limits((), 2), [3, 2, 0]),  # no limit that the output is beyond
        ],
    )
    def test_drafts_are_cut_to_the_limit_when_they_are_replayed(self, limits: Limits, tokens: list[int]):
        slots = Lattice(
            np.array([[[0], [9], [9]], [[1], [9], [9]], [[2], [9], [9]]], dtype=np.int32), np.zeros((3, 3, 1))
        )
        output = np.array([0, 1, 2], dtype=np.int32)
        example = TracedExample("x", "", (), None, np.array([7]), output, slots, np.zeros((3, 3)), np.zeros(3))
        (steps,) = replay_steps([example], Drafting(load_rescorer("none")), limits=limits)
        assert steps.accepted == [1, 1, 1] and [call.tokens for call in steps.calls] == tokens
