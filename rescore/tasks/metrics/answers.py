"""Metrics of short answers: exact match and F1 as SQuAD has them, GSM8K's final answer, LAMBADA's last word."""

from __future__ import annotations

import re
import string
from collections import Counter

from rescore.tasks.base import Metric

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?", re.ASCII)


def normalise_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, without English articles, words parted by one space (in this order), as
    the official SQuAD v1.1 evaluation does (Rajpurkar et al. 2016, section 6.1)."""
    text = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", text).split())


def exact_match(output: str, references: tuple[str, ...]) -> float:
    """1.0 if the normalised output equals any normalised reference, else 0.0."""
    normalised = normalise_answer(output)
    return float(any(normalised == normalise_answer(reference) for reference in references))


def f1(output: str, references: tuple[str, ...]) -> float:
    """The best F1 over the references: the harmonic mean of precision and recall of the normalised words.

    A word counts as often as it is in both. As in v1.1, no word in common is 0.0, even where both are empty.
    """
    found = normalise_answer(output).split()
    return max((_f1(found, normalise_answer(reference).split()) for reference in references), default=0.0)


def _f1(found: list[str], wanted: list[str]) -> float:
    same = (Counter(found) & Counter(wanted)).total()
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def final_answer(output: str, references: tuple[str, ...]) -> float:
    """1.0 if the last number of the output is the last number of a reference (behind its `####`), else 0.0."""
    found = _last_number(output)
    return float(found is not None and any(found == _last_number(reference) for reference in references))


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def last_word(output: str, references: tuple[str, ...]) -> float:
    """1.0 if the output, space before it left out, begins with a reference and no letter or digit goes on, else 0.0.

    So `dock.` and `dock's` are the word `dock`, `docks` and `Dock` are not.
    """
    output = output.lstrip()
    return float(any(_begins_with(output, reference) for reference in references if reference))


def _begins_with(output: str, word: str) -> bool:
    return output.startswith(word) and not output[len(word) : len(word) + 1].isalnum()


EXACT_MATCH = Metric("exact match", exact_match)
F1 = Metric("F1", f1)
FINAL_ANSWER = Metric("final answer", final_answer)
LAST_WORD = Metric("last word", last_word)
