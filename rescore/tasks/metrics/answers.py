"""Exact match as the official SQuAD v1.1 evaluation defines it (Rajpurkar et al. 2016, section 6.1)."""

from __future__ import annotations

import re
import string

from rescore.tasks.base import Metric

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")


def normalise_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, without English articles, words parted by one space (in this order)."""
    text = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", text).split())


def exact_match(output: str, references: tuple[str, ...]) -> float:
    """1.0 if the normalised output equals any normalised reference, else 0.0."""
    normalised = normalise_answer(output)
    return float(any(normalised == normalise_answer(reference) for reference in references))


EXACT_MATCH = Metric("exact match", exact_match)
