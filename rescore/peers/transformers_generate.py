"""transformers' own `generate` as a peer: greedy, or with its prompt lookup.

The model is loaded as transformers does it by itself; all settings but those of the spec are the library's own, and
what a model's `generation_config` changes in the logits (a penalty for repeating) is left out, as ours does without.
"""

from __future__ import annotations

import importlib.metadata
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from lattices.errors import IncompatibleError, RescoreError, first_line
from lm.base.catalog import load_model, quiet
from lm.base.model import BaseLM
from rescore.acceptance import first_difference
from rescore.calls import NO_CALL, Call
from rescore.decoding import Decoded
from rescore.peers import Decoder, Peer

MOST_LOOKUP = 1024  # tokens; more is a slip


class TransformersGenerate(Peer):
    """lookup: tokens that its prompt lookup drafts (`prompt_lookup_num_tokens`); 0: none, one token a step."""

    def __init__(self, *, lookup: int = 0) -> None:
        if not 0 <= lookup <= MOST_LOOKUP:
            raise RescoreError(f"--peer transformers: lookup is 0 to {MOST_LOOKUP}, and {lookup} is none of these")
        self.lookup, self.longest = lookup, 1 + lookup
        self.identity = f"transformers {importlib.metadata.version('transformers')}"

    def load(self, base: BaseLM, shared: dict[object, Any]) -> Decoder:
        """See `Peer`. A model that was given in memory is used as it is: nothing in it is laid out in our way."""
        model: Any = base.model
        if base.from_files:
            key = ("transformers", base.identity)
            if key not in shared:
                shared[key] = load_model(base.identity.name, dtype=base.identity.dtype, device=str(base.device))
            model = shared[key]
        ends = sorted(base.eos_token_ids)
        config = GenerationConfig(
            do_sample=False, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0,
            prompt_lookup_num_tokens=self.lookup or None, **base.generation_settings,
        )  # fmt: skip
        return _Generate(model, config, self.name, base.prefix)


@dataclass(frozen=True)
class _Generate:
    """Decodes with `model.generate`; name: of the peer, for messages; prefix: what stands before the output of a
    prompt."""

    model: Any
    config: GenerationConfig
    name: str
    prefix: Callable[[Sequence[int]], list[int]]

    @torch.inference_mode()
    def __call__(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Decoded:
        """One prompt. `seconds`: the prompt's call is its prefill, though it may verify a draft already; `verify` is
        the time in later calls (on a GPU, where calls return before they are done, all time after the prompt)."""
        before = len(self.prefix(prompt_ids))
        model, calls = self.model, _Calls(before)
        hooks = [
            model.register_forward_pre_hook(calls.begin, with_kwargs=True), model.register_forward_hook(calls.end)
        ]  # fmt: skip
        own, model.generation_config = model.generation_config, self.config
        start = time.perf_counter()
        try:
            with quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ids = torch.tensor([list(prompt_ids)], device=model.device)
                mask = torch.ones_like(ids)
                forced = before - 1 if model.config.is_encoder_decoder else 0  # after the decoder's start token
                found: Any = model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens + forced)
                output_ids = found[0, before:].tolist()
        except Exception as error:  # whatever it raises over a model that it can't decode in this way
            raise IncompatibleError(
                f"transformers can't decode with this model ({first_line(error)}); drop --peer {self.name}"
            ) from error
        finally:
            end = time.perf_counter()
            model.generation_config = own
            for hook in hooks:
                hook.remove()
        decoded = decoded_by([tokens[0].tolist() for tokens in calls.tokens], before, output_ids)
        decoded.seconds.prefill, decoded.seconds.total = calls.read_at - start, end - calls.read_at
        decoded.seconds.verify = calls.seconds if model.device.type == "cpu" else decoded.seconds.total
        return decoded


@dataclass
class _Calls:
    """Hooks that note each call of a model: its tokens `[1, n]`, when the prompt had been read, the time after that."""

    prompt: int
    tokens: list[torch.Tensor] = field(default_factory=list)
    read: int = 0
    read_at: float = 0.0
    seconds: float = 0.0
    began: float = 0.0

    def begin(self, _model: torch.nn.Module, _args: tuple[Any, ...], given: dict[str, Any]) -> None:
        self.tokens.append(given["decoder_input_ids" if "decoder_input_ids" in given else "input_ids"])
        self.began = time.perf_counter()

    def end(self, model: Any, _args: tuple[Any, ...], _output: Any) -> None:
        # Long prompts may take several calls.
        if self.read >= self.prompt:
            self.seconds += time.perf_counter() - self.began
            return
        self.read += self.tokens[-1].shape[1]
        if self.read >= self.prompt:
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            self.read_at = time.perf_counter()


def decoded_by(calls: Sequence[Sequence[int]], prompt: int, output_ids: list[int]) -> Decoded:
    """The steps of an output from the tokens of each call, the prompt's (so many) first; counted as docs/numbers.md has
    it.

    After the prompt a call has the token that the call before chose, and a draft; what of both the output goes on with
    it has accepted. What the prompt's own call accepted of a draft is a step too, where it is anything; a last token
    that needed no call is one.
    """
    decoded = Decoded(verify="batch")
    unread = prompt
    for tokens in calls:
        ahead = output_ids[len(decoded.output_ids) :]
        draft = list(tokens[unread:])[: len(ahead)]
        unread = max(0, unread - len(tokens))
        differs = first_difference(draft, ahead[: len(draft)])
        if accepted := len(draft) if differs is None else differs:
            decoded.add(draft, accepted, Call(len(draft), 1, heads=False))
    if ahead := output_ids[len(decoded.output_ids) :]:
        assert len(ahead) == 1, "a call of the model was not seen"
        decoded.add(ahead, 1, NO_CALL)
    return decoded
