"""Base LMs with an encoder: T5, BART, Marian and their kin. The encoder reads a prompt once; the decoder begins with a
start token and looks at what the encoder made of it, by keys and values that each layer computes once.

Blocks are verified as rows of a batch: these decoders are not told where tokens stand, so that they read no trees.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import EncoderDecoderCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from lattices.errors import IncompatibleError
from lm.base.cache import KVCache, TreeCache
from lm.base.model import BaseIdentity, BaseLM
from lm.base.probe import attempt, refusal

ENCODER_LENGTHS = ("max_source_positions", "max_encoder_position_embeddings", "max_position_embeddings")
PADDING_TOLERANCE = 1e-4  # share of the largest logit by which padding a prompt may change any


class EncoderDecoderLM(BaseLM):
    """A base LM whose encoder reads the prompt.

    Tokens that the model's `generation_config` forbids (`bad_words_ids` of one token) never come, and
    `forced_bos_token_id` is a part of what the decoder begins with, not of the output.
    """

    has_encoder = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prompt_length = min(
            _encoder_length(self.prompt_reader.config.get_text_config()), _numbered(self.prompt_reader)
        )
        self.context_length = min(self.context_length, _numbered(self.decoder))
        if unknown := next((token for token in self._before if not 0 <= token < self.vocab_size), None):
            raise IncompatibleError(
                f"{self.identity.name} begins with token {unknown}, and writes 0 to {self.vocab_size - 1}; mend "
                "decoder_start_token_id or forced_bos_token_id in its generation_config.json"
            )

    @property
    def decoder_config(self) -> Any:
        return self.decoder.config

    @property
    def decoder(self) -> Any:
        return self.model.get_decoder()

    @property
    def prompt_reader(self) -> Any:
        return self.model.get_encoder()

    def prompt_room(self, new_tokens: int) -> int:
        return self.prompt_length

    @functools.cached_property
    def _before(self) -> list[int]:
        generation, config = self.model.generation_config, self.model.config
        start = next(
            (
                value
                for name in ("decoder_start_token_id", "bos_token_id") for of in (generation, config)
                if (value := getattr(of, name, None)) is not None
            ),
            None,
        )  # fmt: skip
        if not isinstance(start, int):
            raise IncompatibleError(
                f"{self.identity.name} does not say what its decoder begins with; put decoder_start_token_id into its "
                "generation_config.json"
            )
        forced = getattr(generation, "forced_bos_token_id", None)
        return [start, *([forced] if isinstance(forced, int) else [])]

    @property
    def _forbidden_ids(self) -> list[int]:
        words = getattr(self.model.generation_config, "bad_words_ids", None) or []
        return [word[0] for word in words if len(word) == 1 and word[0] not in self.eos_token_ids]  # as transformers

    @functools.cached_property
    def _forbidden(self) -> torch.Tensor | None:
        """What makes tokens never come, `[vocab]`."""
        if not self._forbidden_ids:
            return None
        never = torch.zeros(self.vocab_size, dtype=self.dtype, device=self.device)
        # A number that is one in float32 too, so that a lattice may hold all tokens.
        never[self._forbidden_ids] = max(torch.finfo(self.dtype).min / 2, -1e30)
        return never

    @functools.cached_property
    def added_bias(self) -> torch.Tensor | None:
        bias = getattr(self.model, "final_logits_bias", None)
        shift = None if bias is None or not bias.any() else bias[0]
        parts = [part for part in (shift, self._forbidden) if part is not None]
        return sum(parts[1:], parts[0]) if parts else None

    def _call(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits, hidden = super()._call(*args, **kwargs)
        return logits if self._forbidden is None else logits + self._forbidden, hidden

    @property
    def generation_settings(self) -> dict[str, Any]:
        words = [[token] for token in self._forbidden_ids]
        names = ("decoder_start_token_id", "forced_bos_token_id")
        return {**dict(zip(names, self._before, strict=False)), "bad_words_ids": words or None}

    def prefix(self, prompt_ids: Sequence[int]) -> list[int]:
        return list(self._before)

    @torch.inference_mode()
    def encoded(self, prompts: Sequence[Sequence[int]]) -> Source:
        ids, mask = self._padded(prompts)
        states = self.prompt_reader(input_ids=ids, attention_mask=mask).last_hidden_state
        return Source(states, mask)

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask `[b, s]`."""
        rows = [torch.tensor(list(prompt)) for prompt in prompts]
        ids, mask = (pad_sequence(each, batch_first=True) for each in (rows, [torch.ones_like(row) for row in rows]))
        return ids.to(self.device), mask.to(self.device)

    def adapted(
        self, arguments: dict[str, Any], cache: KVCache | TreeCache | None, source: Source | None
    ) -> dict[str, Any]:
        ids = arguments.pop("input_ids")
        rows = len(ids)  # of one prompt for all, else a row each
        if isinstance(cache, KVCache):
            source = cache.source
            assert source is not None, "the decoder reads what the encoder made of a prompt (`read_prompt`)"
            arguments[self._cache_argument] = EncoderDecoderCache(cache, source.cross(rows, len(cache.layers)))
        assert source is not None, "a call without cache is given a source"
        states, mask = source.states.expand(rows, -1, -1), source.mask.expand(rows, -1)
        arguments["decoder_input_ids"], arguments["decoder_attention_mask"] = ids, arguments["attention_mask"]
        return {**arguments, "encoder_outputs": BaseModelOutput(last_hidden_state=states), "attention_mask": mask}

    def body_arguments(self, prompts: Sequence[Sequence[int]], ids: torch.Tensor) -> dict[str, Any]:
        """See `BaseLM`; the encoder is a part of the body."""
        sources, mask = self._padded(prompts)
        return {"input_ids": sources, "attention_mask": mask, "decoder_input_ids": ids, "use_cache": False}

    @functools.cached_property
    def supports_padding(self) -> bool:
        """See `BaseLM`: whether a prompt is read the same beside a longer one."""
        first = torch.tensor([self._before], device=self.device)
        short, long = [3, 4], [3, 4, 5, 6]

        def logits() -> torch.Tensor:
            both = self.forward(first.expand(2, -1), source=self.encoded([short, long]))[0][0]
            return torch.stack([both, self.forward(first, source=self.encoded([short]))[0][0]])

        found = attempt(logits)
        if found is None:
            return False
        return bool((found[0] - found[1]).abs().max() <= PADDING_TOLERANCE * found[1].abs().max())

    def _ids(self, text: str, *, chat: bool, max_tokens: int | None) -> list[int]:
        """As the encoder reads a text, of which more than `max_tokens` are cut before the tokens that end it."""
        if chat:
            return super()._ids(text, chat=chat, max_tokens=max_tokens)
        how = {"truncation": max_tokens is not None, "max_length": max_tokens, "verbose": False}
        return list(self.tokenizer.encode(text, **how))


