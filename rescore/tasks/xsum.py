"""XSum: a news article in one sentence (Narayan et al. 2018); prompt and metric as in [A]."""

from __future__ import annotations

from rescore.tasks.base import HubSource, Task, only_reference, only_text
from rescore.tasks.metrics import ROUGE_L

TASK = Task(
    name="xsum",
    description="one-sentence summaries of news articles (XSum)",
    fields=("document", "summary"),
    template="Summarize: {document}",
    references=only_reference("summary"),
    group=only_text("document"),
    metrics=(ROUGE_L,),
    # The main branch has held a loading script, which `datasets` 4 and later refuse; this one is the hub's export.
    hub=HubSource("EdinburghNLP/xsum", None, "test", revision="refs/convert/parquet"),
)
