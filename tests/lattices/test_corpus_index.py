"""The suffix array and what follows a match, against a search through all documents."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from lattices.errors import InvalidDataError
from lattices.joined.corpus_index import END, CorpusIndex, build_suffix_array, join_documents
from lattices.joined.likeliest import best_branches

TOKENS = st.integers(0, 3)
DOCUMENTS = st.lists(st.lists(TOKENS, min_size=1, max_size=25), min_size=1, max_size=6)
LAST = st.lists(st.integers(-1, 4), max_size=8)


def corpus(*documents: list[int]) -> CorpusIndex:
    return CorpusIndex.build(documents)


def suffixes_of(documents: list[list[int]]) -> list[tuple[list[int], int]]:
    """(what stands there up to the end of the document, place) of every token, in order."""
    found, start = [], 0
    for document in documents:
        found += [(document[i:], start + i) for i in range(len(document))]
        start += len(document) + 1
    return sorted(found)


def followers(documents: list[list[int]], string: list[int]) -> list[list[int]]:
    """What follows the occurrences of a string, where something does."""
    m = len(string)
    return [
        document[i + m :]
        for document in documents
        for i in range(len(document) - m)
        if document[i : i + m] == string
    ]  # fmt: skip


def longest_match(documents: list[list[int]], last: list[int], least: int, most: int) -> int:
    lengths = range(min(most, len(last)), least - 1, -1)
    return next((m for m in lengths if followers(documents, last[len(last) - m :])), 0)


def trie(runs: list[list[int]], length: int) -> tuple[list[tuple[int, ...]], list[float]]:
    """Prefixes in order, the empty one first, and their log-probabilities."""
    prefixes = sorted({tuple(run[:i]) for run in runs for i in range(min(length, len(run)) + 1)})
    counts = {prefix: sum(tuple(run[: len(prefix)]) == prefix for run in runs) for prefix in prefixes}
    logps = {(): 0.0}
    for prefix in prefixes[1:]:
        logps[prefix] = logps[prefix[:-1]] + math.log((counts[prefix] - 0.5) / counts[prefix[:-1]])
    return prefixes, [logps[prefix] for prefix in prefixes]


@settings(deadline=None)
@given(DOCUMENTS)
def test_suffixes_are_sorted_up_to_the_ends_of_their_documents(documents):
    places = build_suffix_array(join_documents(documents))
    assert places.dtype == np.int32
    assert places.tolist() == [place for _, place in suffixes_of(documents)]


@pytest.mark.parametrize("documents", [[[5] * 300], [[1, 2] * 100, [1, 2] * 100], [[7], [7], [7]], [[2**31 - 1, 0]]])
def test_repetitions_and_repeated_documents(documents):
    places = build_suffix_array(join_documents(documents))
    assert places.tolist() == [place for _, place in suffixes_of(documents)]


@settings(deadline=None)
@given(DOCUMENTS, LAST, st.integers(1, 3), st.integers(0, 4))
def test_the_longest_match_that_something_follows(documents, last, least, more):
    length, occurrences = corpus(*documents).match(last, least=least, most=least + more)
    assert length == longest_match(documents, last, least, least + more)
    assert occurrences == (len(followers(documents, last[len(last) - length :])) if length else 0)


@settings(deadline=None)
@given(DOCUMENTS, LAST, st.integers(1, 5), st.integers(1, 6), st.integers(1, 2))
def test_the_branches_with_the_highest_expected_length(documents, last, count, length, least):
    tokens, logps, matched = corpus(*documents).continuations(last, count=count, length=length, least=least)
    assert (tokens.dtype, logps.dtype) == (np.int32, np.float32)
    assert logps.shape == tokens.shape == (len(tokens), length)
    assert matched == longest_match(documents, last, least, 16)
    if not matched:
        assert not len(tokens)
        return
    prefixes, expected = trie(followers(documents, last[len(last) - matched :]), length)
    logp_of = dict(zip(prefixes, expected, strict=True))
    chosen = set()
    for run, given_logps in zip(tokens.tolist(), logps.tolist(), strict=True):
        size = run.index(END) if END in run else length
        assert run[size:] == [END] * (length - size) and given_logps[size:] == [0.0] * (length - size)
        path = [tuple(run[:i]) for i in range(size + 1)]
        assert np.allclose(np.cumsum(given_logps[:size]), [logp_of[prefix] for prefix in path[1:]], atol=1e-5)
        assert not any(len(other) > size and other[:size] == path[-1] for other in prefixes)  # up to a leaf
        chosen |= set(path)
    parents = np.array([-1, *(prefixes.index(prefix[:-1]) for prefix in prefixes[1:])], dtype=np.int32)
    stays = best_branches(parents, np.array(expected), count)
    best = np.exp(np.array(expected)[stays]).sum()
    assert math.isclose(sum(math.exp(logp_of[prefix]) for prefix in chosen), best, rel_tol=1e-9)


@settings(deadline=None)
@given(DOCUMENTS, LAST, st.integers(1, 4))
def test_more_continuations_go_on_from_fewer(documents, last, length):
    index = corpus(*documents)
    all_of_them = index.continuations(last, count=50, length=length)[0].tolist()
    for count in range(1, 4):
        assert index.continuations(last, count=count, length=length)[0].tolist() == all_of_them[:count]


def test_probabilities_are_discounted_counts():
    tokens, logps, matched = corpus([1, 2, 3], [1, 2, 4], [1, 2, 3, 5]).continuations([9, 1], count=2, length=3)
    assert (tokens.tolist(), matched) == ([[2, 3, 5], [2, 4, END]], 1)
    expected = [[2.5 / 3, 1.5 / 3, 0.5 / 2], [2.5 / 3, 0.5 / 3, 1.0]]
    assert np.allclose(np.exp(logps), expected)


def test_of_equals_the_lowest_token_comes_first():
    index = corpus([1, 9, 4], [1, 2, 8], [1, 2, 3], [1, 9, 5])
    tokens, _, _ = index.continuations([1], count=3, length=2)
    assert tokens.tolist() == [[2, 3], [9, 4], [2, 8]]


def test_nothing_runs_on_into_the_next_document():
    index = corpus([1, 2], [3, 4])
    assert index.continuations([1, 2], count=4, length=4)[2] == 0
    assert index.continuations([2, 3], count=4, length=4)[0].tolist() == [[4, END, END, END]]
    assert index.continuations([2, 3], count=4, length=4)[2] == 1
    assert index.continuations([1, END, 3], count=1, length=1)[2] == 1


def test_of_many_occurrences_every_continuation_keeps_its_share():
    index = corpus(*([[1, 2]] * 600), *([[1, 3]] * 300), *([[1, 4]] * 100))
    assert index.match([1]) == (1, 1000)
    tokens, logps, _ = index.continuations([1], count=4, length=1, occurrences=100)
    assert tokens.tolist() == [[2], [3], [4]]
    assert np.allclose(np.exp(logps[:, 0]), [0.595, 0.295, 0.095])


@pytest.mark.parametrize("last", [[], [7], [1, 7], np.array([], dtype=np.int64)])
def test_without_a_match_there_is_nothing(last):
    tokens, logps, matched = corpus([1, 2, 1, 2]).continuations(last, count=2, length=3)
    assert (tokens.shape, logps.shape, matched) == ((0, 3), (0, 3), 0)


def test_a_long_context_and_its_last_tokens_say_the_same():
    index = corpus([1, 2, 3, 1, 2, 4])
    context = np.arange(1000) % 3 + 1
    for most in (1, 2, 16):
        whole = index.continuations(context, count=3, length=2, most=most)
        cut = index.continuations(context[-most:].tolist(), count=3, length=2, most=most)
        assert all(np.array_equal(a, b) for a, b in zip(whole, cut, strict=True))


def test_documents_are_counted():
    index = corpus([1, 2], [], [3])
    assert (len(index), index.documents) == (3, 2)


WRONG = [{"count": 0}, {"length": 0}, {"least": 0}, {"least": 3, "most": 2}, {"occurrences": 0}]


@pytest.mark.parametrize("wrong", WRONG)
def test_numbers_that_make_no_sense(wrong):
    refused(lambda: corpus([1, 2]).continuations([1], **{"count": 1, "length": 1, **wrong}), "must be at least")


def test_arrays_that_are_no_corpus():
    for empty in ([], [END], [END, END]):
        refused(lambda empty=empty: build_suffix_array(np.array(empty)), InvalidDataError, "the corpus is empty")
    for wrong in ([1, 2], [1, -2, END]):
        refused(lambda wrong=wrong: build_suffix_array(np.array(wrong)), InvalidDataError, "only -1 is below 0")


def test_arrays_that_are_no_index():
    good, places = join_documents([[1, 2]]), np.array([0, 1], dtype=np.int32)
    CorpusIndex(good, places)
    for token_ids, suffixes in ((good[:2], places), (good, places[:0]), (good.astype(np.int64), places)):
        refused(lambda t=token_ids, s=suffixes: CorpusIndex(t, s), InvalidDataError, "index")
