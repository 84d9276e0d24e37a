"""Cost model: what one decoded token costs, by method (Kim et al. 2024, [A]; docs/analyses.md).

Counted for one sequence, with c tokens in the cache, b bytes per number (weights and cache alike):

    weight bytes   parameters that a step reads from memory; each call of a model reads all that it uses once
    KV bytes       keys and values of earlier tokens that a step reads from the cache
    FLOPs          2 per weight and token, and for attention 4 per query number and cached token (2 scores, 2 sum)

A step verifies T tokens in one call of the base LM and accepts `block_efficiency` of them. Of the base LM, W are the
parameters that a call reads: all but the rows of tables (embeddings, learned positions), of which one per token is
read; the vocabulary projection, V, is in W whether it is tied or not. H are the parameters of heads 2..h, which read
the projection R times a step: once where all are asked in one call, h - 1 times where each is asked for what the one
before it chose (architecture "sequential"). Q(c) = sum over layers of query heads x head size x min(c, window); KV(c) =
2 x sum over layers of key-value heads x head size x min(c, window). Primed: the same of the small LM.

    autoregressive   weights b W            KV b KV(c)            FLOPs 2 W + 4 Q(c)              (a step is one token)
    verify           weights b W            KV b KV(c) x copies   FLOPs T (2 W + 4 Q(c))
    heads 2..h       weights b (H + R V)                          FLOPs 2 (H + (h - 1) V)
    n-gram           none: the search runs on the host and reads a few hundred n-grams a lattice
    neural           weights b (h - 1) W'   KV b (h - 1) KV'(c)   FLOPs (h - 1) (2 W' + 4 Q'(c))

Unrescored is verify + heads; the other methods add their rescorer; per token = per step / block efficiency. p drafts as
a `batch` are T = p h tokens, every row reading a cache of its own (copies = p). As a prefix `tree` the cache is read
once (copies = 1) and the first token is shared: T = 1 + p (h - 1), an upper bound, since more prefixes may be. With one
draft both are h tokens. The heads read the projection once more than the base LM, because they start from the state of
the last accepted token, which the verify call decides. The neural rescorer makes h - 1 dependent calls of one token.

Left out, being small beside the rest: activations, writes to the cache, table rows, attention among the tokens of one
call, and the search.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lattices.errors import IncompatibleError, RescoreError, UnknownNameError
from rescore.runs.records import Result

CONTEXTS = (128, 512, 1024, 2048)  # tokens ([A])
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # per number
VERIFY = ("tree", "batch")
DEFAULT_H = 9  # tokens of a block ([A])
AUTOREGRESSIVE, NEURAL = "autoregressive", "neural-61m"


@dataclass(frozen=True)
class Method:
    """A row of [A]'s cost table: its `name`, and the rescorer (as typed) and p that it is in results; `neural`: a small
    LM is called besides; `ours`: not one of [A]'s, shown where its block efficiency is known."""

    name: str
    rescorer: str | None
    p: int
    neural: bool = False
    ours: bool = False


METHODS = (
    Method(AUTOREGRESSIVE, None, 1),
    Method("unrescored", "none", 1),
    Method("4-gram", "ngram", 1),
    Method(NEURAL, "neural-61m", 1, neural=True),
    Method("16-best 0-gram", "none", 16),
    Method("16-best 4-gram", "ngram", 16),
    Method("context n-gram", "context-ngram", 1, ours=True),
    Method("16-best context n-gram", "context-ngram", 16, ours=True),
)


@dataclass(frozen=True)
class LayerShape:
    """Attention of one layer: query `heads` and `kv_heads` of `head_size` numbers; `window`: tokens that a sliding
    attention sees (None: all)."""

    heads: int
    kv_heads: int
    head_size: int
    window: int | None = None

    def seen(self, context: int) -> int:
        """Cached tokens that the layer reads."""
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True)
class Decoder:
    """A decoder-only LM as the cost model sees it: `parameters` (all, tied tables once), `read_parameters` (W),
    `projection_parameters` (V), `hidden_size`, `vocab_size`, and the attention of each layer. `assumption`: what of it
    is not public and assumed here (None: nothing)."""

    name: str
    parameters: int
    read_parameters: int
    projection_parameters: int
    hidden_size: int
    vocab_size: int
    layers: tuple[LayerShape, ...]
    assumption: str | None = None

    def cached_numbers(self, context: int) -> int:
        """KV(c): numbers that one token reads from a cache of `context` tokens."""
        return sum(2 * layer.kv_heads * layer.head_size * layer.seen(context) for layer in self.layers)

    def attention_flops(self, context: int) -> int:
        """4 Q(c): FLOPs of one token's attention to `context` cached tokens."""
        return sum(4 * layer.heads * layer.head_size * layer.seen(context) for layer in self.layers)


@dataclass(frozen=True)
class HeadsShape:
    """Heads 2..h as the cost model sees them: their `parameters` (H), and how often a step reads the vocabulary
    projection for them (R, `projection_reads`)."""

    parameters: int
    projection_reads: int = 1


@dataclass(frozen=True)
class MethodCost:
    """One method at one context: `weight_bytes`, `kv_bytes` and `flops` per decoded token and (`step_...`) per step;
    `..._change` of each against autoregressive decoding (-0.25: a quarter less). `p` drafts a step. Per token and
    change are None where `block_efficiency` is not known."""

    method: str
    p: int
    context: int
    block_efficiency: float | None
    step_weight_bytes: int
    step_kv_bytes: int
    step_flops: int
    weight_bytes: float | None
    kv_bytes: float | None
    flops: float | None
    weight_bytes_change: float | None
    kv_bytes_change: float | None
    flops_change: float | None


