"""Batched greedy generation gives every prompt what transformers' own greedy decoding gives it alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM

from lm.base import attention, generation
from lm.base.attention import PACKED
from lm.base.catalog import load_base
from lm.base.generation import generate, sampled
from lm.base.model import BaseIdentity, BaseLM

exhaustive = settings(
    deadline=None, derandomize=True, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
prompt_lists = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=12), min_size=1, max_size=9)


def greedy(base: BaseLM, prompt: list[int], max_new_tokens: int, ends: set[int]) -> list[int]:
    """transformers' own greedy decoding of one prompt."""
    ids = torch.tensor([prompt])
    output = base.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None, pad_token_id=0,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def window_base() -> BaseLM:
    """A tiny base LM whose layers see four positions only."""
    attention.register()
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.6, sliding_window=4, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    model = MistralForCausalLM._from_config(config, attn_implementation=PACKED).double()
    return BaseLM(model, byte_tokenizer(), identity=BaseIdentity("window", "w", "t", 32, 257, "float64"))


@pytest.fixture(params=["tiny_base", "window_base"])
def base(request: pytest.FixtureRequest) -> BaseLM:
    return request.getfixturevalue(request.param)


@exhaustive
@given(
    prompts=prompt_lists,
    limit=st.integers(1, 16),
    batch_size=st.integers(1, 10),
    window=st.integers(1, 10),
    ends=st.sets(st.integers(0, 60), max_size=5),
)
def test_every_prompt_gets_its_own_greedy_output(base, monkeypatch, prompts, limit, batch_size, window, ends):
    free = [token for prompt in prompts[:4] for token in greedy(base, prompt, 16, set())]
    end_tokens = {free[place % len(free)] for place in ends}  # rows end at different steps, some never
    monkeypatch.setattr(base, "eos_token_ids", frozenset(end_tokens))
    monkeypatch.setattr("lm.base.generation.WINDOW", window)
    results = list(generate(base, prompts, max_new_tokens=limit, batch_size=batch_size))
    assert sorted(result.index for result in results) == list(range(len(prompts)))
    for result in results:
        prompt = prompts[result.index]
        assert result.output_ids.dtype == np.int64
        assert result.output_ids.tolist() == greedy(base, prompt, limit, end_tokens)
        # Row i is the state that chose token i, and the margin is its lead.
        whole = torch.tensor([[*prompt, *result.output_ids.tolist()]])
        logits, hidden = base.forward(whole)
        choosing = slice(len(prompt) - 1, -1)
        assert (result.hidden.dtype, result.margins.dtype) == (np.float64, np.float32)
        np.testing.assert_allclose(result.hidden, hidden[0, choosing].numpy(), rtol=1e-9, atol=1e-9)
        projected = base.project(torch.from_numpy(result.hidden))
        assert projected.argmax(-1).tolist() == result.output_ids.tolist()
        best = logits[0, choosing].topk(2).values
        np.testing.assert_allclose(result.margins, (best[:, 0] - best[:, 1]).numpy(), rtol=1e-4, atol=1e-5)
        assert (result.margins >= 0).all()


@exhaustive
@given(prompts=prompt_lists, batch_size=st.integers(1, 10), window=st.integers(1, 10), seed=st.integers(0, 3))
def test_sampled_output_does_not_depend_on_the_batch(base, monkeypatch, prompts, batch_size, window, seed):
    monkeypatch.setattr("lm.base.generation.WINDOW", window)
    options = {"max_new_tokens": 6, "temperature": 0.8, "seed": seed}
    together = {r.index: r for r in generate(base, prompts, batch_size=batch_size, **options)}
    for index, prompt in enumerate(prompts):
        (alone,) = generate(base, [prompt], **options)
        assert together[index].output_ids.tolist() == alone.output_ids.tolist()
        np.testing.assert_allclose(together[index].hidden, alone.hidden, rtol=1e-9, atol=1e-9)


