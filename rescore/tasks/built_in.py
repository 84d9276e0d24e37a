"""The built-in tasks, one data set each, but for those of Spec-Bench.

With a short answer:
- GSM8K: grade-school word problems (Cobbe et al. 2021); a category of Spec-Bench in [A] (Kim et al. 2024), table 6.
- LAMBADA: the last word of a passage (Paperno et al. 2016), in OpenAI's processing; plain text, as in [A].
- SQuAD v1.1: answer a question from a passage (Rajpurkar et al. 2016); prompt as in [A], exact match and F1 as in the
  official evaluation. The embedded sample, `squad_sample.jsonl`, is not SQuAD: its passages were written for this
  project, and many of the towns, persons and firms in them are invented.

With a summary, prompts and metric as in [A]:
- CNN/DailyMail 3.0.0: news articles and their highlights (See et al. 2017).
- Multi-News: one summary of several news articles (Fabbri et al. 2019).
- Newsroom: news articles and the summaries that their publishers wrote (Grusky et al. 2018). The data may not be
  redistributed: whoever accepts their terms gets JSON lines, one file for each part.
- SAMSum: short summaries of messenger dialogues (Gliwa et al. 2019).
- XSum: a news article in one sentence (Narayan et al. 2018).

With an image: super-resolution over pixels as tokens (Stern et al. 2018), numbers 0 to 255, row by row. A base LM for
it has a token for every intensity whose id is the number, so that the distance of two ids is that of their intensities
(`--acceptance distance:eps=2`); `docs/recipes/train_superresolution.py` trains one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lattices.errors import InvalidDataError
from rescore.tasks.base import HubSource, Limits, Record, Task, only_reference, text_field, text_list
from rescore.tasks.metrics import CLOSENESS, EXACT_MATCH, F1, FINAL_ANSWER, LAST_WORD, ROUGE_L
from rescore.tasks.spec_bench import MATH, row_of

# The main branches of some data sets hold a loading script, which `datasets` 4 and later refuse; the hub exports these.
EXPORT = "refs/convert/parquet"


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
    Task(
        name="superresolution", description="grey images of more pixels from few: numbers 0 to 255, row by row",
        fields=("low", "high"), template="{low}", references=only_reference("high"), metrics=(CLOSENESS,), chat=False,
        limits=Limits(new_tokens=256),
        without_hub="it has no data set on the hub; docs/recipes/train_superresolution.py makes one",
    ),
)  # fmt: skip
