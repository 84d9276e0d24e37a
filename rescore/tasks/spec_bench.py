"""Spec-Bench (Xia et al. 2024), table 6 of [A] (Kim et al. 2024): one file, `question.jsonl`; each row has a category.

Every category is a task that reads only its own rows. The first turn is the prompt: what follows it would need the
answer before. GSM8K's category, `math_reasoning`, is read by the task gsm8k.

A row is `{"question_id", "category", "turns": [text, ...], "reference": [...]}`; `prompt` may stand for `turns`, as
text or a list. Hub copies that hold one category only need no `category`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lattices.errors import InvalidDataError
from rescore.tasks.base import HubSource, Metric, Record, Task, checked_text, json_kind, text_field
from rescore.tasks.metrics import BLEU, CHRF, EXACT_MATCH, F1, ROUGE_L

MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
MATH = "math_reasoning"


def row_of(*categories: str) -> Callable[[Record], Record | None]:
    """A `Task.row`: gives `id`, `prompt` and `references` (a list) of a row in one of the categories, else None."""

    def row(record: Record) -> Record | None:
        if checked_text(record.get("category", categories[0]), "category") not in categories:
            return None
        return {
            "id": record.get("question_id", record.get("id")),
            "prompt": _first_turn(record),
            "references": _first_references(record.get("reference")),
        }

    return row


def _first_turn(record: Record) -> str:
    name = "turns" if "turns" in record else "prompt"
    if name not in record:
        raise InvalidDataError("no field 'turns'; rows of Spec-Bench have question_id, category and turns")
    turns = record[name]
    if isinstance(turns, str):
        turns = [turns]
    if not isinstance(turns, list) or not turns:
        kind = "an empty list" if turns == [] else json_kind(turns)
        raise InvalidDataError(f"the field {name!r} holds {kind} where a list of text is needed")
    return checked_text(turns[0], name)


def _first_references(value: object) -> list[str]:
    """The references of the first turn: of `[text of each turn, ...]` or `[[text, ...] of each turn, ...]`."""
    if value is None or value == []:
        return []
    first = value[0] if isinstance(value, list) else value
    return [checked_text(entry, "reference") for entry in (first if isinstance(first, list) else [first])]


def _task(
    name: str, description: str, *categories: str, hub: HubSource | None = None, metrics: tuple[Metric, ...]
) -> Task:
    return Task(
        name=name,
        description=description,
        fields=("prompt", "references"),
        template="{prompt}",
        references=lambda record: tuple(dict.fromkeys(record["references"])),
        row=row_of(*categories),
        shared="spec_bench",
        rows=f"Spec-Bench's rows of category {', '.join(categories)} (question_id, category, turns, reference)",
        # The authors publish on GitHub; this copy has a file for each category, rows unchanged.
        hub=hub or HubSource("RedHatAI/speculator_benchmarks", None, "train", data_files=f"{name}.jsonl"),
        metrics=metrics,
    )


def _sentence(record: Record) -> Record | None:
    """Rows with a source and its translation as they are, Spec-Bench's in the same shape, None for other categories."""
    if "source" not in record:
        if not {"turns", "prompt", "category"} & record.keys():
            raise InvalidDataError("no field 'source' (nor 'turns', as Spec-Bench's rows have)")
        return row_of("translation")(record)
    return {
        "id": record.get("id"),
        "prompt": text_field(record, "source"),
        "references": _first_references(record.get("reference")),
    }


TASKS = (
    _task(
        "mt_bench", "open questions, first turns (MT-bench, in Spec-Bench)", *MT_BENCH,
        hub=HubSource("lighteval/mt-bench", None, "train"), metrics=(),  # judged by a model elsewhere
    ),
    replace(
        _task(
            "translation", "sentences with their translation; German to English (WMT14, in Spec-Bench)", "translation",
            metrics=(CHRF, BLEU),
        ),
        row=_sentence, rows="the fields source, reference (or Spec-Bench's rows of category translation)",
    ),
    _task(
        "summarization", "summaries of news articles (CNN/DailyMail, in Spec-Bench)", "summarization",
        metrics=(ROUGE_L,),
    ),
    _task("qa", "questions without a passage (Natural Questions, in Spec-Bench)", "qa", metrics=(EXACT_MATCH, F1)),
    _task(
        "rag", "questions with retrieved passages (Natural Questions, in Spec-Bench)", "rag",
        metrics=(EXACT_MATCH, F1),
    ),
)  # fmt: skip
