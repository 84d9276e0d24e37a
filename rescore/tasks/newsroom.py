"""Newsroom: news articles and the summaries that their publishers wrote (Grusky et al. 2018); prompt as in [A].

The data may not be redistributed: whoever accepts their terms gets JSON lines, one file for each part.
"""

from __future__ import annotations

from collections.abc import Mapping

from rescore.tasks.base import Record, Task, only_reference, only_text, text_field
from rescore.tasks.metrics import ROUGE_L


def title_and_text(record: Record) -> Mapping[str, str]:
    """Both as text; an article without a title (null) has an empty one."""
    title = "" if record.get("title") is None else text_field(record, "title")
    return {"title": title, "text": text_field(record, "text")}


TASK = Task(
    name="newsroom",
    description="summaries of news articles by their publishers (Newsroom)",
    fields=("title", "text", "summary"),
    template="Please write a short summary for the following article: {title} {text}",
    variables=title_and_text,
    references=only_reference("summary"),
    without_hub="it may not be redistributed; ask for it at https://lil.nlp.cornell.edu/newsroom/",
    group=only_text("text"),
    metrics=(ROUGE_L,),
)
