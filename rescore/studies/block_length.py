"""Which block length pays here: acceptance from a trace against what verify, heads and rescoring cost on this machine.

A long block accepts more tokens a step and costs more to verify. For every h from 2 to the heads' own the trace is
replayed with the first h heads, and a step is timed in its parts:

    speed-up(h) = block efficiency(h) x t(step of 1 token) / (t(step of h tokens) + t(heads) + t(rescoring))

which predicts the net speed-up of a live run. Only `rescore eval --mode live` measures it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from lattices.errors import IncompatibleError, RescoreError
from lattices.lattice import Lattice
from lm.base.catalog import load_base
from lm.heads.block_heads import heads_folder, heads_sha256, load_heads
from lm.options import Base, Device, Dtype, Heads, TopK
from lm.records import object_of
from rescore.accounting import account
from rescore.checks import check_held_k, check_timing
from rescore.costs.kept import costs_here
from rescore.costs.measuring import StandingDecode, heads_added, heads_calls, step_calls, times_of
from rescore.drafters.drafting import Drafting
from rescore.drafters.proposals import Proposals
from rescore.options import Cached, Repeats
from rescore.replaying import replay
from rescore.rescorers import Context, Rescorer
from rescore.rescorers.base import JoiningRescorer
from rescore.runs.inputs import Inputs
from rescore.runs.run import Run
from rescore.runs.weights import fitted_to, target_of
from rescore.studies.records import Record, record_of
from rescore.tracing import read_trace


@dataclass(frozen=True)
class BlockLength:
    """Blocks of `h` tokens: their block efficiency with its interval, median milliseconds of a step's parts, and the
    speed-up over greedy decoding that follows."""

    h: int
    block_efficiency: float
    block_efficiency_ci95: tuple[float, float] | None
    verify_ms: float
    heads_ms: float
    rescoring_ms: float
    speedup: float


@dataclass(frozen=True)
class BlockLengths(Record):
    """All block lengths; `greedy_ms` is a forward of one token, all forwards on `cached` cached tokens."""

    base: str
    task: str | None
    rescorer: str
    alpha: float | None
    k: int
    examples: int
    groups: int
    dtype: str
    device: str
    cached: int
    greedy_ms: float
    lengths: list[BlockLength]

    @property
    def best(self) -> BlockLength:
        """The fastest."""
        return max(self.lengths, key=lambda length: length.speedup)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**super().as_dict(), "best_h": self.best.h}


def timed(rescorer: Rescorer, seconds: list[float]) -> Rescorer:
    """The rescorer, adding the seconds of every call but an example's first, which reads the prompt; for one example
    at a time."""
    asked = "draft_joined" if isinstance(rescorer, JoiningRescorer) else "draft"
    choose: Callable[..., np.ndarray] = getattr(rescorer, asked)

    def drafts(proposed: Lattice | Proposals, contexts: Sequence[Context], p: int) -> np.ndarray:
        start = time.perf_counter()
        found = choose(proposed, contexts, p)
        if contexts[0].output_ids:
            seconds.append(time.perf_counter() - start)
        return found

    noting = copy.copy(rescorer)
    setattr(noting, asked, drafts)
    return noting


def block_lengths_of_trace(
    folder: Annotated[Path, "Trace folder (rescore trace) of the base LM and its heads.", "--trace"],
    *,
    base: Base = "smollm2-135m",
    heads: Heads = None,
    rescorer: Annotated[str, "Which drafts: none, ngram, context-ngram ... (one a step)."] = "none",
    alpha: Annotated[float | None, "The rescorer's weight. Default: its own, not a tuned one."] = None,
    k: TopK = 16,
    limit: Annotated[int, "Only the first N examples of the trace."] = 20,
    cached: Cached = 256,
    repeats: Repeats = 7,
    dtype: Dtype = "float32",
    device: Device = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> BlockLengths:
    """Every block length of the trace in a folder, with the models and the rescorer by name; drafts are one a step.

    Raises `IncompatibleError` for a trace of another base LM or other heads, `RescoreError` for a weight that the
    rescorer has not and for k beyond the trace.
    """
    run = Run(rescorer)
    loaded = run.load()
    drafters = run.load_drafters(loaded)
    if alpha is not None:
        if loaded.alpha is None:
            raise RescoreError(f"{rescorer} has no weight; drop --alpha")
        loaded = loaded.weighted(alpha)
    if limit < 1:
        raise RescoreError(f"--limit {limit}; at least one example must be replayed")
    check_timing([cached], repeats)
    trace = read_trace(folder).first_examples(limit)
    check_held_k(trace.header.k, k)
    model = load_base(base, dtype=dtype, device=device)
    place = heads_folder(heads, model.identity)
    if trace.header.settings.get("heads_sha256") not in (None, heads_sha256(place)):
        raise IncompatibleError(f"{folder} was recorded with other heads than those in {place}; give its own: --heads")
    block_heads = load_heads(model, heads)
    choosing = {rescorer: (loaded, drafters)}
    key, at = (block_heads.sha256, block_heads.h), str(model.device)
    named = Inputs(base=base, heads=heads, dtype=dtype, device=device)
    costs = costs_here(model.identity, key, at, compiles=model.compiles, inputs=named) if loaded.plans else None
    fitted, drafters = fitted_to(target_of(trace, device=at, shared=model, costs=costs), choosing)[rescorer]
    if object_of(trace.header.settings, "base").get("weights_sha256") not in (None, model.identity.weights_sha256):
        raise IncompatibleError(f"the trace is of another base LM than {model.identity.name}; give --base")
    longest = min(trace.header.h, block_heads.h)
    if longest < 2:
        raise RescoreError("the trace holds head 1 only; a block needs at least two")
    hs = list(range(2, longest + 1))
    decode = StandingDecode(model, cached, longest)
    of_heads = [heads_calls(decode, block_heads.first(h), k, sizes=(h,)) for h in hs]
    of_steps, *added = times_of([step_calls(decode, (1, *hs)), *of_heads], repeats)
    greedy, *steps = np.median(of_steps, axis=0).tolist()
    groups = [example.group for example in trace.examples]
    lengths = []
    for h, verify_ms, times in zip(hs, steps, added, strict=True):
        seconds: list[float] = []
        noting = timed(fitted, seconds)
        examples = trace.first_heads(h).examples
        accepted = [steps for example in examples for steps in replay([example], noting, k=k, drafters=drafters)]
        accounting = account(accepted, Drafting(noting, drafters).longest(h), groups=groups)
        rescoring_ms = float(np.median(seconds)) * 1e3 if seconds else 0.0
        heads_ms = heads_added(times)
        step_ms = verify_ms + heads_ms + rescoring_ms
        speedup = accounting.block_efficiency * greedy / step_ms
        parts = {"verify_ms": verify_ms, "heads_ms": heads_ms, "rescoring_ms": rescoring_ms, "speedup": speedup}
        lengths.append(record_of(BlockLength, accounting, h=h, **parts))
        if progress:
            progress("block lengths", len(lengths), len(hs))
    return BlockLengths(
        base=model.identity.name, task=trace.header.task, rescorer=rescorer, alpha=fitted.alpha, k=k,
        examples=len(trace.examples), groups=len(set(groups)), dtype=model.identity.dtype, device=str(model.device),
        cached=cached, greedy_ms=greedy, lengths=lengths,
    )  # fmt: skip
