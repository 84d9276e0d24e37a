"""Blockwise parallel decoding, live: predict a lattice, choose drafts, verify them in one call, keep what is right.

Exact: whatever the heads and the rescorer propose, the output is the base LM's own, or has the law of what it would
draw (`rescore.acceptance`; only the rules called lossy keep neither). Autoregressive decoding is the same loop with
blocks of one token (no heads). Source: [B] section 4 (verify and predict in one call), [A].
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from lattices.errors import UnknownNameError
from lattices.lattice import Lattice
from lattices.prefix_tree import build_prefix_tree
from lm.base.cache import KVCache
from lm.base.model import BaseLM
from lm.heads.block_heads import BlockHeads, top_k_lowest_ids
from rescore.acceptance import Greedy, Rule
from rescore.calls import NO_CALL, Call, as_read, usable_verify
from rescore.checks import VERIFY_MODES, check_fits, check_k, check_new_tokens, check_p
from rescore.drafters.base import Drafter
from rescore.drafters.drafting import HEADS_ALONE, Drafting, check_drafters
from rescore.rescorers.base import Context, Rescorer
from rescore.runs.records import Seconds

GREEDY = Greedy()


@dataclass(frozen=True)
class Decoded:
    """One decode.

    output_ids: tokens, end-of-text included.
    accepted, drafts: length accepted by each step, and its winning draft as far as the output may still grow.
    calls: the verify call of each step.
    rescore_seconds: of each step that rescored.
    verify: how drafts were verified, which need not be how it was asked for (`usable_verify`).
    """

    output_ids: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    rescore_seconds: list[float] = field(default_factory=list)
    seconds: Seconds = field(default_factory=Seconds)
    verify: str = "tree"

    def add(self, draft: list[int], n: int, call: Call) -> None:
        """Adds a step that accepted n tokens of a draft."""
        self.output_ids.extend(draft[:n])
        self.accepted.append(n)
        self.drafts.append(draft)
        self.calls.append(call)

    def cut(self, count: int) -> None:
        """Drops what the last step accepted after the first `count` tokens of the output."""
        self.accepted[-1] -= len(self.output_ids) - count
        del self.output_ids[count:]


def decode(
    base: BaseLM,
    heads: BlockHeads | None,
    prompt_ids: Sequence[int],
    *,
    rescorer: Rescorer | None = None,
    drafters: Sequence[Drafter] = HEADS_ALONE,
    k: int = 1,
    p: int = 1,
    max_new_tokens: int = 64,
    verify: str = "tree",
    future: np.ndarray | None = None,
    accepted: Callable[[list[int]], bool] | None = None,
    rule: Rule = GREEDY,
) -> Decoded:
    """Decodes one prompt in blocks that `drafters` propose (without a rescorer: one token a step).

    `verify`: p drafts as one prefix `tree` with a tree attention mask (where the base takes one, else as a batch), or
    as a `batch` of rows. `future`: the greedy output, for the oracle only. `accepted`: takes the tokens of each step,
    and ends the output after them by returning False. `rule`: what is accepted, and what comes then, greedily unless
    another is given; a random one is `started` for this output. A step whose outcome is known before it (its first
    token is end-of-text, or only one token remains) is counted but needs no call. Base, rescorer and
    drafters are for one thread at a time. Raises as `BaseLM.check_ids`, and `RescoreError` for what can't be decoded:
    sizes out of range, a prompt longer than the context.
    """
    base.check_ids(prompt_ids)
    if verify not in VERIFY_MODES:
        raise UnknownNameError("verify mode", verify, VERIFY_MODES)
    check_p(p)
    check_new_tokens(max_new_tokens)
    if heads is not None:
        check_k(k, base.vocab_size)
    check_fits(base, len(prompt_ids), max_new_tokens)
    drafting = Drafting(rescorer, drafters, k, p) if rescorer else None
    of_heads = drafting.heads if drafting else None
    assert of_heads is None or heads is not None, "the drafter heads needs block heads"
    check_drafters(drafters, live=True)
    base.pack()
    out = Decoded(verify=usable_verify(verify, p, trees=base.supports_tree))
    context = Context(prompt_ids, out.output_ids, future=future, random_source=rule.random_source)
    with out.seconds.timing("prefill"):
        most = drafting.most_tokens(heads.h if heads else 1) if drafting else 1
        layers = drafting.layers if drafting else ()
        cache = base.new_decoding_cache(len(base.prefix(prompt_ids)) + max_new_tokens + most, layers)
        context.states = cache.states
        logits, hidden = base.read_prompt(prompt_ids, cache)
        cache.prepare(most)
        last = Last(logits, hidden, rule.first(logits[0]))
        if drafting is not None:
            drafting.prefill([context])
        if of_heads is not None:
            projection = of_heads.projection(base, prompt_ids)

            def lattice(k: int) -> Lattice:
                assert heads is not None
                with out.seconds.timing("draft"):
                    chosen = torch.tensor([last.choice], device=base.device)
                    return heads.lattice(base, last.hidden, last.logits, k, tokens=chosen, projection=projection)[0]

            context.lattices = {of_heads.name: lattice}

    with out.seconds.timing("total"):
        while True:
            remaining = max_new_tokens - len(out.output_ids)
            if last.choice in base.eos_token_ids or remaining == 1:
                out.add([last.choice], 1, NO_CALL)
                if accepted is not None:
                    accepted([last.choice])
                break
            # Propose: p drafts, each of which begins with the token that the base has chosen already.
            drafts, asked = np.array([[last.choice]], dtype=np.int64), False  # [p, h]
            if drafting is not None:
                drafts, asked = _propose(drafting, context, last.choice, out)
                drafts = as_read(drafts, remaining)
            # Verify all of them in one call of the base.
            with out.seconds.timing("verify"):
                verified = VERIFY[out.verify](base, cache, drafts)
            # Accept what the rule keeps of them: greedily the longest prefix of any that is the base's own output.
            row, n, choice = rule.judge(drafts, verified, remaining, base.eos_token_ids, context.drawn)
            call = Call(verified.tokens, len(drafts), asked)
            out.add([token for token in drafts[row].tolist() if token >= 0], n, call)
            goes_on = accepted is None or accepted(out.output_ids[-n:])
            if not goes_on or out.output_ids[-1] in base.eos_token_ids or n == remaining:
                break
            # Advance: what was accepted stays in the cache; the next token is chosen.
            last = verified.keep(cache, row, n, choice)
    out.seconds.rescore = sum(out.rescore_seconds)
    return out


@dataclass(frozen=True)
class Last:
    """The last position that the base has settled: logits `[1, vocab]`, state `[1, d]`, the token chosen after it."""

    logits: torch.Tensor
    hidden: torch.Tensor
    choice: int


def _propose(drafting: Drafting, context: Context, first: int, out: Decoded) -> tuple[np.ndarray, bool]:
    """The rescorer's drafts of what is proposed after the base's token, int64 `[p', l]`, and whether heads were
    asked."""
    start, of_draft = time.perf_counter(), out.seconds.draft
    proposals = drafting.propose([context], np.array([first]))
    drafts = np.asarray(drafting.choose(proposals, [context])[0], dtype=np.int64)
    # Heads are asked when a rescorer first looks at them.
    out.rescore_seconds.append(time.perf_counter() - start - (out.seconds.draft - of_draft))
    return drafts, bool(proposals.heads_asked[0])


@dataclass(frozen=True)
class Verified:
    """What a verify call gave: the base's choice after every draft token `[p, h]`, and where that token stands in the
    output."""

    choices: np.ndarray
    logits: torch.Tensor  # [b, m, vocab]
    hidden: torch.Tensor  # [b, m, d]
    rows: np.ndarray  # [p, h], batch row of each draft token
    columns: np.ndarray  # [p, h], its column

    @property
    def tokens(self) -> int:
        """That the base read."""
        return self.logits.shape[0] * self.logits.shape[1]

    def best(self, k: int) -> np.ndarray:
        """See `rescore.acceptance.rules.Likeliest`."""
        best = top_k_lowest_ids(self.logits, min(k, self.logits.shape[-1]))[1].cpu().numpy()  # [b, m, k]
        return np.asarray(best[self.rows, self.columns])

    def keep(self, cache: KVCache, row: int, n: int, choice: int) -> Last:
        """Keeps the first n tokens of a draft in the cache; what the base says after them, and the token chosen."""
        cache.keep(self.columns[row, :n].tolist(), row=int(self.rows[row, 0]))
        b, m = int(self.rows[row, n - 1]), int(self.columns[row, n - 1])
        return Last(self.logits[b, m : m + 1], self.hidden[b, m : m + 1], choice)


def _verify_batch(base: BaseLM, cache: KVCache, drafts: np.ndarray) -> Verified:
    tokens = torch.from_numpy(drafts.clip(min=0)).to(base.device)  # what stands after an end is never accepted
    logits, hidden = base.forward(tokens, cache)
    p, h = drafts.shape
    rows, columns = np.broadcast_to(np.arange(p)[:, None], (p, h)), np.broadcast_to(np.arange(h), (p, h))
    return Verified(logits.argmax(-1).cpu().numpy(), logits, hidden, rows, columns)


def _verify_tree(base: BaseLM, cache: KVCache, drafts: np.ndarray) -> Verified:
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
    return Verified(choices[tree.nodes], logits, hidden, np.zeros_like(tree.nodes), tree.nodes)


VERIFY = {"tree": _verify_tree, "batch": _verify_batch}


def margin_at(base: BaseLM, prompt_ids: Sequence[int], output_ids: Sequence[int], place: int) -> float:
    """The base's logit margin where it chooses output token `place` (from 0): its best logit less the runner-up's.

    Near 0, two ways of computing the same logits may choose differently; in half precision they do.
    """
    (states,) = base.states_before([prompt_ids], [output_ids[: place + 1]])
    best = base.project(states[-1]).topk(2).values.to(base.heads_dtype)
    return float(best[0] - best[1])
