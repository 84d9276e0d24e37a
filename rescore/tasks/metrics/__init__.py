"""The metrics by name. Every one scores one output against its references, in 0..1."""

from __future__ import annotations

import difflib

from lattices.errors import RescoreError
from rescore.tasks.base import Metric
from rescore.tasks.metrics.answers import EXACT_MATCH, F1, FINAL_ANSWER, LAST_WORD
from rescore.tasks.metrics.texts import BLEU, CHRF, ROUGE_1, ROUGE_2, ROUGE_L

__all__ = [
    "BLEU", "CHRF", "EXACT_MATCH", "F1", "FINAL_ANSWER", "LAST_WORD", "METRICS", "ROUGE_1", "ROUGE_2", "ROUGE_L",
    "find_metric",
]  # fmt: skip

METRICS: dict[str, Metric] = {
    metric.name: metric for metric in (EXACT_MATCH, F1, ROUGE_1, ROUGE_2, ROUGE_L, CHRF, BLEU, FINAL_ANSWER, LAST_WORD)
}


def find_metric(name: str) -> Metric:
    """The metric called `name`; case, spaces, `-` and `_` do not matter (`rouge_l` is `ROUGE-L`).

    Raises `RescoreError` with the nearest name.
    """
    by_plain = {_plain(known): metric for known, metric in METRICS.items()}
    if (found := by_plain.get(_plain(name))) is not None:
        return found
    # Compared as they are read: `rougel` is nearer to `ROUGE-L` than its letters alone tell.
    near = difflib.get_close_matches(_plain(name), by_plain, n=1, cutoff=0.5)
    advice = f"did you mean {by_plain[near[0]].name!r}?" if near else f"known: {', '.join(METRICS)}"
    raise RescoreError(f"unknown metric {name[:80]!r}; {advice}")


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())
