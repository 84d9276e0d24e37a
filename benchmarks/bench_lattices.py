"""Speed of the ground floor on one core: oracle, p-best search, prefix tree.

`python benchmarks/bench_lattices.py`, with the project installed. Prints a table, then one JSON line. The lattices are
random (fixed seed) with the shape of real ones: later heads are less sure. Compiling is not counted; each number is the
best of several runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np

from lattices.lattice import Lattice
from lattices.oracle import oracle_accepted, target_ranks
from lattices.prefix_tree import build_prefix_tree
from lattices.search import p_best

H, K, P = 9, 16, 16
VOCAB = 49_152
BLOCKS, SEARCHED, TREES = 200_000, 10_000, 1_000
REPEATS = 5


def random_lattices(n: int, rng: np.random.Generator) -> Lattice:
    """`[n, H, K]`: gaps between neighbouring log-probs are exponential and shrink from head to head."""
    sharpness = np.geomspace(1.5, 0.25, H)[:, None]  # mean gap in nats, [H, 1]
    falling = -np.cumsum(rng.exponential(sharpness, (n, H, K)), axis=-1)
    logps = falling - np.log(np.exp(falling).sum(axis=-1, keepdims=True)) - 0.2  # 18 % outside the top K
    starts = rng.integers(0, VOCAB, (n, H, 1))
    strides = 2 * rng.integers(0, VOCAB // 2, (n, H, 1)) + 1  # odd: K distinct ids, in no order
    token_ids = (starts + strides * np.arange(K)) % VOCAB
    return Lattice(token_ids.astype(np.int32), logps.astype(np.float32))


def random_targets(lattice: Lattice, rng: np.random.Generator) -> np.ndarray:
    """`[n, H]`: slot 1's arg-max, later a token whose rank falls off, now and then one outside the lattice."""
    ranks = np.minimum(rng.geometric(np.geomspace(0.6, 0.15, H), (len(lattice), H)) - 1, K)  # K: outside
    ranks[:, 0] = 0
    inside = np.take_along_axis(lattice.token_ids, np.minimum(ranks, K - 1)[..., None], axis=-1)[..., 0]
    return np.where(ranks < K, inside, VOCAB).astype(np.int32)


def best_seconds(run: Callable[[], object]) -> float:
    """Seconds of the fastest run, after one that is not counted."""
    run()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    rng = np.random.default_rng(0)
    lattice = random_lattices(BLOCKS, rng)
    lattice[:1000].validate(VOCAB)
    targets = random_targets(lattice, rng)
    oracle = best_seconds(lambda: oracle_accepted(target_ranks(lattice.token_ids, targets), K))
    searched = lattice[:SEARCHED]
    one = best_seconds(lambda: p_best(searched, 1))
    sixteen = best_seconds(lambda: p_best(searched, P))
    flat = Lattice(searched.token_ids, np.full_like(searched.logps, -1.0))
    tied = best_seconds(lambda: p_best(flat, P))
    drafts = p_best(lattice[:TREES], P).drafts
    trees = best_seconds(lambda: [build_prefix_tree(d) for d in drafts])
    nodes = np.mean([len(build_prefix_tree(d).tokens) for d in drafts])

    result = {
        "h": H,
        "k": K,
        "p": P,
        "oracle_blocks_per_s": round(BLOCKS / oracle),
        "p_best_1_us": round(one / SEARCHED * 1e6, 3),
        "p_best_16_us": round(sixteen / SEARCHED * 1e6, 2),
        "p_best_16_all_tied_us": round(tied / SEARCHED * 1e6, 2),
        "prefix_tree_us": round(trees / TREES * 1e6, 1),
        "prefix_tree_mean_nodes": round(float(nodes), 1),
    }
    print(f"lattices of {H} slots x {K} tokens, one core\n")
    print(f"{'target_ranks + oracle_accepted':<34}{result['oracle_blocks_per_s']:>12,} blocks/s")
    print(f"{'p_best, p = 1':<34}{result['p_best_1_us']:>12} us per lattice")
    print(f"{f'p_best, p = {P}':<34}{result['p_best_16_us']:>12} us per lattice")
    print(f"{f'p_best, p = {P}, all paths equal':<34}{result['p_best_16_all_tied_us']:>12} us per lattice")
    print(f"{f'prefix tree, p = {P}':<34}{result['prefix_tree_us']:>12} us per tree ({nodes:.1f} nodes)")
    print()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
