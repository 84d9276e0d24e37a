"""The law of sampled output at scale: whatever drafts it, it is as near to the base LM's own as direct samples are.

    python benchmarks/check_sampling.py --draws 200000

A tiny model with random weights has ten tokens and outputs of up to four, so that the law of whole outputs is known
exactly. In every way of drafting, each rescorer and drafters alone and joined (`sampled/models.py`), one prompt is
decoded so often (`sampled/decodes.py` says how that takes seconds only), and the total variation distance of the
outputs' frequencies from the law is compared with those of direct samples of the same size. The first `--whole` decodes
of each are decoded without shortcuts besides, and must be the same. Wrong rules must be found out.

A way holds if its distance is among the nearer ones of direct samples, all but the farthest 1 % / (number of ways):
where all keep the law, one or more are called wrong once in a hundred seeds. Prints a table and one JSON line; exit
code 1 if a way does not hold, or a wrong rule does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from sampled.decodes import WRONG_RULES, Counted, Decodes, Remembered, apart, count, direct_sample, distance, law_of
from sampled.models import make_tiny, ways_of

from rescore.acceptance import sampling
from rescore.table import text_table

FALSE_ALARMS = 0.01  # seeds with which a law that is kept is called missed
DIRECT = 20_000  # direct samples that are drawn from the law to compare with
HEADER = ["drafts", "tokens a step", "to the law", "of direct samples farther", "to a direct sample", "whole, same", ""]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200_000, help="decodes of each way of drafting")
    parser.add_argument(
        "--whole", type=int, default=100, help="of these, how many are decoded without shortcuts besides"
    )
    parser.add_argument("--max-new-tokens", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--top-k", type=int, default=6)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokens, draws, seed = arguments.max_new_tokens, arguments.draws, arguments.seed
    how: dict[str, Any] = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
    rule = Remembered(**how, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        tiny = make_tiny(Path(folder))
        ways, law = ways_of(tiny.folder), law_of(tiny, rule, tokens)
        shares = np.array(list(law.values()))
        samples = np.random.default_rng(seed).multinomial(draws, shares / shares.sum(), size=DIRECT) / draws
        usual = np.sort(np.abs(samples - shares).sum(axis=1) / 2)
        of_two = np.abs(samples[::2] - samples[1::2]).sum(axis=1) / 2
        one, other = (direct_sample(tiny, tokens, draws, seed=seed + n, **how) for n in (0, 1))
        rows: list[list[str]] = []
        results: dict[str, dict[str, Any]] = {}

        def tell(label: str, counted: Counted, *, right: bool = True) -> bool:
            """Adds a row; whether it is as it should be."""
            found = distance(counted.outputs, law)
            farther = float((usual >= found).mean())
            holds = farther >= FALSE_ALARMS / len(ways)
            results[label] = {
                "block_efficiency": round(counted.block_efficiency, 4), "to_law": round(found, 6), "farther": farther,
                "to_direct": round(apart(counted.outputs, one), 6), "whole": counted.whole,
                "differing": counted.differing, "holds": holds,
            }  # fmt: skip
            rows.append([
                label, f"{counted.block_efficiency:.3f}", f"{found:.5f}", f"{farther:.2%}",
                f"{apart(counted.outputs, one):.5f}", f"{counted.whole - counted.differing}/{counted.whole}",
                "holds" if holds else "does not hold",
            ])  # fmt: skip
            print(f"{len(rows)}/{1 + len(ways) + len(WRONG_RULES)} {', '.join(rows[-1])}", file=sys.stderr)
            return holds is right and not counted.differing

        fine = [
            tell("transformers' generate", Counted(other, sum(len(output) * times for output, times in other.items())))
        ]
        decodes = {way.label: Decodes(tiny, way, tokens) for way in ways}
        fine += [tell(way.label, count(decodes[way.label], rule, draws, arguments.whole)) for way in ways]
        for wrong, label in WRONG_RULES.items():
            with patch.object(sampling, "try_candidates", wrong):
                fine.append(tell(f"wrong: {wrong.__name__}, {label}", count(decodes[label], rule, draws), right=False))
    limits = {
        "direct": float(np.median(usual)), "direct_99": float(np.quantile(usual, 0.99)),
        "of_two": float(np.median(of_two)), "of_two_99": float(np.quantile(of_two, 0.99)),
        "of_two_of_transformers": apart(one, other),
    }  # fmt: skip
    print(text_table(HEADER, rows))
    print(
        f"{draws:,} decodes each of up to {tokens} tokens, {rule.name}; {len(law):,} outputs; total variation distance."
        "\nDirect samples of that size: {direct:.5f} from the law (99 %: within {direct_99:.5f}), {of_two:.5f} from "
        "each other (99 %: within {of_two_99:.5f}); transformers' two: {of_two_of_transformers:.5f}.".format(**limits)
    )
    line = {"benchmark": "sampling", "draws": draws, "tokens": tokens, "rule": rule.name, "outputs": len(law)}
    print(json.dumps({**line, **limits, "results": results, "fine": all(fine)}))
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
