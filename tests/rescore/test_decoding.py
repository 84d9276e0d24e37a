"""Decoding is exact: whatever is proposed, the output is transformers' greedy output; and replay equals live."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_heads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lattices.errors import RescoreError
from lm.base.model import BaseLM
from rescore.acceptance import first_difference
from rescore.accounting import account
from rescore.decoding import decode, margin_at
from rescore.generation.live import generate
from rescore.replaying import replay
from rescore.rescorers import load_rescorer
from rescore.runs.run import Run
from rescore.tasks import Example
from rescore.tracing import record_trace

exhaustive = settings(
    deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
prompts = st.lists(st.integers(0, 255), min_size=1, max_size=12)


def greedy(base: BaseLM, prompt: list[int], max_new_tokens: int) -> list[int]:
    """transformers' own greedy decoding."""
    ids = torch.tensor([prompt])
    output = base.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens,
        eos_token_id=sorted(base.eos_token_ids) or None, pad_token_id=0,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


@pytest.fixture
def with_end(tiny_base: BaseLM, monkeypatch: pytest.MonkeyPatch):
    """Makes tokens end the output, so that end-of-text comes inside blocks."""

    def use(tokens: set[int]) -> None:
        monkeypatch.setattr(tiny_base, "eos_token_ids", frozenset(tokens))

    return use


