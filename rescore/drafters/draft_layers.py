"""`eagle:FOLDER`, `mtp`, `hydra:FOLDER`: draft layers that read the base's own states (`lm.draft_layers`).

A chain goes on greedily from the base's token, each token with the state that the layers gave before it; the top k of
every step is a lattice, conditioned on the chain. Live, the layers read on where they were, with the states of what
was accepted. Of a known output all chains are drafted together: in step j the node of a position sees the text up to it
and its own nodes of the steps before, as a tree mask says.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self
from weakref import WeakValueDictionary

import numpy as np
import torch

from lattices.errors import IncompatibleError, RescoreError
from lattices.joined.sources import MODEL
from lattices.lattice import Lattice, put_first, stacked_lattices
from lattices.paths import user_path
from lm.base.cache import TreeCache
from lm.base.model import BaseLM
from lm.base.states import LayerStates
from lm.draft_layers.eagle import EagleSource
from lm.draft_layers.hydra import HydraSource
from lm.draft_layers.mtp import MtpSource
from lm.draft_layers.net import DraftNet, NetSource
from lm.heads.block_heads import lattice_of
from rescore.checks import check_k
from rescore.drafters.base import LatticeDrafter
from rescore.drafters.draft_model import MAX_TOKENS, NODES, empty_lattice, slots_after
from rescore.rescorers.base import Context, Target

TOKENS, MTP_TOKENS = 7, 3

_LOADED: WeakValueDictionary[tuple[str, int], DraftNet] = WeakValueDictionary()  # by identity and base: runs share them


@dataclass
class _Reading:
    """How far the layers have read an example: pairs of a token and the base's state before it."""

    cache: TreeCache
    pairs: int = 0


