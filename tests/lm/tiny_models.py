"""A tiny random causal LM of any family that transformers knows, by setting whatever sizes its configuration has."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from conftest import byte_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lattices.errors import RescoreError
from lm.base import attention, catalog
from lm.base.model import BaseIdentity, BaseLM
from lm.base.probe import state_size

TINY = dict(
    vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.6, max_position_embeddings=64,
)  # fmt: skip
VOCABULARY, CONTEXT, WINDOW = 61, 28, 5


def wrap(model: torch.nn.Module) -> BaseLM:
    """A base LM around a model, in float64."""
    identity = BaseIdentity("made", "w", "t", 32, 257, "float64")
    return BaseLM(model.double(), byte_tokenizer(), identity=identity)


def packed(config: LlamaConfig, kind: type = LlamaForCausalLM) -> BaseLM:
    """The same around a random model of a configuration, with packed attention."""
    attention.register()
    torch.manual_seed(0)
    return wrap(kind._from_config(config, attn_implementation=attention.PACKED))


# One value for every name under which some family keeps a size. Windows and chunks are shorter than the prompts.
_NAMES: dict[int, str] = {
    VOCABULARY: """
        pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab unpadded_vocab_size
        vocab_size text_vocab_size vocab_size_per_layer_input
    """,
    8: """
        pronunciation_embed_dim shape_embed_dim linear_head_dim head_dim v_head_dim qk_rope_head_dim
        qk_nope_head_dim rotary_dim kv_channels global_head_dim swa_head_dim index_head_dim rope_head_dim
        qk_head_dim attention_head_dim kv_lora_rank q_lora_rank o_lora_rank dim_head
        hidden_size_per_layer_input
    """,
    2: """
        zero_expert_num type_vocab_size num_hidden_layers n_layer n_layers num_layers decoder_layers
        encoder_layers num_decoder_layers num_encoder_layers num_blocks num_key_value_heads num_kv_heads
        n_kv_heads swa_num_key_value_heads sliding_window_pattern num_experts_per_tok
        num_experts_per_token moe_k moe_topk moe_top_k top_k_experts index_n_heads
    """,
    20: """
        input_embedding_size
    """,
    32: """
        attention_hidden_size hidden_size n_embd d_model emb_dim dim_model hidden_dim lru_width
    """,
    24: """
        word_embed_proj_dim embedding_size output_embedding_size
    """,
    4: """
        num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
        num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads num_experts
        num_local_experts n_routed_experts moe_num_experts num_moe_experts mamba_num_heads mamba_n_heads
        linear_num_value_heads linear_num_key_heads time_step_rank mamba_dt_rank
    """,
    48: """
        intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size n_inner d_inner dff
        dim_ff ffn_intermediate_size intermediate_size_mlp
    """,
    CONTEXT: """
        max_position_embeddings n_positions max_seq_len max_target_positions max_length n_ctx
        context_length original_max_position_embeddings
    """,
    WINDOW: """
        sliding_window window_size attention_window_size attention_chunk_size
    """,
    16: """
        moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        expert_ffn_hidden_size moe_shared_expert_intermediate_size expert_intermediate_size mamba_d_head
        mamba_head_dim linear_key_head_dim linear_value_head_dim state_size mamba_d_state ssm_state_size
        mamba_d_ssm dim_model_base
    """,
    3: """
        index_topk
    """,
}  # fmt: skip
SIZES: dict[str, Any] = {
    **{name: size for size, names in _NAMES.items() for name in names.split()},
    "n_group": 1, "topk_group": 1, "moe_num_groups": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "moe_layer_start_index": 1, "n_groups": 1, "mamba_n_groups": 1, "num_kv_shared_layers": 0, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1, "is_decoder": True, "causal": True,
    "is_encoder_decoder": False, "tie_word_embeddings": False, "use_cache": True,
}  # fmt: skip

# Absent by default and worked out from other sizes, which are tiny here.
UNSAID = {
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "n_inner",
    "head_dim",
    "num_key_value_heads",
    "layer_types",
}

LAYER_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

# Sizes that have to fit together, or that a family lists elsewhere.
TWEAKS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}},
    "dots3_note": {"audio_config": {"adapter_in_dim": 32, "adapter_input_size": 32}},
    "opt": {"word_embed_proj_dim": 32},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dory": {"num_hidden_layers": 3, "layer_types": None, "n_input_layers": 1, "n_output_layers": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "kimi_linear": {"linear_head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 16, "zero_expert_num": 2},
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8), "attn_layers": ["local", "lsh"]},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


SHARED = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 20}

# Architectures within a family that differ in what decoding asks of them.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "big_bird, full": ("big_bird", {"attention_type": "original_full"}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon, alibi, many heads": ("falcon", {"alibi": True, "multi_query": False, "num_kv_heads": 4}),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True}),
    "falcon, one block after the other": ("falcon", {"parallel_attn": False}),
    "gemma2, tied": ("gemma2", {"tie_word_embeddings": True}),
    "gemma3n_text, shared": ("gemma3n_text", {**SHARED, "num_kv_shared_layers": 2}),
    "gemma4_text, shared": ("gemma4_text", {**SHARED, "num_kv_shared_layers": 2}),
    "gpt2, tied": ("gpt2", {"tie_word_embeddings": True}),
    "gpt_bigcode, many heads": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neo, global": ("gpt_neo", {"attention_types": [[["global"], 2]]}),
    "granite, scaled": ("granite", {"logits_scaling": 3.0}),
    "llama, dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **ROPE}}),
    "mixtral, window": ("mixtral", {"sliding_window": WINDOW}),
    "opt, projected": ("opt", {"word_embed_proj_dim": 24}),
    "opt, norm after": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "phi3, longrope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, **ROPE,
                "partial_rotary_factor": 1.0,
            },
            "original_max_position_embeddings": 20,
        },
    ),
    "qwen2, windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen3, window everywhere": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ["sliding_attention"] * 2},
    ),
}  # fmt: skip

FLOAT32 = dict.fromkeys(("inkling2_text", "inkling2_loop_text", "xglm"), torch.float32)  # they know no float64


def families() -> list[str]:
    """The model types of every causal LM."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(name: str) -> Any:
    """The configuration of a family or variant, all its sizes tiny, with one layer at least of every kind it has."""
    family, changes = VARIANTS.get(name, (name, {}))
    return _shrunk(CONFIG_MAPPING[family], {**TWEAKS.get(family, {}), **changes})


