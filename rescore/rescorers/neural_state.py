"""What a neural rescorer has read of the examples it follows: their settled tokens, and the nodes of the last drafts.

Examples that begin together are read together, in groups of similar length (less padding). An example keeps its place
in `Context.state`, so every rescorer object and every weight has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import torch

from lm.neural.model import NeuralLM
from rescore.rescorers.base import Context

GROUP_ROWS = 32
GROUP_TOKENS = 16384  # of the prompts of a group, padding included


class Group:
    """Examples whose tokens lie in one cache, a row each.

    nodes[row]: (parent, token) -> node of what was read after the settled tokens, parent -1 for the first.
    """

    def __init__(self, model: NeuralLM, contexts: list[Context]) -> None:
        self.model, self.contexts = model, contexts
        self.nodes: list[dict[tuple[int, int], int]] = [{} for _ in contexts]
        prompts = tuple(tuple(context.prompt_ids) for context in contexts)
        several = len(prompts) > 1  # a replay of many examples, which a sweep repeats; live decoding comes by once
        remembered = model.remembered(prompts) if several else None
        self.cache = model.new_cache(len(contexts)) if remembered is None else remembered
        if remembered is None and any(prompts):
            model.read_text(self.cache, _padded([list(prompt) for prompt in prompts])[0])
            self._forget([list(range(len(prompt))) for prompt in prompts])
            if several:
                model.remember(prompts, self.cache)

    def keep(self, contexts: Sequence[Context]) -> None:
        """Drops the rows of all other examples."""
        if len(contexts) < len(self.contexts):
            self._settle_nodes()
            staying = {id(context) for context in contexts}
            rows = [row for row, context in enumerate(self.contexts) if id(context) in staying]
            self.cache.select(rows)
            self.contexts = [self.contexts[row] for row in rows]
            self.nodes = [{} for _ in rows]

    def begin(self, first: np.ndarray) -> torch.Tensor:
        """Settles what was accepted and reads what is new and `first` `[b]`; the states after it, `[b, d]`."""
        pending = self._pending(first)
        hidden = self.model.read_text(self.cache, _padded(pending)[0])
        self._forget([list(range(len(chain))) for chain in pending])
        return hidden[range(len(pending)), [len(chain) - 1 for chain in pending]]

    def begin_behind(self, first: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """As `begin`; the states before `first` and after it, `[b, d]` each.

        The token before `first` is read again where it was settled. A row without one has no state before `first`:
        what stands there means nothing.
        """
        self._settle_nodes()
        texts = [len(context.prompt_ids) + len(context.output_ids) for context in self.contexts]
        self.cache.lengths = np.minimum(self.cache.lengths, np.maximum(np.array(texts) - 1, 0))
        pending = self._pending(first)
        hidden = self.model.read_text(self.cache, _padded(pending)[0])
        self._forget([list(range(len(chain))) for chain in pending])
        rows, last = range(len(pending)), np.array([len(chain) - 1 for chain in pending])
        return hidden[rows, np.maximum(last - 1, 0)], hidden[rows, last]

    def begin_with_trees(
        self, first: np.ndarray, tokens: np.ndarray, parents: np.ndarray, counts: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `begin`, and reads a tree after `first` in the same forward.

        tokens, parents int `[b, n]` (parent -1: `first`), of which the first `counts` `[b]` are there. Returns states
        `[b, d]` after `first` and `[b, n, d]` after the nodes.
        """
        pending = self._pending(first)
        lengths = np.array([len(chain) for chain in pending])
        longest = int(lengths.max())
        self.model.check_context(int((self.cache.lengths + lengths).max()))
        chains, chain_parents = _padded(pending)
        offset = np.where(parents < 0, lengths[:, None] - 1, parents + longest)
        hidden = self.model.read(
            self.cache, np.concatenate([chains, tokens], axis=1), np.concatenate([chain_parents, offset], axis=1)
        )
        for row, chain in enumerate(pending):
            self._remember(row, range(len(chain)), range(-1, len(chain) - 1), chain)
            there = range(longest, longest + int(counts[row]))
            self._remember(row, there, offset[row].tolist(), tokens[row].tolist())
        return hidden[range(len(pending)), lengths - 1], hidden[:, longest:]

    def read(self, tokens: np.ndarray, parents: np.ndarray) -> torch.Tensor:
        """Reads new nodes, tokens and parents int `[b, n]`; the states after them, `[b, n, d]`."""
        start = self.cache.nodes
        hidden = self.model.read(self.cache, tokens, parents)
        new = range(start, start + tokens.shape[1])
        for row in range(len(tokens)):
            self._remember(row, new, parents[row].tolist(), tokens[row].tolist())
        return hidden

    def _remember(self, row: int, nodes: Sequence[int], parents: Sequence[int], tokens: Sequence[int]) -> None:
        for node, parent, token in zip(nodes, parents, tokens, strict=False):
            self.nodes[row].setdefault((parent, token), node)

    def _pending(self, first: np.ndarray) -> list[list[int]]:
        """After settling the nodes that were accepted: each row's tokens that were never read, `first` the last."""
        self._settle_nodes()
        return [[*self._unsettled(row), int(token)] for row, token in enumerate(first)]

    def _unsettled(self, row: int) -> list[int]:
        return self.contexts[row].since(int(self.cache.lengths[row]))

    def _settle_nodes(self) -> None:
        paths = []
        for row, known in enumerate(self.nodes):
            path: list[int] = []
            if known:
                for token in self._unsettled(row):
                    node = known.get((path[-1] if path else -1, token))
                    if node is None:
                        break
                    path.append(node)
            paths.append(path)
        self._forget(paths)

    def _forget(self, settled: list[list[int]]) -> None:
        self.cache.settle(settled)
        self.nodes = [{} for _ in self.contexts]


def _padded(chains: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Chains of tokens as nodes: tokens and parents int64 `[b, longest]`, padded after their ends."""
    tokens = np.array(list(zip_longest(*chains, fillvalue=0)), dtype=np.int64).T
    return tokens, np.broadcast_to(np.arange(-1, tokens.shape[1] - 1), tokens.shape)


def groups_of(model: NeuralLM, key: str, contexts: Sequence[Context]) -> list[tuple[Group, np.ndarray]]:
    """The groups that follow these examples, and where each of their rows stands in `contexts`, int64 `[b]`.

    Examples that are new are put into groups of their own; those of a group that are not asked for any more leave it.
    """
    new = [i for i, context in enumerate(contexts) if key not in context.state]
    new.sort(key=lambda i: len(contexts[i].prompt_ids))
    while new:
        # By falling length from the end: the longest prompt of a group says how many fit.
        rows = max(1, min(GROUP_ROWS, GROUP_TOKENS // max(1, len(contexts[new[-1]].prompt_ids))))
        members = [contexts[new.pop()] for _ in range(min(rows, len(new)))]
        group = Group(model, members)
        for context in members:
            context.state[key] = group
    place = {id(context): i for i, context in enumerate(contexts)}
    groups: list[tuple[Group, np.ndarray]] = []
    for group in dict.fromkeys(context.state[key] for context in contexts):
        group.keep([context for context in contexts if context.state[key] is group])
        groups.append((group, np.array([place[id(context)] for context in group.contexts])))
    return groups
