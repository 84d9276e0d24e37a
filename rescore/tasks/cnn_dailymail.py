"""CNN/DailyMail: news articles and their highlights (See et al. 2017, version 3.0.0); prompt and metric as in [A]."""

from __future__ import annotations

from rescore.tasks.base import HubSource, Task, only_reference, only_text
from rescore.tasks.metrics import ROUGE_L

TASK = Task(
    name="cnn_dailymail",
    description="highlights of news articles (CNN/DailyMail 3.0.0)",
    fields=("article", "highlights"),
    template="summarize: {article}",
    references=only_reference("highlights"),
    group=only_text("article"),
    metrics=(ROUGE_L,),
    hub=HubSource("abisee/cnn_dailymail", "3.0.0", "test"),
)
