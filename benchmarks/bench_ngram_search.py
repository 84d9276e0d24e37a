"""Exact p-best search over lattice and n-gram automaton: ours against OpenFst, on the same lattices in the same run.

`python benchmarks/bench_ngram_search.py --automaton PATH... --trace FOLDER... [--limit N] [--weight W] [--k K]
[--p P...] [--passes N] [--fst FOLDER] [--check N] [--arpa PATH...]`, with the project installed; run it on one core
(OMP_NUM_THREADS=1). An automaton is a folder of `build-ngram` or its `.bin`. The lattices are positions of the traces,
evenly spread; their left contexts are prompt + output. Both sides start from the lattice's arrays, one lattice a call;
each lattice counts with the best of several passes, in which the two sides take turns. Compiling is not counted.

OpenFst (`pip install pynini`; without it only ours is measured): the automaton is one transducer with back-off as
epsilon, built once (`--fst` keeps it for the next run) and started in the state of the left context; a call makes the
lattice's transducer (the quickest way from Python found: text), composes and takes the p shortest paths. Looking up
the context's state, which both sides need, and reading the paths out of OpenFst's result are not counted. Its epsilon
back-off is an approximation from above: "best path equal" is the share of lattices where it makes no difference to
the best score. On `--check` lattices the p best scores are compared with those of the exact composition.

With `--arpa` (one for each automaton, in their order) a million random (context, word) pairs are scored by the
automaton and by KenLM. Prints tables, then one JSON line; exit code 1 if KenLM's scores are not the automaton's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lattices.automaton import LN10, ROOT, SCORE_SCALE, Automaton
from lattices.lattice import Lattice
from lattices.ngram_search import NgramSearch
from lattices.ngrams import SENTENCE_END, UNKNOWN
from lm.files import sha256_of_file
from lm.ngram.build import AUTOMATON_FILE
from rescore.exports.openfst import automaton_text, composition_text, dense_states
from rescore.tracing import read_trace

LOADS = 20
PAIRS = 1_000_000
SAME = 1e-3  # nats: OpenFst adds in float32
KENLM_TOLERANCE = 1e-4  # log10


def load_lattices(folders: list[Path], k: int, limit: int) -> tuple[Lattice, list[np.ndarray], int, list[int]]:
    """Up to `limit` lattices `[n, h, k]`, the tokens before each, the vocabulary's size, end-of-text ids."""
    ids, logps, contexts = [], [], []
    traces = [read_trace(folder) for folder in folders]
    for trace in traces:
        for example in trace.examples:
            before = np.concatenate([example.prompt_ids, example.output_ids])
            for i in range(len(example.output_ids)):
                ids.append(example.lattice.token_ids[i, :, :k])
                logps.append(example.lattice.logps[i, :, :k])
                contexts.append(before[: len(example.prompt_ids) + i])
    chosen = np.unique(np.linspace(0, len(ids) - 1, min(limit, len(ids))).astype(int))
    lattice = Lattice(np.stack([ids[i] for i in chosen]), np.stack([logps[i] for i in chosen]))
    header = traces[0].header
    return lattice, [contexts[i] for i in chosen], header.vocab_size, header.eos_token_ids


class OpenFst:
    """The same search by OpenFst: compose and shortestpath."""

    def __init__(self, automaton: Automaton, words: np.ndarray, weight: float, kept: Path | None) -> None:
        import pywrapfst

        self.fst, self.labels = pywrapfst, words + 1
        self.states = dense_states(automaton)
        self.machine: Any
        start = time.perf_counter()
        if kept is not None and kept.is_file():
            self.machine = pywrapfst.Fst.read(str(kept))
        else:
            compiler = pywrapfst.Compiler()
            for block in automaton_text(automaton, weight=weight):
                compiler.write(block)
            self.machine = compiler.compile()
            self.machine.arcsort("ilabel")
            if kept is not None:
                self.machine.write(str(kept))
        self.seconds = time.perf_counter() - start

    def lattice(self, lattice: Lattice, i: int) -> Any:
        """The transducer of lattice i."""
        compiler, lines = self.fst.Compiler(), []
        labels = self.labels[lattice.token_ids[i]].tolist()
        rows = zip((lattice.token_ids[i] + 1).tolist(), labels, (-lattice.logps[i]).tolist(), strict=True)
        for j, (into, out, costs) in enumerate(rows):
            for a, b, cost in zip(into, out, costs, strict=True):
                lines.append(f"{j} {j + 1} {a} {b} {cost}\n")
                if not j:
                    break  # slot 1 stays its arg-max
        lines.append(f"{lattice.h}\n")
        compiler.write("".join(lines))
        return compiler.compile()

    def p_best(self, lattice: Lattice, i: int, state: int, p: int) -> Any:
        """The p shortest paths of lattice i after the automaton's `state` (counted from 0 without gaps)."""
        self.machine.set_start(state)
        return self.fst.shortestpath(self.fst.compose(self.lattice(lattice, i), self.machine), nshortest=p)

    def scores(self, paths: Any) -> list[float]:
        """Scores of shortest paths, best first."""
        found, upcoming = [], [(paths.start(), 0.0)]
        while upcoming:
            at, cost = upcoming.pop()
            if (end := float(paths.final(at))) < float("inf"):
                found.append(-cost - end)
            upcoming += [(arc.nextstate, cost + float(arc.weight)) for arc in paths.arcs(at)]
        return sorted(found, reverse=True)

    def exact_scores(self, composition: str, p: int) -> list[float]:
        """Scores of the p shortest paths of a composition without epsilon."""
        compiler = self.fst.Compiler()
        compiler.write(composition)
        return self.scores(self.fst.shortestpath(compiler.compile(), nshortest=p))


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def percentiles(seconds: np.ndarray) -> dict[str, float]:
    """p50 and p95 in milliseconds, over the lattices' best passes `[passes, n]`."""
    p50, p95 = np.percentile(seconds.min(axis=0), [50, 95]) * 1e3
    return {"p50_ms": round(float(p50), 4), "p95_ms": round(float(p95), 4)}


