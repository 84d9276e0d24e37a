"""GSM8K: grade-school word problems (Cobbe et al. 2021); one of Spec-Bench's categories in [A] table 6."""

from __future__ import annotations

import re

from rescore.tasks.base import HubSource, Metric, Task, only_reference

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?", re.ASCII)


def final_answer(output: str, references: tuple[str, ...]) -> float:
    """1.0 if the last number of the output is the last number of a reference (behind its `####`), else 0.0."""
    found = _last_number(output)
    return float(found is not None and any(found == _last_number(reference) for reference in references))


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


TASK = Task(
    name="gsm8k",
    description="grade-school word problems (GSM8K)",
    fields=("question", "answer"),
    template="{question}",
    references=only_reference("answer"),
    metric=Metric("final answer", final_answer),
    hub=HubSource("openai/gsm8k", "main", "test"),
)
