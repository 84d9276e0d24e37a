"""`draft-model:NAME`: what a small causal LM with the base's tokenizer would say by itself, greedily.

Its top k at every step of its own path is a lattice: slot 1 is the token that the base has chosen already, slot j >= 2
what the model gives after prompt, output so far, that token and its own arg-max of slots 2..j-1. Live, its key/value
cache follows the accepted output as a neural rescorer's does; of a known output all positions are drafted at once.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import torch

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lattices.joined.sources import MODEL
from lattices.lattice import Lattice, concatenated, put_first
from lm.base.catalog import load_tokenizer, read_model_config
from lm.heads.block_heads import entropies_of, lattice_of
from lm.neural.model import DRAFT_MODEL, NeuralLM
from rescore.checks import check_k
from rescore.drafters.base import LatticeDrafter
from rescore.rescorers.base import Context, Target
from rescore.rescorers.neural import NeuralModel
from rescore.rescorers.neural_state import groups_of

TOKENS = 8
MAX_TOKENS = 64
NODES = 1024  # of the positions of an output that are drafted at a time
LOGIT_ROWS = 64  # states whose full-vocabulary logits are alive at a time


class DraftModel(LatticeDrafter):
    """A draft model, to be fitted to a base LM before it is used; see `rescore.drafters.base.LatticeDrafter`.

    path: any small causal LM (folder or hub id) with the base's tokenizer, a folder of `rescore train-rescorer`, or
    one of the shipped neural-32m, neural-61m, neural-94m.
    tokens: of a chain after the base's own.

    A slot's log-probs are over the base's vocabulary: a model that counts more tokens (a padded embedding) is cut. One
    that counts fewer, but all of the tokenizer's, never proposes the others. Equal ones stand by lowest id. Slot 1
    begins with the base's token; its log-prob is raised to the slot's highest where the model prefers others.
    """

    kind = MODEL
    longest: int

    def __init__(self, path: str = "", *, tokens: int = TOKENS) -> None:
        if not 1 <= tokens <= MAX_TOKENS:
            raise RescoreError(f"draft-model: tokens = {tokens}; give 1 to {MAX_TOKENS}")
        self.model = self.recorder = NeuralModel(path, DRAFT_MODEL)
        self.tokens, self.longest = tokens, 1 + tokens
        self.identity = f"draft-model {self.model.sha256} {tokens}"
        self.vocab_size = 0  # of what it may propose, once it is fitted

    @property
    def source(self) -> str:
        return f"draft-model {self.model.sha256[:12]}"

    def fit(self, target: Target) -> Self:
        """For a base LM. Raises `IncompatibleError` if the model has another tokenizer, lacks some of its tokens, or
        was made for other weights."""
        fitted = copy.copy(self)
        fitted.vocab_size = self._known(target.vocab_size)
        fitted.model = self.model.fit(target, least=fitted.vocab_size)
        # What is recorded is the same to the last bit whatever decodes beside it.
        fitted.recorder = self.model.fit(dataclasses.replace(target, shared=None), least=fitted.vocab_size)
        return fitted

    def _known(self, vocab_size: int) -> int:
        """Which of the base's tokens the model has: those below this."""
        source = self.model.source
        if source.delta is not None:
            return vocab_size
        folder = str(source.folder)
        own = int(read_model_config(folder).get_text_config(decoder=True).vocab_size)
        if own < vocab_size and (needed := len(load_tokenizer(folder))) > own:
            raise IncompatibleError(
                f"the draft model {source.name} knows {own} tokens, fewer than the {needed} of its own tokenizer; "
                "give another model"
            )
        return min(own, vocab_size)

    def prefill(self, contexts: Sequence[Context]) -> None:
        """Reads the prompts of new examples, before the first lattice is asked for."""
        groups_of(*self._place(), contexts)

    def _place(self) -> tuple[NeuralLM, str]:
        """The model, and under which name it remembers examples."""
        lm = self.model.load()
        return lm, f"{self.identity} {id(lm)}"

    def computed(self, contexts: Sequence[Context], firsts: np.ndarray, k: int) -> Lattice:
        """See `LatticeDrafter.computed`; h = 1 + tokens.

        What was read of an example stays in its `Context.state`, what the base accepted of a chain included.
        """
        check_k(k, self.vocab_size)
        lattices = empty_lattice((len(contexts), self.longest, k))
        for group, rows in groups_of(*self._place(), contexts):
            first = firsts[rows]
            before, hidden = group.begin_behind(first)
            slots, _ = self._slots(group.model, torch.stack([before, hidden], dim=1), k)  # [b, 2, k]
            for row, context in enumerate(group.contexts):
                if not len(context.prompt_ids) and not context.output_ids:
                    self._unread(slots.token_ids[row, :1], slots.logps[row, :1])
            put_first(slots.token_ids[:, 0], slots.logps[:, 0], first)
            lattices.token_ids[rows, :2], lattices.logps[rows, :2] = slots.token_ids, slots.logps
            best, node = slots.token_ids[:, 1, :1], -1
            for slot in range(2, self.longest):
                states = group.read(best, np.full(best.shape, node))
                node = group.cache.nodes - 1
                slots, _ = self._slots(group.model, states, k)
                lattices.token_ids[rows, slot], lattices.logps[rows, slot] = slots.token_ids[:, 0], slots.logps[:, 0]
                best = slots.token_ids[:, 0, :1]
        return lattices

    def record(self, prompt_ids: np.ndarray, output_ids: np.ndarray, k: int) -> tuple[Lattice, np.ndarray]:
        """See `LatticeDrafter.record`.

        The nodes of all positions are read together, each below its own token of the output.
        """
        check_k(k, self.vocab_size)
        lm = self.recorder.load()
        prompt, output = (np.asarray(ids, dtype=np.int64) for ids in (prompt_ids, output_ids))
        lm.check_context(len(prompt) + len(output))
        cache = lm.new_cache(1)
        if len(prompt) > 1:
            lm.read_text(cache, prompt[None, :-1])
            cache.settle([range(len(prompt) - 1)])
        unread = len(prompt) == 0  # a token that no other one sees stands before the output then
        text = np.concatenate([[0] if unread else prompt[-1:], output])
        whole = empty_lattice((len(output), self.longest, k))
        entropies = np.zeros((len(output), self.longest), dtype=np.float32)
        at_a_time = max(1, NODES // self.tokens)
        for start in range(0, len(output), at_a_time):
            block, of_block = whole[start : start + at_a_time], entropies[start : start + at_a_time]  # views
            n = len(block)
            parents = np.arange(-1, n)
            if unread:
                parents[1] = -1
            # The states before and after each of the block's tokens; the last of these is read again by the next one.
            slots, spread = self._slots(lm, lm.read(cache, text[None, start : start + n + 1], parents[None]), k)
            of_block[:, 0], of_block[:, 1] = spread[0, :-1], spread[0, 1:]
            block.token_ids[:, 0], block.logps[:, 0] = slots.token_ids[0, :-1], slots.logps[0, :-1]
            block.token_ids[:, 1], block.logps[:, 1] = slots.token_ids[0, 1:], slots.logps[0, 1:]
            if unread:
                self._unread(block.token_ids[:1, 0], block.logps[:1, 0])
                of_block[0, 0] = np.log(self.vocab_size)
            nodes = np.arange(1, n + 1)
            for slot in range(2, self.longest):
                states = lm.read(cache, block.token_ids[None, :, slot - 1, 0], nodes[None])
                nodes = np.arange(cache.nodes - n, cache.nodes)
                slots, spread = self._slots(lm, states, k)
                of_block[:, slot] = spread[0]
                block.token_ids[:, slot], block.logps[:, slot] = slots.token_ids[0], slots.logps[0]
            cache.settle([range(int(unread), n)])
            unread = False
        put_first(whole.token_ids[:, 0], whole.logps[:, 0], output)
        return whole, entropies

    def _slots(self, lm: NeuralLM, hidden: torch.Tensor, k: int) -> tuple[Lattice, np.ndarray]:
        """The model's top k after each of the states `[b, n, d]`, as one lattice `[b, n, k]`, and the entropies."""
        slots, entropies = slots_after(
            lambda states: lm.logits(states)[:, : self.vocab_size], hidden.flatten(0, 1), k,
            name=f"the draft model {self.model.source.name}",
        )  # fmt: skip
        b, n, _ = hidden.shape
        return Lattice(slots.token_ids.reshape(b, n, k), slots.logps.reshape(b, n, k)), entropies.reshape(b, n)

    def _unread(self, token_ids: np.ndarray, logps: np.ndarray) -> None:
        """Makes slots `[n, k]` even, in place: those of a model that has read nothing."""
        token_ids[:], logps[:] = np.arange(token_ids.shape[1]), -np.log(self.vocab_size)


def slots_after(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    states: torch.Tensor,
    k: int,
    *,
    name: str,
    token_ids: torch.Tensor | None = None,
) -> tuple[Lattice, np.ndarray]:
    """The top k after each of the states `[n, d]`, as one lattice `[n, 1, k]`, and the entropies `[n, 1]`.

    name: of the model; token_ids: as for `lattice_of`. Raises `InvalidDataError` for what is not finite.
    """
    slots, entropies = [], []
    for start in range(0, len(states), LOGIT_ROWS):
        with torch.inference_mode():
            logits = logits_of(states[start : start + LOGIT_ROWS])[:, None].double()
        slots.append(lattice_of(logits, k, token_ids))
        entropies.append(entropies_of(logits))
    whole = concatenated(slots)
    if not np.isfinite(whole.logps).all():
        raise InvalidDataError(
            f"{name} gave log-probabilities that are not finite; check its weights, or take another --dtype"
        )
    return whole, np.concatenate(entropies)


def empty_lattice(shape: tuple[int, ...]) -> Lattice:
    """Zeros, to be filled."""
    return Lattice(np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.float32))
