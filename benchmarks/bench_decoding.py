"""Live decoding: our autoregressive loop against transformers' `generate`, glue per step, and replay against live.

    python benchmarks/bench_decoding.py [--examples N] [--heads DIR] [--max-new-tokens T]

Everything is measured in one process, taking turns, on the embedded sample; `generate` runs on the same model object,
that is with this project's attention on a CPU. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from lm.base.catalog import load_base
from lm.heads.block_heads import load_heads
from rescore.decoding import decode
from rescore.replaying import replay
from rescore.rescorers import load_rescorer
from rescore.table import text_table
from rescore.tasks import load_task
from rescore.tasks.data import load_examples
from rescore.tracing import read_trace, record_trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--heads")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    base, plain = load_base(), load_base()  # transformers' generate has the model as it is loaded
    heads = load_heads(base.identity, arguments.heads, device=base.device)
    examples = load_examples(load_task("squad"), data=load_task("squad").sample, limit=arguments.examples).examples
    prompts = [base.encode_prompt(e.prompt, chat=True) for e in examples]
    limit, rescorer = arguments.max_new_tokens, load_rescorer("none")

    seconds = {"ours": 0.0, "transformers": 0.0, "blockwise": 0.0}
    tokens = {"ours": 0, "transformers": 0, "blockwise": 0}
    glue: dict[str, list[float]] = {"autoregressive": [], "blockwise p=1": [], "blockwise p=16": []}
    decode(base, heads, prompts[0], rescorer=rescorer, k=16, p=16, max_new_tokens=8)
    plain.model.generate(torch.tensor([prompts[0]], device=base.device), max_new_tokens=8, pad_token_id=0)
    for prompt in prompts:
        ids = torch.tensor([prompt], device=base.device)
        start = time.perf_counter()
        output = plain.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit, pad_token_id=0
        )
        seconds["transformers"] += time.perf_counter() - start
        tokens["transformers"] += output.shape[1] - len(prompt)

        start = time.perf_counter()
        ours = decode(base, None, prompt, max_new_tokens=limit)
        seconds["ours"] += time.perf_counter() - start
        tokens["ours"] += len(ours.output_ids)
        assert ours.output_ids == output[0, len(prompt) :].tolist(), "our greedy output is not transformers'"

        start = time.perf_counter()
        blockwise = decode(base, heads, prompt, rescorer=rescorer, k=16, max_new_tokens=limit)
        seconds["blockwise"] += time.perf_counter() - start
        tokens["blockwise"] += len(blockwise.output_ids)
        tree = decode(base, heads, prompt, rescorer=rescorer, k=16, p=16, max_new_tokens=limit)
        for name, decoded in (("autoregressive", ours), ("blockwise p=1", blockwise), ("blockwise p=16", tree)):
            s = decoded.seconds
            glue[name].append((s.total - s.verify - s.draft - s.rescore) / s.total)

    with tempfile.TemporaryDirectory() as folder:
        record_trace(base, heads, examples, Path(folder), settings={}, chat=True, max_new_tokens=limit)
        replay(read_trace(Path(folder)).examples[:1], rescorer, k=16)  # first use compiles and imports
        start = time.perf_counter()
        steps = replay(read_trace(Path(folder)).examples, rescorer, k=16)
        replayed = time.perf_counter() - start
    rate = {name: tokens[name] / seconds[name] for name in seconds}
    shares = {name: sum(values) / len(values) for name, values in glue.items()}
    rows = [
        ["transformers generate", f"{rate['transformers']:.1f} tok/s", "1.00x"],
        ["our autoregressive loop", f"{rate['ours']:.1f} tok/s", f"{rate['ours'] / rate['transformers']:.2f}x"],
        ["blockwise, unrescored", f"{rate['blockwise']:.1f} tok/s", f"{rate['blockwise'] / rate['transformers']:.2f}x"],
        ["replay of the same examples", f"{sum(map(len, steps)) / replayed:.0f} steps/s",
         f"{seconds['blockwise'] / replayed:.0f}x live"],
        *([f"glue, {name}", f"{share:.2%}", "of a step"] for name, share in shares.items()),
    ]  # fmt: skip
    print(text_table(["what", "rate", "ratio"], rows))
    print(json.dumps({
        "benchmark": "decoding", "examples": len(examples), "tokens_per_second": rate,
        "ours_to_transformers": rate["ours"] / rate["transformers"], "glue": shares,
        "replay_to_live": seconds["blockwise"] / replayed, "threads": torch.get_num_threads(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
