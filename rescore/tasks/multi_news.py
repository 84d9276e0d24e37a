"""Multi-News: one summary of several news articles (Fabbri et al. 2019); prompt and metric as in [A]."""

from __future__ import annotations

from rescore.tasks.base import HubSource, Task, only_reference, only_text
from rescore.tasks.metrics import ROUGE_L

TASK = Task(
    name="multi_news",
    description="summaries of several news articles at once (Multi-News)",
    fields=("document", "summary"),
    template="Write a summary based on this article: {document}",
    references=only_reference("summary"),
    group=only_text("document"),
    metrics=(ROUGE_L,),
    # The main branch holds a loading script, which `datasets` 4 and later refuse; this one is the hub's export.
    hub=HubSource("alexfabbri/multi_news", None, "test", revision="refs/convert/parquet"),
)