def _shrunk(kind: Any, changes: dict[str, Any]) -> Any:
    default = kind()
    values = default.to_dict()
    aliases = getattr(kind, "attribute_map", {})
    names = set(values) | set(aliases)
    chosen = {name: value for name, value in SIZES.items() if name in names}
    for name, value in values.items():
        if value is None and name not in UNSAID:
            chosen.pop(name, None)  # off by default: stays off
        part = _value_of(default, name)
        if name in (getattr(kind, "sub_configs", None) or {}) and hasattr(part, "to_dict"):
            chosen[name] = _shrunk(type(part), changes.get(name, {}))
    for name, alias in aliases.items():
        if name in chosen and alias in chosen:
            chosen.pop(name)
    if "num_key_value_heads" in chosen and "kv_lora_rank" in names:
        chosen["num_key_value_heads"] = 4  # compressed keys and values are one for every head
    kinds = {name: list(dict.fromkeys(values.get(name) or ())) for name in LAYER_KINDS}
    kinds = {name: found for name, found in kinds.items() if found and isinstance(found[0], str)}
    count = max([2, *map(len, kinds.values())])
    chosen |= {name: (found * count)[:count] for name, found in kinds.items()}
    chosen |= {name: count for name in LAYER_COUNTS if name in chosen}
    sub_configs = {name for name, value in chosen.items() if hasattr(value, "to_dict")}
    return kind(**{**chosen, **{name: value for name, value in changes.items() if name not in sub_configs}})


def _value_of(config: Any, name: str) -> Any:
    """An attribute, or None where a configuration will not say."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def tiny_model(name: str, *, dtype: torch.dtype = torch.float64) -> Any:
    """A model of a family or variant with random weights that make outputs vary, as `load_base` would load it."""
    config = tiny_config(name)
    attention.register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config,
        attn_implementation=attention.PACKED if attention.takes_packed(config, AutoModelForCausalLM) else None,
        experts_implementation="eager",
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape) * 0.25)
            elif parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.generation_config = GenerationConfig()  # what a family adds to greedy output (forced tokens) is not tried
    return model.to(FLOAT32.get(name, dtype)).eval()


@dataclass(frozen=True)
class Tried:
    """What came of a family or variant: a `base`, or why it is `refused`, or why it was not even `built`."""

    base: BaseLM | None = None
    refused: str = ""
    not_built: str = ""


@functools.cache
def tried(name: str) -> Tried:
    """A tiny model as a base LM, made once."""
    try:
        model = tiny_model(name)
    except Exception as error:  # sizes that don't fit together, or libraries that are not here
        reason = " ".join(str(error).split()).rpartition("ValueError: ")[2].partition(". ")[0]
        return Tried(not_built=f"{type(error).__name__}: {reason}")
    try:
        with catalog._reading(f"can't tell what {name} is"):
            config = model.config.get_text_config(decoder=True)
            identity = BaseIdentity(name, "w", "t", state_size(config), config.vocab_size, str(model.dtype))
        return Tried(BaseLM(model, byte_tokenizer(), identity=identity))
    except RescoreError as error:
        return Tried(refused=str(error))
