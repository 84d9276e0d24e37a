"""Tiny DeepSeek-V3 and GLM-4.5 models with a multi-token prediction layer in their files, and its formula."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from conftest import byte_tokenizer
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM

VOCABULARY, D, LAYERS = 257, 32, 2
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=D, intermediate_size=48, moe_intermediate_size=16, num_attention_heads=4,
    max_position_embeddings=512, initializer_range=0.4, eos_token_id=256, bos_token_id=None, first_k_dense_replace=1,
    n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1, num_nextn_predict_layers=1,
)  # fmt: skip
FAMILIES = {
    "deepseek_v3": (DeepseekV3ForCausalLM, DeepseekV3Config, dict(
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8
    )),
    "glm4_moe": (Glm4MoeForCausalLM, Glm4MoeConfig, dict(num_key_value_heads=2, head_dim=8)),
}  # fmt: skip


def save_with_mtp(folder: Path, family: str) -> Path:
    """A tiny model of `LAYERS` layers with one MTP layer after them: the block of a third layer, and what is beside."""
    kind, config, sizes = FAMILIES[family]
    torch.manual_seed(2)
    whole = kind(config(**SIZES, **sizes, num_hidden_layers=LAYERS + 1))
    whole.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    prefix = f"model.layers.{LAYERS}."
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    tensors |= {
        f"{prefix}enorm.weight": 1 + normal(D), f"{prefix}hnorm.weight": 1 + normal(D),
        f"{prefix}eh_proj.weight": 2 * normal(D, 2 * D), f"{prefix}shared_head.norm.weight": 1 + normal(D),
        f"{prefix}embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        f"{prefix}shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }  # fmt: skip
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config(**SIZES, **sizes, num_hidden_layers=LAYERS).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


class MtpReference:
    """The formula of an MTP layer on whole sequences, without a cache, in float64; its block as the third layer of the
    model that transformers loads from the same files."""

    def __init__(self, folder: Path, family: str) -> None:
        kind, config, sizes = FAMILIES[family]
        deeper = config(**SIZES, **sizes, num_hidden_layers=LAYERS + 1)
        self.block = (
            kind.from_pretrained(folder, config=deeper, experts_implementation="eager").double().model.layers[LAYERS]
        )
        self.model = kind.from_pretrained(folder, experts_implementation="eager").double()
        prefix = f"model.layers.{LAYERS}."
        stored = load_file(folder / "model.safetensors")
        self.w = {n.removeprefix(prefix): v.double() for n, v in stored.items() if n.startswith(prefix)}

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        x = x.float()  # as both families have their norms
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.model.config.rms_norm_eps)
        return x.double() * self.w[f"{name}.weight"]

    def after(self, tokens: list[int], states: torch.Tensor) -> torch.Tensor:
        n = len(tokens)
        embedded = self.w["embed_tokens.weight"][tokens]
        x = torch.cat([self.norm(embedded, "enorm"), self.norm(states, "hnorm")], dim=-1) @ self.w["eh_proj.weight"].T
        places = 1 + torch.arange(n)[None]
        mask = torch.zeros(1, 1, n, n, dtype=torch.float64).masked_fill(~torch.ones(n, n).tril().bool(), -math.inf)
        turned = self.model.model.rotary_emb(x[None], position_ids=places)
        y = self.block(x[None], attention_mask=mask, position_ids=places, position_embeddings=turned)
        return self.norm(y[0], "shared_head.norm")

    @torch.inference_mode()
    def chain(self, text: list[int], first: int, tokens: int) -> torch.Tensor:
        """Log-probs `[1 + tokens, vocabulary]`: of the base after the text, and of every step after `first`."""
        output = self.model(torch.tensor([text]), output_hidden_states=True)
        states, pairs = output.hidden_states[-1][0], [*text[1:], first]
        said = [torch.log_softmax(output.logits[0, -1], dim=-1)]
        for _ in range(tokens):
            after = self.after(pairs, states)[-1]
            said.append(torch.log_softmax(after @ self.w["shared_head.head.weight"].T, dim=-1))
            pairs.append(int(said[-1].argmax()))
            states = torch.cat([states, after[None]])
        return torch.stack(said)
