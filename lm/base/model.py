"""The base LM: tokens in, final hidden states and logits out, with a cache that keeps what was accepted.

Knows nothing about block heads, drafts or tasks. Any transformers causal LM serves whose layers are attention over
keys and values (`lm.base.probe` tries it); `lm.base.catalog.load_base` turns a name into one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jinja2.exceptions import TemplateError
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lattices.errors import IncompatibleError, RescoreError, first_line
from lm.base.cache import KVCache, TreeCache, layer_types
from lm.base.fast.compiled import compile_layers, remove
from lm.base.fast.graphs import SIZES, FixedCache, FixedForwards
from lm.base.fast.packed import can_pack, pack_joined, product_of, unpack
from lm.base.identity import uses_date, with_fixed_date
from lm.base.probe import Probe, Scaling, context_length
from lm.base.states import causal_arguments

if TYPE_CHECKING:
    from lm.base.encoder_decoder import Source

LEAST_WEIGHTS = 1 << 24  # of a model whose layers are compiled; what a smaller one saves is not worth the wait
CACHE_ARGUMENTS = ("cache", "past_key_values")  # its name now, and before transformers 5.24


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

    context_length: positions of the decoder; 2^30 where there is no limit.
    prompt_length: tokens of a prompt at most.
    eos_token_ids: any of them ends the output.
    is_chat: has a chat template.
    from_files: was read from the files that its identity names, not given in memory.
    compiles: has its layers compiled where it decodes, if that gains (`lm.base.fast`).
    takes_positions: is given the places of tokens.
    supports_tree: takes a 4D attention mask with every layer looking at the whole cache.
    position_size: numbers that the cache holds for one position.

    For one thread at a time: what a forward goes by, and what it leaves, lies in the object.
    What an architecture can do is tried, see `lm.base.probe`. Raises `IncompatibleError` for one that can't be
    decoded in blocks with the output it has by itself.
    """

    has_encoder = False  # which reads the prompt apart (`lm.base.encoder_decoder`)

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        identity: BaseIdentity,
        from_files: bool = False,
        compiles: bool = False,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        config = self.decoder_config.get_text_config(decoder=True)
        self.tokenizer: Any = tokenizer
        self.identity = identity
        self.from_files, self.compiles = from_files, compiles
        self.config = config
        self.eos_token_ids = _eos_token_ids(model, tokenizer)
        if getattr(model, "_is_stateful", False):  # transformers' mark of recurrent architectures
            raise IncompatibleError(f"{identity.name} is recurrent: its state can't forget rejected tokens")
        if any(getattr(module, "attention_type", None) == "block_sparse" for module in model.modules()):
            # It reads long texts by another attention than short ones, and that is not causal.
            raise IncompatibleError(
                f'{identity.name} has sparse attention; put "attention_type": "original_full" into its config.json'
            )
        takes = inspect.signature(model.forward).parameters
        self._cache_argument = next((name for name in CACHE_ARGUMENTS if name in takes), "")
        if not self._cache_argument:
            raise IncompatibleError(f"{identity.name} ({config.model_type}) has no cache of keys and values")
        self.takes_positions = "position_ids" in takes
        self._takes_last = "logits_to_keep" in takes
        self.output_embeddings: Any = model.get_output_embeddings()
        weight = getattr(self.output_embeddings, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            raise IncompatibleError(
                f"{identity.name} ({config.model_type}) has no vocabulary projection for block heads"
            )
        self.vocab_size, self.hidden_size = weight.shape
        sizes = (identity.hidden_size, identity.vocab_size)
        if sizes != (self.hidden_size, self.vocab_size):
            raise IncompatibleError(
                f"{identity.name} projects {self.hidden_size} numbers to {self.vocab_size} tokens, and by its "
                f"configuration it would be {sizes[0]} to {sizes[1]}"
            )
        self.context_length = self.prompt_length = context_length(config)
        self._hidden: torch.Tensor | None = None
        self._fixed: FixedForwards | None = None
        self._packs, self._may_compile = from_files, compiles  # a model that was given in memory may still change
        self._projects, self._last = True, 0
        self.output_embeddings.register_forward_pre_hook(self._remember_hidden)
        self.scaling = Scaling()
        probe = Probe(self)
        may_be_tree = self.takes_positions and layer_types(config) == {"full_attention"}
        self.supports_tree = probe.check_cache(tree=may_be_tree)
        probe.check_window()
        self.position_size = probe.position_size
        self.has_fixed_shapes = compiles and self.supports_tree and self.device.type == "cuda"

    def pack(self) -> None:
        """Makes the model ready for steps of a few tokens, where that gains: its weights are laid out for them
        (`lm.base.fast.packed`), and layers compiled (`lm.base.fast`). For inference only.

        Of a weight that no file holds as it is only the shape stays then (but for the vocabulary projection).
        """
        if not self._packs or not can_pack(self.model):
            return
        few = torch.arange(3, device=self.device)[None]
        source = self.encoded(few.tolist())
        self._packs = pack_joined(self.model, self.output_embeddings, lambda: self.forward(few, source=source)[0])
        gains = not self.has_encoder and sum(weight.numel() for weight in self.model.parameters()) >= LEAST_WEIGHTS
        if self._may_compile and gains:
            compile_layers(self)
        self._may_compile = False

    def unpack(self) -> None:
        """Has all weights as they were read: to train them, or to compute as before `pack` to the last bit."""
        remove(self.model)
        unpack(self.model)
        self._may_compile = self.compiles

    @functools.cached_property
    def body_gives_states(self) -> bool:
        """Whether the states that heads read are the output of the model's body, so that the body can be trained."""
        return Probe(self).body_gives_states()

    @functools.cached_property
    def supports_padding(self) -> bool:
        """Whether prompts of different lengths can stand in one batch, padded on the left."""
        return Probe(self).follows_padding(mask_4d=self.supports_tree)

    def _remember_hidden(self, _module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        # The one place that every architecture agrees on: block heads read what the vocabulary projection reads.
        # Contiguous, because torch multiplies a batch of slices by one copy of the projection per row (100x slower).
        self._hidden = args[0][:, -self._last :].contiguous()
        return (self._hidden if self._projects else self._hidden[:, :0],)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.output_embeddings.weight.device  # where all are, or were before `pack`
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def is_half(self) -> bool:
        """Whether it computes in 16 bits."""
        return self.dtype in (torch.float16, torch.bfloat16)

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
        is no text, no chat template, no room for text beside template or special tokens, and as `check_ids`.
        """
        if not text:
            raise RescoreError("a prompt is empty; every example needs text to start from")
        if max_tokens and not chat and max_tokens <= self.tokenizer.num_special_tokens_to_add():
            raise RescoreError(f"a limit of {max_tokens} prompt tokens leaves no room beside the special ones")
        ids = self._ids(text, chat=chat, max_tokens=max_tokens)
        while chat and max_tokens and len(ids) > max_tokens:
            pieces = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            keep = len(pieces) - (len(ids) - max_tokens)
            # Several pieces can be parts of one character, which goes as a whole: every round takes something off.
            end = min(pieces[keep - 1][1], len(text) - 1) if keep > 0 else 0
            if end == 0:
                raise RescoreError(f"a limit of {max_tokens} prompt tokens leaves no room beside the chat template")
            text = text[:end]
            ids = self._ids(text, chat=chat, max_tokens=max_tokens)
        self.check_ids(ids)
        return ids[:max_tokens] if max_tokens else ids

    def check_ids(self, prompt_ids: Sequence[int]) -> None:
        """Raises `RescoreError` for a prompt without tokens, `IncompatibleError` for tokens that the model lacks."""
        if not len(prompt_ids):
            raise RescoreError("a prompt has no tokens; it needs one at least")
        known = len(self.prompt_reader.get_input_embeddings().weight)
        if unknown := next((token for token in prompt_ids if not 0 <= token < known), None):
            raise IncompatibleError(f"a prompt has token {unknown}, and {self.identity.name} reads 0 to {known - 1}")

    def _ids(self, text: str, *, chat: bool, max_tokens: int | None) -> list[int]:
        messages = [{"role": "user", "content": text}]  # a verbose tokenizer warns of what is too long: that is ours
        return self.encode_messages(messages) if chat else list(self.tokenizer.encode(text, verbose=False))

    def encode_messages(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, `{"role", "content"}` a message, and of what begins the answer.

        Raises `RescoreError` if there is no chat template, or it does not take these messages.
        """
        if not self.is_chat:
            raise IncompatibleError(f"{self.identity.name} has no chat template; give its prompts as plain text")
        arguments: dict[str, Any] = {"add_generation_prompt": True, "return_dict": False}
        if uses_date(self.tokenizer.chat_template):
            arguments["chat_template"] = with_fixed_date(self.tokenizer.get_chat_template())
        try:
            ids: list[int] = self.tokenizer.apply_chat_template([dict(each) for each in messages], **arguments)
        except TemplateError as error:  # templates refuse some roles, and some orders of them
            raise RescoreError(
                f"the chat template of {self.identity.name} does not take these messages: {first_line(error)}"
            ) from error
        return ids

    def decode_text(self, ids: Sequence[int]) -> str:
        """Text of output tokens, special tokens left out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    @property
    def decoder_config(self) -> Any:
        """The configuration that says which layers write to a cache."""
        return self.model.config

    @property
    def decoder(self) -> Any:
        """What reads a token of the output."""
        return self.model

    @property
    def prompt_reader(self) -> Any:
        """What reads a prompt."""
        return self.model

    def prompt_room(self, new_tokens: int) -> int:
        """Tokens of a prompt at most, beside so many of an output."""
        return self.context_length - new_tokens

    @property
    def generation_settings(self) -> dict[str, Any]:
        """What transformers' `generate` must be told to give the same output, by the names of a `GenerationConfig`."""
        return {}

    def prefix(self, prompt_ids: Sequence[int]) -> list[int]:
        """What stands before the output of a prompt: the prompt; where an encoder reads that, what the decoder begins
        with."""
        return list(prompt_ids)

    def encoded(self, prompts: Sequence[Sequence[int]]) -> Source | None:
        """What the encoder makes of prompts; None for a base LM without one, which reads them before its output."""
        return None

    def read_prompt(self, prompt_ids: Sequence[int], cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads a prompt into an empty cache; logits `[1, vocab]` and state `[1, d]` after it."""
        cache.source = self.encoded([prompt_ids])
        ids = torch.tensor([self.prefix(prompt_ids)], device=self.device)
        logits, hidden = self.forward(ids, cache, last=1)
        cache.keep(range(ids.shape[1]))
        return logits[0], hidden[0]

    def states_before(self, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The final states `[t, d]` from which each of the t tokens of an output is chosen, of several prompts with
        their outputs in one call."""
        before = [self.prefix(prompt) for prompt in prompts]
        texts = [[*first, *output[:-1]] for first, output in zip(before, outputs, strict=True)]
        # Padded at the end: no token sees what stands after it.
        ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
        _, hidden = self.forward(ids.to(self.device), projects=False, source=self.encoded(prompts))
        return [
            hidden[row, len(first) - 1 : len(text)] for row, (first, text) in enumerate(zip(before, texts, strict=True))
        ]

    def body_arguments(self, prompts: Sequence[Sequence[int]], ids: torch.Tensor) -> dict[str, Any]:
        """What the model's body (`body_gives_states`) is given to read texts `[b, n]`, padded at the end, that begin
        with the `prefix` of the prompts."""
        return causal_arguments(self.model.base_model, ids, masked=self.supports_tree)

    def new_cache(self, capacity: int, layers: Collection[int] = ()) -> KVCache:
        """An empty cache for up to `capacity` positions; with the states that enter these layers (`lm.base.states`)."""
        return KVCache(self.decoder_config, capacity, layers)

    def new_decoding_cache(self, capacity: int, layers: Collection[int] = ()) -> KVCache:
        """`new_cache` for one sequence that is decoded in steps of a few tokens: on a GPU its forwards are of fixed
        shapes, and recorded (but not those whose states are asked for)."""
        if layers or not self.has_fixed_shapes:
            return self.new_cache(capacity, layers)
        if self._fixed is None or not self._fixed.has_room(capacity):
            self._fixed = FixedForwards(self._call, self.model.config, capacity, self.device)
        return self._fixed.new_cache()

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
        source: Source | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One call of the model.

        input_ids `[b, n]`; `attention_mask` `[b, m]`, or bool `[b, 1, n, m]` with m = cached + n positions. Returns
        logits `[b, l, vocab]` and final hidden states `[b, l, d]` of the last `last` tokens (0: of all n). The caller
        then calls the cache's `keep`. Without `projects` there are no logits (`[b, 0, vocab]`): where only the states
        are used, the vocabulary projection would be a large part of the work. `source`: for a call without cache, where
        there is an encoder (`encoded`).
        """
        if position_ids is None:  # always given: some architectures would count from elsewhere than `generate` does
            assert not isinstance(cache, TreeCache), "the nodes of a tree have positions of their own"
            start = 0 if cache is None else cache.length
            position_ids = torch.arange(start, start + input_ids.shape[1], device=self.device)[None]
            position_ids = position_ids.expand(len(input_ids), -1)
        few = len(input_ids) == 1 and input_ids.shape[1] <= SIZES[-1]
        if isinstance(cache, FixedCache) and cache.length and few and projects and not last:
            return cache.forwards(input_ids, cache, position_ids, attention_mask)
        return self._call(input_ids, cache, position_ids, attention_mask, last=last, projects=projects, source=source)

    def adapted(
        self, arguments: dict[str, Any], cache: KVCache | TreeCache | None, source: Source | None
    ) -> dict[str, Any]:
        """What the model's forward is given, of what a decoder alone is; see `forward`."""
        return arguments

    def _call(
        self,
        input_ids: torch.Tensor,
        cache: KVCache | TreeCache | None,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        last: int = 0,
        projects: bool = True,
        source: Source | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        arguments: dict[str, Any] = {
            "input_ids": input_ids, "attention_mask": attention_mask, self._cache_argument: cache,
            "use_cache": cache is not None,
        }  # fmt: skip
        if self.takes_positions:
            arguments["position_ids"] = position_ids
        if self._takes_last:
            arguments["logits_to_keep"] = last
        self._projects, self._last = projects, last
        states = cache.states if isinstance(cache, KVCache) else None
        try:
            with states.noting(self) if states else nullcontext():
                output = self.model(**self.adapted(arguments, cache, source))
        finally:
            self._projects, self._last = True, 0
        if self._hidden is None:
            raise IncompatibleError(f"{self.identity.name} does not call its vocabulary projection, which heads need")
        hidden, self._hidden = self._hidden, None
        if states:
            states.note_logits(output.logits)
        return output.logits, hidden

    def project(self, hidden: torch.Tensor, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """The base's vocabulary projection: `[..., d]` -> logits `[..., vocab]`, scaled as its architecture does.

        `token_ids` int64 `[b, k]`, for hidden `[b, w, d]`: the logits of these tokens only, `[b, w, k]`.
        """
        weight, bias = self.output_embeddings.weight, self.output_embeddings.bias
        if token_ids is None or token_ids.numel() >= self.vocab_size:
            packed = product_of(self.output_embeddings)  # without the hook, which notes the states of a call
            logits = packed(hidden) if packed else functional.linear(hidden, weight, bias)
            if token_ids is not None:
                logits = logits.gather(-1, token_ids[:, None].expand(-1, hidden.shape[1], -1))
        else:
            logits = hidden @ weight[token_ids].transpose(1, 2)
            logits = logits if bias is None else logits + bias[token_ids][:, None]
        if self.added_bias is not None:
            logits = logits + (self.added_bias if token_ids is None else self.added_bias[token_ids][:, None])
        return self.scaling(logits)

    @property
    def added_bias(self) -> torch.Tensor | None:
        """What an architecture adds to the logits after its projection, `[vocab]`."""
        return None

    @property
    def output_bias(self) -> torch.Tensor | None:
        """Of the vocabulary projection, `[vocab]`, with what is added after it."""
        parts = [part for part in (self.output_embeddings.bias, self.added_bias) if part is not None]
        return sum(parts[1:], parts[0]) if parts else None


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    generation = getattr(model, "generation_config", None)
    configured = getattr(generation, "eos_token_id", None)
    if configured is None:
        configured = tokenizer.eos_token_id
    if configured is None:
        return frozenset()
    return frozenset([configured] if isinstance(configured, int) else configured)
