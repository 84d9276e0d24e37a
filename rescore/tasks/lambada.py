"""LAMBADA: the last word of a passage (Paperno et al. 2016), in OpenAI's processing; plain text, as in [A]."""

from __future__ import annotations

from lattices.errors import InvalidDataError
from rescore.tasks.base import HubSource, Record, Task, text_field
from rescore.tasks.metrics import LAST_WORD


def split_last_word(record: Record) -> tuple[str, str]:
    """(the passage without its last word and the space before it, the last word). Raises `InvalidDataError`."""
    parts = text_field(record, "text").rsplit(maxsplit=1)
    if len(parts) < 2:
        raise InvalidDataError("the field 'text' needs two words or more, the last of which is to be found")
    return parts[0], parts[1]


TASK = Task(
    name="lambada",
    description="language modelling: the last word of a passage (LAMBADA)",
    fields=("text",),
    template="{text_without_last_word}",
    variables=lambda record: {"text_without_last_word": split_last_word(record)[0]},
    references=lambda record: (split_last_word(record)[1],),
    metrics=(LAST_WORD,),
    passage="text",
    hub=HubSource("EleutherAI/lambada_openai", "default", "test"),
    chat=False,
)