@dataclass(frozen=True)
class CostTable:
    """The methods x contexts (`costs`, methods outermost) of one base LM in one precision: `h` block tokens, the shape
    of heads 2..h, the small LM of neural-61m (None: left out) and how drafts are verified (`tree` or `batch`)."""

    base: Decoder
    dtype: str
    h: int
    heads: HeadsShape
    neural: Decoder | None
    verify: str
    contexts: tuple[int, ...]
    costs: tuple[MethodCost, ...]

    def as_dict(self) -> dict[str, Any]:
        """The table as one JSON object."""
        return dataclasses.asdict(self)


def cost_table(
    base: Decoder,
    *,
    h: int = DEFAULT_H,
    heads: HeadsShape,
    neural: Decoder | None,
    block_efficiency: Mapping[str, float],
    dtype: str = "float16",
    verify: str = "tree",
    contexts: Sequence[int] = CONTEXTS,
) -> CostTable:
    """Costs of every method of `METHODS`; `block_efficiency` by method (autoregressive decoding's is 1).

    Raises `RescoreError` for an h below 2, a context below 1, a block efficiency outside 1 to h or a small LM over
    another vocabulary, `UnknownNameError` for a method, dtype or way of verifying that there is not.
    """
    _check(base, h, neural, block_efficiency, dtype, verify, contexts)
    costs: list[MethodCost] = []
    plain: dict[int, tuple[int, int, int]] = {}
    for method in METHODS:
        if (method.neural and neural is None) or (method.ours and method.name not in block_efficiency):
            continue
        for context in contexts:
            step = _step(method, base, h, heads, neural, BYTES[dtype], verify, context)
            plain.setdefault(context, step)  # the first method is autoregressive
            efficiency = 1.0 if method.rescorer is None else block_efficiency.get(method.name)
            costs.append(_cost(method, context, efficiency, step, plain[context]))
    return CostTable(base, dtype, h, heads, neural, verify, tuple(contexts), tuple(costs))


def _step(
    method: Method,
    base: Decoder,
    h: int,
    heads: HeadsShape,
    neural: Decoder | None,
    size: int,
    verify: str,
    context: int,
) -> tuple[int, int, int]:
    """Weight bytes, KV bytes and FLOPs of one step."""
    per_token = 2 * base.read_parameters + base.attention_flops(context)
    weights, cached = base.read_parameters, base.cached_numbers(context)
    if method.rescorer is None:
        return size * weights, size * cached, per_token
    tokens, copies = (method.p * h, method.p) if verify == "batch" else (1 + method.p * (h - 1), 1)
    weights += heads.parameters + heads.projection_reads * base.projection_parameters
    cached *= copies
    flops = tokens * per_token + 2 * (heads.parameters + (h - 1) * base.projection_parameters)
    if method.neural:
        assert neural is not None, "a method that calls a small LM needs one"
        weights += (h - 1) * neural.read_parameters
        cached += (h - 1) * neural.cached_numbers(context)
        flops += (h - 1) * (2 * neural.read_parameters + neural.attention_flops(context))
    return size * weights, size * cached, flops


def _cost(
    method: Method, context: int, efficiency: float | None, step: tuple[int, int, int], plain: tuple[int, int, int]
) -> MethodCost:
    token = [None if efficiency is None else cost / efficiency for cost in step]
    change = [None if cost is None else cost / before - 1.0 for cost, before in zip(token, plain, strict=True)]
    return MethodCost(method.name, method.p, context, efficiency, *step, *token, *change)


def _check(
    base: Decoder,
    h: int,
    neural: Decoder | None,
    block_efficiency: Mapping[str, float],
    dtype: str,
    verify: str,
    contexts: Sequence[int],
) -> None:
    for kind, name, known in (("dtype", dtype, BYTES), ("verify mode", verify, VERIFY)):
        if name not in known:
            raise UnknownNameError(kind, name, known)
    if h < 2:
        raise RescoreError(f"h = {h}; a block has at least 2 tokens (--h 2)")
    if wrong := [context for context in contexts if context < 1]:
        raise RescoreError(f"a context of {wrong[0]} tokens; give contexts of at least 1")
    for name, value in block_efficiency.items():
        if name not in (methods := [m.name for m in METHODS if m.rescorer is not None]):
            raise UnknownNameError("method", name, methods)
        if not 1 <= value <= h:
            raise RescoreError(f"a block efficiency of {value:g} for {name}; it is between 1 and h = {h}")
    if neural is not None and neural.vocab_size != base.vocab_size:
        raise IncompatibleError(
            f"{neural.name} has {neural.vocab_size} tokens, {base.name} {base.vocab_size}; a rescorer reads the base's"
        )


def heads_parameters(h: int, hidden_size: int, inner_size: int | None = None) -> int:
    """Parameters of heads 2..h as [A] section 3 has them: a hidden layer of `inner_size` (default: the hidden size) and
    an output layer each, with biases."""
    inner = hidden_size if inner_size is None else inner_size
    return (h - 1) * (2 * hidden_size * inner + inner + hidden_size)


def block_efficiencies(results: Sequence[Result], task: str) -> dict[str, float]:
    """Block efficiency by method of the results of a task; methods not run are not in it."""
    found = {(r.rescorer, r.p): float(r.block_efficiency) for r in results if r.task == task}
    return {m.name: found[m.rescorer, m.p] for m in METHODS if m.rescorer and (m.rescorer, m.p) in found}
