"""Cost model: what one decoded token costs, by method ([A], METHOD section 7.6).

Counted per token of output, batch size 1, at a context of c tokens in the cache:

weight bytes parameters that a step reads from memory, each call of a model reading all it uses once KV bytes keys and
values of earlier tokens that a step reads from the cache FLOPs two per weight and token for matrices, and attention:
per layer, head and head dimension two for the scores and two for the sum, for each token and each cached token

A step verifies T tokens in one call of the base LM and accepts `block_efficiency` of them. For the base LM let W be the
parameters that a call reads (all but the embedding table's rows: of it one row per token is read; the vocabulary
projection V = vocab x d is in W whether it is tied or not), A = sum over layers of query heads x head size, and KV(c) =
2 x sum over layers of KV heads x head size x min(c, window) the numbers that the cache holds; b = bytes per number.

autoregressive weights b W; KV b KV(c); FLOPs 2 W + 4 A c (one token a step) verify weights b W; KV b KV(c) x copies;
FLOPs T (2 W + 4 A c) heads 2..h weights b (H + V); FLOPs 2 (H + (h - 1) V), H the parameters of the heads n-gram none
of the three: a lattice is searched on the host in microseconds, and reads some hundred n-grams neural h - 1 dependent
calls of one token: weights b (h - 1) W'; KV b (h - 1) KV'(c); FLOPs (h - 1) (2 W' + 4 A' c), of the small LM

Unrescored = verify + heads; the others add their rescorer; per token = per step / block efficiency. p drafts of h
tokens are T = p h tokens; as a `batch` every draft reads the cache of its own row (copies = p), as a `tree` the cache
is read once (copies = 1), and shared prefixes could save tokens (T = 1 + p (h - 1) at most, since the first token is
shared). The heads read the projection again, because they start from the last accepted token, which the verify call
decides. Left out: activations, cache writes, embedding rows, sampling, attention among the tokens of one call (at most
T of c). Lengths are where sliding windows end: a layer with one reads at most its window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONTEXTS = (128, 512, 1024, 2048)  # tokens ([A])
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # per number, of weights and cache


@dataclass(frozen=True)
class LayerShape:
    """Attention of one layer: query `heads` and `kv_heads` of `head_size` numbers; `window`: tokens that a sliding
    attention sees (None: all)."""

    heads: int
    kv_heads: int
    head_size: int
    window: int | None = None


@dataclass(frozen=True)
class Decoder:
    """A decoder-only LM as the cost model sees it: `parameters` (all, tied tables once), `read_parameters` (W: what one
    call reads), `projection_parameters` (V), and the attention of each layer. `assumption`: what of it is not public
    and assumed here (None: nothing)."""

    name: str
    parameters: int
    read_parameters: int
    projection_parameters: int
    layers: tuple[LayerShape, ...]
    assumption: str | None = None


@dataclass(frozen=True)
class MethodCost:
    """One method at one context: `weight_bytes`, `kv_bytes` and `flops` per decoded token and (`step_...`) per step;
    `..._change` of each against autoregressive decoding (-0.25: a quarter less). `p` drafts a step. Per token and
    change are None where `block_efficiency` is not known."""

    method: str
    p: int
    context: int
    block_efficiency: float | None
    step_weight_bytes: float
    step_kv_bytes: float
    step_flops: float
    weight_bytes: float | None
    kv_bytes: float | None
    flops: float | None
    weight_bytes_change: float | None
    kv_bytes_change: float | None
    flops_change: float | None


@dataclass(frozen=True)
class CostTable:
    """The methods x contexts (`costs`, methods outermost) of one base LM in one precision: `h` block tokens,
    `heads_parameters`, the small LM of neural-61m (None: left out) and how drafts are verified (`tree` or `batch`)."""

    base: Decoder
    dtype: str
    h: int
    heads_parameters: int
    neural: Decoder | None
    verify: str
    contexts: tuple[int, ...]
    costs: tuple[MethodCost, ...]

    def as_dict(self) -> dict[str, Any]:
        """The table as one JSON object."""
        return dataclasses.asdict(self)


# Methods of [A]'s table: the rescorer of each and its p, as they are found in results.
METHODS: tuple[tuple[str, str | None, int], ...] = (
    ("autoregressive", None, 1),
    ("unrescored", "none", 1),
    ("4-gram", "ngram", 1),
    ("neural-61m", "neural-61m", 1),
    ("16-best 0-gram", "none", 16),
    ("16-best 4-gram", "ngram", 16),
)


def cost_table(
    base: Decoder,
    *,
    h: int = 9,
    heads_parameters: int,
    neural: Decoder | None,
    block_efficiency: Mapping[str, float],
    dtype: str = "float16",
    verify: str = "tree",
    contexts: Sequence[int] = CONTEXTS,
) -> CostTable:
    """Costs of every method of `METHODS`; `block_efficiency` by method (autoregressive is 1).

    Raises `RescoreError` for an h below 2, a context below 1 or a block efficiency outside 1 to h, `UnknownNameError`
    for a method, dtype or way of verifying that there is not.
    """
    raise NotImplementedError
