"""Time of rescoring a block as live decoding does it, one example at a time, beside bare forwards of the same model.

`python benchmarks/bench_rescoring.py --trace TRACE --rescorer neural-61m --rescorer ngram-neural ...` prints a table,
then one JSON line. The examples of the trace are walked as a decoder would walk them; every block's first rescoring of
an example (which reads the prompt) is left out. Rescorers take turns, example by example, so that noise falls on all.
`bare`: h - 1 forwards of one token through the neural LM on as many cached tokens, without its vocabulary projection.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from lm.neural.model import NeuralLM
from rescore.accounting import account
from rescore.drafters.drafting import Drafting
from rescore.replaying import replay
from rescore.rescorers import Context, Rescorer
from rescore.rescorers.neural import Neural
from rescore.rescorers.ngram_neural import NgramNeural
from rescore.runs.run import Run
from rescore.runs.weights import fit_to
from rescore.studies.block_length import TimedRescorer
from rescore.table import text_table
from rescore.tracing import TracedExample, read_trace


class Timed(TimedRescorer):
    """Notes the tokens that the neural LM read in these calls, too."""

    def __init__(self, rescorer: Rescorer, model: NeuralLM | None) -> None:
        super().__init__(rescorer)
        self.model, self.tokens = model, 0

    def _timed(self, contexts: Sequence[Context], call: Callable[[], np.ndarray]) -> np.ndarray:
        before = self.model.tokens_read if self.model else 0
        drafts = super()._timed(contexts, call)
        if contexts[0].output_ids:
            self.tokens += self.model.tokens_read - before if self.model else 0
        return drafts


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--rescorer", action="append", required=True)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--p", type=int, default=1)
    parser.add_argument("--alpha", type=float, default=0.5)
    arguments = parser.parse_args()
    trace = read_trace(arguments.trace)
    examples, h = trace.examples[: arguments.limit + 1], trace.header.h
    runs = {name: Run(name) for name in arguments.rescorer}
    loaded = {name: run.load() for name, run in runs.items()}
    choosing = fit_to(trace, {name: (loaded[name], run.load_drafters(loaded[name])) for name, run in runs.items()})
    fitted = {name: rescorer for name, (rescorer, _) in choosing.items()}
    drafters = {name: each for name, (_, each) in choosing.items()}
    models = {name: r.model.load() for name, r in fitted.items() if isinstance(r, Neural | NgramNeural)}
    timed = {
        name: Timed(r if r.alpha is None else r.weighted(arguments.alpha), models.get(name))
        for name, r in fitted.items()
    }
    bare: dict[str, list[float]] = {name: [] for name in models}
    accepted: dict[str, list[list[int]]] = {name: [] for name in timed}
    for turn, example in enumerate(examples):
        for name, rescorer in timed.items():
            if name in models:
                bare[name].append(bare_seconds(models[name], example, h))
            accepted[name] += replay([example], rescorer, k=arguments.k, p=arguments.p, drafters=drafters[name])
            if turn == 0:  # the first example warms up
                rescorer.seconds.clear()
                rescorer.tokens = 0
                accepted[name].clear()
                bare.get(name, []).clear()
    sequential = next((n for n, r in fitted.items() if isinstance(r, Neural)), None)
    rows, results = [], []
    for name, rescorer in timed.items():
        ms = np.array(rescorer.seconds) * 1e3
        p50, p95 = float(np.median(ms)), float(np.quantile(ms, 0.95))
        plain = float(np.median(bare[name])) * 1e3 if name in models else None
        against = p50 / float(np.median(timed[sequential].seconds)) / 1e3 if sequential else None
        longest = Drafting(fitted[name], drafters[name]).longest(h)
        efficiency = account(accepted[name], longest).block_efficiency
        parameters, flops = sizes_of(models[name]) if name in models else (None, None)
        gflops = flops and flops * rescorer.tokens / len(ms) / 1e9
        results.append({
            "rescorer": name, "p": arguments.p, "p50_ms": round(p50, 3), "p95_ms": round(p95, 3),
            "bare_ms": plain and round(plain, 3), "against_bare": plain and round(p50 / plain, 3),
            "against_sequential": against and round(against, 3), "parameters": parameters,
            "gflops_per_block": gflops and round(gflops, 3),
            "block_efficiency": round(efficiency, 4), "blocks": len(ms),
        })  # fmt: skip
        rows.append([
            name, f"{p50:.2f}", f"{p95:.2f}", "-" if plain is None else f"{plain:.2f}",
            "-" if plain is None else f"{p50 / plain:.2f}x", "-" if against is None else f"{against:.3f}x",
            "-" if parameters is None else f"{parameters / 1e6:.1f} M", "-" if gflops is None else f"{gflops:.2f}",
            f"{efficiency:.3f}",
        ])  # fmt: skip
    header = [
        "rescorer",
        "p50 ms",
        "p95 ms",
        "bare ms",
        "against bare",
        f"against {sequential}",
        "weights",
        "GFLOP",
        "block eff.",
    ]
    print(f"{arguments.trace}, {len(examples) - 1} examples, h = {h}, k = {arguments.k}, p = {arguments.p}\n")
    print(text_table(header, rows))
    print()
    print(json.dumps({"results": results, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
