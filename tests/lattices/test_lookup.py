"""The suffix automaton: matches, counts and continuations against a search through all of the text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lattices.errors import RescoreError
from lattices.joined import lookup
from lattices.joined.lookup import COUNT, END, NONE, Lookup

TEXTS = st.lists(st.integers(0, 3), max_size=40)
ENDS = st.lists(st.integers(0, 4), max_size=4)


def occurrences(text: list[int], string: list[int]) -> list[int]:
    """Places of the last tokens of all occurrences."""
    m = len(string)
    return [end for end in range(m - 1, len(text)) if text[end - m + 1 : end + 1] == string]


def longest_match(text: list[int], more: list[int]) -> list[int]:
    """The longest suffix of text + more that something follows in the text."""
    whole = text + more
    for m in range(len(whole), 0, -1):
        if any(end + 1 < len(text) for end in occurrences(text, whole[len(whole) - m :])):
            return whole[len(whole) - m :]
    return []


def expected_continuations(text, more, count, length, least, most) -> list[tuple[list[int], int]]:
    whole, found = text + more, []
    longest = min(len(longest_match(text, more)), most)
    for m in range(longest, least - 1, -1):
        for place in range(len(text) - 1, 0, -1):
            matched = 0
            while matched < longest and matched < place and text[place - 1 - matched] == whole[-1 - matched]:
                matched += 1
            run = text[place : place + length]
            if matched == m and m > 0 and not any(other[: len(run)] == run for other, _ in found):
                found.append((run, m))
    return found[:count]


def match(text: Lookup, more: list[int]) -> tuple[int, int]:
    return lookup.follow(text.tables, np.array(more, dtype=np.int32))


@settings(deadline=None)
@given(TEXTS, ENDS)
def test_the_longest_match_that_something_follows(text, more):
    state, length = match(Lookup(text), more)
    assert length == len(longest_match(text, more)) and (state == lookup.ROOT) == (length == 0)


@settings(deadline=None)
@given(TEXTS, st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_a_state_knows_its_occurrences(text, string):
    tables, state = Lookup(text).tables, lookup.ROOT
    for token in string:
        state = lookup.step(tables, state, token)
        if state == NONE:
            break
    ends = occurrences(text, string)
    assert (state == NONE) == (not ends)
    if ends:
        assert (tables.states[state, COUNT], tables.states[state, END]) == (len(ends), ends[-1])


@settings(deadline=None)
@given(TEXTS, ENDS, st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.integers(3, 8))
def test_continuations(text, more, count, length, least, most):
    runs, matches = Lookup(text).continuations(more, count=count, length=length, least=least, most=most)
    found = [([t for t in run.tolist() if t != NONE], m) for run, m in zip(runs, matches.tolist(), strict=True)]
    assert found == expected_continuations(text, more, count, length, least, most)


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_growing_is_the_same_as_at_once(first, second):
    grown, whole = Lookup(), Lookup(first + second)
    grown.extend(first)
    for token in second:
        grown.extend([token])
    for each in (grown, whole):
        assert each.tables.tokens[: len(each)].tolist() == first + second
    for name in ("states", "edges"):
        used = whole.tables.sizes[lookup.STATES if name == "states" else lookup.EDGES]
        assert (getattr(grown.tables, name)[:used] == getattr(whole.tables, name)[:used]).all()


def test_it_grows_beyond_its_first_room(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lookup, "FIRST_TOKENS", 2)
    text = np.random.default_rng(0).integers(0, 5, 300)
    grown = Lookup()
    for start in range(0, 300, 7):
        grown.extend(text[start : start + 7])
    assert match(grown, [3, 1]) == match(Lookup(text), [3, 1]) and len(grown) == 300


def test_nothing_to_look_up():
    for text in ([], [7]):
        assert match(Lookup(text), []) == (lookup.ROOT, 0)
        assert len(Lookup(text).continuations(count=4)[0]) == 0


def test_a_negative_token_is_refused():
    with pytest.raises(RescoreError, match="token id -1 is negative"):
        Lookup([3, -1])
