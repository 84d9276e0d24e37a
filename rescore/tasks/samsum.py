"""SAMSum: short summaries of messenger dialogues (Gliwa et al. 2019); prompt and metric as in [A]."""

from __future__ import annotations

from rescore.tasks.base import HubSource, Task, only_reference, only_text
from rescore.tasks.metrics import ROUGE_L

TASK = Task(
    name="samsum",
    description="summaries of messenger dialogues (SAMSum)",
    fields=("dialogue", "summary"),
    template="Here is a dialogue: {dialogue}\nWrite a short summary!",
    references=only_reference("summary"),
    group=only_text("dialogue"),
    metrics=(ROUGE_L,),
    hub=HubSource("knkarthick/samsum", None, "test"),  # the authors' own copy has left the hub
)
