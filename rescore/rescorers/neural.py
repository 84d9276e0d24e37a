"""`neural`, `neural-32m`, `neural-61m`, `neural-94m`: local rescoring by a small LM ([A] section 4).

One draft: left to right over the slots, the heads' log-probs + alpha x the LM's logits within the lattice's k tokens,
arg-max, go on. p drafts, beyond [A]: a beam of p paths by the sum of the heads' log-probs + alpha x the LM's
log-probs among the k tokens of each slot. The first slot is never rescored. Either way h - 1 dependent forwards a
block, of one draft for one example about half as many (`draft_ahead`); the key/value cache follows the accepted output.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Self
from weakref import WeakValueDictionary

import numpy as np
import torch

from lattices.errors import IncompatibleError, RescoreError
from lattices.lattice import Lattice
from lattices.search import p_best
from lm.base.model import BaseIdentity, BaseLM
from lm.neural.model import (
    RESCORER,
    NeuralLM,
    NeuralSource,
    Use,
    check_fits,
    find_neural,
    load_neural,
    tokenizer_sha256_of,
)
from rescore.rescorers.base import Context, LocalRescorer, Rescorer, Target
from rescore.rescorers.neural_state import Group, groups_of

# Several rescorers of a run, and their weights, use one LM. The sha256 tells a retrained one in the same folder.
_Of = tuple[NeuralSource, str, int, BaseIdentity | None, str, BaseLM | None]  # all that `load_neural` is given
_LOADED: WeakValueDictionary[_Of, NeuralLM] = WeakValueDictionary()


class NeuralModel:
    """A small LM, looked up at once, checked against a base LM, and loaded when it is first needed.

    use: what messages call it.
    """

    def __init__(self, path: str, use: Use = RESCORER) -> None:
        if not path:
            name, form = use.option.removesuffix(":").split()[-1], use.option.split()[-1]
            raise RescoreError(f"{name} needs a model: {form}FOLDER or a hub id, or one of neural-32m, -61m, -94m")
        self.source = find_neural(path, use=use)
        self.sha256 = self.source.sha256
        self.identity = f"neural {self.sha256}"
        self.target: Target | None = None
        self.least = 0
        self._loaded: NeuralLM | None = None

    def fit(self, target: Target, *, least: int | None = None) -> Self:
        """For a base LM. Raises `IncompatibleError` if it was made for another tokenizer or other weights.

        least: tokens that it must know (None: all of the base's).
        """
        use, name = self.source.use, self.source.name
        if target.base is not None:
            check_fits(self.source, target.base)
        elif self.source.delta is not None:
            raise IncompatibleError(
                f"the {use.name} {name} needs the base LM it was made for, and the trace does not name its own; give "
                f"{use.option.split()[-1]}FOLDER with a whole model"
            )
        elif target.tokenizer_sha256 not in (None, tokenizer_sha256_of(self.source.folder)):
            raise IncompatibleError(f"the {use.name} {name} has another tokenizer than the trace's base LM")
        fitted = copy.copy(self)
        fitted.target = replace(target, costs=None)  # which are nothing to a model, and have no hash
        fitted.least = target.vocab_size if least is None else least
        return fitted

    def load(self) -> NeuralLM:
        """The LM. Raises as `load_neural`, and `RescoreError` if it is not what it was when it was looked up."""
        if self.target is None:
            raise RescoreError(f"a {self.source.use.name} must be fitted to a base LM first (fit)")
        base, device, shared = self.target.base, self.target.device, self.target.shared
        key = (self.source, self.sha256, self.least, base, device, shared)
        if (model := _LOADED.get(key)) is None:
            model = load_neural(
                self.source,
                vocab_size=self.least,
                base_name=base.name if base else "the base LM",
                dtype=base.dtype if base else "float32",
                device=device,
                shared=shared,
            )
            if self.source.sha256 != self.sha256:
                raise RescoreError(
                    f"the {self.source.use.name} {self.source.name} has changed since this run began: its results "
                    "would be those of two models; start again"
                )
            _LOADED[key] = model
        self._loaded = model  # keeps it alive
        return model


class FollowsExamples(Rescorer):
    """What the rescorers with a neural LM share: they read on where they were in each example."""

    model: NeuralModel
    alpha: float

    def fit(self, target: Target) -> Self:
        fitted = copy.copy(self)
        fitted.model = self.model.fit(target)
        return fitted

    def prefill(self, contexts: Sequence[Context]) -> None:
        if self.alpha != 0:
            self._groups(contexts)

    def _groups(self, contexts: Sequence[Context]) -> list[tuple[Group, np.ndarray]]:
        model = self.model.load()
        return groups_of(model, f"{self.identity} {id(model)}", contexts)


class Neural(FollowsExamples, LocalRescorer):
    """Scores drafts by a small LM, left to right.

    path: a named size (shipped), a folder of `rescore train-rescorer`, or any small causal LM (folder or hub id) with
    the base's tokenizer.
    """

    alpha: float = 1.0

    def __init__(self, path: str = "") -> None:
        self.model = NeuralModel(path)
        self.identity = self.model.identity

    def rescored(self, lattices: Lattice, contexts: Sequence[Context]) -> Lattice:
        if self.alpha == 0:
            return lattices
        model = self.model.load()
        token_ids, logps = lattices.token_ids.copy(), lattices.logps.copy()
        for group, rows in self._groups(contexts):
            rescored = local_lattice(model, group, lattices[rows], self.alpha)
            token_ids[rows], logps[rows] = rescored.token_ids, rescored.logps
        return Lattice(token_ids, logps)

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        if self.alpha == 0:
            return p_best(lattices, p).drafts
        model = self.model.load()
        drafts = np.zeros((len(contexts), min(p, lattices.k ** (lattices.h - 1)), lattices.h), dtype=np.int32)
        for group, rows in self._groups(contexts):
            if p == len(rows) == 1:
                drafts[rows] = draft_ahead(model, group, lattices[rows], self.alpha)
            else:
                drafts[rows] = local_drafts(model, group, lattices[rows], self.alpha, p)
        return drafts


def local_drafts(model: NeuralLM, group: Group, lattices: Lattice, alpha: float, p: int) -> np.ndarray:
    """Drafts int32 `[b, p', h]` of the lattices `[b, h, k]` after a group's contexts, best first, ties by lowest ids.

    p = 1 adds alpha x logits, as [A] does; a beam compares paths, so it adds log-probs among each slot's tokens.
    """
    b, h, _ = lattices.token_ids.shape
    paths, scores = lattices.token_ids[:, :1, :1], np.zeros((b, 1))  # [b, w, j] and [b, w]
    hidden = group.begin(lattices.token_ids[:, 0, 0])[:, None]  # [b, w, d]
    nodes = np.full((b, 1), -1)  # of the last tokens of the paths
    for slot in range(1, h):
        ids = lattices.token_ids[:, slot]  # [b, k]
        of_lm = model.score(hidden, ids)  # [b, w, k]
        if p > 1:
            of_lm -= np.logaddexp.reduce(of_lm, axis=-1, keepdims=True)
        steps = lattices.logps[:, slot].astype(np.float64)[:, None] + alpha * of_lm
        paths, scores, extended = _extend(paths, scores, ids, steps, p)
        if slot < h - 1:
            before = group.cache.nodes
            hidden = group.read(paths[:, :, -1], np.take_along_axis(nodes, extended, axis=1))
            nodes = np.broadcast_to(np.arange(before, group.cache.nodes), extended.shape)
    return paths.astype(np.int32)


def local_lattice(model: NeuralLM, group: Group, lattices: Lattice, alpha: float) -> Lattice:
    """The lattices `[b, h, k]` after a group's contexts with the slots from the second on rescored: the heads'
    log-probs + alpha x the LM's logits, as log-probabilities among the slot's tokens, which then fall.

    What the LM reads is the arg-max of the slots before, the draft of [A]; equal scores stand by lowest ids.
    """
    token_ids, logps = lattices.token_ids.copy(), lattices.logps.astype(np.float64)
    hidden = group.begin(token_ids[:, 0, 0])[:, None]  # [b, 1, d]
    nodes = np.full((len(token_ids), 1), -1)
    for slot in range(1, lattices.h):
        ids = token_ids[:, slot]  # [b, k]
        scores = logps[:, slot] + alpha * model.score(hidden, ids)[:, 0]
        scores -= np.logaddexp.reduce(scores, axis=-1, keepdims=True)
        order = np.lexsort((ids, -scores), axis=1)
        token_ids[:, slot] = np.take_along_axis(ids, order, axis=1)
        logps[:, slot] = np.take_along_axis(scores, order, axis=1)
        if slot < lattices.h - 1:
            before = group.cache.nodes
            hidden = group.read(token_ids[:, slot, :1], nodes)
            nodes = np.full_like(nodes, before)
    return Lattice(token_ids, np.minimum(logps, 0.0).astype(np.float32))  # rounding may leave one above 0


def draft_ahead(model: NeuralLM, group: Group, lattices: Lattice, alpha: float) -> np.ndarray:
    """What `local_drafts` gives with p = 1, of one lattice `[1, h, k]`: int32 `[1, 1, h]`, in fewer forwards.

    All slots are guessed and read in one forward, for which a single example leaves room. Up to the first wrong guess
    the LM has read what it was to read, so its choice there is right; the slots behind it are guessed anew by what it
    said after the wrong ones, and read again. The first guesses are the heads' own. (Fixed-point, or Jacobi, decoding.)
    """
    ids, logps, h = lattices.token_ids[0], lattices.logps[0].astype(np.float64), lattices.h
    order = np.argsort(ids, axis=1)  # equals: the lowest id
    path: np.ndarray = ids[:, 0].copy()
    parents = np.arange(-1, h - 3)
    first, after = group.begin_with_trees(path[:1], path[None, 1:-1], parents[None], np.array([h - 2]))
    states = torch.cat([first[:, None], after], dim=1)[0]  # [h - 1, d], after each slot but the last
    nodes = group.cache.nodes - h + 1 + np.arange(h - 1)  # of the same slots
    slot = 1  # the first that is not known to be right
    while slot < h:
        scores = logps[slot:] + alpha * model.score(states[slot - 1 :, None], ids[slot:])[:, 0]
        best = np.take_along_axis(scores, order[slot:], axis=1).argmax(axis=1)
        chosen = ids[np.arange(slot, h), order[np.arange(slot, h), best]]
        wrong = np.flatnonzero(chosen != path[slot:])
        path[slot:] = chosen
        slot = slot + int(wrong[0]) if len(wrong) else h
        if slot < h - 1:  # nothing is read after the last one
            start = group.cache.nodes
            parents = np.concatenate([nodes[slot - 1 : slot], np.arange(start, start + h - 2 - slot)])
            states[slot:] = group.read(path[None, slot:-1], parents[None])[0]
            nodes[slot:] = np.arange(start, group.cache.nodes)
        slot += 1
    return np.asarray(path[None, None])


def _extend(
    paths: np.ndarray, scores: np.ndarray, ids: np.ndarray, steps: np.ndarray, p: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The p best paths one token longer, their scores, and which path `[b, p']` each of them extends.

    Paths `[b, w, j]` with their scores `[b, w]`; the next slot's tokens `[b, k]` and what each adds, `[b, w, k]`.
    """
    b, w, k = steps.shape
    longer = np.concatenate([np.repeat(paths, k, axis=1), np.tile(ids, (1, w))[:, :, None]], axis=2)  # [b, w k, j+1]
    scores = (scores[:, :, None] + steps).reshape(b, w * k)
    best = np.lexsort((*longer.transpose(2, 0, 1)[::-1], -scores), axis=1)[:, :p]  # by score, then by token ids
    return np.take_along_axis(longer, best[:, :, None], axis=1), np.take_along_axis(scores, best, axis=1), best // k
