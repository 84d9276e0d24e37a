"""A static index of a large corpus of token ids: where do these last tokens stand in it, and what followed there?

A suffix array: all places of the corpus in the order of what stands there up to the end of the document, so that the
occurrences of a string are neighbours, and those of its longer forms too. It is made once and mapped into memory; a
question reads a few hundred places of it. Built by prefix doubling (Manber and Myers 1993). What follows is weighed as
a trie of frequencies, as REST does (He et al. 2024). `lattices.joined.lookup` is the same for a text that grows.

A corpus is one array: each document's tokens, then `END`. Ends are all different and before every token, so that no
match and no continuation runs on into the next document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numba import njit

from lattices.errors import InvalidDataError, RescoreError

END = -1  # after the last token of a document; in continuations, where nothing follows
DISCOUNT = 0.5  # of a count: what is taken from it for all that was not seen
MOST_PLACES = 2**31 - 1  # that int32 can number


class CorpusIndex:
    """A corpus and its suffix array.

    token_ids: int32 `[t]`, `END` after each document. suffixes: int32 `[t - documents]`, of `build_suffix_array`.
    Both may be mapped from files, and are only read. Raises `InvalidDataError` for arrays that can't be these.
    """

    def __init__(self, token_ids: np.ndarray, suffixes: np.ndarray) -> None:
        # Not a subclass (memmap), and not writable: one compiled version serves all.
        self.token_ids, self.suffixes = _frozen(token_ids), _frozen(suffixes)
        if not len(suffixes) or len(suffixes) >= len(token_ids) or token_ids[-1] != END:
            raise InvalidDataError(
                f"{len(token_ids)} places of a corpus and {len(suffixes)} suffixes are no index of one"
            )

    @classmethod
    def build(cls, documents: Iterable[Sequence[int] | np.ndarray]) -> CorpusIndex:
        """The index of documents, in memory. Raises as `build_suffix_array`."""
        token_ids = join_documents(documents)
        return cls(token_ids, build_suffix_array(token_ids))

    def __len__(self) -> int:
        """Tokens of the corpus."""
        return len(self.suffixes)

    @property
    def documents(self) -> int:
        """Their number."""
        return len(self.token_ids) - len(self.suffixes)

    def match(self, token_ids: Sequence[int] | np.ndarray, *, least: int = 1, most: int = 16) -> tuple[int, int]:
        """Length of the longest suffix of the tokens, of `least` to `most`, that something follows in the corpus, and
        how often something does; (0, 0) without any."""
        last = np.array(token_ids[-most:], dtype=np.int32)
        length, begin, stop = find(self.token_ids, self.suffixes, last, least, most)
        return length, stop - begin

    def continuations(
        self,
        token_ids: Sequence[int] | np.ndarray,
        *,
        count: int,
        length: int,
        least: int = 1,
        most: int = 16,
        occurrences: int = 256,
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """What follows the longest suffix of `token_ids` that stands in the corpus with something after it.

        token_ids: the last tokens, of which the suffix has `least` to `most`. count: continuations, at most; length: of
        each, in tokens. occurrences: of the suffix that are looked at, at most; of more they are spread evenly over
        the suffix array, which is in the order of what follows, so that every continuation keeps its share.

        Returns tokens int32 `[c, length]`, `END` where the documents end; the log-probability of each given those
        before it, float32 `[c, length]`, 0 where there is no token; and the length of the match, 0 without any. The
        probability of a token that follows m times where something stands n times is (m - 1/2) / n: half a count of
        each goes to what was not seen (absolute discounting; a document's end counts as a token).

        Which continuations: the `c` branches of the trie of all that follows with the highest expected number of
        accepted tokens as a set, the rule of `lattices.joined.likeliest.best_branches`; the one that adds most first,
        of equals the one with the lowest token ids. Raises `RescoreError` for numbers that make no sense.
        """
        for name, value, smallest in (
            ("count", count, 1), ("length", length, 1), ("least", least, 1), ("most", most, least),
            ("occurrences", occurrences, 1),
        ):  # fmt: skip
            if value < smallest:
                raise RescoreError(f"{name} = {value}; it must be at least {smallest}")
        last = np.array(token_ids[-most:], dtype=np.int32)
        return continuations(self.token_ids, self.suffixes, last, count, length, least, most, occurrences)


def _frozen(array: np.ndarray) -> np.ndarray:
    if array.ndim != 1 or array.dtype != np.int32 or not array.flags.c_contiguous:
        raise InvalidDataError(
            f"an array of {array.dtype} with shape {array.shape} is no part of an index; give int32 [n]"
        )
    view: np.ndarray = array.view(np.ndarray)
    view.flags.writeable = False
    return view


def join_documents(documents: Iterable[Sequence[int] | np.ndarray]) -> np.ndarray:
    """A corpus of documents without the empty ones, int32 `[t]`: each one's tokens, then `END`."""
    parts = [np.append(np.asarray(document, dtype=np.int32), np.int32(END)) for document in documents if len(document)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


def build_suffix_array(token_ids: np.ndarray) -> np.ndarray:
    """The places of all tokens of a corpus in the order of what stands from there to the end of the document, int32.

    token_ids: int32 `[t]`, `END` after each document (`join_documents`). What ends comes before what goes on; of equals
    the earlier place comes first. O(t log m) for repetitions of at most m tokens; 16 bytes a token beside the corpus.
    Raises `InvalidDataError` for an array that is no corpus, an empty one, and one of more than 2^31 places.
    """
    token_ids = np.ascontiguousarray(token_ids, dtype=np.int32)
    if not len(token_ids) or token_ids.max() < 0:
        raise InvalidDataError("the corpus is empty; there is no token to look up")
    if token_ids[-1] != END or token_ids.min() < END:
        raise InvalidDataError(f"in a corpus only {END} is below 0, after every document; see join_documents")
    if len(token_ids) > MOST_PLACES:
        raise InvalidDataError(f"a corpus of {len(token_ids):,} tokens is too large; take at most {MOST_PLACES:,}")
    order = np.argsort(token_ids, kind="stable").astype(np.int32)
    _sort_by_doubling(token_ids, order)
    return order[np.count_nonzero(token_ids == END) :].copy()


@njit(cache=True, nogil=True)
def _sort_by_doubling(token_ids: np.ndarray, order: np.ndarray) -> None:
    """Sorts places by all that follows; they come in the order of their first token, of equals by place.

    The rank of a place is where the group of those with the same first `span` tokens begins. To double the span, places
    are taken in the order of what stands `span` tokens on, which is known, and dealt out to their groups.
    """
    n = len(order)
    ranks, others, free = np.empty(n, dtype=np.int32), np.empty(n, dtype=np.int32), np.empty(n, dtype=np.int32)
    groups = rank = 0
    for at in range(n):
        token = token_ids[order[at]]
        if at == 0 or token == END or token != token_ids[order[at - 1]]:  # all ends differ
            rank = at
            groups += 1
        ranks[order[at]] = rank
    span = 1
    while groups < n:
        made = 0
        for place in range(n - span, n):  # nothing stands so far on
            others[made] = place
            made += 1
        for at in range(n):
            if order[at] >= span:
                others[made] = order[at] - span
                made += 1
        for at in range(n):
            free[at] = at
        for at in range(n):
            place = others[at]
            order[free[ranks[place]]] = place
            free[ranks[place]] += 1
        groups = rank = 0
        for at in range(n):
            place, before = order[at], order[at - 1]
            # Two with the same tokens have no end among them, so that something stands after these.
            if at == 0 or ranks[place] != ranks[before] or ranks[place + span] != ranks[before + span]:
                rank = at
                groups += 1
            others[place] = rank
        ranks, others = others, ranks
        span *= 2


@njit(cache=True, nogil=True)
def _bound(token_ids: np.ndarray, suffixes: np.ndarray, string: np.ndarray, begin: int, above: bool) -> int:
    """From `begin` on, the first suffix that is the string and more, or after all these (`above`)."""
    low, high = begin, len(suffixes)
    while low < high:
        middle = (low + high) >> 1
        place, step = suffixes[middle], 0
        while step < len(string) and token_ids[place + step] == string[step]:
            step += 1
        if step < len(string):
            is_before = token_ids[place + step] < string[step]
        else:
            is_before = above or token_ids[place + step] == END
        if is_before:
            low = middle + 1
        else:
            high = middle
    return low


@njit(cache=True, nogil=True)
def _is_followed(token_ids: np.ndarray, place: int, string: np.ndarray) -> bool:
    """Whether a string stands at a place with something after it."""
    for step in range(len(string)):
        if token_ids[place + step] != string[step]:
            return False
    return bool(token_ids[place + len(string)] != END)


@njit(cache=True, nogil=True)
def find(token_ids: np.ndarray, suffixes: np.ndarray, last: np.ndarray, least: int, most: int) -> tuple[int, int, int]:
    """The longest suffix of the tokens `last`, of `least` to `most`, that something follows in the corpus: its length,
    and from where to where its occurrences that something follows stand in the suffix array; (0, 0, 0) without any."""
    n, longest = len(last), 0
    while longest < min(n, most) and last[n - 1 - longest] >= 0:
        longest += 1
    found, begin, shortest = 0, 0, max(least, 1)
    while shortest <= longest:  # if a suffix stands there, so do all shorter ones
        length = (shortest + longest) >> 1
        string = last[n - length :]
        first = _bound(token_ids, suffixes, string, 0, False)
        if first < len(suffixes) and _is_followed(token_ids, suffixes[first], string):
            found, begin, shortest = length, first, length + 1
        else:
            longest = length - 1
    if found == 0:
        return 0, 0, 0
    return found, begin, _bound(token_ids, suffixes, last[n - found :], begin, True)


@njit(cache=True, nogil=True)
def continuations(
    token_ids: np.ndarray,
    suffixes: np.ndarray,
    last: np.ndarray,
    count: int,
    length: int,
    least: int,
    most: int,
    occurrences: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    """See `CorpusIndex.continuations`."""
    matched, begin, stop = find(token_ids, suffixes, last, least, most)
    if matched == 0:
        return np.empty((0, length), dtype=np.int32), np.empty((0, length), dtype=np.float32), 0
    tokens, parents, counts = _trie(token_ids, suffixes, begin, stop, matched, length, occurrences)
    runs, logps = _best_branches(tokens, parents, counts, count, length)
    return runs, logps, matched


@njit(cache=True, nogil=True)
def _trie(
    token_ids: np.ndarray, suffixes: np.ndarray, begin: int, stop: int, matched: int, length: int, occurrences: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What follows a match, as a tree of at most `length` tokens: of each node the token, the parent and how often it
    was seen. Parents come before their children, and children in the order of their tokens, as suffixes do."""
    taken = min(stop - begin, occurrences)
    tokens = np.empty(1 + taken * length, dtype=np.int32)
    parents, counts = np.empty_like(tokens), np.zeros_like(tokens)
    path = np.zeros(1 + length, dtype=np.int32)  # the nodes of the occurrence before
    tokens[0], parents[0], counts[0] = END, -1, taken
    nodes, deepest = 1, 0
    for i in range(taken):
        place = suffixes[begin + (2 * i + 1) * (stop - begin) // (2 * taken)] + matched
        for depth in range(length):
            token = token_ids[place + depth]
            if token == END:
                deepest = min(deepest, depth)
                break
            if depth >= deepest or tokens[path[depth + 1]] != token:
                tokens[nodes], parents[nodes] = token, path[depth]
                path[depth + 1] = nodes
                deepest = depth + 1
                nodes += 1
            counts[path[depth + 1]] += 1
    return tokens[:nodes], parents[:nodes], counts[:nodes]


@njit(cache=True, nogil=True)
def _best_branches(
    tokens: np.ndarray, parents: np.ndarray, counts: np.ndarray, count: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The branches of a trie that are expected to have most tokens accepted, and the log-probabilities in them.

    Every node's likeliest branch goes on with that of one child; where a branch does not go on, another begins, and
    what a branch adds is the sum of the probabilities of its nodes.
    """
    n = len(tokens)
    chances, adds, heavy = np.ones(n), np.zeros(n), np.full(n, -1, dtype=np.int32)
    for node in range(1, n):
        chances[node] = chances[parents[node]] * (counts[node] - DISCOUNT) / counts[parents[node]]
    for node in range(n - 1, 0, -1):
        adds[node] += chances[node]
        above = parents[node]
        if adds[node] >= adds[above]:  # what a node has from its children so far; of equals the lowest token
            adds[above], heavy[above] = adds[node], node
    tops, begun = np.empty(n, dtype=np.int32), 0
    for node in range(1, n):
        if parents[node] == 0 or heavy[parents[node]] != node:
            tops[begun] = node
            begun += 1
    found = min(count, begun)
    runs = np.full((found, length), END, dtype=np.int32)
    logps = np.zeros((found, length), dtype=np.float32)
    for row in range(found):
        best = 0
        for i in range(1, begun):
            if adds[tops[i]] > adds[tops[best]]:
                best = i
        _write(tops[best], tokens, parents, counts, heavy, runs[row], logps[row])
        adds[tops[best]] = -1.0
    return runs, logps


@njit(cache=True, nogil=True)
def _write(
    top: int, tokens: np.ndarray, parents: np.ndarray, counts: np.ndarray, heavy: np.ndarray, run: np.ndarray,
    logps: np.ndarray,
) -> Any:  # fmt: skip
    """Writes the path to a node, and its likeliest branch."""
    depth, node = 0, top
    while parents[node] >= 0:
        depth += 1
        node = parents[node]
    node = top
    for step in range(depth - 1, -1, -1):
        run[step], logps[step] = tokens[node], np.log((counts[node] - DISCOUNT) / counts[parents[node]])
        node = parents[node]
    node = heavy[top]
    while node >= 0:
        run[depth], logps[depth] = tokens[node], np.log((counts[node] - DISCOUNT) / counts[parents[node]])
        depth += 1
        node = heavy[node]
