"""Live decoding: our autoregressive loop against transformers' `generate`, glue per step, forwards of a few tokens
against one, and replay against live.

    python benchmarks/bench_decoding.py [--examples N] [--heads DIR] [--max-new-tokens T]

Everything is measured in one process, taking turns, on the embedded sample, the prompts apart; `generate` has the model
as transformers loads it. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from lm.base.catalog import load_base
from lm.heads.block_heads import load_heads
from rescore.costs.measuring import verify_curve
from rescore.replaying import replay
from rescore.rescorers import load_rescorer
from rescore.runs.evaluation import evaluate
from rescore.runs.recording import record
from rescore.runs.run import Run
from rescore.table import text_table
from rescore.tasks import load_task

FEW = (5, 9)  # tokens of a forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--heads")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    base = load_base()
    heads = load_heads(base.identity, arguments.heads, device=base.device)
    recording = record(
        base, heads, data=str(load_task("squad").sample), limit=arguments.examples,
        max_new_tokens=arguments.max_new_tokens,
    )  # fmt: skip
    run = evaluate(recording, ["none", Run("none", p=16)], live=True, peers=["transformers"])
    one, many, peer = (result.latency for result in run.results)
    assert one and many and peer, "live results have times"
    assert all(r.identical and r.identical.identical == r.n for r in run.results), "our greedy output is not theirs"
    greedy = [e.live.autoregressive_seconds for e in run.records("squad", "none", 1) if e.live]
    glue = {
        "autoregressive": 1 - sum(s.verify for s in greedy) / sum(s.total for s in greedy),
        "blockwise p=1": one.glue_share,
        "blockwise p=16": many.glue_share,
    }

    curve = verify_curve(base, sizes=(1, *FEW), repeats=15)
    against_one = {n: ms / curve.milliseconds[0] for n, ms in zip(curve.tokens, curve.milliseconds, strict=True)}

    rescorer = load_rescorer("none")
    replay(recording.trace().examples[:1], rescorer, k=16)  # first use compiles and imports
    start = time.perf_counter()
    steps = replay(recording.trace().examples, rescorer, k=16)
    replayed = time.perf_counter() - start
    live = run.result("none", p=1).tokens / one.tokens_per_second  # seconds
    rate = {
        "ours": one.autoregressive_tokens_per_second, "transformers": peer.tokens_per_second,
        "blockwise": one.tokens_per_second,
    }  # fmt: skip
    rows = [
        ["transformers generate", f"{rate['transformers']:.1f} tok/s", "1.00x"],
        ["our autoregressive loop", f"{rate['ours']:.1f} tok/s", f"{rate['ours'] / rate['transformers']:.2f}x"],
        ["blockwise, unrescored", f"{rate['blockwise']:.1f} tok/s", f"{rate['blockwise'] / rate['transformers']:.2f}x"],
        ["replay of the same examples", f"{sum(map(len, steps)) / replayed:.0f} steps/s",
         f"{live / replayed:.0f}x live"],
        *([f"forward of {n} tokens", f"{ms:.1f} ms", f"{against_one[n]:.2f}x of one"]
          for n, ms in zip(curve.tokens, curve.milliseconds, strict=True)),
        *([f"glue, {name}", f"{share:.2%}", "of a step"] for name, share in glue.items()),
    ]  # fmt: skip
    print(text_table(["what", "rate", "ratio"], rows))
    print(json.dumps({
        "benchmark": "decoding", "examples": len(recording.ids), "tokens_per_second": rate,
        "ours_to_transformers": rate["ours"] / rate["transformers"], "glue": glue, "forward_to_one": against_one,
        "forward_ms": curve.milliseconds,
        "replay_to_live": live / replayed, "threads": torch.get_num_threads(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
