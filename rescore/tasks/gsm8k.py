"""GSM8K: grade-school word problems (Cobbe et al. 2021); one of Spec-Bench's categories in [A] table 6."""

from __future__ import annotations

from rescore.tasks.base import HubSource, Task, only_reference

TASK = Task(
    name="gsm8k",
    description="grade-school word problems (GSM8K)",
    fields=("question", "answer"),
    template="{question}",
    references=only_reference("answer"),
    hub=HubSource("openai/gsm8k", "main", "test"),
)