class DraftLayers(LatticeDrafter):
    """Proposes what draft layers (EAGLE, MTP) do: slot 1 is the base's own top k, the others are theirs.

    tokens: of a chain after the base's own.
    """

    kind = MODEL
    longest: int

    def __init__(self, source: NetSource, word: str, tokens: int) -> None:
        if not 1 <= tokens <= MAX_TOKENS:
            raise RescoreError(f"{word}: tokens = {tokens}; give 1 to {MAX_TOKENS}")
        self.tokens, self.longest = tokens, 1 + tokens
        self._word, self._from = word, source
        self._target: Target | None = None
        self._net: DraftNet | None = None
        self._say_identity()

    def _say_identity(self) -> None:
        self.identity = f"{self._word} {self._from.sha256} {self.tokens}"

    @property
    def source(self) -> str:
        return f"{self._word} {self._from.sha256[:12]}"

    def fit(self, target: Target) -> Self:
        """See `Drafter.fit`. Raises `IncompatibleError` for a base with other sizes, or too few layers."""
        fitted = copy.copy(self)
        fitted._target, fitted._net = target, None
        of_base = target.base.name if target.base else "the base"
        sizes = {"vocab_size": target.vocab_size, "hidden_size": target.base.hidden_size if target.base else None}
        for name, size in sizes.items():
            made_for = getattr(self._from, name)
            if None not in (made_for, size) and made_for != size:
                raise IncompatibleError(
                    f"{self._from.name} was made for another base than {of_base}: {name} is {made_for}, the base's is "
                    f"{size}; give a checkpoint of this base"
                )
        if target.shared is not None:
            _check_states(target.shared, self._from.name)
            fitted.layers = self._from.layers(target.shared)
        return fitted

    def _loaded(self, base: BaseLM) -> DraftNet:
        if self._net is None or self._net.base is not base:
            net = _LOADED.get((self.identity, id(base)))
            if net is None or net.base is not base:
                _check_states(base, self._from.name)
                net = self._from.load(base)
                self._from.check_unchanged()
                _LOADED[self.identity, id(base)] = net
            self._net = net
        return self._net

    def _live(self, context: Context) -> tuple[DraftNet, LayerStates]:
        base = self._target.shared if self._target else None
        if base is None or context.states is None:
            raise RescoreError(f"{self.name or self._word} drafts from states inside the base, which must be loaded")
        return self._loaded(base), context.states

    def prefill(self, contexts: Sequence[Context]) -> None:
        """Reads the prompts of new examples, before the first lattice is asked for."""
        for context in contexts:
            if context.states is not None and len(context.prompt_ids) > 1:
                self._read_on(context, context.prompt_ids, len(context.prompt_ids) - 1)

    def _read_on(self, context: Context, text: Sequence[int], pairs: int) -> tuple[_Reading, torch.Tensor]:
        """Reads the pairs that are not read yet, the last of so many in any case; the states after them."""
        net, states = self._live(context)
        reading = context.state.setdefault(f"{self.identity} {id(net)}", _Reading(net.new_cache()))
        start = reading.pairs = min(reading.pairs, pairs - 1)
        reading.cache.lengths[:] = start
        begun = net.begun(states.since(net.layers, start)[: pairs - start])
        after = net.read_text(reading.cache, np.array(text[start + 1 : pairs + 1]), begun)
        reading.pairs = pairs
        return reading, after

    def computed(self, contexts: Sequence[Context], firsts: np.ndarray, k: int) -> Lattice:
        """See `LatticeDrafter.computed`; h = 1 + tokens. What was read of an example stays in its `Context.state`."""
        return stacked_lattices(
            [self._chain(context, int(first), k) for context, first in zip(contexts, firsts, strict=True)]
        )

    def _chain(self, context: Context, first: int, k: int) -> Lattice:
        """The lattice `[h, k]` at one position."""
        net, of_base = self._live(context)
        text = [*context.prompt_ids, *context.output_ids, first]
        assert of_base.length == len(text) - 1, "the states must be those of the text so far"
        k = self._fitting(net, k)
        whole = empty_lattice((self.longest, k))
        logits = of_base.logits[:, None].double()
        self._put(whole, 0, lattice_of(logits, k))
        reading, after = self._read_on(context, text, len(text) - 1)
        state, node = after[-1:], -1
        for slot in range(1, self.longest):
            if slot > 1:
                state = net.read(reading.cache, whole.token_ids[slot - 1, :1], state, np.array([node]))
                node += 1
            self._put(whole, slot, self._slots(net, state, k)[0])
        reading.cache.settle([[]])
        put_first(whole.token_ids[None, 0], whole.logps[None, 0], np.array([first]))
        return whole

    def _put(self, whole: Lattice, slot: int, of_slot: Lattice) -> None:
        whole.token_ids[slot], whole.logps[slot] = of_slot.token_ids[0, 0], of_slot.logps[0, 0]

    def record(self, prompt_ids: np.ndarray, output_ids: np.ndarray, k: int) -> tuple[Lattice, np.ndarray]:
        """See `LatticeDrafter.record`: one pass of the base over prompt and output, and `tokens` passes of the layers
        over the positions, many at a time."""
        if self._target is None or self._target.models is None:
            raise RescoreError(
                f"{self.name or self._word} drafts from states inside the base, which a trace that is given does not "
                "have; drop --trace"
            )
        base, _ = self._target.models()
        base.unpack()  # what is recorded is the same to the last bit whatever was decoded before
        net = self._loaded(base)
        k = self._fitting(net, k)
        text = np.concatenate([prompt_ids, output_ids]).astype(np.int64)
        count, start_of_output = len(text) - 1, len(prompt_ids) - 1
        kept = base.new_cache(count, net.layers)
        ids = torch.from_numpy(text[:-1])[None].to(base.device)
        _, final = base.forward(ids, kept, last=len(output_ids), projects=False)
        kept.keep(range(count))
        assert kept.states is not None
        begun = net.begun(kept.states.since(net.layers, 0))
        cache = net.new_cache()
        if start_of_output:
            net.read_text(cache, text[1 : start_of_output + 1], begun[:start_of_output])
        whole = empty_lattice((len(output_ids), self.longest, k))
        entropies = np.zeros(whole.token_ids.shape[:2], dtype=np.float32)

        def put(begin: int, slot: int, of_slot: tuple[Lattice, np.ndarray]) -> None:
            lattice, spread = of_slot
            rows = slice(begin, begin + len(spread))
            whole.token_ids[rows, slot], whole.logps[rows, slot] = lattice.token_ids[:, 0], lattice.logps[:, 0]
            entropies[rows, slot] = spread[:, 0]

        at_a_time = max(1, NODES // self.tokens)
        for begin in range(0, len(output_ids), at_a_time):
            pairs = np.arange(start_of_output + begin, min(start_of_output + begin + at_a_time, count))
            n = len(pairs)
            put(begin, 0, self._slots(base, final[0, begin : begin + n], k))
            states = net.read(cache, text[pairs + 1], begun[pairs], np.arange(-1, n - 1))
            put(begin, 1, self._slots(net, states, k))
            nodes = np.arange(n)
            for slot in range(2, self.longest):
                states = net.read(cache, whole.token_ids[begin : begin + n, slot - 1, 0], states, nodes)
                nodes = np.arange(cache.nodes - n, cache.nodes)
                put(begin, slot, self._slots(net, states, k))
            cache.settle([range(n)])
        put_first(whole.token_ids[:, 0], whole.logps[:, 0], np.asarray(output_ids))
        return whole, entropies

    def _slots(self, of: DraftNet | BaseLM, states: torch.Tensor, k: int) -> tuple[Lattice, np.ndarray]:
        """The top k after each of the states `[n, d]`, as one lattice `[n, 1, k]`, and the entropies `[n, 1]`."""
        if isinstance(of, BaseLM):
            return slots_after(of.project, states, k, name=self._from.name)
        return slots_after(of.logits, states, k, name=self._from.name, token_ids=of.token_ids)

    def _fitting(self, net: DraftNet, k: int) -> int:
        """Entries of a slot: no more than the layers have tokens."""
        check_k(k, net.base.vocab_size)
        return k if net.token_ids is None else min(k, len(net.token_ids))


class Eagle(DraftLayers):
    """`eagle:FOLDER`: a checkpoint of EAGLE-1, -2 or -3 for this very base; see `DraftLayers`."""

    def __init__(self, path: str = "", *, tokens: int = TOKENS) -> None:
        if not path:
            raise RescoreError("eagle needs a checkpoint; write eagle:FOLDER")
        source = EagleSource(user_path(path, "eagle:"), f"eagle:{path}")
        super().__init__(source, "eagle", tokens)
        self.held = source.drafted


class Mtp(DraftLayers):
    """`mtp`, `mtp:FOLDER`: the base's own multi-token prediction layer, which lies in its files or in a folder beside;
    see `DraftLayers`."""

    def __init__(self, path: str = "", *, tokens: int = MTP_TOKENS) -> None:
        folder = user_path(path, "mtp:") if path else None
        super().__init__(MtpSource(folder, f"mtp:{path}" if path else "mtp"), "mtp", tokens)
        self._in_base = not path

    def fit(self, target: Target) -> Self:
        found = copy.copy(self)
        if self._in_base:
            if target.base is None:
                raise RescoreError("mtp drafts with a layer in the base's files, and the trace does not name its base")
            found._from = MtpSource(None, "mtp").beside(target.base)
            found._say_identity()
        return super(Mtp, found).fit(target)


class Hydra(DraftLayers):
    """`hydra:FOLDER`: Hydra's mlp heads for this very base; see `DraftLayers`. They draft as many tokens as there are
    heads, or the first `tokens` of these."""

    def __init__(self, path: str = "", *, tokens: int | None = None) -> None:
        if not path:
            raise RescoreError("hydra needs a checkpoint; write hydra:FOLDER")
        source = HydraSource(user_path(path, "hydra:"), f"hydra:{path}")
        if tokens is not None and tokens > source.heads:
            raise RescoreError(f"hydra:{path} has {source.heads} heads; give tokens from 1 to {source.heads}")
        super().__init__(source, "hydra", source.heads if tokens is None else tokens)


def _check_states(base: BaseLM, name: str) -> None:
    if base.has_encoder:
        raise IncompatibleError(
            f"{name} drafts from states along the prompt, and {base.identity.name} reads that with an encoder; give "
            "other drafters"
        )
