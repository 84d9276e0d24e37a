"""The base LM: prompts, forward passes, a cache that forgets what was rejected."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
import torch
from conftest import CHAT_TEMPLATE, byte_tokenizer, save_tiny_base
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import TINY, packed, wrap
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)
from transformers.utils import chat_template_utils

from lattices.errors import IncompatibleError, RescoreError
from lm.base.catalog import load_base
from lm.base.model import BaseLM

exhaustive = settings(
    deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
token_lists = st.lists(st.integers(0, 255), min_size=1, max_size=12)
GPT2 = dict(vocab_size=257, n_embd=32, n_head=4, n_positions=64, bos_token_id=256, eos_token_id=256)


LLAMA = """
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{{- "\\nDate: " + date_string + "\\n" -}}
"""


def clock_of(year: int) -> type[datetime]:
    """A class that is asked for the time in a year."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(year, 1, 2, 3, 4, 5)

    return Clock


class TestPrompts:
    def test_plain_text_is_its_tokens(self, tiny_base):
        assert tiny_base.encode_prompt("ab é", chat=False) == byte_tokenizer()("ab é")["input_ids"]
        assert tiny_base.encode_prompt("abc", chat=False, max_tokens=2) == tiny_base.encode_prompt("ab", chat=False)
        assert tiny_base.encode_prompt("abc", chat=False, max_tokens=3) == tiny_base.encode_prompt("abc", chat=False)

    def test_chat_is_the_users_turn_in_the_template(self, tiny_base):
        assert tiny_base.decode_text(tiny_base.encode_prompt("hello", chat=True)) == "<user>hello<assistant>"

    @exhaustive
    @given(text=st.text(st.sampled_from("ab é😀\n<"), min_size=1, max_size=12), room=st.integers(-2, 50))
    def test_a_limit_cuts_the_users_text_only(self, tiny_base, text, room):
        template = len("<user><assistant>")
        if room < 1:
            with pytest.raises(RescoreError, match="leaves no room beside the chat template"):
                tiny_base.encode_prompt(text, chat=True, max_tokens=template + room)
            return
        first = len(text[0].encode())
        if room < first and room < len(text.encode()):  # not even one character
            with pytest.raises(RescoreError, match="leaves no room"):
                tiny_base.encode_prompt(text, chat=True, max_tokens=template + room)
            return
        ids = tiny_base.encode_prompt(text, chat=True, max_tokens=template + room)
        assert len(ids) <= template + room
        words = tiny_base.decode_text(ids).removeprefix("<user>").removesuffix("<assistant>")
        assert text.startswith(words)
        cut = len(text.encode()) > room
        assert (words != text) == cut
        if cut:  # as much as goes in
            assert len(text[: len(words) + 1].encode()) > room

    def test_no_text_is_refused(self, tiny_base):
        for chat in (False, True):
            with pytest.raises(RescoreError, match="prompt is empty"):
                tiny_base.encode_prompt("", chat=chat)

    def test_text_without_tokens_is_refused(self, tiny_base, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(tiny_base.tokenizer, "encode", lambda _text, **_: [])
        with pytest.raises(RescoreError, match="has no tokens"):
            tiny_base.encode_prompt("\u200b", chat=False)

    def test_chat_needs_a_template(self, tmp_path: Path):
        base = load_base(str(save_tiny_base(tmp_path / "plain", chat=False)))
        assert not base.is_chat
        assert base.encode_prompt("a", chat=False)
        with pytest.raises(IncompatibleError, match="no chat template"):
            base.encode_prompt("a", chat=True)

    def test_a_template_that_writes_the_date_is_given_one_date(
        self, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
    ):
        base = load_base(str(tiny_folder), device="cpu")
        for template, written in (
            (
                "{{ strftime_now('%d %b %Y, %-m/%-d, %H:%M:%S, %A %F') }} ",
                "26 Jul 2024, 7/26, 00:00:00, Friday 2024-07-26 ",
            ),
            (LLAMA, "\nDate: 26 Jul 2024\n"),
        ):
            prompts = []
            for year in (2025, 2031):
                monkeypatch.setattr(chat_template_utils, "datetime", clock_of(year))
                base.tokenizer.chat_template = template + CHAT_TEMPLATE
                plain = base.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
                prompts.append(base.decode_text(base.encode_prompt("hi", chat=True)))
            assert str(year) in plain  # what transformers gives
            assert prompts == [written + "<user>hi<assistant>"] * 2

    def test_one_of_several_templates_too(self, tiny_folder: Path):
        base = load_base(str(tiny_folder), device="cpu")
        base.tokenizer.chat_template = {"default": "{{ strftime_now('%Y') }}" + CHAT_TEMPLATE, "tools": "none"}
        assert base.decode_text(base.encode_prompt("hi", chat=True)) == "2024<user>hi<assistant>"

    def test_decoded_text_leaves_special_tokens_out(self, tiny_base):
        (end,) = tiny_base.eos_token_ids
        assert tiny_base.decode_text([*tiny_base.encode_prompt("hé", chat=False), end]) == "hé"


class TestForward:
    @exhaustive
    @given(prompt=token_lists, last=st.integers(1, 12))
    def test_the_last_n_are_the_tail_of_all(self, tiny_base, prompt, last):
        ids = torch.tensor([prompt])
        logits, hidden = tiny_base.forward(ids)
        assert logits.shape == (1, len(prompt), 257)
        assert hidden.shape == (1, len(prompt), 32)
        tail_logits, tail_hidden = tiny_base.forward(ids, last=min(last, len(prompt)))
        torch.testing.assert_close(tail_logits, logits[:, -last:])
        torch.testing.assert_close(tail_hidden, hidden[:, -last:])

    def test_projected_states_are_the_logits(self, tiny_base):
        logits, hidden = tiny_base.forward(torch.tensor([[1, 2, 3], [4, 5, 6]]))
        torch.testing.assert_close(tiny_base.project(hidden), logits)
        torch.testing.assert_close(tiny_base.project(hidden[0, 1]), logits[0, 1])

    def test_a_biased_projection_too(self):
        model = GPT2LMHeadModel(GPT2Config(**GPT2, n_layer=1))
        model.lm_head.bias = torch.nn.Parameter(torch.randn(257))
        base = wrap(model)
        logits, hidden = base.forward(torch.tensor([[1, 2, 3]]))
        torch.testing.assert_close(base.project(hidden), logits)

    def test_a_scaled_one_too(self):
        model = GraniteForCausalLM(GraniteConfig(**TINY, logits_scaling=3.0))
        base = wrap(model)
        logits, hidden = base.forward(torch.tensor([[1, 2, 3]]))
        torch.testing.assert_close(base.project(hidden), logits)

    def test_a_model_that_changes_its_logits_otherwise_is_refused(self):
        model = LlamaForCausalLM(LlamaConfig(**TINY))
        model.lm_head.register_forward_hook(lambda _module, _args, logits: logits * 2)
        with pytest.raises(IncompatibleError, match="changes its logits"):
            wrap(model)

    def test_states_alone_cost_no_projection(self, tiny_base):
        ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
        logits, hidden = tiny_base.forward(ids, projects=False)
        assert logits.shape == (2, 0, 257)
        torch.testing.assert_close(hidden, tiny_base.forward(ids)[1])
        output = tiny_base.model(input_ids=ids)  # and others who call the model get their logits
        torch.testing.assert_close(output.logits, tiny_base.forward(ids)[0])

    def test_what_it_says_about_itself(self, tiny_base):
        assert tiny_base.dtype == tiny_base.heads_dtype == torch.float64
        assert tiny_base.context_length == 512
        assert tiny_base.eos_token_ids == {256}
        assert tiny_base.supports_tree


class TestRefusals:
    def test_layers_that_cannot_forget(self):
        config = LlamaConfig(**TINY)
        config.layer_types = ["full_attention", "linear_attention"]
        with pytest.raises(IncompatibleError, match="linear_attention layers") as caught:
            wrap(LlamaForCausalLM(config))
        assert "\n" not in str(caught.value)

    def test_recurrent_architectures(self):
        config = RwkvConfig(vocab_size=257, hidden_size=32, num_hidden_layers=2, context_length=16)
        with pytest.raises(IncompatibleError, match="recurrent"):
            wrap(RwkvForCausalLM(config))

    def test_windows_take_no_tree(self):
        assert not packed(MistralConfig(**TINY, sliding_window=5), MistralForCausalLM).supports_tree
        assert packed(MistralConfig(**TINY, sliding_window=None), MistralForCausalLM).supports_tree


def adding() -> LlamaForCausalLM:
    """A Llama that adds a mask of true and false to its scores, as 1 and 0."""
    model = LlamaForCausalLM(LlamaConfig(**TINY))

    def as_numbers(_module: torch.nn.Module, args: tuple, named: dict) -> tuple[tuple, dict]:
        mask = named["attention_mask"]
        return args, {**named, "attention_mask": mask if mask is None or mask.ndim < 4 else mask.double()}

    model.register_forward_pre_hook(as_numbers, with_kwargs=True)
    return model


IGNORANT = {
    "refuses it": lambda: BloomForCausalLM(BloomConfig(vocab_size=257, hidden_size=32, n_layer=2, n_head=4)),
    "adds it to the scores": adding,
    "adds it to its own causal mask": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=257,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global"], 2]],
            max_position_embeddings=64,
            initializer_range=0.6,
        )
    ),
}


