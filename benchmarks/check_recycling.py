"""What token recycling could add to `joint`: the base's own best tokens after all that it read, rejected ones too.

`python benchmarks/check_recycling.py --trace TRACE` decodes its prompts live with one draft of `joint` a step. After
each step the base's own next token (the first that the draft lacked) is looked up in what the base said the last time
that it read the token before. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

import rescore
from lattices.joined.sources import room_for, sources_along
from rescore.decoding import decode
from rescore.drafters.proposals import Proposals
from rescore.replaying import contexts_of
from rescore.runs.run import Run
from rescore.runs.weights import fitted_to, target_of
from rescore.table import text_table
from rescore.tracing import TracedExample, read_trace

RECYCLED = 8  # tokens that are remembered after each


class Watched:
    """A base LM whose calls are noted: the tokens of each, and the best tokens after them."""

    def __init__(self, base: Any) -> None:
        self.calls: list[tuple[list[int], list[list[int]]]] = []
        forward = base.forward

        def noted(tokens: Any, *arguments: Any, **options: Any) -> Any:
            logits, hidden = forward(tokens, *arguments, **options)
            self.calls.append((tokens[0].tolist(), logits[0].topk(RECYCLED, dim=-1).indices.tolist()))
            return logits, hidden

        base.forward = noted


def count(example: TracedExample, accepted: list[int], calls: Any, drafters: Any, k: int) -> Counter[str]:
    """Of the steps of one decode; the first call reads the prompt."""
    found: Counter[str] = Counter(steps=len(accepted), tokens=sum(accepted))
    recycled: dict[int, list[int]] = {}
    (context,) = contexts_of([example])
    for n, (tokens, best) in zip(accepted, calls[1:], strict=False):
        right = best[n - 1][0]
        if tokens[n - 1] in recycled:
            proposals = Proposals(drafters, [context], np.array(tokens[:1]), k)
            sources = proposals.sources(0, context)
            is_new = not sources_along(sources, np.array([*tokens[:n], right], dtype=np.int32), room_for(sources))[-1]
            remembered = recycled[tokens[n - 1]]
            found["known"] += 1
            found["best"] += remembered[0] == right
            found["best, new"] += remembered[0] == right and is_new
            found["among the best, new"] += right in remembered and is_new
        recycled.update(zip(tokens, best, strict=True))
        context.output_ids.extend(tokens[:n])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    trace = read_trace(arguments.trace).first_examples(arguments.limit)
    base = rescore.load_base(arguments.base)
    heads = rescore.load_heads(base)
    run = Run("joint")
    loaded = run.load()
    target = target_of(trace, shared=base)
    rescorer, drafters = fitted_to(target, {"joint": (loaded, run.load_drafters(loaded))})["joint"]
    watched, found = Watched(base), Counter[str]()
    for example in trace.examples:
        watched.calls.clear()
        decoded = decode(
            base, heads, example.prompt_ids.tolist(), rescorer=rescorer, drafters=drafters, k=run.k,
            max_new_tokens=arguments.max_new_tokens,
        )  # fmt: skip
        found += count(example, decoded.accepted, watched.calls, drafters, run.k)
    names = ("steps", "tokens", "known", "best", "best, new", "among the best, new")
    print(text_table(names, [[str(found[name]) for name in names]]))
    print("known: the base had read the last accepted token before; best: what it said then was right this time;")
    print(f"new: no candidate of joint; among the best: {RECYCLED} tokens.")
    print(json.dumps({"benchmark": "recycling", **{name: found[name] for name in names}}))


if __name__ == "__main__":
    main()
