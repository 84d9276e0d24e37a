"""Tasks with a short answer, one data set each.

- GSM8K: grade-school word problems (Cobbe et al. 2021); a category of Spec-Bench in [A] (Kim et al. 2024), table 6.
- LAMBADA: the last word of a passage (Paperno et al. 2016), in OpenAI's processing; plain text, as in [A].
- SQuAD v1.1: answer a question from a passage (Rajpurkar et al. 2016); prompt as in [A], exact match and F1 as in the
  official evaluation. The embedded sample, `squad_sample.jsonl`, is not SQuAD: its passages were written for this
  project, and many of the towns, persons and firms in them are invented.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lattices.errors import InvalidDataError
from rescore.tasks.base import HubSource, Record, Task, only_reference, text_field, text_list
from rescore.tasks.metrics import EXACT_MATCH, F1, FINAL_ANSWER, LAST_WORD
from rescore.tasks.spec_bench import MATH, row_of


def _word_problem(record: Record) -> Record | None:
    """GSM8K's own rows as they are, Spec-Bench's (which have turns) in the same shape, None for other categories."""
    if "question" in record or "turns" not in record:
        return record
    row = row_of(MATH)(record)
    if row is None:
        return None
    answers = {"answer": row["references"][0]} if row["references"] else {}
    return {"id": row["id"], "question": row["prompt"], **answers}


def _split_last_word(record: Record) -> tuple[str, str]:
    """(the passage without its last word and the space before it, the last word). Raises `InvalidDataError`."""
    parts = text_field(record, "text").rsplit(maxsplit=1)
    if len(parts) < 2:
        raise InvalidDataError("the field 'text' needs two words or more, the last of which is to be found")
    return parts[0], parts[1]


def _accepted_answers(record: Record) -> tuple[str, ...]:
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


TASKS = (
    Task(
        name="gsm8k", description="grade-school word problems (GSM8K)",
        fields=("question", "answer"), template="{question}", references=only_reference("answer"),
        row=_word_problem, rows=f"the fields question, answer (or Spec-Bench's rows of category {MATH})",
        metrics=(FINAL_ANSWER,), hub=HubSource("openai/gsm8k", "main", "test"),
    ),
    Task(
        name="lambada", description="language modelling: the last word of a passage (LAMBADA)",
        fields=("text",), template="{text_without_last_word}",
        variables=lambda record: {"text_without_last_word": _split_last_word(record)[0]},
        references=lambda record: (_split_last_word(record)[1],),
        metrics=(LAST_WORD,), passage="text", hub=HubSource("EleutherAI/lambada_openai", "default", "test"), chat=False,
    ),
    Task(
        name="squad", description="question answering from a passage (SQuAD v1.1)",
        fields=("context", "question", "answers"), template="question: {question} context: {context}",
        references=_accepted_answers, group=lambda record: text_field(record, "context"), metrics=(EXACT_MATCH, F1),
        hub=HubSource("rajpurkar/squad", "plain_text", "validation"),
        sample=Path(__file__).with_name("squad_sample.jsonl"),
    ),
)  # fmt: skip
