"""Blockwise parallel decoding, live: predict a lattice, choose drafts, verify them in one call, keep what is right.

Greedy and exact: whatever the heads and the rescorer propose, the output is the base LM's own. Autoregressive decoding
is the same loop with blocks of one token (no heads). Source: [B] section 4 (verify and predict in one call), [A].
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from lattices.errors import UnknownNameError
from lattices.prefix_tree import build_prefix_tree
from lm.base.cache import KVCache
from lm.base.model import BaseLM
from lm.heads.block_heads import BlockHeads
from rescore.acceptance import accept
from rescore.checks import check_fits, check_k, check_new_tokens, check_p
from rescore.rescorers.base import Context, Rescorer, check_drafts

VERIFY_MODES = ("tree", "batch")


@dataclass
class Seconds:
    """Where the time went: `prefill` of the prompt; then per run `verify` (base LM), `heads`, `rescore`, and `total`
    of all steps (the rest of it is glue)."""

    prefill: float = 0.0
    verify: float = 0.0
    heads: float = 0.0
    rescore: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class Decoded:
    """Output tokens (end-of-text included), accepted length of each step and its winning draft (as far as the output
    may still grow; a step without a call has its one token), rescoring seconds of each step, times;
    `verify`: how drafts were verified, which need not be how it was asked for (`usable_verify`)."""

    output_ids: list[int]
    accepted: list[int]
    drafts: list[list[int]]
    rescore_seconds: list[float] = field(default_factory=list)
    seconds: Seconds = field(default_factory=Seconds)
    verify: str = "tree"


def decode(
    base: BaseLM,
    heads: BlockHeads | None,
    prompt_ids: Sequence[int],
    *,
    rescorer: Rescorer | None = None,
    k: int = 1,
    p: int = 1,
    max_new_tokens: int = 64,
    verify: str = "tree",
    future: np.ndarray | None = None,
) -> Decoded:
    """Decodes one prompt greedily, in blocks of `heads.h` tokens (without heads: one token a step).

    `verify`: p drafts as one prefix `tree` with a tree attention mask (where the base takes one, else as a batch), or
    as a `batch` of rows. `future`: the greedy
    output, for the oracle only. A step whose outcome is known before it (its first token is end-of-text, or only one
    token remains) is counted but needs no call.
    """
    check_request(base, heads, len(prompt_ids), k=k, p=p, max_new_tokens=max_new_tokens, verify=verify)
    assert (heads is None) == (rescorer is None), "heads need a rescorer to choose drafts, and the other way round"
    verify = usable_verify(base, verify, p)
    seconds, clock = Seconds(), time.perf_counter
    h = heads.h if heads else 1
    context = Context(prompt_ids, future=future)
    accepted: list[int] = []
    won: list[list[int]] = []
    rescore_seconds: list[float] = []

    start = clock()
    cache = base.new_cache(len(prompt_ids) + max_new_tokens + p * h)
    logits, hidden = base.forward(torch.tensor([list(prompt_ids)], device=base.device), cache, last=1)
    cache.keep(range(len(prompt_ids)))
    logits, hidden = logits[0], hidden[0]  # [1, vocab], [1, d]
    next_token = int(logits[0].argmax())
    if rescorer is not None:
        rescorer.prefill([context])
    seconds.prefill = clock() - start

    start = clock()
    while True:
        remaining = max_new_tokens - len(context.output_ids)
        if next_token in base.eos_token_ids or remaining == 1:
            context.output_ids.append(next_token)
            accepted.append(1)
            won.append([next_token])
            break
        if heads is None or rescorer is None:
            drafts = np.array([[next_token]], dtype=np.int64)  # [p, h]
        else:
            before = clock()
            lattice = heads.lattice(base, hidden, logits, k)
            seconds.heads += clock() - before
            before = clock()
            every = rescorer.draft(lattice, [context], p)  # [1, p', h]
            rescore_seconds.append(clock() - before)
            check_drafts(every, lattice, p)
            drafts = every[0, :, :remaining].astype(np.int64)

        before = clock()
        call = _VERIFY[verify](base, cache, drafts)
        seconds.verify += clock() - before

        rows, lengths = accept(drafts[None], call.choices[None], np.array([remaining]), base.eos_token_ids)
        row, n = int(rows[0]), int(lengths[0])
        tokens = drafts[row, :n].tolist()
        context.output_ids.extend(tokens)
        accepted.append(n)
        won.append(drafts[row].tolist())
        if tokens[-1] in base.eos_token_ids or len(context.output_ids) == max_new_tokens:
            break
        logits, hidden = call.keep(cache, row, n)
        next_token = int(call.choices[row, n - 1])
    seconds.total = clock() - start
    seconds.rescore = sum(rescore_seconds)
    return Decoded(context.output_ids, accepted, won, rescore_seconds, seconds, verify)


@dataclass(frozen=True)
class _Call:
    """A verify call: the base's choice after every draft token `[p, h]`, and where that token stands in the output."""

    choices: np.ndarray
    logits: torch.Tensor  # [b, m, vocab]
    hidden: torch.Tensor  # [b, m, d]
    rows: np.ndarray  # [p, h], batch row of each draft token
    columns: np.ndarray  # [p, h], its column

    def keep(self, cache: KVCache, row: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps the first n tokens of a draft in the cache; logits `[1, vocab]` and state `[1, d]` after them."""
        cache.keep(self.columns[row, :n].tolist(), row=int(self.rows[row, 0]))
        b, m = int(self.rows[row, n - 1]), int(self.columns[row, n - 1])
        return self.logits[b, m : m + 1], self.hidden[b, m : m + 1]


def _verify_batch(base: BaseLM, cache: KVCache, drafts: np.ndarray) -> _Call:
    logits, hidden = base.forward(torch.from_numpy(drafts).to(base.device), cache)
    p, h = drafts.shape
    rows, columns = np.broadcast_to(np.arange(p)[:, None], (p, h)), np.broadcast_to(np.arange(h), (p, h))
    return _Call(logits.argmax(-1).cpu().numpy(), logits, hidden, rows, columns)


def _verify_tree(base: BaseLM, cache: KVCache, drafts: np.ndarray) -> _Call:
    if len(drafts) == 1:  # a tree of one branch is a sequence: no mask of its own
        return _verify_batch(base, cache, drafts)
    tree = build_prefix_tree(drafts)
    nodes = len(tree.tokens)
    mask = torch.ones(1, 1, nodes, cache.length + nodes, dtype=torch.bool)
    mask[0, 0, :, cache.length :] = torch.from_numpy(tree.mask)
    logits, hidden = base.forward(
        torch.from_numpy(tree.tokens)[None].to(base.device),
        cache,
        position_ids=torch.from_numpy(tree.depths + cache.length)[None].to(base.device),
        attention_mask=mask.to(base.device),
    )
    choices = logits[0].argmax(-1).cpu().numpy()
    return _Call(choices[tree.nodes], logits, hidden, np.zeros_like(tree.nodes), tree.nodes)


_VERIFY = {"tree": _verify_tree, "batch": _verify_batch}


def usable_verify(base: BaseLM, verify: str, p: int) -> str:
    """`verify`, but `batch` where p drafts as a tree would need a mask that the base does not take."""
    return verify if p == 1 or base.supports_tree else "batch"


def check_request(
    base: BaseLM,
    heads: BlockHeads | None,
    prompt_tokens: int,
    *,
    k: int,
    p: int,
    max_new_tokens: int,
    verify: str = "tree",
) -> None:
    """Raises `RescoreError` for what can't be decoded: sizes out of range, a prompt longer than the context."""
    if verify not in VERIFY_MODES:
        raise UnknownNameError("verify mode", verify, VERIFY_MODES)
    check_p(p)
    check_new_tokens(max_new_tokens)
    if heads is not None:
        check_k(k, base.vocab_size)
    check_fits(prompt_tokens, max_new_tokens, base.context_length)


def first_difference(output_ids: Iterable[int], reference_ids: Iterable[int]) -> int | None:
    """Position of the first token that differs (or is missing on one side); None if both are the same."""
    output, reference = list(output_ids), list(reference_ids)
    for place, (a, b) in enumerate(zip(output, reference, strict=False)):
        if a != b:
            return place
    return None if len(output) == len(reference) else min(len(output), len(reference))


def margin_at(base: BaseLM, prompt_ids: Sequence[int], output_ids: Sequence[int], place: int) -> float:
    """The base's logit margin where it chooses output token `place` (from 0): its best logit less the runner-up's.

    Near 0, two ways of computing the same logits may choose differently; in half precision they do.
    """
    before = torch.tensor([[*prompt_ids, *output_ids[:place]]], device=base.device)
    logits, _ = base.forward(before, last=1)
    best = logits[0, -1].topk(2).values.to(base.heads_dtype)
    return float(best[0] - best[1])
