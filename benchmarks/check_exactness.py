"""Exactness on a real model: every way of decoding against transformers' greedy `generate`, and replay against live.

    python benchmarks/check_exactness.py --task squad --data squad.jsonl --limit 50 --max-new-tokens 64

Float32, one example at a time, with a line on stderr after each. Prints, for one draft and for p drafts as batch and as
tree: outputs identical token for token, whether replay's accepted lengths equal the live decoder's at every step, and
the live steps and tokens; then one JSON line. A base LM that takes no tree mask (an encoder-decoder) has no tree.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from lm.base.catalog import load_base
from lm.heads.block_heads import load_heads
from rescore.decoding import decode
from rescore.peers import load_peer
from rescore.replaying import replay
from rescore.rescorers import load_rescorer
from rescore.table import text_table
from rescore.tasks import load_task
from rescore.tasks.data import load_examples
from rescore.tracing import record_trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="squad")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--heads")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--p", type=int, default=16)
    arguments = parser.parse_args()
    task, limit = load_task(arguments.task), arguments.max_new_tokens
    base = load_base(arguments.base)
    heads = load_heads(base.identity, arguments.heads, device=base.device)
    examples = load_examples(task, data=arguments.data, limit=arguments.limit).examples
    rescorer, theirs = load_rescorer("none"), load_peer("transformers").load(base, {})
    ways = {"p = 1": (1, "batch"), f"p = {arguments.p}, batch": (arguments.p, "batch")}
    if base.supports_tree:
        ways[f"p = {arguments.p}, tree"] = arguments.p, "tree"
    with tempfile.TemporaryDirectory() as folder:
        chat = task.chat and base.is_chat
        trace = record_trace(
            base, heads, examples, Path(folder), settings={}, chat=chat, max_new_tokens=limit,
            progress=lambda done, total: print(f"trace {done}/{total}", file=sys.stderr),
        )  # fmt: skip
        replayed = {way: replay(trace.examples, rescorer, k=arguments.k, p=p) for way, (p, _) in ways.items()}
        identical, same_steps, steps, tokens = (dict.fromkeys(ways, 0) for _ in range(4))
        traced = 0
        for place, example in enumerate(trace.examples):
            prompt = example.prompt_ids.tolist()
            expected = theirs(prompt, limit).output_ids
            traced += expected == example.output_ids.tolist()
            for way, (p, verify) in ways.items():
                decoded = decode(
                    base, heads, prompt, rescorer=rescorer, k=arguments.k, p=p, max_new_tokens=limit, verify=verify
                )
                identical[way] += decoded.output_ids == expected
                same_steps[way] += decoded.accepted == replayed[way][place]
                steps[way] += len(decoded.accepted)
                tokens[way] += len(decoded.output_ids)
            so_far = f"identical {list(identical.values())}, replay = live {list(same_steps.values())}"
            print(f"{place + 1}/{len(examples)} {so_far}", file=sys.stderr)
        n = len(trace.examples)
    rows = [["trace (batched greedy)", f"{traced}/{n}", "-", "-", "-"]]
    for way in ways:
        rows.append([way, f"{identical[way]}/{n}", f"{same_steps[way]}/{n}", str(steps[way]), str(tokens[way])])
    print(text_table(["decoding", "identical to generate", "replay = live", "steps", "tokens"], rows))
    line = {"benchmark": "exactness", "task": task.name, "n": n, "max_new_tokens": limit, "trace_identical": traced}
    counts = {"identical": identical, "replay_equals_live": same_steps, "steps": steps, "tokens": tokens}
    print(json.dumps({**line, **counts}))


if __name__ == "__main__":
    main()
