"""Mixes n-gram model folders into one: what the command `mix-ngram` does (the arithmetic is in
`lm.ngram.interpolation`).

A part is a folder of `build-ngram` or `mix-ngram`, an ARPA file, or `own`: the model shipped for the built-in base.
The result is a folder like those of `build-ngram`, whose manifest names the parts with their hashes and weights.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lattices.errors import IncompatibleError, OutputError, RescoreError
from lattices.ngrams import NgramModel
from lattices.paths import user_path
from lm.files import read_json_object, sha256_of_file
from lm.locks import writing_to
from lm.ngram.build import ARPA_FILE, KIND, MANIFEST_FILE, WORDS, Progress, check_place, write_model
from lm.ngram.interpolation import check_weights, mix
from lm.ngram.load import SHIPPED_FILE, SHIPPED_NGRAM, check_files, is_arpa

SHIPPED = "shipped"  # the name that stands for the shipped model; a folder of that name is ./shipped


@dataclass(frozen=True)
class NgramPart:
    """A model to mix: its name as given, its ARPA file, and what its manifest says of its words (None: not known)."""

    name: str
    file: Path
    tokenizer: str | None
    tokenizer_sha256: str | None
    surface: bool | None

    @cached_property
    def sha256(self) -> str:
        """sha256 of the ARPA file."""
        return sha256_of_file(self.file)

    def read(self) -> NgramModel:
        """The model. Raises `InvalidDataError` for a broken ARPA file."""
        from lm.ngram.arpa import read_arpa

        return read_arpa(self.file)


@dataclass(frozen=True)
class MixedNgram:
    """The mixture in the folder `path`: `ngrams[n - 1]` n-grams of order n, from `parts` with `weights` (sum 1)."""

    path: str
    order: int
    ngrams: tuple[int, ...]
    parts: tuple[str, ...]
    weights: tuple[float, ...]


def find_parts(names: Sequence[str]) -> list[NgramPart]:
    """What the names stand for. Raises `RescoreError` for what is no model that can be mixed, and for fewer than two;
    `IncompatibleError` for models over other words than the first one's."""
    if len(names) < 2:
        raise RescoreError("a mixture is made of two n-gram models or more; name them one after the other")
    parts = [_find(name) for name in names]
    for name in ("tokenizer_sha256", "surface"):
        known = [(part, getattr(part, name)) for part in parts if part.tokenizer is not None]
        for part, value in known[1:]:
            if value != known[0][1]:
                raise IncompatibleError(
                    f"{known[0][0].name} is over the words of {_words(known[0][0])}, {part.name} over those of "
                    f"{_words(part)}; mix models that were built with one tokenizer"
                )
    return parts


def _words(part: NgramPart) -> str:
    return f"{part.tokenizer}{' (--surface)' if part.surface else ''}"


def _find(name: str) -> NgramPart:
    path = SHIPPED_NGRAM if name == SHIPPED else user_path(name, "the model")
    if path.is_dir():
        manifest = read_json_object(path / MANIFEST_FILE, missing=f"no n-gram model in {path}")
        for file in (path / ARPA_FILE, path / SHIPPED_FILE):
            if file.is_file():
                check_files(path, manifest)
                tokenizer, sha256 = manifest.get("tokenizer"), manifest.get("tokenizer_sha256")
                return NgramPart(
                    name,
                    file,
                    tokenizer if isinstance(tokenizer, str) else None,
                    sha256 if isinstance(sha256, str) else None,
                    bool(manifest.get("surface")),
                )
        raise RescoreError(f"{path} has no {ARPA_FILE}, which a mixture is made from; build the model again")
    if not path.is_file():
        raise RescoreError(
            f"no n-gram model at {path}; give a folder of rescore build-ngram, an ARPA file or {SHIPPED}"
        )
    if not is_arpa(path):
        raise RescoreError(f"{path} is no ARPA file, and only these can be mixed; give the folder or the ARPA file")
    return NgramPart(name, path, None, None, None)


def mix_ngrams(
    parts: Sequence[NgramPart],
    weights: Sequence[float],
    out: Path,
    *,
    tuned: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> MixedNgram:
    """Writes the mixture of `parts` with `weights` (above 0, scaled to sum to one) to the folder `out`.

    `tuned` goes into the manifest: how the weights were found. Raises `RescoreError` for weights that make no sense,
    `InvalidDataError` for a broken part, `OutputError` where `out` can't be written, is a part or is being written to.
    """
    check_weights(weights, len(parts))
    check_place(out)
    if out.resolve() in [part.file.resolve().parent for part in parts]:
        raise OutputError(f"{out} is one of the models to mix, which would be lost; choose another --out")
    with writing_to(out, beside=True):
        models = []
        for done, part in enumerate(parts):
            if progress:
                progress("reading", done, len(parts))
            models.append(part.read())
        if progress:
            progress("mixing", 0, 1)
        model = mix(models, weights)
        shares = tuple(weight / sum(weights) for weight in weights)
        summary = MixedNgram(
            str(out), model.order, tuple(map(len, model.orders)), tuple(part.name for part in parts), shares
        )
        words = next((part for part in parts if part.tokenizer is not None), parts[0])
        manifest = {
            "kind": KIND,
            "version": importlib.metadata.version("rescore"),
            "order": model.order,
            "tokenizer": words.tokenizer or WORDS,
            "tokenizer_sha256": words.tokenizer_sha256,
            "surface": bool(words.surface),
            "mixture": [
                # Where a file lay says nothing about the model; its hash does.
                {"name": Path(part.name).name, "sha256": part.sha256, "weight": share}
                for part, share in zip(parts, shares, strict=True)
            ],
            "tuned": tuned,
            "ngrams": summary.ngrams,
        }
        write_model(model, out, manifest, progress=progress)
        return summary
