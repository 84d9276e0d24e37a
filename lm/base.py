"""The base LM: tokens in, final hidden states and logits out, with a cache that keeps what was accepted.

Knows nothing about block heads, drafts or tasks. Any transformers causal LM whose layers are full attention serves;
`lm.catalog.load_base` turns a name into one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lattices.errors import IncompatibleError, RescoreError
from lm.cache import KVCache
from lm.tree_cache import TreeCache


@dataclass(frozen=True)
class BaseIdentity:
    """What a base LM is, for keys of caches and for checks: two equal identities give the same numbers.

    `tokenizer_sha256` says what a token id means, which is what heads and rescorers must agree with the base on;
    `tokenization_sha256` and `config_sha256` (of `lm.keys`) say the rest: how text is cut, what the forward computes
    with these weights, and what ends a text. Empty where what an earlier version wrote does not say.
    """

    name: str
    weights_sha256: str
    tokenizer_sha256: str
    hidden_size: int
    vocab_size: int
    dtype: str
    config_sha256: str = ""
    tokenization_sha256: str = ""


class BaseLM:
    """A causal LM with its tokenizer, in evaluation mode, on one device.

    Attributes: `model`, `tokenizer`, `identity`, `device`, `dtype`, `hidden_size`, `vocab_size`, `context_length`
    (positions), `eos_token_ids` (any of them ends the output), `is_chat` (has a chat template), `supports_tree`
    (takes a 4D attention mask with every layer looking at the whole cache).
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, identity: BaseIdentity) -> None:
        config = model.config.get_text_config(decoder=True)
        layer_types = _layer_types(config)
        if other := layer_types - {"full_attention", "sliding_attention"}:
            kinds = ", ".join(sorted(other))
            raise IncompatibleError(f"{identity.name} has {kinds} layers, whose state can't forget rejected tokens")
        if getattr(model, "_is_stateful", False):  # transformers' mark of recurrent architectures
            raise IncompatibleError(f"{identity.name} is recurrent: its state can't forget rejected tokens")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer: Any = tokenizer
        self.identity = identity
        self.config = config
        self.hidden_size: int = config.hidden_size
        self.context_length: int = getattr(config, "max_position_embeddings", 1 << 30)
        self.eos_token_ids = _eos_token_ids(model, tokenizer)
        self.output_embeddings: Any = model.get_output_embeddings()
        self.vocab_size: int = self.output_embeddings.weight.shape[0]
        self._hidden: torch.Tensor | None = None
        self._projects = True
        self.output_embeddings.register_forward_pre_hook(self._remember_hidden)
        probe = torch.arange(3, device=self.device)[None] % self.vocab_size
        logits, hidden = self.forward(probe)
        if not torch.allclose(self.project(hidden).float(), logits.float(), rtol=1e-2, atol=1e-2):
            raise IncompatibleError(f"{identity.name} changes its logits in a way that block heads can't follow")
        self.supports_tree = layer_types == {"full_attention"} and self._follows_mask(probe, logits)

    def _follows_mask(self, probe: torch.Tensor, logits: torch.Tensor) -> bool:
        """Whether a 4D mask means to this architecture what it says; some add it to the scores, some refuse it.

        Tried on a tree, whose third token follows the first: a causal mask would also pass where it is ignored.
        """
        tree = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool, device=self.device)
        positions = torch.tensor([[0, 1, 1]], device=self.device)
        try:
            masked, _ = self.forward(probe, attention_mask=tree[None, None], position_ids=positions)
        except (ValueError, TypeError, RuntimeError, IndexError):
            return False
        branch, _ = self.forward(probe[:, [0, 2]], last=1)
        expected = torch.cat([logits[:, :2], branch], dim=1).float()
        # Half precision may differ by this much from one kernel to another; a mask that is ignored differs by more.
        return bool((masked.float() - expected).abs().max() <= 0.02 * expected.abs().max())

    def _remember_hidden(self, _module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        # The one place that every architecture agrees on: block heads read what the vocabulary projection reads.
        # Contiguous, because torch multiplies a batch of slices by one copy of the projection per row (100x slower).
        self._hidden = args[0].contiguous()
        return (self._hidden if self._projects else self._hidden[:, :0],)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def heads_dtype(self) -> torch.dtype:
        """The precision that block heads run in: at least float32, they are small."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def is_chat(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def encode_prompt(self, text: str, *, chat: bool, max_tokens: int | None = None) -> list[int]:
        """Token ids of a prompt; `chat` puts it as the user's turn into the chat template.

        More than `max_tokens` are cut from the end of `text`, never from the template. Raises `RescoreError` if there
        is no text, no chat template, or no room for text beside the template.
        """
        if not text:
            raise RescoreError("a prompt is empty; every example needs text to start from")
        if chat and not self.is_chat:
            raise IncompatibleError(f"{self.identity.name} has no chat template; give its prompts as plain text")
        ids = self._chat_ids(text) if chat else self._plain_ids(text)
        while chat and max_tokens and len(ids) > max_tokens:
            pieces = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            keep = len(pieces) - (len(ids) - max_tokens)
            # Several pieces can be parts of one character, which goes as a whole: every round takes something off.
            end = min(pieces[keep - 1][1], len(text) - 1) if keep > 0 else 0
            if end == 0:
                raise RescoreError(f"a limit of {max_tokens} prompt tokens leaves no room beside the chat template")
            text = text[:end]
            ids = self._chat_ids(text)
        if not ids:
            raise RescoreError(f"a prompt has no tokens: {text[:40]!r}")
        return ids[:max_tokens] if max_tokens else ids

    def _plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def _chat_ids(self, text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        ids: list[int] = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return ids

    def decode_text(self, ids: Sequence[int]) -> str:
        """Text of output tokens, special tokens left out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for up to `capacity` positions."""
        return KVCache(self.model.config, capacity)

    @torch.inference_mode()
    def forward(
        self,
        input_ids: torch.Tensor,
        cache: KVCache | TreeCache | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        last: int = 0,
        projects: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One call of the model.

        input_ids `[b, n]`; `attention_mask` `[b, m]`, or bool `[b, 1, n, m]` with m = cached + n positions. Returns
        logits `[b, l, vocab]` and final hidden states `[b, l, d]` of the last `last` tokens (0: of all n). The caller
        tells the cache afterwards what to keep. Without `projects` there are no logits (`[b, 0, vocab]`): where states
        are all that is wanted, the vocabulary projection would be a large part of the work.
        """
        if position_ids is None and cache is not None:
            assert isinstance(cache, KVCache), "the nodes of a tree have positions of their own"
            start = cache.length
            position_ids = torch.arange(start, start + input_ids.shape[1], device=self.device)[None]
        self._projects = projects
        try:
            output = self.model(
                input_ids=input_ids,
                past_key_values=cache,
                use_cache=cache is not None,
                position_ids=position_ids,
                attention_mask=attention_mask,
                logits_to_keep=last,
            )
        finally:
            self._projects = True
        assert self._hidden is not None
        hidden, self._hidden = self._hidden, None
        return output.logits, hidden

    def project(self, hidden: torch.Tensor, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """The base's vocabulary projection: `[..., d]` -> logits `[..., vocab]`, scaled as its architecture does.

        `token_ids` int64 `[b, k]`, for hidden `[b, w, d]`: the logits of these tokens only, `[b, w, k]`.
        """
        weight, bias = self.output_embeddings.weight, self.output_embeddings.bias
        if token_ids is None or token_ids.numel() >= self.vocab_size:
            logits = functional.linear(hidden, weight, bias)
            if token_ids is not None:
                logits = logits.gather(-1, token_ids[:, None].expand(-1, hidden.shape[1], -1))
        else:
            logits = hidden @ weight[token_ids].transpose(1, 2)
            logits = logits if bias is None else logits + bias[token_ids][:, None]
        logits = logits * (getattr(self.config, "logit_scale", None) or 1.0)
        logits = logits / (getattr(self.config, "logits_scaling", None) or 1.0)
        softcap = getattr(self.config, "final_logit_softcapping", None)
        return softcap * torch.tanh(logits / softcap) if softcap else logits


def _layer_types(config: Any) -> set[str]:
    if types := getattr(config, "layer_types", None):
        return set(types)
    return {"sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"}


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    generation = getattr(model, "generation_config", None)
    configured = getattr(generation, "eos_token_id", None)
    if configured is None:
        configured = tokenizer.eos_token_id
    if configured is None:
        return frozenset()
    return frozenset([configured] if isinstance(configured, int) else configured)
