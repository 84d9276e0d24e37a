"""Options as records and functions declare them: a type with its help, `Annotated[int, "Tokens per step."]`.

The command line makes its options of such fields and parameters (`cli.py`); what has no help is no option. A text that
begins with `--` is the option's name, where that is not the field's. This module and those of records that commands
take import nothing heavy, so that help is quick.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from lattices.errors import RescoreError

Base = Annotated[
    str, "Base LM: smollm2-135m, smollm2-135m-bpd (tuned with its heads), a model folder, .gguf file or hub id."
]
Heads = Annotated[
    str | None,
    "Block heads: a folder, or others' Medusa heads as they are (folder or file). Default: the base's.",
]
TopK = Annotated[int, "Tokens of each head that are in the lattice."]
Dtype = Annotated[Literal["float32", "float64", "bfloat16", "float16"], "Precision of the base LM."]
Device = Annotated[str, "cpu, cuda, or auto."]
Compile = Annotated[
    Literal["auto", "off"],
    "Live, compile the base LM's layers, which takes some 15 s once on a machine; auto: of float32 on a CPU. On a GPU: "
    "record its forwards.",
]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16"], "Of what is multiplied to learn; auto: what the machine is fast in."
]
Field = Annotated[str, "Field of JSON lines, tables and hub data sets with the text or the token ids."]
Utf8Errors = Annotated[Literal["strict", "replace"], "Bad UTF-8: refuse it, or replace it."]
TEXTS = (
    "text, .jsonl, .json, .csv or .parquet (--field), .gz or .zst of those, folders of them, a folder of rescore "
    "generate-corpus (the base LM's own output, what the rescorer ngram learns from best), or hub:NAME[:SPLIT[:FIELD]] "
    "for a hub data set"
)

Corpora = Annotated[
    Sequence[str],
    f"One or more of: {TEXTS}; own:PROMPTS for the base LM's own output for a file of prompts, generated once and "
    "kept.",
    "CORPUS",
]
Writer = Annotated[str | None, "Base LM that writes the output for own:PROMPTS. Default: --tokenizer.", "--base"]


@dataclass(frozen=True)
class Size:
    """Of a whole number that may be given like 500K, 1.5M or 4G."""

    thousand: int  # what K stands for

    def text(self, number: int) -> str:
        """The number as short as it can be written."""
        for letter in ("", "K", "M", "G"):
            if number < self.thousand or number % self.thousand:
                return f"{number}{letter}"
            number //= self.thousand
        return f"{number}T"

    def read(self, name: str, text: str) -> int:
        """The number. Raises `RescoreError` that begins with the option's name."""
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kmgt]?)b?", text.strip().lower())
        if not match:
            raise RescoreError(f"{name} {text}: give a number, with K, M, G or T after it if it is large, like 4G")
        return int(float(match[1]) * self.thousand ** " kmgt".index(match[2] or " "))