def bench(
    automaton: Automaton, words: np.ndarray, lattice: Lattice, contexts: list[np.ndarray], options: argparse.Namespace,
    kept: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """All timings of one automaton."""
    search = NgramSearch(automaton, words)
    needed = max(1, automaton.order - 1)
    states = np.array([search.state_after(context[-needed:]) for context in contexts], dtype=np.int32)
    one_by_one = [(lattice[i : i + 1], states[i : i + 1]) for i in range(len(lattice))]
    result: dict[str, Any] = {"order": automaton.order, "ngrams": sum(automaton.counts)}
    opponent: OpenFst | None = None
    if not options.without_openfst:
        try:
            opponent = OpenFst(automaton, words, options.weight, kept)
        except ImportError:
            print("pywrapfst is not installed (pip install pynini): no comparison with OpenFst", file=sys.stderr)
    dense = np.searchsorted(opponent.states, states).tolist() if opponent else []
    if opponent:
        result["openfst_built_s"] = round(opponent.seconds, 1)
        made = [
            [seconds_of(partial(opponent.lattice, lattice, i)) for i in range(len(lattice))]
            for _ in range(options.passes)
        ]
        result["openfst_lattice_ms"] = percentiles(np.array(made))["p50_ms"]
        free = np.array([opponent.scores(opponent.p_best(lattice, i, dense[i], 1))[0] for i in range(len(lattice))])
        ours = search.p_best(lattice, states, 1, weight=options.weight).scores[:, 0]
        if (ours > free + SAME).any():
            sys.exit("OpenFst's best path with free back-off scores worse than ours, which can't be")
        result["best_path_equal"] = round(float((ours > free - SAME).mean()), 3)
        # Exactness on some of the lattices: all of the automaton that they need, expanded.
        most = max(options.p)
        for i in np.linspace(0, len(lattice) - 1, min(options.check, len(lattice))).astype(int).tolist():
            text = composition_text(lattice[i], words, automaton, int(states[i]), weight=options.weight)
            scores = search.p_best(lattice[i : i + 1], states[i : i + 1], most, weight=options.weight).scores[0]
            if np.abs(scores - opponent.exact_scores(text, most)).max() > SAME:
                sys.exit(f"lattice {i}: the {most} best paths are not those of the exact composition")
        result["exact_on"] = min(options.check, len(lattice))
    for p in options.p:
        search.p_best(lattice, states, p, weight=options.weight)  # compiles, and makes room
        mine, other = np.empty((options.passes, len(lattice))), np.empty((options.passes, len(lattice)))
        for turn in range(options.passes):
            for i, (one, state) in enumerate(one_by_one):
                start = time.perf_counter()
                search.p_best(one, state, p, weight=options.weight)
                mine[turn, i] = time.perf_counter() - start
            for i in range(len(lattice) if opponent else 0):
                assert opponent is not None
                start = time.perf_counter()
                opponent.p_best(lattice, i, dense[i], p)
                other[turn, i] = time.perf_counter() - start
        whole = partial(search.p_best, lattice, states, p, weight=options.weight)
        batch = min(seconds_of(whole) for _ in range(options.passes))
        measured: dict[str, Any] = {"ours": percentiles(mine), "batched_blocks_per_s": round(len(lattice) / batch)}
        if opponent:
            measured["openfst"] = percentiles(other)
            measured["ratio_p50"] = round(measured["openfst"]["p50_ms"] / measured["ours"]["p50_ms"], 1)
            measured["ratio_p95"] = round(measured["openfst"]["p95_ms"] / measured["ours"]["p95_ms"], 1)
        result[f"p{p}"] = measured
    return result


def check_against_kenlm(
    automaton: Automaton, words: np.ndarray, arpa: Path, contexts: list[np.ndarray], pairs: int
) -> float:
    """The largest difference (log10) over random (context, word) pairs: half of the words as they stand in the traces,
    half drawn from the vocabulary, a twentieth unknown; every second context follows `<s>`."""
    import kenlm

    config = kenlm.Config()
    config.show_progress, config.arpa_complain = False, kenlm.ARPALoadComplain.NONE
    scorer = kenlm.Model(str(arpa), config)
    rng = np.random.default_rng(0)
    width = automaton.order + 2
    stream = words[np.concatenate(contexts[:: max(1, len(contexts) // 200)])]
    places = rng.integers(0, len(stream) - width, pairs)[:, None] + np.arange(width)
    drawn = np.where(
        rng.random((pairs, width)) < 0.5, stream[places], rng.integers(0, len(automaton.roots), places.shape)
    )
    real = rng.random(pairs) < 0.5  # whole stretches of text: long n-grams are met
    drawn[real] = stream[places[real]]
    unseen = rng.random(drawn.shape) < 0.05
    drawn[unseen] = UNKNOWN
    used = rng.integers(1, width + 1, pairs)  # words of each pair, the last of them scored
    follows_start = np.arange(pairs) % 2 == 1

    states = np.where(follows_start, automaton.start, ROOT).astype(np.int64)
    for column in range(width - 1):
        there = column >= width - used
        states[there] = automaton.advance_many(states[there], drawn[there, column])[1]
    scores = automaton.advance_many(states, drawn[:, -1])[0] / (LN10 * SCORE_SCALE)

    vocabulary = automaton.vocabulary
    inside, outside = kenlm.State(), kenlm.State()
    expected = np.empty(pairs)
    for i in range(pairs):
        (scorer.BeginSentenceWrite if follows_start[i] else scorer.NullContextWrite)(inside)
        for word, new in zip(drawn[i, width - used[i] :].tolist(), unseen[i, width - used[i] :].tolist(), strict=True):
            expected[i] = scorer.BaseScore(inside, "never-seen" if new else vocabulary[word], outside)
            inside, outside = outside, inside
    return float(np.abs(scores - expected).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--automaton", type=Path, nargs="+", required=True)
    parser.add_argument("--trace", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=300, help="lattices")
    parser.add_argument("--weight", type=float, default=0.5)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--p", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--fst", type=Path, help="a folder that keeps OpenFst's automata")
    parser.add_argument("--without-openfst", action="store_true")
    parser.add_argument(
        "--check", type=int, default=10, help="lattices whose p best are compared with OpenFst's exact ones"
    )
    parser.add_argument("--arpa", type=Path, nargs="+", default=[], help="check against KenLM; one for each automaton")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    options = parser.parse_args()
    if options.arpa and len(options.arpa) != len(options.automaton):
        parser.error("--arpa needs one file for each --automaton")
    lattice, contexts, vocab_size, eos_token_ids = load_lattices(options.trace, options.k, options.limit)
    if options.fst:
        options.fst.mkdir(parents=True, exist_ok=True)
    print(f"{len(lattice)} lattices of {lattice.h} slots x {lattice.k} tokens, weight {options.weight:g}, one core\n")
    print(f"{'':<28}{'p':>4}{'ours ms':>9}{'p95':>8}{'OpenFst ms':>12}{'p95':>8}{'ratio':>7}{'p95':>7}{'blocks/s':>10}")
    results, wrong = [], False
    for place, path in enumerate(options.automaton):
        file = path / AUTOMATON_FILE if path.is_dir() else path
        automaton = Automaton.load(file)
        words = automaton.words_of_tokens(vocab_size)
        words[eos_token_ids] = SENTENCE_END
        kept = options.fst / f"{sha256_of_file(file)[:16]}-{options.weight:g}.fst" if options.fst else None
        result = bench(automaton, words, lattice, contexts, options, kept)
        result["automaton"] = str(path)
        result["load_ms"] = round(min(seconds_of(partial(Automaton.load, file)) for _ in range(LOADS)) * 1e3, 3)
        for p in options.p:
            row = result[f"p{p}"]
            name = f"order {result['order']}, {result['ngrams']:,} n-grams"
            ours, theirs = row["ours"], row.get("openfst", {"p50_ms": "-", "p95_ms": "-"})
            print(
                f"{name:<28}{p:>4}"
                f"{ours['p50_ms']:>9}{ours['p95_ms']:>8}{theirs['p50_ms']:>12}{theirs['p95_ms']:>8}"
                f"{row.get('ratio_p50', '-'):>7}{row.get('ratio_p95', '-'):>7}{row['batched_blocks_per_s']:>10,}"
            )
        about = f"  loaded in {result['load_ms']} ms"
        if "best_path_equal" in result:
            about += (
                f"; exact on {result['exact_on']} lattices; OpenFst: best path equal on {result['best_path_equal']:.1%}"
            )
            about += f", lattice made in {result['openfst_lattice_ms']} ms of its time"
        print(about)
        if options.arpa:
            difference = check_against_kenlm(automaton, words, options.arpa[place], contexts, options.pairs)
            result["kenlm_pairs"], result["kenlm_largest_difference"] = options.pairs, difference
            wrong |= not difference <= KENLM_TOLERANCE
            print(f"  {options.pairs:,} pairs: KenLM's log10 probabilities differ by {difference:.2g} at most")
        results.append(result)
    print()
    print(
        json.dumps(
            {"lattices": len(lattice), "h": lattice.h, "k": lattice.k, "weight": options.weight, "results": results}
        )
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
