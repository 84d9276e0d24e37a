"""Time of rescoring a block as live decoding does it, one example at a time, beside bare forwards of the same model.

    python benchmarks/bench_rescoring.py --trace TRACE --rescorer neural-61m --rescorer draft-model:neural-61m ...

The examples of the trace are walked as a decoder would walk them; every block's first rescoring of an example (which
reads the prompt) is left out, as is the first example. Rescorers, or drafters by themselves, take turns, example by
example, so that noise falls on all. Small LMs are laid out as beside a base LM that decodes; with `--plain` each is
measured as in a replay, too. `bare`: as many dependent forwards of one token as there are slots behind the first,
through the same LM on as many cached tokens, without its vocabulary projection. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from lm.base.catalog import load_base
from lm.neural.model import NeuralLM
from rescore.accounting import account
from rescore.drafters.draft_model import DraftModel
from rescore.drafters.drafting import Drafting
from rescore.drafters.proposals import Proposals
from rescore.replaying import replay_steps
from rescore.rescorers import Context
from rescore.rescorers.neural import FollowsExamples
from rescore.runs.run import Run
from rescore.runs.weights import fitted_to, target_of
from rescore.table import text_table
from rescore.tracing import TracedExample, read_trace


@dataclass(frozen=True)
class Timed(Drafting):
    """Notes what every block takes, and what its neural LM (`model`) reads, but for an example's first block."""

    model: NeuralLM | None = None
    began: list[tuple[float, int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    accepted: list[list[int]] = field(default_factory=list)

    def propose(self, contexts: Sequence[Context], firsts: np.ndarray) -> Proposals:
        """See `Drafting.propose`."""
        self.began.append((time.perf_counter(), self.model.tokens_read if self.model else 0))
        return super().propose(contexts, firsts)

    def choose(self, proposals: Proposals, contexts: Sequence[Context]) -> np.ndarray:
        """See `Drafting.choose`; for one example at a time."""
        drafts = super().choose(proposals, contexts)
        began, read = self.began.pop()
        if contexts[0].output_ids:
            self.seconds.append(time.perf_counter() - began)
            self.tokens.append(self.model.tokens_read - read if self.model else 0)
        return drafts

    def walk(self, example: TracedExample, h: int) -> None:
        """Measures all of an example."""
        if self.model:
            self.bare.append(bare_seconds(self.model, example, self.longest(h)))
        self.accepted.append(replay_steps([example], self)[0].accepted)

    def forget(self) -> None:
        """Drops what was measured so far."""
        for measured in (self.seconds, self.tokens, self.bare, self.accepted):
            measured.clear()


def bare_seconds(model: NeuralLM, example: TracedExample, h: int) -> float:
    """Seconds of h - 1 dependent forwards of one token behind an example's prompt."""
    base = model.model
    prompt = torch.from_numpy(example.prompt_ids.astype(np.int64))[None].to(base.device)
    cache = base.new_cache(prompt.shape[1] + h)
    base.forward(prompt, cache, projects=False)
    cache.keep(range(prompt.shape[1]))
    start = time.perf_counter()
    for _ in range(h - 1):
        base.forward(prompt[:, :1], cache, projects=False)
        cache.keep(range(1))
    return time.perf_counter() - start


def sizes_of(model: NeuralLM) -> tuple[int, int]:
    """Number of weights, tied ones once, and operations of the layers for a token (2 a weight, attention left out)."""
    projection = model.model.output_embeddings.weight.shape
    sizes = [(p.numel(), p.shape) for p in model.model.model.parameters()]
    return sum(size for size, _ in sizes), 2 * sum(size for size, shape in sizes if shape != projection)


def neural_of(drafting: Drafting) -> NeuralLM | None:
    """The neural LM that is asked for every block, if any."""
    asked = [each for each in (drafting.rescorer, *drafting.drafters) if isinstance(each, FollowsExamples | DraftModel)]
    return asked[0].model.load() if asked else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--rescorer", action="append", required=True)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--p", type=int, default=1)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--plain", action="store_true")
    arguments = parser.parse_args()
    trace = read_trace(arguments.trace)
    examples, h = trace.examples[: arguments.limit + 1], trace.header.h
    runs = {name: Run(name) for name in arguments.rescorer}
    loaded = {name: run.load() for name, run in runs.items()}
    choosing = {name: (loaded[name], run.load_drafters(loaded[name])) for name, run in runs.items()}
    base = load_base(trace.header.settings["base"]["name"])
    timed: dict[str, Timed] = {}
    for how, shared in (("", base), (", plain", None))[: 1 + arguments.plain]:
        for name, (rescorer, drafters) in fitted_to(target_of(trace, shared=shared), choosing).items():
            weighted = rescorer if rescorer.alpha is None else rescorer.weighted(arguments.alpha)
            drafting = Timed(weighted, drafters, arguments.k, arguments.p)
            model = neural_of(drafting)
            if model is not None or not how:
                timed[name + how] = Timed(weighted, drafters, arguments.k, arguments.p, model)
    for turn, example in enumerate(examples):
        for each in timed.values():
            each.walk(example, h)
            if turn == 0:  # the first example warms up
                each.forget()
    rows, results = [], []
    for name, each in timed.items():
        ms = np.array(each.seconds) * 1e3
        p50, p95 = float(np.median(ms)), float(np.quantile(ms, 0.95))
        bare = float(np.median(each.bare)) * 1e3 if each.model else None
        efficiency = account(each.accepted, each.longest(h)).block_efficiency
        parameters, flops = sizes_of(each.model) if each.model else (None, None)
        gflops = flops and flops * sum(each.tokens) / len(ms) / 1e9
        results.append({
            "rescorer": name, "p": arguments.p, "p50_ms": round(p50, 3), "p95_ms": round(p95, 3),
            "bare_ms": bare and round(bare, 3), "against_bare": bare and round(p50 / bare, 3),
            "parameters": parameters, "gflops_per_block": gflops and round(gflops, 3),
            "block_efficiency": round(efficiency, 4), "blocks": len(ms),
        })  # fmt: skip
        rows.append([
            name, f"{p50:.2f}", f"{p95:.2f}", "-" if bare is None else f"{bare:.2f}",
            "-" if bare is None else f"{p50 / bare:.2f}x", "-" if parameters is None else f"{parameters / 1e6:.1f} M",
            "-" if gflops is None else f"{gflops:.2f}", f"{efficiency:.3f}",
        ])  # fmt: skip
    header = ["rescorer", "p50 ms", "p95 ms", "bare ms", "against bare", "weights", "GFLOP", "block eff."]
    print(f"{arguments.trace}, {len(examples) - 1} examples, h = {h}, k = {arguments.k}, p = {arguments.p}\n")
    print(text_table(header, rows))
    print()
    print(json.dumps({"results": results, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
