"""The counts that an n-gram model was estimated from, out of its probabilities.

Modified Kneser-Ney writes p(w | c) = (n(cw) - D) / n(c) + b(c) p(w | c'), where c' is c without its first word, D the
discount for n(cw) = 1, 2, 3 or more, and b(c), the back-off weight, the sum of all D after c over n(c) (Chen & Goodman
1999). With the discounts known, n(c) is the whole number with which every n(cw) is one too, and they sum to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lattices.errors import InvalidDataError
from lattices.ngrams import SENTENCE_END, SENTENCE_START, NgramModel
from lm.ngram.build import ARPA_FILE
from lm.ngram.load import Manifest, check_files, find_ngram

ROUNDING = 3e-7  # of a probability in an ARPA file, at most
MOST = 300_000  # occurrences of a context: of more, rounding hides which whole number it was


def counts_of_tokens(folder: Path) -> tuple[np.ndarray, Path, Manifest]:
    """How often each token stood in the text of the n-gram model in a folder, int64 by token id, the last `</s>`; the
    model's file; its manifest.

    The first order - 1 words of documents are left out, which of own output are the prompts'. Raises `RescoreError` if
    there is no model, `InvalidDataError` for one whose counts can't be recovered: not Kneser-Ney, pruned, of words that
    are no token ids.
    """
    from lm.ngram.arpa import read_arpa

    file, manifest = find_ngram(folder, ARPA_FILE)
    check_files(file, manifest)
    model = read_arpa(file)
    if manifest.smoothing != "kneser-ney" or model.order < 2 or len(manifest.discounts) != model.order:
        raise InvalidDataError(f"{folder}: counts can be recovered of Kneser-Ney models of order 2 and more only")
    words = model.vocabulary[SENTENCE_END + 1 :]
    if manifest.surface or not all(word.isascii() and word.isdecimal() for word in words):
        raise InvalidDataError(f"{folder}: its words are no token ids; build it with --tokenizer BASE")
    found = word_counts(model, manifest.discounts[-1])
    if found is None:
        raise InvalidDataError(
            f"{folder}: its counts can't be recovered (is it pruned, are its discounts given?); give its corpus"
        )
    token_ids = np.array([int(word) for word in words])
    counts = np.zeros(token_ids.max(initial=-1) + 2, dtype=np.int64)
    counts[token_ids] = found[SENTENCE_END + 1 :]
    counts[-1] = found[SENTENCE_END]
    return counts, file, manifest


def word_counts(model: NgramModel, discounts: Sequence[float]) -> np.ndarray | None:
    """How often each word stood after order - 1 others of its document, int64 `[vocabulary]`; None where no counts fit.

    discounts: D1, D2, D3+ of the highest order. If they are in proportion to counts (0.5, 1, 1.5), those of a word that
    alone follows a context do not show.
    """
    shares = np.concatenate([[discounts[0], discounts[1] / 2], discounts[2] / np.arange(3, 100)])
    if np.diff(np.sort(shares)).min() < ROUNDING * 100:
        return None
    highest, lower = model.orders[-1], model.orders[-2]
    rows = np.concatenate([lower.words, highest.words[:, :-1], highest.words[:, 1:]])
    _, first, number = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    place = first[number.ravel()]  # of what equals a row, the first: in `lower`, if it is there
    contexts, suffixes = place[len(lower) : len(lower) + len(highest)], place[len(lower) + len(highest) :]
    if max(contexts.max(initial=0), suffixes.max(initial=0)) >= len(lower):
        return None
    # The n-grams of a context stand together.
    backoff = 10.0 ** lower.log10_backoff.astype(np.float64)
    shorter = 10.0 ** lower.log10p[suffixes].astype(np.float64)
    over_n = 10.0 ** highest.log10p.astype(np.float64) - backoff[contexts] * shorter  # (n(cw) - D) / n(c)
    discount = np.array([0.0, *discounts])
    counts = np.zeros(len(highest), dtype=np.int64)
    left, n = np.arange(len(highest)), 0
    while len(left):
        n += 1
        if n > MOST:
            return None
        tolerance = ROUNDING * (30 + n)
        kept = over_n[left] * n  # a count less its discount
        count = np.rint(kept + discount[3])
        for few in (2, 1):
            count[np.abs(kept + discount[few] - few) < tolerance] = few
        taken = discount[np.clip(count, 0, 3).astype(np.int64)]
        starts = np.flatnonzero(np.diff(contexts[left], prepend=-1))
        fits = np.logical_and.reduceat(np.abs(kept + taken - count) < tolerance, starts)
        fits &= np.add.reduceat(count, starts) == n
        fits &= np.abs(np.add.reduceat(taken, starts) - n * backoff[contexts[left[starts]]]) < tolerance
        solved = np.repeat(fits, np.diff([*starts, len(left)]))
        counts[left[solved]] = count[solved]
        left = left[~solved]
    inside = (highest.words != SENTENCE_START).all(axis=1)
    return np.bincount(highest.words[inside, -1], counts[inside], len(model.vocabulary)).astype(np.int64)
