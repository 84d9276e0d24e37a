"""Cost model: what one decoded token costs, by method (Kim et al. 2024, [A]).

Counted for one sequence, with c tokens in the cache and b bytes per number (weights and cache alike): bytes of weights
and of the cache that a step reads, and FLOPs: 2 per weight and token, and for attention 4 per query number and cached
token. Each call of a model reads all that it uses once. docs/analyses.md has the formulas by part and what is left out;
letters in docstrings here (W, V, H, R, Q, KV) are those of that page. Unrescored is verify + heads; the other methods
add their rescorer: nothing for an n-gram, whose search runs on the host; h - 1 dependent calls of one token for a small
LM. Per token = per step / block efficiency.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lattices.errors import IncompatibleError, RescoreError, UnknownNameError
from rescore.checks import VERIFY_MODES
from rescore.runs.records import Result
from rescore.studies.records import Record

CONTEXTS = (128, 512, 1024, 2048)  # tokens ([A])
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # per number
DEFAULT_H = 9  # tokens of a block ([A])
AUTOREGRESSIVE, NEURAL = "autoregressive", "neural-61m"


@dataclass(frozen=True)
class Method:
    """A row of [A]'s cost table.

    rescorer (its spec), p: what it is in results; neural: a small LM is called besides.
    ours: not one of [A]'s, shown where its block efficiency is known.
    """

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
    """A decoder-only LM as the cost model sees it.

    parameters: all, tied tables once; read_parameters: W; projection_parameters: V.
    assumption: what of it is not public and assumed here (None: nothing).
    """

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
    """Heads 2..h: their `parameters` (H), and how often a step reads the vocabulary projection for them (R)."""

    parameters: int
    projection_reads: int = 1


@dataclass(frozen=True)
class MethodCost:
    """One method at one context, `p` drafts a step.

    step_...: per step; weight_bytes, kv_bytes, flops: per decoded token; ..._change: of these against autoregressive
    decoding (-0.25: a quarter less). Per token and change are None where `block_efficiency` is not known.
    """

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
class CostTable(Record):
    """The methods x contexts (`costs`, methods outermost) of one base LM in one precision.

    h: tokens of a block; neural: the small LM of neural-61m (None: left out).
    verify: how drafts are verified (`tree` or `batch`).
    """

    base: Decoder
    dtype: str
    h: int
    heads: HeadsShape
    neural: Decoder | None
    verify: str
    contexts: tuple[int, ...]
    costs: tuple[MethodCost, ...]


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
    for kind, name, known in (("dtype", dtype, BYTES), ("verify mode", verify, VERIFY_MODES)):
        if name not in known:
            raise UnknownNameError(kind, name, known)
    if h < 2:
        raise RescoreError(f"h = {h}; a block has at least 2 tokens (--h 2)")
    if wrong := [context for context in contexts if context < 1]:
        raise RescoreError(f"a context of {wrong[0]} tokens; give contexts of at least 1")
    rescored = [method.name for method in METHODS if method.rescorer is not None]
    for name, value in block_efficiency.items():
        if name not in rescored:
            raise UnknownNameError("method", name, rescored)
        if not 1 <= value <= h:
            raise RescoreError(f"a block efficiency of {value:g} for {name}; it is between 1 and h = {h}")
    if neural is not None and neural.vocab_size != base.vocab_size:
        raise IncompatibleError(
            f"{neural.name} has {neural.vocab_size} tokens, {base.name} {base.vocab_size}; a rescorer reads the base's"
        )

    def step(method: Method, context: int) -> tuple[int, int, int]:
        """Weight bytes, KV bytes and FLOPs of one step."""
        flops = 2 * base.read_parameters + base.attention_flops(context)  # of one token
        weights, cached = base.read_parameters, base.cached_numbers(context)
        if method.rescorer is not None:
            # Drafts in a tree share their first token at least; rows of a batch read a cache of their own each.
            batch = verify == "batch"
            flops *= method.p * h if batch else 1 + method.p * (h - 1)
            cached *= method.p if batch else 1
            weights += heads.parameters + heads.projection_reads * base.projection_parameters
            flops += 2 * (heads.parameters + (h - 1) * base.projection_parameters)
        if method.neural and neural:
            weights += (h - 1) * neural.read_parameters
            cached += (h - 1) * neural.cached_numbers(context)
            flops += (h - 1) * (2 * neural.read_parameters + neural.attention_flops(context))
        return BYTES[dtype] * weights, BYTES[dtype] * cached, flops

    costs = []
    for method in METHODS:
        if (method.neural and neural is None) or (method.ours and method.name not in block_efficiency):
            continue
        efficiency = 1.0 if method.rescorer is None else block_efficiency.get(method.name)
        for context in contexts:
            of_step, plain = step(method, context), step(METHODS[0], context)
            of_token = [None if efficiency is None else cost / efficiency for cost in of_step]
            change = [None if cost is None else cost / of - 1.0 for cost, of in zip(of_token, plain, strict=True)]
            costs.append(MethodCost(method.name, method.p, context, efficiency, *of_step, *of_token, *change))
    return CostTable(base, dtype, h, heads, neural, verify, tuple(contexts), tuple(costs))


def heads_parameters(h: int, hidden_size: int) -> int:
    """Parameters of heads 2..h as [A] section 3 has them: two layers of the hidden size each, with biases."""
    return (h - 1) * 2 * (hidden_size * hidden_size + hidden_size)


def block_efficiencies(results: Sequence[Result], task: str) -> dict[str, float]:
    """Block efficiency by method of the results of a task; methods not run are not in it."""
    known = {(r.rescorer, r.p): float(r.block_efficiency) for r in results if r.task == task}
    return {m.name: known[m.rescorer, m.p] for m in METHODS if m.rescorer and (m.rescorer, m.p) in known}
