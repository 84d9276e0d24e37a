"""Lookup in a corpus (`lattices.joined.corpus_index`) and in the text so far (`lattices.joined.lookup`), on one core.

`python benchmarks/bench_lookup.py [CORPUS...] [--tokenizer NAME] [--field NAME] [--tokens N ...]`, with the project
installed (OMP_NUM_THREADS=1, TOKENIZERS_PARALLELISM=false). CORPUS is what `rescore build-lookup` takes, all of them
one index, built as the command does it; beside it corpora of N tokens drawn at random by Zipf's law. The questions are
asked of an index of nine tenths of the documents, at places of the others, as text of a user would be: a question is
one call of `CorpusIndex.continuations` from Python. The text so far is 4096 tokens, then grows token by token, each
added and matched, called from Python and in compiled code. Compiling is not counted. Prints a table, then one JSON
line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from lattices.joined import lookup
from lattices.joined.corpus_index import END, CorpusIndex, build_suffix_array, join_documents

VOCABULARY, EXPONENT, DOCUMENT = 49152, 1.1, 512  # of random corpora: ids, Zipf's exponent, tokens of a document
HELD_OUT = 10  # every tenth document
CONTEXT, MORE = 4096, 1024  # tokens of the text so far, and by how many it grows
MOST = 16  # tokens of a match
WARM_UP = 50  # questions
PASSES = 9  # over the growing text in compiled code, after one that compiles; the median counts


def zipf_corpus(tokens: int) -> np.ndarray:
    """Tokens drawn independently, the i-th likeliest with a probability proportional to i^-1.1."""
    chances = np.arange(1, VOCABULARY + 1) ** -EXPONENT
    drawn = np.random.default_rng(0).choice(VOCABULARY, size=tokens, p=chances / chances.sum())
    return join_documents(np.split(drawn, range(DOCUMENT, tokens, DOCUMENT)))


def documents_of(corpus: np.ndarray) -> list[np.ndarray]:
    """The documents of a corpus as an index holds it."""
    ends = np.flatnonzero(corpus == END)
    return [corpus[start:end] for start, end in zip([0, *(ends[:-1] + 1)], ends, strict=True)]


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall-clock of a call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and 95th percentile in microseconds."""
    return {f"p{share}_us": round(float(np.percentile(seconds, share)) * 1e6, 2) for share in (50, 95)}


def bench_questions(documents: list[np.ndarray], options: argparse.Namespace) -> dict[str, Any]:
    """Questions about documents that are not indexed."""
    index = CorpusIndex.build(document for i, document in enumerate(documents) if i % HELD_OUT)
    others = np.concatenate(documents[::HELD_OUT])
    seconds, lengths = [], []
    for place in np.random.default_rng(1).integers(1, len(others) + 1, options.questions + WARM_UP):
        last = others[max(0, place - MOST) : place]
        begin = time.perf_counter()
        _, _, matched = index.continuations(last, count=options.count, length=options.length, most=MOST)
        seconds.append(time.perf_counter() - begin)
        lengths.append(matched)
    matches = np.array(lengths[WARM_UP:])
    return {
        **spread(seconds[WARM_UP:]), "matched": round(float(np.mean(matches > 0)), 4),
        "match_length": round(float(np.mean(matches)), 2),
    }  # fmt: skip


@njit
def _grow(tables: lookup.Tables, token_ids: np.ndarray) -> int:
    """Adds tokens one by one, and after each finds the match of the text."""
    lengths = 0
    for place in range(len(token_ids)):
        lookup.extend(tables, token_ids[place : place + 1])
        lengths += lookup.follow(tables, token_ids[:0])[1]
    return lengths


def bench_text(documents: list[np.ndarray]) -> dict[str, float]:
    """The text so far: microseconds to add a token and find the match."""
    text = np.concatenate(documents)[: CONTEXT + MORE]
    context, more = text[:CONTEXT], text[CONTEXT:]
    inside = []
    for _ in range(1 + PASSES):
        tables = lookup._tables(len(text))
        lookup.extend(tables, context)
        inside.append(seconds_of(lambda t=tables: _grow(t, more)) / len(more))  # type: ignore[misc]
    growing, seconds = lookup.Lookup(context), []
    for token in more[:, None]:
        begin = time.perf_counter()
        growing.extend(token)
        lookup.follow(growing.tables, token[:0])
        seconds.append(time.perf_counter() - begin)
    return {**spread(seconds), "compiled_us": round(float(np.median(inside[1:])) * 1e6, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="*", help="as rescore build-lookup takes it")
    parser.add_argument("--tokenizer", default="smollm2-135m")
    parser.add_argument("--field", default="text")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1_000_000], help="of random corpora")
    parser.add_argument("--count", type=int, default=4, help="continuations of a question")
    parser.add_argument("--length", type=int, default=10, help="tokens of a continuation")
    parser.add_argument("--questions", type=int, default=5000)
    options = parser.parse_args()
    build_suffix_array(join_documents([[1, 2, 1, 2]]))  # compiles
    corpora: list[tuple[str, np.ndarray, float | None, float]] = []
    for tokens in options.tokens:
        corpus = zipf_corpus(tokens)
        corpora.append(("zipf", corpus, None, (8 * tokens + 4 * np.count_nonzero(corpus == END)) / 1e6))
    if options.corpus:
        from lm.lookup_index import LookupOptions, build_lookup, open_lookup

        with tempfile.TemporaryDirectory() as folder:
            out, reading = Path(folder) / "index", LookupOptions(tokenizer=options.tokenizer, field=options.field)
            built_s = round(seconds_of(lambda: build_lookup(options.corpus, out, reading)), 2)
            size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
            name = Path(options.corpus[0]).name if len(options.corpus) == 1 else f"{len(options.corpus)} corpora"
            corpora.append((name, np.array(open_lookup(out).corpus.token_ids), built_s, size))
    asked = f"a question for {options.count} x {options.length} tokens"
    print(f"{'':<22}{'':>10}{'':>8}{'build s':>9}{'':>9}{'':>7}{asked:>44}{'text so far':>20}")
    print(
        f"{'corpus':<22}{'tokens':>10}{'docs':>8}{'whole':>9}{'sorting':>9}{'MB':>7}"
        f"{'us':>9}{'p95':>9}{'matched':>12}{'by tokens':>14}{'us':>10}{'compiled':>10}"
    )
    results = []
    for name, corpus, whole_s, size in corpora:
        documents = documents_of(corpus)
        sorting = round(seconds_of(lambda c=corpus: build_suffix_array(c)), 3)  # type: ignore[misc]
        questions, text = bench_questions(documents, options), bench_text(documents)
        tokens = len(corpus) - len(documents)
        result = {
            "corpus": name,
            "tokens": tokens,
            "documents": len(documents),
            "build_s": whole_s,
            "sorting_s": sorting,
        }
        results.append({**result, "mb": round(size, 1), "questions": questions, "text": text})
        whole = f"{whole_s:.2f}" if whole_s else "-"
        print(
            f"{name:<22}{tokens:>10,}{len(documents):>8,}{whole:>9}{sorting:>9.2f}{size:>7.1f}"
            f"{questions['p50_us']:>9}{questions['p95_us']:>9}{questions['matched']:>12.1%}"
            f"{questions['match_length']:>14}{text['p50_us']:>10}{text['compiled_us']:>10}"
        )
    print()
    print(
        json.dumps(
            {"count": options.count, "length": options.length, "most": MOST, "context": CONTEXT, "results": results}
        )
    )


if __name__ == "__main__":
    main()
