"""The metrics by name: each scores one output against its references, in 0..1; reports give the mean over examples.

Short answers: exact match and F1 as SQuAD has them, GSM8K's final answer, LAMBADA's last word. Longer texts, by the
libraries that define them, the best of several references: ROUGE of rouge-score, chrF and BLEU of sacrebleu, which are
imported at the first score.
"""

from __future__ import annotations

import difflib
import re
import string
import unicodedata
from collections import Counter
from decimal import Decimal
from functools import cache, partial
from typing import Any

from lattices.errors import RescoreError
from rescore.tasks.base import Metric

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_LEVELS = 256  # of a pixel
_NUMBER = re.compile(
    r"""
    (?: (?<![^\W_]) (?<![)\]}%]) (?P<sign>[-\u2212]) )?    # no sign after a digit, letter or bracket: 9-4 ends with 4
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
    words, best = Counter(normalise_answer(output).split()), 0.0
    for reference in references:
        accepted = Counter(normalise_answer(reference).split())
        if same := (words & accepted).total():
            best = max(best, 2 * same / (words.total() + accepted.total()))
    return best


def final_answer(output: str, references: tuple[str, ...]) -> float:
    """1.0 if the last number of the output is the last number of a reference (after its `####`), else 0.0."""
    number = last_number(output)
    return float(number is not None and any(number == last_number(reference) for reference in references))


def last_number(text: str) -> Decimal | None:
    """The last number of a text, None without one; equal numbers are equal however they are written (7, 7.00, 1e3).

    ASCII digits, with commas for thousands or without, a point and decimals or decimals alone (.5), an exponent. A `-`
    or U+2212 right before it, or before its currency sign, is its sign unless a digit, letter, % or closing bracket
    stands right before that: `9-4` ends with 4. What comes after (%, units, a full stop) is no part of it; of a
    fraction the number below the stroke is the last one.
    """
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    last = numbers[-1]
    value = Decimal((last["number"].replace(",", "") + (last["exponent"] or "")).replace("\u2212", "-"))
    return -value if last["sign"] else value


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


@cache
def _scorer(name: str) -> Any:
    if name == "chrF":
        from sacrebleu.metrics.chrf import CHRF

        return CHRF()
    if name == "BLEU":
        from sacrebleu.metrics.bleu import BLEU

        return BLEU(effective_order=True)
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([name], use_stemmer=True)


def rouge(kind: str, output: str, references: tuple[str, ...]) -> float:
    """F-measure of a kind of ROUGE, Porter stemmer; words are runs of a-z and 0-9 (Lin 2004).

    kind: `rouge1` (words in common), `rouge2` (pairs of words) or `rougeL` (the longest common subsequence of words in
        the whole text).
    """
    return float(_scorer(kind).score_multi(references, output)[kind].fmeasure) if references else 0.0


def chrf(output: str, references: tuple[str, ...]) -> float:
    """Sentence-level chrF2 in 0..1: F-score of character 1- to 6-grams, recall twice as important (Popović 2015)."""
    return float(_scorer("chrF").sentence_score(output, list(references)).score) / 100 if references else 0.0


def bleu(output: str, references: tuple[str, ...]) -> float:
    """Sentence-level BLEU in 0..1: sacrebleu's 13a tokens, exponential smoothing, effective order (Post 2018).

    The mean over sentences is not the BLEU of the corpus, which pools its n-gram counts.
    """
    score = float(_scorer("BLEU").sentence_score(output, list(references)).score) if references else 0.0
    return min(1.0, score / 100)  # it rounds above 100


def closeness(output: str, references: tuple[str, ...]) -> float:
    """1 less the mean distance of an output's pixels from a reference's, as a share of the range of intensities; the
    best over the references. Pixels that are missing, too many, or no intensities are as far off as can be."""
    return max((_closeness(output.split(), reference.split()) for reference in references), default=0.0)


def _closeness(pixels: list[str], reference: list[str]) -> float:
    count = max(len(pixels), len(reference), 1)
    pairs = zip(pixels, reference, strict=False)
    return sum(1 - abs(int(a) - int(b)) / (_LEVELS - 1) for a, b in pairs if _is_level(a) and _is_level(b)) / count


def _is_level(word: str) -> bool:
    return word.isascii() and word.isdecimal() and int(word) < _LEVELS


EXACT_MATCH = Metric("exact match", exact_match)
F1 = Metric("F1", f1)
FINAL_ANSWER = Metric("final answer", final_answer)
LAST_WORD = Metric("last word", last_word)
ROUGE_1 = Metric("ROUGE-1", partial(rouge, "rouge1"))
ROUGE_2 = Metric("ROUGE-2", partial(rouge, "rouge2"))
ROUGE_L = Metric("ROUGE-L", partial(rouge, "rougeL"))
CHRF = Metric("chrF", chrf)
BLEU = Metric("BLEU", bleu)
CLOSENESS = Metric("closeness", closeness)
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (EXACT_MATCH, F1, ROUGE_1, ROUGE_2, ROUGE_L, CHRF, BLEU, FINAL_ANSWER, LAST_WORD, CLOSENESS)
}


def find_metric(name: str) -> Metric:
    """The metric called `name`; case, spaces, `-` and `_` do not matter (`rouge_l` is `ROUGE-L`).

    Raises `RescoreError` with the nearest name.
    """
    by_plain = {_plain(known): metric for known, metric in METRICS.items()}
    if (metric := by_plain.get(_plain(name))) is not None:
        return metric
    # Compared as they are read: `rougel` is nearer to `ROUGE-L` than its letters alone say.
    near = difflib.get_close_matches(_plain(name), by_plain, n=1, cutoff=0.5)
    advice = f"did you mean {by_plain[near[0]].name!r}?" if near else f"known: {', '.join(METRICS)}"
    raise RescoreError(f"unknown metric {name[:80]!r}; {advice}")


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())
