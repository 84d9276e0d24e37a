"""Blockwise decoding inside transformers' own `generate`: `model.generate(..., custom_generate=custom_generate(...))`.

transformers prepares the prompt, the limits and what ends the output; the decode is this project's. What its callable
form does not hand on is named where it can't be seen from here: the `streamer` and `tokenizer` of the call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from lattices.errors import IncompatibleError, RescoreError, first_line
from lm.base.catalog import load_base
from lm.base.model import BaseLM
from lm.heads.block_heads import BlockHeads, load_heads
from rescore.acceptance import Rule
from rescore.acceptance.sampling import Sampling
from rescore.decoding import GREEDY, Decoded
from rescore.drafters import Drafter
from rescore.generation.live import Generator, best_run
from rescore.rescorers import Rescorer
from rescore.runs.run import DEFAULT_K, Run, runs_of

PREPARED = ("attention_mask", "position_ids", "logits_to_keep", "use_cache", "cache_position")  # nothing of the user's
CACHES = ("cache", "past_key_values")
WANTED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# What a processor of logits is asked for by; the others are named by their class.
ASKED_BY = {
    "RepetitionPenaltyLogitsProcessor": "repetition_penalty",
    "NoRepeatNGramLogitsProcessor": "no_repeat_ngram_size",
    "MinLengthLogitsProcessor": "min_length (or min_new_tokens)",
    "MinNewTokensLengthLogitsProcessor": "min_new_tokens",
    "NoBadWordsLogitsProcessor": "bad_words_ids",
    "SequenceBiasLogitsProcessor": "sequence_bias",
    "SuppressTokensLogitsProcessor": "suppress_tokens",
    "SuppressTokensAtBeginLogitsProcessor": "begin_suppress_tokens",
    "ForcedBOSTokenLogitsProcessor": "forced_bos_token_id",
    "ForcedEOSTokenLogitsProcessor": "forced_eos_token_id",
    "ExponentialDecayLengthPenalty": "exponential_decay_length_penalty",
    "PrefixConstrainedLogitsProcessor": "prefix_allowed_tokens_fn",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
    "InfNanRemoveLogitsProcessor": "remove_invalid_values",
    "WatermarkLogitsProcessor": "watermarking_config",
    "SynthIDTextWatermarkLogitsProcessor": "watermarking_config",
    "TopHLogitsWarper": "top_h",
    "MinPLogitsWarper": "min_p",
    "TypicalLogitsWarper": "typical_p",
    "EpsilonLogitsWarper": "epsilon_cutoff",
    "EtaLogitsWarper": "eta_cutoff",
}
HARMLESS = ("LogitNormalization",)  # the likeliest token stays the likeliest
WARPERS = ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper")  # of sampling
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
SEEDS = 1 << 62


def custom_generate(
    *,
    heads: BlockHeads | str | None = None,
    rescorer: str | Run | Rescorer | None = None,
    drafters: Sequence[str | Drafter] = (),
    k: int = DEFAULT_K,
    p: int = 1,
    verify: str = "tree",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> CustomGenerate:
    """What `model.generate(..., custom_generate=...)` of transformers takes: the same output in fewer steps.

    heads: of the model, or their folder; None: no drafter is `heads`.
    rescorer, drafters, k, p, verify: as for `rescore.generate` and `Run`; a `Run` says all of them but `verify`. With
        p = 1 a tree has all its branches.
    tokenizer: of the model; None: the one that lies where the model was loaded from.

    One prompt a call, greedily or sampled; what asks for more raises `RescoreError`. With `do_sample=True` the output
    is drawn, with exactly the law of transformers' own sampling: `temperature`, `top_k` and `top_p` are the call's, or
    those of the model's `generation_config`, or transformers' defaults (a `top_k` of 50 among them). The seed of each
    call is drawn from torch's global generator on the CPU, so that the same `torch.manual_seed` gives the same output;
    not the one of transformers, which draws every token from there. What else changes the logits is refused by name.
    All stopping criteria hold, token by token. The model must be in evaluation mode. It is prepared at its first call
    (its weights are hashed); make another callable when its weights have changed. `decoded` then says how the last call
    went. transformers does not hand on the call's `streamer`: give it as `stream_to`. Of the call's `tokenizer` nothing
    is seen either, so that `stop_strings` are given as a `StopStringCriteria` among `stopping_criteria`.
    """
    run: Run | None = None
    if isinstance(rescorer, Run):
        run = rescorer
        if drafters or (k, p) != (DEFAULT_K, 1):
            raise RescoreError("a Run says its own drafters, k and p; leave them out")
    elif rescorer is not None:
        (run,) = runs_of([rescorer], ps=() if p == 1 else [p], ks=[k], drafters=tuple(drafters))
    best = partial(best_run, drafters=tuple(drafters), k=k, p=p)
    return CustomGenerate(heads, run or best, verify, tokenizer)


class CustomGenerate:
    """See `custom_generate`.

    decoded: of the last call: tokens accepted by each step, and seconds; None before the first.
    For one thread at a time, as is the model that it decodes with.
    """

    def __init__(
        self,
        heads: BlockHeads | str | None,
        run: Run | Callable[[BaseLM, BlockHeads | None], Run],
        verify: str,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self.decoded: Decoded | None = None
        self._heads, self._run = heads, run
        self._verify, self._tokenizer = verify, tokenizer
        self._ready: tuple[weakref.ref[PreTrainedModel], Generator] | None = None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Sequence[Any],
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        stream_to: Any = None,
        **model_kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """The prompt with its output `[1, prompt + new]`, or as `GenerateDecoderOnlyOutput` where that is asked for.

        stream_to: a streamer of transformers. Raises `RescoreError`.
        """
        _check_call(model, input_ids, generation_config, model_kwargs)
        generator = self._generator(model, _rule(generation_config, logits_processor))
        base, length = generator.base, input_ids.shape[1]
        ends = [each.eos_token_id.tolist() for each in stopping_criteria if isinstance(each, EosTokenCriteria)]
        base.eos_token_ids = frozenset(token for tokens in ends for token in tokens)  # of this call, not of the model
        limits = [int(each.max_length) for each in stopping_criteria if isinstance(each, MaxLengthCriteria)]
        output = _Output(input_ids, stopping_criteria, stream_to)
        room = max(1, min(limits, default=base.context_length) - length)
        self.decoded = generator.decode(input_ids[0].tolist(), room, output.accepted)
        self.decoded.cut(output.ids.shape[1] - length)
        if stream_to is not None:
            stream_to.end()
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, output.ids))
        return output.ids

    def _generator(self, model: PreTrainedModel, rule: Rule) -> Generator:
        """Of this model, made once, with the rule of a call."""
        if self._ready is not None and self._ready[0]() is model:
            return self._ready[1].under(rule)
        learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
        base = load_base(model, self._tokenizer or _tokenizer_of(model))
        for parameter in learns:  # what is the user's to train stays so
            parameter.requires_grad_(True)
        heads = load_heads(base, self._heads) if isinstance(self._heads, str) else self._heads
        run = self._run if isinstance(self._run, Run) else self._run(base, heads)
        generator = Generator.of(base, heads, run, verify=self._verify, rule=rule)
        self._ready = weakref.ref(model), generator
        return generator


class _Output:
    """Prompt and output so far, int64 `[1, n]`, as transformers' criteria look at it: after every token."""

    def __init__(self, input_ids: torch.Tensor, criteria: Any, streamer: Any) -> None:
        self.ids = input_ids
        self._criteria, self._streamer = criteria, streamer
        if streamer is not None:
            streamer.put(input_ids.cpu())

    def accepted(self, tokens: list[int]) -> bool:
        """Adds the tokens of a step up to the one that ends the output; whether it goes on."""
        for token in tokens:
            added = torch.tensor([token], dtype=self.ids.dtype)
            self.ids = torch.cat([self.ids, added[None].to(self.ids.device)], dim=1)
            if self._streamer is not None:
                self._streamer.put(added)
            if bool(self._criteria(self.ids, None).all()):
                return False
        return True


