"""Time of drafting from a joined lattice, one position at a time as live decoding does it, apart from any model.

`python benchmarks/bench_joined.py --trace TRACE` walks the examples of a trace as a decoder would and times, at every
step: the text's automaton grown by what was accepted, the candidates and the search (`joint`), for each p. Prints a
table, then one JSON line. The n-gram model and the weights are those that are shipped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from rescore.drafters.drafting import Drafting
from rescore.replaying import contexts_of
from rescore.runs.run import Run
from rescore.runs.weights import fitted_to, target_of
from rescore.table import text_table
from rescore.tracing import read_trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--rescorer", action="append", help="joint (default), lookup, context-ngram ...")
    parser.add_argument("--p", type=int, action="append", help="drafts of a step; default 1 and 16")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--limit", type=int, default=40)
    arguments = parser.parse_args()
    trace = read_trace(arguments.trace).first_examples(arguments.limit)
    runs = [Run(name, p=p, k=arguments.k) for name in arguments.rescorer or ["joint"] for p in arguments.p or [1, 16]]
    choosing = {}
    for run in runs:
        loaded = run.load()
        choosing[run.label] = (loaded, run.load_drafters(loaded))
    fitted = fitted_to(target_of(trace), choosing)
    rows, results = [], []
    for run in runs:
        drafting = Drafting(*fitted[run.label], run.k, run.p)
        seconds = []
        for example in trace.examples:
            (context,) = contexts_of([example])
            drafting.prefill([context])
            while (position := len(context.output_ids)) < len(example.output_ids):
                start = time.perf_counter()
                drafts = drafting.choose(
                    drafting.propose([context], example.output_ids[position : position + 1]), [context]
                )
                seconds.append(time.perf_counter() - start)
                ahead = example.output_ids[position : position + drafts.shape[2]]
                same = drafts[0, :, : len(ahead)] == ahead
                n = max(1, int(np.cumprod(same, axis=1).sum(axis=1).max()))
                context.output_ids.extend(ahead[:n].tolist())
        ms = np.array(seconds[len(seconds) // 10 :]) * 1e3  # the first ones compile
        p50, p95 = float(np.median(ms)), float(np.quantile(ms, 0.95))
        rows.append([run.label, str(run.p), str(len(ms)), f"{p50:.3f}", f"{p95:.3f}"])
        results.append({"rescorer": run.label, "p": run.p, "p50_ms": round(p50, 4), "p95_ms": round(p95, 4)})
    print(text_table(["drafts of", "p", "steps", "median ms", "95 % ms"], rows))
    print(json.dumps({"benchmark": "joined", "results": results}))


if __name__ == "__main__":
    main()
