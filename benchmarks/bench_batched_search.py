"""The batched p-best search in torch tensors against the compiled one, on lattices of real traces.

    python benchmarks/bench_batched_search.py --trace DIR... --automaton FILE... [--lattices 4000] [--k 16] [--p 1 16]
        [--beam 64] [--depth 3 2] [--weight 0.5] [--device cpu] [--threads 1]

The positions of the traces, spread evenly and repeated as needed, with the automaton's states after their true left
contexts; both searches get these ready-made. The compiled search runs on one core. Only the share that the batched
search proves exact can be used as it is; the other lattices would be searched again. Every lattice proven exact is
compared with the compiled search, and a difference ends the run. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lattices.automaton import Automaton
from lattices.lattice import Lattice
from lattices.ngram_search import NgramSearch
from lm.batched_search import BatchedNgramSearch
from rescore.table import text_table
from rescore.tracing import Trace, load_trace

CONTEXT = 5  # tokens: enough for every order


def positions(traces: list[Trace], count: int, k: int) -> tuple[Lattice, np.ndarray]:
    """`count` lattices `[n, h, k]` and the last tokens before each, int64 `[n, CONTEXT]` (-1: none)."""
    places = [(example, at) for trace in traces for example in trace.examples for at in range(len(example.lattice))]
    chosen = [places[i * len(places) // count] for i in range(count)]
    contexts = np.full((count, CONTEXT), -1, dtype=np.int64)
    for row, (example, at) in zip(contexts, chosen, strict=True):
        before = np.concatenate([example.prompt_ids, example.output_ids[:at]])[-CONTEXT:]
        row[CONTEXT - len(before) :] = before
    lattices = [example.lattice.top(k)[at : at + 1] for example, at in chosen]
    ids, logps = (np.concatenate([getattr(x, name) for x in lattices]) for name in ("token_ids", "logps"))
    return Lattice(ids, logps), contexts


def best_seconds(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Seconds of the fastest run, and what it gave; the caller has run it once before."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def measure(
    search: BatchedNgramSearch, words: np.ndarray, lattice: Lattice, contexts: np.ndarray,
    p: int, weight: float, repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """Both searches over all lattices: microseconds each, the share proven exact and how good the others are."""
    device = search.device
    ids, logps = torch.from_numpy(lattice.token_ids).to(device), torch.from_numpy(lattice.logps).to(device)
    states = search.states_after(torch.from_numpy(contexts))
    host = states.cpu().numpy().astype(np.int32)
    compiled = NgramSearch(search.automaton, words)

    def batched() -> Any:
        found = search.p_best(ids, logps, states, p, weight=weight)
        found.exact.cpu()  # waits for a GPU
        return found

    compiled.p_best(lattice[:100], host[:100], p, weight=weight)
    search.p_best(ids[:500], logps[:500], states[:500], p, weight=weight)
    reference_seconds, reference = best_seconds(lambda: compiled.p_best(lattice, host, p, weight=weight), repeats)
    seconds, found = best_seconds(batched, repeats)
    exact, scores = found.exact.cpu().numpy(), found.scores.cpu().numpy()
    same = (found.drafts.cpu().numpy() == reference.drafts).all(axis=(1, 2)) & (scores == reference.scores).all(axis=1)
    if not same[exact].all() or (found.bound.cpu().numpy() < reference.scores[:, 0]).any():
        raise SystemExit("the batched search called a result exact, or a bound one, that is not")
    return {
        "order": search.automaton.order,
        "p": p,
        "depth": search.depth,
        "beam": p if search.automaton.order <= search.depth + 1 else max(p, search.beam),
        "batched_us": seconds / len(lattice) * 1e6,
        "compiled_us": reference_seconds / len(lattice) * 1e6,
        "ratio": seconds / reference_seconds,
        "proven_exact": float(exact.mean()),
        "same": float(same.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, nargs="+", required=True)
    parser.add_argument("--automaton", type=Path, nargs="+", required=True)
    parser.add_argument("--lattices", type=int, default=4000)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--p", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--beam", type=int, default=64)
    parser.add_argument("--depth", type=int, nargs="+", default=[3, 2], help="words that the bound knows")
    parser.add_argument("--weight", type=float, default=0.5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=int, default=1 << 28, help="bytes for a chunk of lattices")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    traces = [load_trace(folder) for folder in arguments.trace]
    lattice, contexts = positions(traces, arguments.lattices, arguments.k)
    results = []
    for path in arguments.automaton:
        automaton = Automaton.load(path)
        words = automaton.words_of_tokens(traces[0].header.vocab_size)
        for depth in arguments.depth if automaton.order > 3 else arguments.depth[:1]:
            search = BatchedNgramSearch(
                automaton, words, device=arguments.device, beam=arguments.beam, depth=depth, memory=arguments.memory
            )
            for p in arguments.p:
                results.append(
                    measure(search, words, lattice, contexts, p, arguments.weight, arguments.repeats)
                    | {"automaton": path.name, "ngrams": sum(automaton.counts)}
                )
    h, k = lattice.token_ids.shape[1:]
    print(f"{len(lattice)} lattices of {h} x {k}, weight {arguments.weight}, {arguments.device}, us per lattice\n")
    header = ["automaton", "order", "p", "depth", "beam", "batched", "compiled", "ratio", "proven exact", "same"]
    rows = [
        [r["automaton"], str(r["order"]), str(r["p"]), str(r["depth"]), str(r["beam"]), f"{r['batched_us']:.0f}",
         f"{r['compiled_us']:.0f}", f"{r['ratio']:.2f}", f"{r['proven_exact']:.1%}", f"{r['same']:.1%}"]
        for r in results
    ]  # fmt: skip
    print(text_table(header, rows))
    print()
    print(json.dumps({
        "benchmark": "batched_search", "lattices": len(lattice), "h": h, "k": k, "weight": arguments.weight,
        "device": arguments.device, "threads": torch.get_num_threads(), "torch": torch.__version__, "results": results,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
