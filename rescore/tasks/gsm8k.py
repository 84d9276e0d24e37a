"""GSM8K: grade-school word problems (Cobbe et al. 2021); one of Spec-Bench's categories in [A] table 6."""

from __future__ import annotations

from rescore.tasks.base import HubSource, Record, Task, only_reference
from rescore.tasks.metrics import FINAL_ANSWER
from rescore.tasks.spec_bench import MATH, row_of

_OF_SPEC_BENCH = row_of(MATH)


def row(record: Record) -> Record | None:
    """GSM8K's own rows as they are, Spec-Bench's (which have turns) in the same shape, None for other categories."""
    if "question" in record or "turns" not in record:
        return record
    found = _OF_SPEC_BENCH(record)
    if found is None:
        return None
    answers = {"answer": found["references"][0]} if found["references"] else {}
    return {"id": found["id"], "question": found["prompt"], **answers}


TASK = Task(
    name="gsm8k",
    description="grade-school word problems (GSM8K)",
    fields=("question", "answer"),
    template="{question}",
    references=only_reference("answer"),
    row=row,
    rows=f"the fields question, answer (or Spec-Bench's rows of category {MATH})",
    metrics=(FINAL_ANSWER,),
    hub=HubSource("openai/gsm8k", "main", "test"),
)
