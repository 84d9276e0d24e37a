"""Packed attention: the same numbers as transformers' own, for every shape of call that is made here."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TINY, packed, wrap
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lm.base.attention import PACKED, packed_attention
from lm.base.model import BaseLM


class TestPackedAttention:
    @pytest.fixture(scope="class", params=[1, 2, 4], ids=lambda n: f"{n} kv heads")
    @staticmethod
    def pair(request: pytest.FixtureRequest) -> tuple[BaseLM, BaseLM]:
        config = LlamaConfig(**{**TINY, "num_key_value_heads": request.param})
        ours = packed(config)
        theirs = LlamaForCausalLM._from_config(LlamaConfig(**config.to_diff_dict()), attn_implementation="sdpa")
        theirs.load_state_dict(ours.model.state_dict())
        assert ours.model.config._attn_implementation == PACKED
        assert theirs.config._attn_implementation == "sdpa"
        return ours, wrap(theirs)

    @staticmethod
    def same(
        pair: tuple[BaseLM, BaseLM], ids: torch.Tensor, *, cached: torch.Tensor | None = None, **arguments
    ) -> None:
        results = []
        for base in pair:
            cache = None
            if cached is not None:
                cache = base.new_cache(30)
                base.forward(cached, cache)
                cache.keep_all()
            results.append(base.forward(ids, cache, **arguments))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)

    def test_a_batch_of_prompts(self, pair):
        self.same(pair, torch.randint(0, 257, (3, 7)))

    def test_one_token(self, pair):
        self.same(pair, torch.tensor([[5]]))
        self.same(pair, torch.tensor([[5]]), cached=torch.randint(0, 257, (1, 6)))
        self.same(pair, torch.randint(0, 257, (4, 1)), cached=torch.randint(0, 257, (4, 6)))

    def test_a_block_on_a_past(self, pair):
        self.same(pair, torch.randint(0, 257, (1, 5)), cached=torch.randint(0, 257, (1, 6)))

    def test_drafts_on_one_past(self, pair):
        self.same(pair, torch.randint(0, 257, (4, 5)), cached=torch.randint(0, 257, (1, 6)))

    def test_a_tree(self, pair):
        mask = torch.ones(1, 1, 4, 10, dtype=torch.bool)
        mask[0, 0, :, 6:] = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
        self.same(
            pair,
            torch.randint(0, 257, (1, 4)),
            cached=torch.randint(0, 257, (1, 6)),
            position_ids=torch.tensor([[6, 7, 7, 8]]),
            attention_mask=mask,
        )

    def test_a_ragged_left_padded_batch(self, pair):
        attended = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]], dtype=torch.bool)
        positions = (attended.long().cumsum(1) - 1).clamp(min=0)
        results = [
            base.forward(torch.arange(15).reshape(3, 5), position_ids=positions, attention_mask=attended)[0]
            for base in pair
        ]
        torch.testing.assert_close(results[0][attended], results[1][attended], rtol=1e-10, atol=1e-10)
        alone, _ = pair[0].forward(torch.tensor([[3, 4]]))
        torch.testing.assert_close(results[0][0, 3:], alone[0])

    @pytest.mark.parametrize("n", [1, 3])
    def test_a_position_bias_is_not_dropped(self, n: int):
        """Some architectures hand one to their attention."""
        module = torch.nn.Module().eval()
        module.num_key_value_groups = 2
        query, bias = torch.randn(2, 4, n, 8), torch.randn(1, 4, n, 6)
        key, value = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
        mask = torch.ones(2, 1, n, 6, dtype=torch.bool)
        ours, theirs, without = (
            attend(module, query, key, value, mask, scaling=0.3, **more)[0]
            for attend, more in (
                (packed_attention, {"position_bias": bias}),
                (sdpa_attention_forward, {"position_bias": bias}),
                (packed_attention, {}),
            )
        )
        torch.testing.assert_close(ours, theirs)
        assert not torch.allclose(ours, without)
