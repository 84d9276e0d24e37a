"""Counting and estimation: equal to what lmplz printed, to a slow Kneser-Ney, and to themselves out of core."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import files_of_at_most, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lattices.errors import InvalidDataError, OutputError, RescoreError
from lattices.ngrams import NgramModel
from lm.ngram import counting, tables
from lm.ngram.counting import BREAK, Workspace, count_full
from lm.ngram.estimation import check_fallback, check_thresholds, estimate, good_turing_factors, kneser_ney_discounts
from lm.ngram.tables import NgramTable, build_table

REFERENCE = Path(__file__).parent / "reference"
DEFAULT_FALLBACK = (0.5, 1.0, 1.5)  # lmplz's
TOLERANCE = 1e-5  # in log10: what the files' single precision leaves
thorough = settings(
    deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
Ngrams = list[dict[str, tuple[float, float]]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "counting"


def numbered(sentences: Sequence[Sequence[str]]) -> tuple[np.ndarray, list[str]]:
    """Word ids with `</s>` after every sentence, and the vocabulary."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    ids = []
    for sentence in sentences:
        ids += [vocabulary.setdefault(word, len(vocabulary)) for word in sentence] + [2]
    return np.array(ids, np.int32), list(vocabulary)


def table_of(
    ids: np.ndarray, size: int, order: int, folder: Path, *, memory: int = 1 << 26, threads: int = 1
) -> NgramTable:
    shutil.rmtree(folder, ignore_errors=True)
    full = count_full(ids, order=order, vocabulary_size=size, folder=folder, memory=memory, threads=threads)
    return build_table(full, Workspace(folder, memory), threads=threads)


def estimated(
    sentences: Sequence[Sequence[str]],
    order: int,
    folder: Path,
    *,
    smoothing: str = "kneser-ney",
    prune: Sequence[int] = (),
    discount_fallback: Sequence[float] | None = None,
    max_ngrams: int | None = None,
) -> NgramModel:
    ids, vocabulary = numbered(sentences)
    return estimate(
        table_of(ids, len(vocabulary), order, folder), vocabulary, smoothing=smoothing,
        prune=check_thresholds(prune, order, smoothing), discount_fallback=check_fallback(discount_fallback),
        max_ngrams=max_ngrams, workspace=Workspace(folder, 1 << 26),
    ).model  # fmt: skip


def as_ngrams(model: NgramModel) -> Ngrams:
    """Per order: n-gram -> (log10 probability, log10 back-off)."""
    return [
        {
            " ".join(model.vocabulary[i] for i in words): (p, backoff)
            for words, p, backoff in zip(o.words.tolist(), o.log10p.tolist(), o.log10_backoff.tolist(), strict=True)
        }
        for o in model.orders
    ]


def read_reference(path: Path) -> Ngrams:
    orders: Ngrams = []
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    for line in text.decode().split("\n"):
        if line.endswith("-grams:"):
            orders.append({})
        elif orders and "\t" in line:
            p, words, *backoff = line.split("\t")
            orders[-1][words] = float(p), float(backoff[0]) if backoff else 0.0
    return orders


