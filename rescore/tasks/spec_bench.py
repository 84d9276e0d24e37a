"""Spec-Bench (Xia et al. 2024), [A] table 6: one file, `question.jsonl`, whose rows each have a category.

Every category is a task that reads only its own rows. The first turn is the prompt: what follows it would need the
answer before. GSM8K's category, `math_reasoning`, is read by the task gsm8k.

A row is `{"question_id", "category", "turns": [text, ...], "reference": [...]}`; `prompt` may stand for `turns`, as
text or a list. Hub copies that hold one category only need no `category`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lattices.errors import InvalidDataError
from rescore.tasks.base import HubSource, Metric, Record, Task, checked_text, json_kind
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
    found = first if isinstance(first, list) else [first]
    return [checked_text(entry, "reference") for entry in found]


def task_of(name: str, description: str, *categories: str, hub: HubSource, metrics: tuple[Metric, ...] = ()) -> Task:
    """The task of some categories."""
    return Task(
        name=name,
        description=description,
        fields=("prompt", "references"),
        template="{prompt}",
        references=lambda record: tuple(dict.fromkeys(record["references"])),
        row=row_of(*categories),
        rows=f"Spec-Bench's rows of category {', '.join(categories)} (question_id, category, turns, reference)",
        hub=hub,
        metrics=metrics,
    )


def _part(file: str) -> HubSource:
    # The authors publish on GitHub; this copy has a file for each category, rows unchanged.
    return HubSource("RedHatAI/speculator_benchmarks", None, "train", data_files=file)


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        task_of(
            "mt_bench", "open questions, first turns (MT-bench, in Spec-Bench)", *MT_BENCH,
            hub=HubSource("lighteval/mt-bench", None, "train"),  # judged by a model elsewhere: no metric here
        ),
        task_of(
            "translation", "German to English (WMT14, in Spec-Bench)", "translation",
            hub=_part("translation.jsonl"), metrics=(CHRF, BLEU),
        ),
        task_of(
            "summarization", "summaries of news articles (CNN/DailyMail, in Spec-Bench)", "summarization",
            hub=_part("summarization.jsonl"), metrics=(ROUGE_L,),
        ),
        task_of(
            "qa", "questions without a passage (Natural Questions, in Spec-Bench)", "qa",
            hub=_part("qa.jsonl"), metrics=(EXACT_MATCH, F1),
        ),
        task_of(
            "rag", "questions with retrieved passages (Natural Questions, in Spec-Bench)", "rag",
            hub=_part("rag.jsonl"), metrics=(EXACT_MATCH, F1),
        ),
    )
}  # fmt: skip
