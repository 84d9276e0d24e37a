"""Replay walks a trace as a decoder would; and what holds at every position of a trace.

`test_decoding` shows on a model that replay gives the live decoder's steps. Here the traces are drawn at random, with
targets at every rank, so that all lengths of acceptance occur.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lattices.errors import RescoreError
from lattices.lattice import Lattice
from lattices.search import p_best
from rescore.acceptance import accept
from rescore.accounting import account
from rescore.replaying import replay
from rescore.rescorers import Context, Rescorer, load_rescorer
from rescore.tracing import TracedExample

VOCAB = 12
random_traces = settings(deadline=None, derandomize=True, max_examples=60)
seeds = st.integers(0, 2**32 - 1)


def traced(seed: int, *, t: int, h: int, k: int, name: str = "x") -> TracedExample:
    """A trace of t positions in a vocabulary so small that targets are often in their slots."""
    rng = np.random.default_rng(seed)
    output = rng.integers(VOCAB, size=t).astype(np.int32)
    ids = np.argsort(rng.random((t, h, VOCAB)), axis=-1)  # [t, h, vocab]
    for position, slot in itertools.product(range(t), range(h)):
        if position + slot < t:  # the target to the front, or not so far back
            row, target = ids[position, slot], output[position + slot]
            place = 0 if slot == 0 else min(int(rng.integers(1, VOCAB) * rng.random()), VOCAB - 1)
            ids[position, slot] = np.insert(row[row != target], place, target)
    logps = -np.sort(rng.integers(1, 8, size=(t, h, VOCAB)) / 4, axis=-1)  # coarse: scores tie
    lattice = Lattice(ids[..., :k].astype(np.int32).copy(), logps[..., :k].astype(np.float32).copy())
    return TracedExample(name, "", (), None, np.array([1, 2]), output, lattice, np.zeros((t, h)), np.zeros(t))


def matched(draft: np.ndarray, ahead: np.ndarray) -> int:
    """Length of the common prefix: the definition of acceptance."""
    length = 0
    while length < min(len(draft), len(ahead)) and draft[length] == ahead[length]:
        length += 1
    return length


@random_traces
@given(seed=seeds, t=st.integers(1, 20), h=st.integers(1, 4), k=st.integers(1, 5), p=st.integers(1, 6))
def test_a_replay_jumps_from_draft_to_draft(seed, t, h, k, p):
    example = traced(seed, t=t, h=h, k=k)
    position, expected = 0, []
    while position < t:
        drafts = p_best(example.lattice[position], p).drafts[0]
        expected.append(max(matched(draft, example.output_ids[position:]) for draft in drafts))
        position += expected[-1]
    assert replay([example], load_rescorer("none"), k=k, p=p) == [expected]
    assert sum(expected) == t, "every output token is decoded once"


@random_traces
@given(seed=seeds, t=st.integers(1, 20), h=st.integers(1, 4), k=st.integers(1, 4))
def test_the_oracle_takes_the_best_of_all_paths(seed, t, h, k):
    example = traced(seed, t=t, h=h, k=k)
    position, expected = 0, []
    while position < t:
        slots = example.lattice.token_ids[position].tolist()
        paths = itertools.product(slots[0][:1], *slots[1:])
        expected.append(max(matched(np.array(path), example.output_ids[position:]) for path in paths))
        position += expected[-1]
    assert replay([example], load_rescorer("oracle"), k=k) == [expected]


@random_traces
@given(seed=seeds, lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), p=st.integers(1, 3))
def test_examples_side_by_side_do_not_touch_each_other(seed, lengths, p):
    examples = [traced(seed + i, t=t, h=3, k=4) for i, t in enumerate(lengths)]
    for name in ("none", "oracle"):
        together = replay(examples, load_rescorer(name), k=4, p=p)
        assert together == [replay([e], load_rescorer(name), k=4, p=p)[0] for e in examples]


@random_traces
@given(seed=seeds, h=st.integers(1, 4), k=st.integers(1, 5), p=st.integers(1, 4))
def test_the_identities_of_accounting_hold(seed, h, k, p):
    examples = [traced(seed + i, t=9 + i, h=h, k=k) for i in range(3)]
    for name in ("none", "oracle"):
        found = account(replay(examples, load_rescorer(name), k=k, p=p), h)
        assert found.steps == sum(found.accepted_histogram)
        assert found.tokens == sum(i * n for i, n in enumerate(found.accepted_histogram)) == 9 + 10 + 11
        assert len(found.accepted_histogram) == h + 1 and found.accepted_histogram[0] == 0
        assert found.block_efficiency == found.tokens / found.steps
        assert sum(found.marginal) == pytest.approx(found.block_efficiency)
        assert np.cumprod([c or 0.0 for c in found.conditional]) == pytest.approx(found.marginal)
        assert all(a >= b for a, b in itertools.pairwise(found.marginal))


# Every position: here dominance holds, which it need not over a whole decode.


def at_every_position(example: TracedExample, rescorer: Rescorer, k: int, p: int = 1) -> np.ndarray:
    """Accepted length of the block that starts at each position, `[t]`."""
    t, output = len(example.output_ids), example.output_ids.tolist()
    contexts = [Context([1, 2], output_ids=output[:i], future=example.output_ids) for i in range(t)]
    drafts = rescorer.draft(example.lattice.top(k), contexts, p)
    h = drafts.shape[-1]
    padded = np.array(output + [-1] * h)
    choices = np.stack([padded[i + 1 : i + 1 + h] for i in range(t)])
    return accept(drafts, np.broadcast_to(choices[:, None], drafts.shape), np.arange(t, 0, -1), ())[1]


@random_traces
@given(seed=seeds, h=st.integers(2, 4), k=st.integers(1, 6), p=st.integers(2, 20))
def test_oracle_is_at_least_p_best_is_at_least_unrescored(seed, h, k, p):
    example = traced(seed, t=24, h=h, k=k)
    unrescored = at_every_position(example, load_rescorer("none"), k)
    p_best_drafts = at_every_position(example, load_rescorer("none"), k, p)
    oracle = at_every_position(example, load_rescorer("oracle"), k)
    assert (unrescored >= 1).all() and (oracle <= h).all()
    assert (unrescored <= p_best_drafts).all() and (p_best_drafts <= oracle).all()


@random_traces
@given(seed=seeds, h=st.integers(2, 4))
def test_the_oracle_never_falls_with_k(seed, h):
    example = traced(seed, t=24, h=h, k=VOCAB)
    rows = [at_every_position(example, load_rescorer("oracle"), k) for k in range(1, VOCAB + 1)]
    assert all((a <= b).all() for a, b in itertools.pairwise(rows))
    unrescored = at_every_position(example, load_rescorer("none"), VOCAB)
    assert (rows[0] == unrescored).all(), "one path, the unrescored draft"
    assert (rows[-1] == np.minimum(h, np.arange(24, 0, -1))).all(), "the whole vocabulary holds every target"


@random_traces
@given(seed=seeds, h=st.integers(2, 4), k=st.integers(1, 4))
def test_p_best_never_falls_with_p_and_ends_at_the_oracle(seed, h, k):
    example = traced(seed, t=24, h=h, k=k)
    every = k ** (h - 1)
    rows = [at_every_position(example, load_rescorer("none"), k, p) for p in sorted({1, 2, 3, 5, 9, 30, every})]
    assert all((a <= b).all() for a, b in itertools.pairwise(rows))
    assert (rows[-1] == at_every_position(example, load_rescorer("oracle"), k)).all()


@random_traces
@given(seed=seeds, h=st.integers(2, 4))
def test_the_unrescored_draft_does_not_depend_on_k(seed, h):
    example = traced(seed, t=24, h=h, k=VOCAB)
    rows = {tuple(at_every_position(example, load_rescorer("none"), k).tolist()) for k in (1, 3, VOCAB)}
    assert len(rows) == 1


def test_requests_that_make_no_sense_are_refused():
    examples = [traced(0, t=4, h=2, k=8)]
    for k in (0, 9):
        with pytest.raises(RescoreError, match=f"k = {k}, but the trace holds the top 8 of each head; choose --k from"):
            replay(examples, load_rescorer("none"), k=k)
    with pytest.raises(RescoreError, match="p = 0; at least one draft"):
        replay(examples, load_rescorer("none"), k=8, p=0)
    assert replay(examples, load_rescorer("none"), k=8)
    assert replay([], load_rescorer("none"), k=3) == []


def test_a_rescorer_is_not_credited_with_what_it_did_not_draft():
    class Cheat(Rescorer):
        def draft(self, lattices, contexts, p):
            return np.array([[c.future[len(c.output_ids) :][:2] + 1] for c in contexts], dtype=np.int32)

    with pytest.raises(AssertionError, match="does not begin with the lattice's first token"):
        replay([traced(0, t=4, h=2, k=8)], Cheat(), k=8)
