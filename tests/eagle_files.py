"""EAGLE checkpoints with random weights in the published layouts, and their arithmetic written out in plain torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from conftest import byte_tokenizer
from safetensors.torch import save_file
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, D, HEADS, KV, INNER = 257, 32, 4, 2, 40
CONFIG = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=D, num_attention_heads=HEADS,
    num_key_value_heads=KV, intermediate_size=INNER, num_hidden_layers=1, vocab_size=VOCABULARY, rms_norm_eps=1e-5,
    rope_theta=20000.0, max_position_embeddings=512, hidden_act="silu",
)  # fmt: skip
Tensors = dict[str, torch.Tensor]


def save_deep_base(folder: Path, *, layers: int = 8) -> Path:
    """A tiny base with layers enough for EAGLE-3."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=D, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.4, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tensors_of(third: bool, *, d: int = D, drafted: int = 200, seed: int = 5, base: int = D) -> Tensors:
    """The tensors of EAGLE-1 or EAGLE-3, by their published names."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) * 1.5

    layer, width, head = ("midlayer.", 2 * d, d // HEADS) if third else ("layers.0.", d, d // HEADS)
    tensors = {
        "embed_tokens.weight": normal(VOCABULARY, d) * 4,
        f"{layer}self_attn.q_proj.weight": normal(HEADS * head, width),
        f"{layer}self_attn.k_proj.weight": normal(KV * head, width),
        f"{layer}self_attn.v_proj.weight": normal(KV * head, width),
        f"{layer}self_attn.o_proj.weight": normal(d, HEADS * head),
        f"{layer}mlp.gate_proj.weight": normal(INNER, d),
        f"{layer}mlp.up_proj.weight": normal(INNER, d),
        f"{layer}mlp.down_proj.weight": normal(d, INNER),
        f"{layer}post_attention_layernorm.weight": 1 + normal(d) / 3,
    }
    if not third:
        return {**tensors, "fc.weight": normal(d, 2 * d), "fc.bias": normal(d)}
    chosen = torch.randperm(VOCABULARY, generator=generator)[:drafted].sort().values
    return {
        **tensors,
        "fc.weight": normal(d, 3 * base),
        f"{layer}input_layernorm.weight": 1 + normal(d) / 3,
        f"{layer}hidden_norm.weight": 1 + normal(d) / 3,
        "norm.weight": 1 + normal(d) / 3,
        "lm_head.weight": normal(drafted, d) * 4,
        "d2t": chosen - torch.arange(drafted),
        "t2d": torch.isin(torch.arange(VOCABULARY), chosen),
    }


def save_eagle(folder: Path, tensors: Tensors, *, pickled: bool = False, **config: Any) -> str:
    """The folder of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return str(folder)


class Reference:
    """EAGLE by its formulas: whole sequences, no cache, in float64.

    layers: of the base whose inputs EAGLE-3 reads.
    """

    def __init__(self, model: LlamaForCausalLM, tensors: Tensors, layers: tuple[int, ...] | None = None) -> None:
        self.model, self.layers = model.double(), layers
        self.w = {
            name.replace("midlayer.", "layers.0."): value.double() if value.is_floating_point() else value
            for name, value in tensors.items()
        }
        self.third = "norm.weight" in self.w

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        x = x.float()  # as Llama has its norms
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + CONFIG["rms_norm_eps"])
        return x.double() * self.w[f"{name}.weight"]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """Causal attention of inputs `[n, width]`."""
        n = len(x)
        q, k, v = (self.linear(x, f"layers.0.self_attn.{name}_proj").reshape(n, -1, D // HEADS) for name in "qkv")
        half = D // HEADS // 2
        # In single precision, as Llama has its angles: what is fed on is large, and tells them apart.
        angles = torch.arange(n).float()[:, None] * (1.0 / CONFIG["rope_theta"] ** (torch.arange(half).float() / half))
        cos, sin = angles.cos()[:, None].double(), angles.sin()[:, None].double()

        def turned(z: torch.Tensor) -> torch.Tensor:
            a, b = z[..., :half], z[..., half:]
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

        q, k = turned(q), turned(k)
        heads = []
        for head in range(HEADS):
            keys, values = k[:, head * KV // HEADS], v[:, head * KV // HEADS]
            scores = q[:, head] @ keys.T / math.sqrt(D // HEADS)
            scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -math.inf)
            heads.append(scores.softmax(-1) @ values)
        return self.linear(torch.cat(heads, dim=-1), "layers.0.self_attn.o_proj")

    def after(self, tokens: list[int], states: torch.Tensor) -> torch.Tensor:
        """The states after pairs of a token and the state before it, `[n, d]`."""
        embedded = self.w["embed_tokens.weight"][tokens]
        if self.third:
            x = torch.cat(
                [self.norm(embedded, "layers.0.input_layernorm"), self.norm(states, "layers.0.hidden_norm")], -1
            )
            y = states + self.attention(x)
        else:
            x = self.linear(torch.cat([embedded, states], dim=-1), "fc")
            y = x + self.attention(x)
        z = self.norm(y, "layers.0.post_attention_layernorm")
        inner = functional.silu(self.linear(z, "layers.0.mlp.gate_proj")) * self.linear(z, "layers.0.mlp.up_proj")
        return y + self.linear(inner, "layers.0.mlp.down_proj")

    def log_probs(self, state: torch.Tensor) -> torch.Tensor:
        """Over the base's vocabulary, minus infinity for tokens that are never drafted."""
        if not self.third:
            return torch.log_softmax(self.model.lm_head(state), dim=-1)
        logits = functional.linear(self.norm(state, "norm"), self.w["lm_head.weight"])
        whole = torch.full((VOCABULARY,), -math.inf, dtype=torch.float64)
        ids = torch.arange(len(logits)) + self.w["d2t"] if "d2t" in self.w else torch.arange(len(logits))
        whole[ids] = torch.log_softmax(logits, dim=-1)
        return whole

    @torch.inference_mode()
    def chain(self, text: list[int], first: int, tokens: int) -> torch.Tensor:
        """Log-probs `[1 + tokens, vocabulary]`: of the base after the text, and of every step after `first`."""
        output = self.model(torch.tensor([text]), output_hidden_states=True)
        states = output.hidden_states[-1][0]
        if self.third:
            joined = torch.cat([output.hidden_states[layer][0] for layer in self.layers or ()], dim=-1)
            states = self.linear(joined, "fc")
        said = [torch.log_softmax(output.logits[0, -1], dim=-1)]
        pairs = [*text[1:], first]
        for _ in range(tokens):
            after = self.after(pairs, states)[-1]
            said.append(self.log_probs(after))
            pairs.append(int(said[-1].argmax()))
            states = torch.cat([states, after[None]])
        return torch.stack(said)