def _check_call(
    model: PreTrainedModel, input_ids: torch.Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> None:
    """Raises `RescoreError` for what can't be had, or would be ignored."""
    if model.training:
        raise RescoreError("the model is in training mode; call model.eval() first")
    if model.config.is_encoder_decoder:
        raise IncompatibleError(f"{type(model).__name__} has an encoder; custom_generate takes decoders only")
    mode = config.get_generation_mode()
    if mode not in MODES:
        raise RescoreError(
            f"custom_generate decodes greedily or samples, and the call asks for {mode.value}; set num_beams=1 and "
            "leave out what else asks for it"
        )
    if input_ids.ndim != 2 or len(input_ids) != 1:
        raise RescoreError(f"custom_generate takes one prompt a call, and there are {len(input_ids)}; call it for each")
    if input_ids.shape[1] == 0:
        raise RescoreError("custom_generate needs input_ids with a token or more")
    if wanted := [name for name in WANTED if getattr(config, name, False)]:
        raise RescoreError(f"custom_generate gives the tokens only; leave out {wanted[0]}")
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not bool((mask == 1).all()):
        raise RescoreError("the prompt is padded; give custom_generate its tokens alone, without attention_mask")
    for name in CACHES:
        cache = model_kwargs.get(name)
        if cache is not None and (not hasattr(cache, "get_seq_length") or int(cache.get_seq_length()) > 0):
            raise RescoreError(f"custom_generate keeps a cache of its own; leave out {name} and give the whole prompt")
    given = {name for name, value in model_kwargs.items() if value is not None} - {*PREPARED, *CACHES}
    if given:
        raise RescoreError(f"custom_generate does not pass {min(given)} to the model; leave it out")


def _rule(config: GenerationConfig, processors: Sequence[Any]) -> Rule:
    """How tokens come about; raises `RescoreError` for a processor that may change that otherwise."""
    for processor in processors:
        kind = type(processor).__name__
        if kind not in HARMLESS and not (config.do_sample and kind in WARPERS):
            asked = ASKED_BY.get(kind, kind)
            raise RescoreError(f"custom_generate can't change the logits as {asked} does; leave it out, or unset it")
    return Sampling.by(processors, seed=int(torch.randint(SEEDS, ()))) if config.do_sample else GREEDY


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    name = str(model.config.name_or_path)
    try:
        if not name:
            raise ValueError("the model was loaded from nowhere")
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever transformers raises over a folder without one
        raise RescoreError(
            f"no tokenizer is found for {name or type(model).__name__} ({first_line(error)}); give "
            "custom_generate(tokenizer=...)"
        ) from error
    return tokenizer