def assert_same(ours: Ngrams, theirs: Ngrams, tolerance: float = TOLERANCE) -> None:
    assert [set(o) for o in ours] == [set(o) for o in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for words, scores in mine.items():
            assert scores == pytest.approx(other[words], abs=tolerance), words


def sentences_of(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().split("\n")[:-1]]


@pytest.mark.parametrize("path", sorted(REFERENCE.glob("fable-*.arpa.gz")), ids=lambda p: p.name)
def test_equals_what_lmplz_printed(path: Path, folder: Path) -> None:
    order, _, prune = path.name.removesuffix(".arpa.gz").removeprefix("fable-").partition("-prune-")
    thresholds = [int(t) for t in prune.split("-")] if prune else []
    # No word and no 5-gram occurs just three times, so these orders need the fallback.
    fallback = DEFAULT_FALLBACK if order in "15" else None
    sentences = sentences_of(REFERENCE / "fable.txt")
    model = estimated(sentences, int(order), folder, prune=thresholds, discount_fallback=fallback)
    assert_same(as_ngrams(model), read_reference(path))


def test_fallback_discounts_equal_what_lmplz_printed(folder: Path) -> None:
    model = estimated(sentences_of(REFERENCE / "tiny.txt"), 3, folder, discount_fallback=(0.4, 0.9))
    assert_same(as_ngrams(model), read_reference(REFERENCE / "tiny-3-fallback.arpa.gz"))


@pytest.mark.skipif(shutil.which("lmplz") is None, reason="no lmplz on PATH")
@pytest.mark.parametrize("order", [2, 3, 4, 5])
@pytest.mark.parametrize("prune", [(), (0, 1), (1, 1)])
def test_equals_a_live_lmplz(order: int, prune: tuple[int, ...], folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(order)
    sentences = [[f"w{i}" for i in rng.zipf(1.4, rng.integers(0, 20)) if i < 500] for _ in range(400)]
    text, arpa = tmp_path / "text.txt", tmp_path / "model.arpa"
    text.write_text("".join(" ".join(s) + "\n" for s in sentences))
    command = ["lmplz", "-o", str(order), "-S", "100M", "-T", f"{tmp_path}/", "--vocab_estimate", "1000"]
    command += ["--discount_fallback", "--text", str(text), "--arpa", str(arpa)]
    command += ["--prune", *map(str, prune)] if prune else []
    subprocess.run(command, check=True, capture_output=True)
    model = estimated(sentences, order, folder, prune=prune, discount_fallback=DEFAULT_FALLBACK)
    assert_same(as_ngrams(model), read_reference(arpa))


# A slow Kneser-Ney to read


def padded_counts(sentences: Sequence[Sequence[str]], n: int) -> Counter[tuple[str, ...]]:
    """Occurrences of the n-grams with at most one `<s>`, at their beginning."""
    counts: Counter[tuple[str, ...]] = Counter()
    for sentence in sentences:
        words = ["<s>", *sentence, "</s>"]
        # A unigram <s> is never predicted, so it does not occur.
        counts.update(tuple(words[i : i + n]) for i in range(int(n == 1), len(words) - n + 1))
    return counts


def slow_kneser_ney(sentences: Sequence[Sequence[str]], order: int, prune: Sequence[int], fallback) -> Ngrams:
    """Chen and Goodman's interpolated modified Kneser-Ney, straight from the definition."""
    raw = {n: padded_counts(sentences, n) for n in range(1, order + 1)}
    adjusted = {order: dict(raw[order])}
    for n in range(1, order):
        left = defaultdict(set)
        for ngram in raw[n + 1]:
            left[ngram[1:]].add(ngram[0])
        adjusted[n] = {g: raw[n][g] if g[0] == "<s>" else len(left[g]) for g in raw[n]}
    # lmplz's peculiarity: the tails of the very last n-gram are counted by occurrences. Words stand as they appear.
    place = {word: i for i, word in enumerate(numbered(sentences)[1])}
    padded = [["<s>"] * (order - 1) + [*s, "</s>"] for s in sentences]
    rows = [tuple(p[i : i + order]) for p in padded for i in range(len(p) - order + 1)]
    greatest = max(rows, key=lambda row: [place[w] for w in reversed(row)])
    orders: Ngrams = []
    probability: dict[tuple[str, ...], float] = {}
    backoffs: dict[tuple[str, ...], float] = {}
    for n in range(1, order + 1):
        found = Counter(adjusted[n].values())
        tail = greatest[-n:]
        if n < order and tail in adjusted[n]:
            found[adjusted[n][tail]] -= 1
            found[raw[n][tail]] += 1
        try:
            d = (0.0, *kneser_ney_discounts(np.array([found[i] for i in range(5)]), n))
        except InvalidDataError:
            d = (0.0, *fallback)
        kept = {g for g in adjusted[n] if raw[n][g] > prune[n - 1] or g == ("</s>",)}
        groups = defaultdict(list)
        for ngram in adjusted[n]:
            groups[ngram[:-1]].append(ngram)
        for context, ngrams in groups.items():
            total = sum(adjusted[n][g] for g in ngrams)
            left_over = sum(d[min(adjusted[n][g], 3)] if g in kept else adjusted[n][g] for g in ngrams)
            backoffs[context] = left_over / total
            for g in ngrams:
                lower = probability[g[1:]] if n > 1 else 1 / (len(kept) + 1)
                probability[g] = (adjusted[n][g] - d[min(adjusted[n][g], 3)]) / total + backoffs[context] * lower
        if n == 1:
            probability["<unk>",] = backoffs[()] / (len(kept) + 1)
            probability["<s>",] = 1.0
            kept |= {("<unk>",), ("<s>",)}
        orders.append({g: probability[g] for g in kept})
    return [
        {" ".join(g): (np.log10(p), np.log10(backoffs.get(g, 1.0)) if n < order else 0.0) for g, p in kept.items()}
        for n, kept in enumerate(orders, start=1)
    ]


texts = st.lists(st.lists(st.sampled_from("abcdef"), max_size=8), min_size=1, max_size=25).filter(any)


@thorough
@given(texts, st.integers(1, 5), st.lists(st.integers(0, 2), max_size=5).map(sorted))
def test_equals_the_definition(folder: Path, sentences, order: int, prune: list[int]) -> None:
    # lmplz itself counts </s> wrongly where its threshold reaches the number of sentences.
    prune = [min(t, len(sentences) - 1) for t in prune[:order]] or [0]
    full = prune + prune[-1:] * (order - len(prune))
    model = estimated(sentences, order, folder, prune=prune, discount_fallback=DEFAULT_FALLBACK)
    assert_same(as_ngrams(model), slow_kneser_ney(sentences, order, full, DEFAULT_FALLBACK))
    for ngrams in model.orders:
        assert ngrams.words.dtype == np.int32
        assert ngrams.log10p.dtype == ngrams.log10_backoff.dtype == np.float32
        assert ngrams.words.tolist() == sorted(ngrams.words.tolist())


# Every model is one: each context sums to one


def probability(ngrams: Ngrams, context: tuple[str, ...], word: str) -> float:
    """Back-off lookup."""
    entry = ngrams[len(context)].get(" ".join((*context, word))) if len(context) < len(ngrams) else None
    if entry:
        return 10 ** entry[0]
    weight = ngrams[len(context) - 1].get(" ".join(context), (0.0, 0.0))[1]
    return 10**weight * probability(ngrams, context[1:], word)


@thorough
@given(
    texts,
    st.integers(1, 4),
    st.sampled_from([{}, {"prune": (0, 1)}, {"smoothing": "katz"}, {"smoothing": "katz", "prune": (0,)}]),
    st.sampled_from([None, 10, 20]),
)
def test_every_context_sums_to_one(folder: Path, sentences, order: int, options, max_ngrams) -> None:
    options = {**options, "max_ngrams": max_ngrams}
    options["prune"] = options.get("prune", ())[:order]
    if options.get("smoothing") != "katz":
        options["discount_fallback"] = DEFAULT_FALLBACK
    ngrams = as_ngrams(estimated(sentences, order, folder, **options))
    words = [w for w in ngrams[0] if w != "<s>"]
    contexts = [()] + [tuple(g.split()) for o in ngrams[:-1] for g in o if not g.endswith(("</s>", "<unk>"))]
    for context in contexts:
        assert sum(probability(ngrams, context, w) for w in words) == pytest.approx(1, abs=1e-4), context
    if max_ngrams is not None:
        assert sum(map(len, ngrams)) <= max_ngrams
    for order_ngrams, below in zip(ngrams[1:], ngrams, strict=False):
        for g in order_ngrams:  # what an n-gram stands on stays in the model
            assert g.split(" ", 1)[1] in below and g.rsplit(" ", 1)[0] in below


# Counting


@pytest.mark.parametrize("order", [1, 2, 4, 6])
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_counts_in_any_runs_and_keys_are_the_same(
    order: int, columns: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, vocabulary = numbered(sentences_of(REFERENCE / "fable.txt"))
    whole = table_of(ids, len(vocabulary), order, folder)
    per_key = -(-order // columns)
    monkeypatch.setattr(counting, "LEAST_CHUNK", 17)
    for module in (counting, tables):
        monkeypatch.setattr(module, "key_layout", lambda n, size: counting.Layout(n, 5, per_key))
    for threads in (1, 2):
        parts = table_of(ids, len(vocabulary), order, folder, memory=1000, threads=threads)  # tables on disk as well
        for name in NgramTable._fields:
            np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name), err_msg=name)


def test_links_lead_to_suffixes_and_contexts(folder: Path) -> None:
    ids, vocabulary = numbered(sentences_of(REFERENCE / "fable.txt"))
    table = table_of(ids, len(vocabulary), 4, folder)

    def words(i: int) -> tuple[int, ...]:
        return (int(table.first[i]), *(words(table.suffix[i]) if table.suffix[i] >= 0 else ()))

    for i in range(table.offsets[1], table.offsets[4]):
        assert words(table.context[i]) == words(i)[:-1]
        assert table.last[i] == words(i)[-1]


def test_finished_runs_are_used_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "LEAST_CHUNK", 50)
    ids, vocabulary = numbered(sentences_of(REFERENCE / "fable.txt"))
    options = {"order": 3, "vocabulary_size": len(vocabulary), "folder": folder, "memory": 1000, "threads": 1}

    class StopError(Exception):
        pass

    def stop(_stage: str, done: int, _total: int) -> None:
        if done >= 100:
            raise StopError

    with pytest.raises(StopError):
        count_full(ids, **options, progress=stop)
    finished = {p.name for p in folder.glob("*.keys")}
    assert finished
    made = []
    monkeypatch.setattr(
        counting,
        "_write_run",
        lambda path, *run, write=counting._write_run: (made.append(path.name), write(path, *run)),
    )
    again = count_full(ids, **options)
    assert not finished & set(made)
    fresh = count_full(ids, **{**options, "folder": folder / "fresh"})
    np.testing.assert_array_equal(again.keys, fresh.keys)
    np.testing.assert_array_equal(again.counts, fresh.counts)


def test_a_cut_document_has_no_end(folder: Path) -> None:
    table = table_of(np.array([3, 4, BREAK, 4, 3, 2], np.int32), 5, 2, folder)
    assert table.raw[:5].tolist() == [0, 0, 1, 2, 2]
    pairs = {(int(table.first[i]), int(table.last[i])) for i in range(5, len(table.raw))}
    assert pairs == {(1, 3), (3, 4), (1, 4), (4, 3), (3, 2)}


@pytest.mark.parametrize("chunk", [1 << 18, 500])
def test_a_disk_that_fills_up_with_the_last_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Of a run, and with several runs of what they are merged to; the counts have the same fate as the keys."""
    monkeypatch.setattr(counting, "LEAST_CHUNK", chunk)
    ids = np.random.default_rng(0).integers(2, 40, 2000).astype(np.int32)
    options = {"order": 2, "vocabulary_size": 40, "memory": 1, "threads": 1}
    keys = count_full(ids, **options, folder=folder / "whole").keys
    with files_of_at_most(keys.nbytes - 1):
        refused(lambda: count_full(ids, **options, folder=folder / "cut"), OutputError, "can't write")


def test_a_full_disk_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(counting, "_write_run", full)
    with pytest.raises(OutputError, match="No space left"):
        count_full(np.array([3, 2], np.int32), order=2, vocabulary_size=4, folder=folder, memory=1000, threads=1)


# Settings and corpora that can't be


def test_too_small_a_corpus_says_what_to_do(folder: Path) -> None:
    with pytest.raises(InvalidDataError, match=r"1-grams.*--discount-fallback"):
        estimated([["a"]], 2, folder)


def test_discounts_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidDataError, match="outside 0 to 2"):
        kneser_ney_discounts(np.array([0, 9, 1, 90, 1]), 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prune": (0, 2, 1)}, "nor fall"),
        ({"prune": (-1,)}, "negative"),
        ({"prune": (0, 0, 0, 0)}, "4 pruning thresholds for a model of order 3"),
        ({"discount_fallback": (2, 1, 1)}, "between 0 and 1"),
        ({"discount_fallback": ()}, "0 fallback discounts"),
        ({"max_ngrams": 3, "discount_fallback": (0.5,)}, "less than the vocabulary"),
    ],
)
def test_settings_that_make_no_sense(options, said: str, folder: Path) -> None:
    with pytest.raises(RescoreError, match=said):
        estimated([["a", "b"], ["b"]], 3, folder, **options)


def test_good_turing_factors_are_katz_formula() -> None:
    counts = np.repeat(np.arange(1, 7), [120, 40, 20, 12, 8, 5])
    factors, stood_in = good_turing_factors(counts)
    common = 6 * 5 / 120
    expected = [
        ((r + 1) * b / a / r - common) / (1 - common)
        for r, (a, b) in enumerate(zip([120, 40, 20, 12, 8], [40, 20, 12, 8, 5], strict=True), start=1)
    ]
    assert factors == pytest.approx(expected) and not stood_in


def test_katz_cut_offs_are_those_of_the_paper(folder: Path) -> None:
    sentences = sentences_of(REFERENCE / "fable.txt")
    ngrams = as_ngrams(estimated(sentences, 4, folder, smoothing="katz"))
    for n, least in ((1, 1), (2, 1), (3, 2), (4, 4)):
        expected = {" ".join(g) for g, count in padded_counts(sentences, n).items() if count >= least}
        assert set(ngrams[n - 1]) - {"<unk>", "<s>"} == expected


def test_entropy_pruning_keeps_what_matters_most(folder: Path) -> None:
    """Removing one n-gram changes the relative entropy by Stolcke's closed form; the least change goes first."""
    sentences = [["a", "b"]] * 6 + [["a", "c"], ["b", "c"], ["c", "a"], ["c"], ["b"]]
    whole = as_ngrams(estimated(sentences, 2, folder, discount_fallback=DEFAULT_FALLBACK))
    words = [w for w in whole[0] if w != "<s>"]
    counts = padded_counts(sentences, 1)
    total = sum(counts.values())

    def change(gone: str) -> float:
        history, _ = gone.split()
        kept = [g.split()[1] for g in whole[1] if g.split()[0] == history and g != gone]
        p = {w: probability(whole, (history,), w) for w in words}
        alpha = (1 - sum(p[w] for w in kept)) / (1 - sum(10 ** whole[0][w][0] for w in kept))
        q = {w: p[w] if w in kept else alpha * 10 ** whole[0][w][0] for w in words}
        weight = (len(sentences) if history == "<s>" else counts[history,]) / total
        return weight * sum(p[w] * np.log(p[w] / q[w]) for w in words)

    ranked = sorted(whole[1], key=change)
    for gone in (1, 3, 5):
        size = len(whole[0]) + len(whole[1]) - gone
        pruned = as_ngrams(estimated(sentences, 2, folder, discount_fallback=DEFAULT_FALLBACK, max_ngrams=size))
        assert set(pruned[1]) == set(ranked[gone:])
