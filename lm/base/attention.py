"""Grouped-query attention without copying keys and values for every query head.

On a CPU torch's `enable_gqa` is slow and the alternative, repeating keys and values once per query head, moves three
to eight times the cache through memory at every step. Here the query heads that share one key/value head become extra
query rows instead: the same products, no copies. Registered with transformers as `packed`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "packed"
# What else transformers' sdpa takes heed of, whatever its version; other arguments it ignores as well.
_SDPA_ONLY = {"softcap", *inspect.signature(sdpa_attention_forward).parameters} - {
    "module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs",
}  # fmt: skip


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention `[b, heads, n, d]` x `[b, kv_heads, m, d]` -> `[b, n, heads, d]`; as transformers' sdpa, packed.

    What is not packed (prompts without a mask, a mask for each head, a `position_bias` ...) goes to sdpa itself.
    """
    rows, heads, n, _ = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    shared_mask = n == 1 if attention_mask is None else attention_mask.shape[1] == 1
    more = any(kwargs.get(name) is not None for name in _SDPA_ONLY)
    if groups == 1 or module.training or not shared_mask or more:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    packed = query.reshape(rows, kv_heads, groups * n, query.shape[-1])
    if attention_mask is not None:
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    out = functional.scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, heads, n, value.shape[-1]).transpose(1, 2).contiguous(), None


def register() -> None:
    """Makes `packed` known to transformers (idempotent)."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)


def takes_packed(config: Any, classes: Any) -> bool:
    """Whether a model of this configuration, that one of transformers' auto classes reads, takes `packed`."""
    softcap = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    architecture: Any = classes._model_mapping.get(type(config), None)
    takes_ours = getattr(architecture, "_supports_attention_backend", False)
    return softcap is None and bool(takes_ours and getattr(architecture, "_supports_sdpa", False))