@exhaustive
@given(temperature=st.sampled_from([0.3, 1.0, 2.5]), seed=st.integers(0, 9))
def test_tokens_are_drawn_by_their_probability(temperature, seed):
    """With draws spread evenly over [0, 1) every token comes as often as its probability says, to one draw."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(1, 30, generator=generator)
    logits[0, 4] = -torch.inf
    count = 5000
    draws = (torch.arange(count) + 0.5) / count
    tokens = sampled(logits.expand(count, -1), draws, temperature)
    wanted = torch.softmax(logits[0].double() / temperature, -1)
    assert float((torch.bincount(tokens, minlength=30) / count - wanted).abs().max()) <= 1.01 / count
    assert 4 not in tokens.tolist()


def test_the_highest_draw_is_a_token_that_can_come():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    assert sampled(logits, torch.tensor([1.0 - 1e-16]), 1.0).tolist() == [1]


def test_no_prompts_give_nothing(tiny_base):
    assert list(generate(tiny_base, [], max_new_tokens=3)) == []


def test_prompts_of_similar_length_share_a_batch(tiny_base, monkeypatch):
    """Padding costs as much as tokens do."""
    widths = []
    forward = tiny_base.forward

    def spy(input_ids, *args, **kwargs):
        widths.append(tuple(input_ids.shape))
        return forward(input_ids, *args, **kwargs)

    monkeypatch.setattr(tiny_base, "forward", spy)
    monkeypatch.setattr(tiny_base, "eos_token_ids", frozenset())
    prompts = [[1] * n for n in (2, 9, 3, 8, 2, 9)]
    list(generate(tiny_base, prompts, max_new_tokens=2, batch_size=3))
    assert widths == [(3, 9), (3, 1), (3, 3), (3, 1)]


def test_finished_rows_are_dropped(tiny_base, monkeypatch):
    outputs = [greedy(tiny_base, [n], 12, set()) for n in range(8)]
    ends = {output[1] for output in outputs[:5]}
    monkeypatch.setattr(tiny_base, "eos_token_ids", frozenset(ends))
    rows = []
    forward = tiny_base.forward

    def spy(input_ids, *args, **kwargs):
        rows.append(len(input_ids))
        return forward(input_ids, *args, **kwargs)

    monkeypatch.setattr(tiny_base, "forward", spy)
    results = list(generate(tiny_base, [[n] for n in range(8)], max_new_tokens=12))
    assert rows[0] == 8 and rows[-1] < 8 and rows == sorted(rows, reverse=True)
    for result in results:
        assert result.output_ids.tolist() == greedy(tiny_base, [result.index], 12, ends)


def test_states_of_half_precision_are_float32(tiny_folder):
    half = load_base(str(tiny_folder), dtype="bfloat16", device="cpu")
    (result,) = generate(half, [[1, 2]], max_new_tokens=3)
    assert (result.hidden.dtype, result.margins.dtype) == (np.float32, np.float32)


def test_a_step_asks_the_device_once(tiny_base, monkeypatch):
    """On a GPU every value that the host reads waits for all work before it: states and margins, after the last."""
    monkeypatch.setattr(tiny_base, "eos_token_ids", frozenset())
    reads = []
    for name in ("tolist", "item", "cpu", "__bool__", "__int__"):
        true = getattr(torch.Tensor, name)

        def spy(tensor, *arguments, true=true, name=name):
            reads.append(name)
            return true(tensor, *arguments)

        monkeypatch.setattr(torch.Tensor, name, spy)
    forward = tiny_base.forward

    def counted(*arguments, **how):
        reads_before.append(len(reads))
        return forward(*arguments, **how)

    monkeypatch.setattr(tiny_base, "forward", counted)
    of_steps = []
    for steps in (4, 9):
        reads, reads_before = [], []
        list(generate(tiny_base, [[1, 2], [3]], max_new_tokens=steps))
        of_steps.append(reads_before[-1])
    assert of_steps[1] - of_steps[0] == 5


def test_long_prompts_share_a_batch_with_fewer(tiny_base, monkeypatch):
    monkeypatch.setattr(generation, "ATTENTION_CELLS", 4 * 10**2)
    sizes = []

    class Batch:
        def __init__(self, base, prompts, *_):
            self.prompts = prompts
            sizes.append([len(p) for p in prompts])

        def generate(self, *_, **__):
            return []

    monkeypatch.setattr(generation, "_Batch", Batch)
    lengths = [5] * 6 + [10] * 5 + [100]
    assert list(generate(tiny_base, [[1] * n for n in lengths], max_new_tokens=1, batch_size=6)) == []
    assert sizes == [[100], [10] * 4, [10, 5, 5, 5], [5, 5, 5]]
