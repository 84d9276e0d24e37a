"""SQuAD v1.1: answer a question from a passage.

Rajpurkar et al. 2016; prompt as in [A], exact match and F1 as in the official evaluation. The embedded sample,
`squad_sample.jsonl`, is not SQuAD: its passages were written for this project, and many of the towns, persons and
firms in them are invented.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lattices.errors import InvalidDataError
from rescore.tasks.base import HubSource, Record, Task, only_text, text_list
from rescore.tasks.metrics import EXACT_MATCH, F1


def accepted_answers(record: Record) -> tuple[str, ...]:
    """The accepted answers, repeats left out, of `"answers": {"text": [...]}` (the hub's shape) or of a plain list.

    Raises `InvalidDataError` if there is none or they are no text.
    """
    answers = record["answers"]
    if isinstance(answers, Mapping):
        if "text" not in answers:
            raise InvalidDataError("the field 'answers' has no list 'text'")
        answers = answers["text"]
    if answers == []:
        raise InvalidDataError("the field 'answers' holds no answer")
    return text_list(answers, "answers")


TASK = Task(
    name="squad",
    description="question answering from a passage (SQuAD v1.1)",
    fields=("context", "question", "answers"),
    template="question: {question} context: {context}",
    references=accepted_answers,
    hub=HubSource("rajpurkar/squad", "plain_text", "validation"),
    group=only_text("context"),
    metrics=(EXACT_MATCH, F1),
    sample=Path(__file__).with_name("squad_sample.jsonl"),
)
