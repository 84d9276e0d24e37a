"""Metrics of longer texts, by the libraries that define them: ROUGE of rouge-score, chrF and BLEU of sacrebleu.

Each scores one output, the best of its references where there are several; reports give the mean over examples. The
libraries are imported at the first score.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from rescore.tasks.base import Metric


@cache
def _rouge_scorer(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=True)


def _rouge(kind: str, output: str, references: tuple[str, ...]) -> float:
    if not references:
        return 0.0
    return float(_rouge_scorer(kind).score_multi(references, output)[kind].fmeasure)


def rouge_1(output: str, references: tuple[str, ...]) -> float:
    """ROUGE-1 F-measure (words in common), Porter stemmer; words are runs of a-z and 0-9 (Lin 2004)."""
    return _rouge("rouge1", output, references)


def rouge_2(output: str, references: tuple[str, ...]) -> float:
    """ROUGE-2 F-measure (pairs of words in common), as `rouge_1`."""
    return _rouge("rouge2", output, references)


def rouge_l(output: str, references: tuple[str, ...]) -> float:
    """ROUGE-L F-measure (longest common subsequence of words over the whole text), as `rouge_1`."""
    return _rouge("rougeL", output, references)


@cache
def _chrf_scorer() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def chrf(output: str, references: tuple[str, ...]) -> float:
    """Sentence-level chrF2 in 0..1: F-score of character 1- to 6-grams, recall twice as important (Popović 2015)."""
    return float(_chrf_scorer().sentence_score(output, list(references)).score) / 100 if references else 0.0


@cache
def _bleu_scorer() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(effective_order=True)


def bleu(output: str, references: tuple[str, ...]) -> float:
    """Sentence-level BLEU in 0..1: sacrebleu's 13a tokens, exponential smoothing, effective order (Post 2018).

    The mean over sentences is not the BLEU of the corpus, which pools its n-gram counts.
    """
    if not references:
        return 0.0
    return min(1.0, float(_bleu_scorer().sentence_score(output, list(references)).score) / 100)  # it rounds above 100


ROUGE_1 = Metric("ROUGE-1", rouge_1)
ROUGE_2 = Metric("ROUGE-2", rouge_2)
ROUGE_L = Metric("ROUGE-L", rouge_l)
CHRF = Metric("chrF", chrf)
BLEU = Metric("BLEU", bleu)