class TestTreeMasks:
    @pytest.mark.parametrize("what", IGNORANT)
    def test_an_architecture_that_does_not_follow_them_is_found_out(self, what: str):
        torch.manual_seed(0)
        assert not wrap(IGNORANT[what]()).supports_tree

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_one_that_does_is_known_in_every_precision(self, tiny_folder: Path, dtype: str):
        assert load_base(str(tiny_folder), dtype=dtype, device="cpu").supports_tree


MODELS = {
    "full": lambda: packed(LlamaConfig(**TINY)),
    "window": lambda: packed(MistralConfig(**TINY, sliding_window=4), MistralForCausalLM),
    "learned positions": lambda: wrap(GPT2LMHeadModel(GPT2Config(**GPT2, n_layer=2))),
}


@pytest.fixture(scope="module", params=MODELS)
def any_base(request: pytest.FixtureRequest) -> BaseLM:
    """Base LMs of several architectures."""
    return MODELS[request.param]()


class TestCache:
    @exhaustive
    @given(
        blocks=st.lists(st.tuples(token_lists, st.integers(0, 12)), min_size=1, max_size=4),
        drafts=st.lists(st.lists(st.integers(0, 255), min_size=4, max_size=4), min_size=1, max_size=3),
        row=st.integers(0, 2),
        kept=st.integers(0, 4),
        rest=token_lists,
    )
    def test_kept_prefixes_are_as_if_nothing_else_had_been_there(self, any_base, blocks, drafts, row, kept, rest):
        cache = any_base.new_cache(64)
        past: list[int] = []
        for tokens, count in blocks:
            logits, _ = any_base.forward(torch.tensor([tokens]), cache)
            whole, _ = any_base.forward(torch.tensor([past + tokens]))
            torch.testing.assert_close(logits, whole[:, len(past) :])
            cache.keep(range(min(count, len(tokens))))
            past += tokens[:count]
            assert cache.length == len(past)
        logits, _ = any_base.forward(torch.tensor(drafts), cache)  # several drafts on one past
        for draft, scores in zip(drafts, logits, strict=True):
            whole, _ = any_base.forward(torch.tensor([past + draft]))
            torch.testing.assert_close(scores, whole[0, len(past) :])
        row %= len(drafts)
        cache.keep(range(kept), row)
        past += drafts[row][:kept]
        logits, _ = any_base.forward(torch.tensor([rest]), cache)
        whole, _ = any_base.forward(torch.tensor([past + rest]))
        torch.testing.assert_close(logits, whole[:, len(past) :])

    @exhaustive
    @given(
        prompt=token_lists,
        tree=st.lists(st.tuples(st.integers(0, 255), st.integers(0, 20)), min_size=1, max_size=8),
        leaf=st.integers(0, 7),
        rest=token_lists,
    )
    def test_a_path_through_a_tree_is_as_if_it_had_been_alone(self, tiny_base, prompt, tree, leaf, rest):
        tokens = [token for token, _ in tree]
        parents = [parent % (node + 1) - 1 for node, (_, parent) in enumerate(tree)]  # -1: the prompt
        paths = []
        for node, parent in enumerate(parents):
            paths.append([*(paths[parent] if parent >= 0 else []), node])
        start = len(prompt)
        sees = torch.zeros(1, 1, len(tree), start + len(tree), dtype=torch.bool)
        sees[..., :start] = True
        for node, path in enumerate(paths):
            sees[0, 0, node, [start + n for n in path]] = True
        depths = torch.tensor([[start + len(path) - 1 for path in paths]])

        cache = tiny_base.new_cache(40)
        tiny_base.forward(torch.tensor([prompt]), cache)
        cache.keep(range(start))
        logits, _ = tiny_base.forward(torch.tensor([tokens]), cache, position_ids=depths, attention_mask=sees)
        for node, path in enumerate(paths):
            alone, _ = tiny_base.forward(torch.tensor([prompt + [tokens[n] for n in path]]))
            torch.testing.assert_close(logits[0, node], alone[0, -1])

        path = paths[leaf % len(paths)]
        cache.keep(path)
        past = prompt + [tokens[n] for n in path]
        stepwise, _ = tiny_base.forward(torch.tensor([rest]), cache)
        whole, _ = tiny_base.forward(torch.tensor([past + rest]))
        torch.testing.assert_close(stepwise, whole[:, len(past) :])

    def test_drafts_of_which_nothing_was_kept_leave_no_trace(self, tiny_base):
        cache = tiny_base.new_cache(20)
        tiny_base.forward(torch.tensor([[1, 2, 3]]), cache)
        cache.keep(range(3))
        tiny_base.forward(torch.tensor([[4, 5], [6, 7]]), cache)
        tiny_base.forward(torch.tensor([[8, 9]]), cache)
        cache.keep(range(2))
        logits, _ = tiny_base.forward(torch.tensor([[10]]), cache)
        whole, _ = tiny_base.forward(torch.tensor([[1, 2, 3, 8, 9, 10]]))
        torch.testing.assert_close(logits, whole[:, 5:])

    @pytest.mark.parametrize(("columns", "uploads"), [([0, 1], 0), ([0, 2], 1), ([1], 1)])
    def test_an_index_goes_to_the_device_once_for_all_layers(self, tiny_base, monkeypatch, columns, uploads):
        cache = tiny_base.new_cache(20)
        tiny_base.forward(torch.tensor([[1, 2, 3]]), cache)
        made, tensor = [], torch.tensor
        monkeypatch.setattr(torch, "tensor", lambda *a, **k: made.append(a) or tensor(*a, **k))
        cache.keep(columns)
        assert len(made) == uploads and cache.length == len(columns)

    def test_drafts_can_not_all_be_kept(self, tiny_base):
        cache = tiny_base.new_cache(20)
        tiny_base.forward(torch.tensor([[1, 2, 3]]), cache)
        cache.keep(range(3))
        tiny_base.forward(torch.tensor([[4, 5], [6, 7]]), cache)
        with pytest.raises(AssertionError, match="can't all be kept"):
            cache.keep_all()

    def test_rows_of_a_batch_can_leave(self, any_base):
        prompts = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
        cache = any_base.new_cache(10)
        any_base.forward(prompts, cache)
        cache.keep_all()
        cache.select_rows(torch.tensor([2, 0]))
        logits, _ = any_base.forward(torch.tensor([[10], [11]]), cache)
        whole, _ = any_base.forward(torch.tensor([[7, 8, 9, 10], [1, 2, 3, 11]]))
        torch.testing.assert_close(logits, whole[:, 3:])