@exhaustive
@given(
    prompt=prompts,
    h=st.integers(2, 6),
    k=st.sampled_from([1, 2, 5, 257]),
    p=st.sampled_from([1, 2, 7, 16]),
    verify=st.sampled_from(["tree", "batch"]),
    rescorer=st.sampled_from(["none", "oracle"]),
    limit=st.integers(1, 20),
    ends=st.sets(st.integers(0, 19), max_size=2),
    strength=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_output_is_greedy_whatever_is_proposed(
    tiny_base, with_end, prompt, h, k, p, verify, rescorer, limit, ends, strength
):
    with_end(set())
    free = greedy(tiny_base, prompt, 20)
    with_end({free[i] for i in ends})
    expected = greedy(tiny_base, prompt, limit)
    decoded = decode(
        tiny_base, make_heads(tiny_base, h=h, strength=strength), prompt, rescorer=load_rescorer(rescorer), k=k, p=p,
        max_new_tokens=limit, verify=verify, future=np.array(expected),
    )  # fmt: skip
    assert decoded.output_ids == expected
    assert sum(decoded.accepted) == len(expected)
    assert all(1 <= n <= h for n in decoded.accepted)


@exhaustive
@given(
    texts=st.lists(st.text("abcdefgh .", min_size=1, max_size=12), min_size=1, max_size=4, unique=True),
    h=st.integers(2, 5),
    k=st.sampled_from([1, 3, 8]),
    p=st.sampled_from([1, 4]),
    verify=st.sampled_from(["tree", "batch"]),
    rescorer=st.sampled_from(["none", "oracle"]),
    ends=st.sets(st.integers(0, 19), max_size=1),
)
def test_replay_gives_the_live_decoders_steps(
    tiny_base, with_end, tmp_path_factory, texts, h, k, p, verify, rescorer, ends
):
    with_end(set())
    heads = make_heads(tiny_base, h=h, strength=0.05)
    first = tiny_base.encode_prompt(texts[0], chat=False)
    with_end({greedy(tiny_base, first, 20)[i] for i in ends})
    examples = [Example(str(i), text, ()) for i, text in enumerate(texts)]
    trace = record_trace(
        tiny_base, heads, examples, tmp_path_factory.mktemp("trace"), settings={}, chat=False, max_new_tokens=16, k=8
    )
    replayed = replay(trace.examples, load_rescorer(rescorer), k=k, p=p)
    for example, accepted in zip(trace.examples, replayed, strict=True):
        live = decode(
            tiny_base, heads, example.prompt_ids.tolist(), rescorer=load_rescorer(rescorer), k=k, p=p,
            max_new_tokens=16, verify=verify, future=example.output_ids,
        )  # fmt: skip
        assert live.output_ids == example.output_ids.tolist()
        assert live.accepted == accepted


@exhaustive
@given(prompt=prompts, limit=st.integers(1, 12))
def test_without_heads_the_loop_is_autoregressive(tiny_base, prompt, limit):
    decoded = decode(tiny_base, None, prompt, max_new_tokens=limit)
    assert decoded.output_ids == greedy(tiny_base, prompt, limit)
    assert account([decoded.accepted], 1).block_efficiency == 1.0


def test_the_whole_vocabulary_lets_the_oracle_accept_full_blocks(tiny_base, tmp_path: Path):
    heads = make_heads(tiny_base, h=4)
    trace = record_trace(
        tiny_base, heads, [Example("a", "hello", ())], tmp_path, settings={}, chat=False, max_new_tokens=20,
        k=tiny_base.vocab_size,
    )  # fmt: skip
    length = len(trace.examples[0].output_ids)
    full, rest = divmod(length, 4)
    assert replay(trace.examples, load_rescorer("oracle"), k=tiny_base.vocab_size) == [[4] * full + [rest] * (rest > 0)]


def test_the_cache_holds_accepted_tokens_only(tiny_base):
    heads = make_heads(tiny_base, h=4)
    prompt = [1, 2, 3]
    cache = tiny_base.new_cache(40)
    tiny_base.forward(torch.tensor([prompt]), cache)
    cache.keep(range(3))
    decoded = decode(tiny_base, heads, prompt, rescorer=load_rescorer("none"), k=4, p=8, max_new_tokens=12)
    whole = prompt + decoded.output_ids
    full, _ = tiny_base.forward(torch.tensor([whole]))
    stepwise, _ = tiny_base.forward(torch.tensor([decoded.output_ids]), cache)
    torch.testing.assert_close(full[:, 3:], stepwise)


@pytest.mark.parametrize(
    ("tree", "verify", "p", "used"),
    [(True, "tree", 4, "tree"), (True, "batch", 4, "batch"), (False, "tree", 4, "batch"), (False, "tree", 1, "tree")],
)
def test_how_drafts_were_verified_is_told(tiny_base, monkeypatch, tree, verify, p, used):
    """A base that takes no tree mask verifies drafts as rows; one draft needs no mask."""
    monkeypatch.setattr(tiny_base, "supports_tree", tree)
    decoded = decode(
        tiny_base, make_heads(tiny_base), [1, 2], rescorer=load_rescorer("none"), k=4, p=p, max_new_tokens=8,
        verify=verify,
    )  # fmt: skip
    assert decoded.verify == used and decoded.output_ids == greedy(tiny_base, [1, 2], 8)


def test_the_margin_at_a_place_is_the_greedy_logit_over_the_runner_up(tiny_base):
    prompt, output = [1, 2, 3], greedy(tiny_base, [1, 2, 3], 6)
    logits, _ = tiny_base.forward(torch.tensor([prompt + output]))
    best = logits[0].topk(2).values
    for place in range(6):
        expected = float(best[place + 2, 0] - best[place + 2, 1])
        assert margin_at(tiny_base, prompt, output, place) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"p": 0}, "p = 0"),
        ({"k": 0}, "k = 0"),
        ({"k": 258}, "vocabulary"),
        ({"max_new_tokens": 0}, "at least one token"),
        ({"max_new_tokens": 600}, "context"),
        ({"verify": "forest"}, "unknown verify mode"),
    ],
)
def test_requests_that_make_no_sense_are_refused(tiny_base, wrong, message):
    request = {"k": 2, "p": 1, "max_new_tokens": 4, **wrong}
    with pytest.raises(RescoreError, match=message):
        decode(tiny_base, make_heads(tiny_base), [1, 2], rescorer=load_rescorer("none"), **request)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (Run("none", alpha=2), "the rescorer none has no weight; drop alpha"),
        (Run("context-ngram:none", alpha="tuned"), "give alpha as a number"),
    ],
)
def test_weights_that_a_prompt_can_t_use_are_refused(tiny_base: BaseLM, run: Run, message: str):
    with pytest.raises(RescoreError, match=message):
        generate(tiny_base, make_heads(tiny_base), "one two", rescorer=run)


def test_first_difference():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
