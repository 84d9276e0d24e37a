"""Checks the exact search on real lattices against all paths scored by KenLM.

`python benchmarks/check_search.py --ngram NGRAM --trace TRACE [TRACE ...]`; NGRAM is a folder of `rescore build-ngram`.
Lattices at positions drawn from the traces are cut to `--h` slots of `--k` tokens; every path is scored by the heads'
log-probs + weight x KenLM's behind the true left context. The p best of the search must have the p best scores (to 1e-4
nats), each the score of its path. Prints one line, then one JSON line; exit code 1 if a lattice differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

import kenlm
import numpy as np

from lattices.lattice import Lattice
from lattices.ngram_search import NgramSearch
from lm.ngram.load import load_ngram
from rescore.tracing import read_trace

TOLERANCE = 1e-4  # nats; both sum float32 log-probs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ngram", type=Path, required=True)
    parser.add_argument("--trace", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=200, help="lattices of each trace")
    parser.add_argument("--h", type=int, default=5)
    parser.add_argument("--k", type=int, default=6)
    parser.add_argument("--p", type=int, default=16)
    parser.add_argument("--weight", type=float, default=0.75)
    arguments = parser.parse_args()
    loaded = load_ngram(arguments.ngram)
    reference = kenlm.Model(str(arguments.ngram / "model.arpa"))
    rng = np.random.default_rng(0)
    lattices, differing, largest = 0, 0, 0.0
    for folder in arguments.trace:
        trace = read_trace(folder)
        eos = set(trace.header.eos_token_ids)
        search = loaded.search(trace.header.vocab_size, tuple(eos))
        assert isinstance(search, NgramSearch), "a KenLM binary has no search of its own to check"
        positions = [(e, t) for e in trace.examples for t in range(len(e.output_ids))]
        for i in rng.permutation(len(positions))[: arguments.limit]:
            example, t = positions[i]
            ids = example.lattice.token_ids[t : t + 1, : arguments.h, : arguments.k]
            logps = example.lattice.logps[t : t + 1, : arguments.h, : arguments.k]
            left = [*example.prompt_ids.tolist(), *example.output_ids[:t].tolist()][-(loaded.order - 1) :]
            found = search.p_best_after(Lattice(ids, logps), [left], arguments.p, weight=arguments.weight)
            scores = _all_scores(reference, ids[0], logps[0], left, eos, arguments.weight)
            best = sorted(scores.values(), reverse=True)[: arguments.p]
            own = [scores[tuple(draft)] for draft in found.drafts[0].tolist()]
            gap = max(np.abs(found.scores[0] - best).max(), np.abs(found.scores[0] - own).max())
            largest, lattices = max(largest, float(gap)), lattices + 1
            differing += bool(gap > TOLERANCE) or len(set(map(tuple, found.drafts[0].tolist()))) < len(best)
    paths = arguments.k ** (arguments.h - 1)
    print(
        f"{lattices} lattices, all {paths} paths of each scored by KenLM: {differing} differ, by {largest:.1e} at most"
    )
    print(json.dumps({"lattices": lattices, "paths": paths, "differing": differing, "largest_nats": largest}))
    sys.exit(differing > 0)


def _all_scores(
    model: kenlm.Model, ids: np.ndarray, logps: np.ndarray, left: list[int], eos: set[int], weight: float
) -> dict[tuple[int, ...], float]:
    """Heads' log-probs + weight x KenLM's, in nats, of every path: ids and log-probs `[h, k]`, first slot fixed."""
    state, scores = kenlm.State(), {}
    model.NullContextWrite(state)
    for token in left:
        state = _step(model, state, token, eos)[1]
    choices = [range(1), *(range(ids.shape[1]) for _ in ids[1:])]
    for path in itertools.product(*choices):
        total, at = 0.0, state
        for slot, place in enumerate(path):
            log10p, at = _step(model, at, int(ids[slot, place]), eos)
            total += float(logps[slot, place]) + weight * math.log(10) * log10p
        scores[tuple(int(ids[slot, place]) for slot, place in enumerate(path))] = total
    return scores


def _step(model: kenlm.Model, state: kenlm.State, token: int, eos: set[int]) -> tuple[float, kenlm.State]:
    after = kenlm.State()
    return model.BaseScore(state, "</s>" if token in eos else str(token), after), after


if __name__ == "__main__":
    main()
