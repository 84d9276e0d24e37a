"""A model in memory with its tokenizer is a base LM like one of files, and another one once its weights change."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, make_heads
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lattices.errors import RescoreError
from lm.base.catalog import identify, load_base
from lm.heads.block_heads import load_heads
from rescore.decoding import decode
from rescore.rescorers import load_rescorer
from rescore.rescorers.base import Target

TOKENIZER = byte_tokenizer()


@pytest.fixture
def model() -> PreTrainedModel:
    """A random two-layer Llama in float64, of no file."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.6,
        eos_token_id=TOKENIZER.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


@pytest.mark.parametrize("rescorer", ["none", "context-ngram:none"])
def test_its_output_is_greedy(model: PreTrainedModel, rescorer: str, tmp_path: Path):
    base = load_base(model, TOKENIZER)
    make_heads(base).save(tmp_path, dtype=torch.float32)
    heads = load_heads(base.identity, str(tmp_path), dtype=base.heads_dtype)
    chosen = load_rescorer(rescorer).fit(
        Target(base.vocab_size, tuple(base.eos_token_ids), base.identity.tokenizer_sha256, base.identity, shared=base)
    )
    prompt = base.encode_prompt("A prompt, a prompt", chat=True)
    ids = torch.tensor([prompt])
    greedy = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=0
    )  # fmt: skip
    decoded = decode(base, heads, prompt, rescorer=chosen, k=4, p=4, max_new_tokens=24)
    assert list(decoded.output_ids) == greedy[0, len(prompt) :].tolist()
    assert base.dtype == torch.float64 and base.identity.dtype == "float64" and base.device == model.device


def test_a_changed_weight_makes_another_base(model: PreTrainedModel):
    before = load_base(model, TOKENIZER).identity
    assert load_base(model, TOKENIZER).identity == before
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-9
    after = load_base(model, TOKENIZER).identity
    assert after.weights_sha256 != before.weights_sha256
    assert dataclasses.replace(after, weights_sha256=before.weights_sha256) == before
    model.bfloat16()
    assert load_base(model, TOKENIZER).identity.dtype == "bfloat16"


def test_changed_settings_and_tokenizers_make_another_base(model: PreTrainedModel):
    before = load_base(model, TOKENIZER).identity
    assert load_base(model, byte_tokenizer(chat=False)).identity.tokenization_sha256 != before.tokenization_sha256
    model.generation_config.eos_token_id = [256, 65]
    changed = load_base(model, TOKENIZER)
    assert changed.identity.config_sha256 != before.config_sha256 and changed.eos_token_ids == {256, 65}


def test_it_agrees_with_its_files(tiny_folder: Path):
    """In all but the hash of the weights: a file's bytes are not those of its tensors."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    of_files = identify(str(tiny_folder))
    in_memory = load_base(model, byte_tokenizer()).identity
    assert in_memory.name == of_files.name and in_memory.tokenizer_sha256 == of_files.tokenizer_sha256
    assert in_memory.config_sha256 == of_files.config_sha256


def test_what_does_not_go_together(model: PreTrainedModel, tiny_folder: Path):
    with pytest.raises(RescoreError, match=r"needs its tokenizer; call load_base\(model, tokenizer\)$"):
        load_base(model)
    with pytest.raises(RescoreError, match="brings its own tokenizer"):
        load_base(tiny_folder, TOKENIZER)
