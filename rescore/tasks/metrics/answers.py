"""Metrics of short answers: exact match and F1 as SQuAD has them, GSM8K's final answer, LAMBADA's last word."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from decimal import Decimal

from rescore.tasks.base import Metric

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(
    r"""
    (?: (?<![^\W_]) (?<![)\]}%]) (?P<sign>[-\u2212]) )?    # no sign behind a digit, letter or bracket: 9-4 ends with 4
    (?: \\?[$€£¥] )?
    (?P<number>
        [0-9]{1,3} (?:,[0-9]{3})+ (?![0-9]) (?:\.[0-9]+)?    # with thousands separators
      | [0-9]+ (?:\.[0-9]+)?
      | (?<![^\W_]) (?<![)\]}.]) \.[0-9]+                   # .5, but not the end of a sentence before 5
    )
    (?P<exponent> [eE][-+\u2212]?[0-9]{1,3} (?![^\W_]) )?
    """,
    re.VERBOSE,
)


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
    found = last_number(output)
    return float(found is not None and any(found == last_number(reference) for reference in references))


def last_number(text: str) -> Decimal | None:
    """The last number of a text, None without one; equal numbers are equal however they are written (7, 7.00, 1e3).

    ASCII digits, with commas for thousands or without, a point and decimals or decimals alone (.5), an exponent. A `-`
    or U+2212 right before it, or before its currency sign, is its sign unless a digit, letter, % or closing bracket
    stands right before that: `9-4` ends with 4. What comes behind (%, units, a full stop) is no part of it; of a
    fraction the number below the stroke is the last one.
    """
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    found = numbers[-1]
    value = Decimal((found["number"].replace(",", "") + (found["exponent"] or "")).replace("\u2212", "-"))
    return -value if found["sign"] else value


def last_word(output: str, references: tuple[str, ...]) -> float:
    """1.0 if the output, space before it left out, begins with a reference and no letter, digit or accent goes on, else
    0.0.

    So `dock.` and `dock's` are the word `dock`, `docks` and `Dock` are not.
    """
    output = output.lstrip()
    return float(any(_begins_with(output, reference) for reference in references if reference))


def _begins_with(output: str, word: str) -> bool:
    after = output[len(word) : len(word) + 1]
    return output.startswith(word) and not (after.isalnum() or (after and unicodedata.combining(after)))


EXACT_MATCH = Metric("exact match", exact_match)
F1 = Metric("F1", f1)
FINAL_ANSWER = Metric("final answer", final_answer)
LAST_WORD = Metric("last word", last_word)
