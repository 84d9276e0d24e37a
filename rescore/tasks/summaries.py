"""Tasks that ask for a summary: prompts and metric as in [A] (Kim et al. 2024), one data set each.

- CNN/DailyMail 3.0.0: news articles and their highlights (See et al. 2017).
- Multi-News: one summary of several news articles (Fabbri et al. 2019).
- Newsroom: news articles and the summaries that their publishers wrote (Grusky et al. 2018). The data may not be
  redistributed: whoever accepts their terms gets JSON lines, one file for each part.
- SAMSum: short summaries of messenger dialogues (Gliwa et al. 2019).
- XSum: a news article in one sentence (Narayan et al. 2018).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rescore.tasks.base import HubSource, Record, Task, only_reference, text_field
from rescore.tasks.metrics import ROUGE_L

# The main branches of some data sets hold a loading script, which `datasets` 4 and later refuse; the hub exports these.
EXPORT = "refs/convert/parquet"


def _title_and_text(record: Record) -> Mapping[str, str]:
    """Both as text; an article without a title (null) has an empty one."""
    title = "" if record.get("title") is None else text_field(record, "title")
    return {"title": title, "text": text_field(record, "text")}


def _summaries(
    name: str, description: str, source: str, template: str, *, summary: str = "summary", **more: Any
) -> Task:
    """The task of summing up the text of the field `source` as the field `summary` does."""
    return Task(
        name=name, description=description, template=template, references=only_reference(summary),
        group=lambda record: text_field(record, source), metrics=(ROUGE_L,), **{"fields": (source, summary), **more},
    )  # fmt: skip


TASKS = (
    _summaries(
        "cnn_dailymail", "highlights of news articles (CNN/DailyMail 3.0.0)", "article", "summarize: {article}",
        summary="highlights", hub=HubSource("abisee/cnn_dailymail", "3.0.0", "test"),
    ),
    _summaries(
        "multi_news", "summaries of several news articles at once (Multi-News)", "document",
        "Write a summary based on this article: {document}",
        hub=HubSource("alexfabbri/multi_news", None, "test", revision=EXPORT),
    ),
    _summaries(
        "newsroom", "summaries of news articles by their publishers (Newsroom)", "text",
        "Please write a short summary for the following article: {title} {text}",
        fields=("title", "text", "summary"), variables=_title_and_text,
        without_hub="it may not be redistributed; ask for it at https://lil.nlp.cornell.edu/newsroom/",
    ),
    _summaries(
        "samsum", "summaries of messenger dialogues (SAMSum)", "dialogue",
        "Here is a dialogue: {dialogue}\nWrite a short summary!",
        hub=HubSource("knkarthick/samsum", None, "test"),  # the authors' own copy has left the hub
    ),
    _summaries(
        "xsum", "one-sentence summaries of news articles (XSum)", "document", "Summarize: {document}",
        hub=HubSource("EdinburghNLP/xsum", None, "test", revision=EXPORT),
    ),
)  # fmt: skip