def make_base(model: Any, tokenizer: Any, *, identity: BaseIdentity, **how: bool) -> BaseLM:
    """The base LM around a model of transformers, with an encoder or without; arguments and errors as of `BaseLM`."""
    kind = EncoderDecoderLM if model.config.is_encoder_decoder else BaseLM
    with refusal(identity.name):
        return kind(model, tokenizer, identity=identity, **how)


class Source:
    """What the encoder made of prompts: states `[b, s, d]`, mask `[b, s]` (0 where a shorter one is padded), and the
    keys and values that the decoder's layers make of the states at the first call."""

    def __init__(self, states: torch.Tensor, mask: torch.Tensor) -> None:
        self.states, self.mask = states, mask
        self._cross: _SourceCache | None = None

    def cross(self, rows: int, layers: int) -> _SourceCache:
        """The keys and values for so many rows, of so many layers."""
        self._cross = self._cross or _SourceCache(layers)
        for layer in self._cross.layers:
            layer.show(rows)
        return self._cross

    def rows(self, chosen: torch.Tensor) -> Source:
        """That of these rows only."""
        source = Source(self.states[chosen], self.mask[chosen])
        if self._cross is not None:
            source._cross = _SourceCache(len(self._cross.layers))
            for ours, theirs in zip(self._cross.layers, source._cross.layers, strict=True):
                theirs.hold(*(each[chosen] for each in ours.held))
        return source


class _SourceLayer(DynamicLayer):
    """One layer's keys and values of a source, `[b, heads, s, d_head]`; shown for several rows where b is 1."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: tuple[torch.Tensor, ...] = ()
        self.shown = 0

    def hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.held = self.keys, self.values = keys, values
        self.shown = len(keys)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Of a call of several rows on one prompt all rows are the same.
        self.hold(key_states, value_states)
        return key_states, value_states

    def show(self, rows: int) -> None:
        """Has the keys and values for so many rows."""
        if self.held and self.shown != rows:
            self.keys, self.values = (each[:1].expand(rows, -1, -1, -1) for each in self.held)
            self.shown = rows

    def get_seq_length(self) -> int:
        return self.held[0].shape[2] if self.held else 0


class _SourceCache(Cache):
    """The keys and values of all layers of a decoder."""

    layers: list[Any]

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[_SourceLayer() for _ in range(layers)])


def _encoder_length(config: Any) -> int:
    """Tokens that an encoder reads at most by its configuration; 2^30 where there is no limit."""
    sizes = [getattr(config, name, None) for name in ENCODER_LENGTHS]
    return next((size for size in sizes if type(size) is int and size > 0), 1 << 30)


def _numbered(model: torch.nn.Module) -> int:
    """Positions of a table that is read from after its padding's on, as Roberta reads it; 2^30 where there is none."""
    tables = [
        module.num_embeddings - module.padding_idx - 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return min(tables, default=1 << 30)
