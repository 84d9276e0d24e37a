"""Mixes n-gram models into one: p(w | h) = sum of weight x p of each, for every n-gram that any of them holds.

Back-off weights are set so that every context sums to one again (as SRILM's static interpolation does), so the mixture
is an ordinary back-off model: one ARPA file, one automaton, the same exact search. `mix_ngrams` is what the command
`mix-ngram` does: a part is a folder of `build-ngram` or `mix-ngram`, an ARPA file, or `shipped`: the model shipped for
the built-in base; the result is a folder like those of `build-ngram`, whose manifest names parts, hashes and weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lattices.automaton import LN10, ROOT, SCORE_SCALE, Automaton
from lattices.errors import IncompatibleError, OutputError, RescoreError
from lattices.ngrams import SENTENCE_START, SPECIAL_WORDS, UNKNOWN, NgramArrays, NgramModel
from lattices.paths import user_path
from lm.keys import remembered_sha256
from lm.locks import writing_to
from lm.ngram.build import ARPA_FILE, WORDS, check_place, write_model
from lm.ngram.counting import Progress, no_progress
from lm.ngram.load import SHIPPED_NGRAM, Manifest, check_files, find_ngram, is_arpa

SHIPPED_NAME = "shipped"  # the name that stands for the shipped model; a folder of that name is ./shipped
LEAST = 1e-99  # of a probability, as ARPA files have it


@dataclass(frozen=True)
class NgramPart:
    """A model to mix."""

    name: str  # as given
    file: Path  # its ARPA file
    manifest: Manifest  # what is known of its words

    @cached_property
    def sha256(self) -> str:
        """sha256 of the ARPA file."""
        return remembered_sha256(self.file)

    def read(self) -> NgramModel:
        """The model. Raises `InvalidDataError` for a broken ARPA file, `IncompatibleError` for one that is replaced
        while it is read, or was since the weights were tuned on it."""
        from lm.ngram.arpa import read_arpa

        sha256 = self.sha256
        model = read_arpa(self.file)
        if remembered_sha256(self.file) != sha256:
            raise IncompatibleError(f"{self.file} was replaced while it was read; run the command again")
        return model


@dataclass(frozen=True)
class MixedNgram:
    """What was mixed."""

    path: str  # the folder
    order: int
    ngrams: tuple[int, ...]  # by order
    parts: tuple[str, ...]
    weights: tuple[float, ...]  # sum 1


def find_parts(names: Sequence[str]) -> list[NgramPart]:
    """What the names stand for. Raises `RescoreError` for what is no model that can be mixed, and for fewer than two;
    `IncompatibleError` for models over other words than the first one's."""
    if len(names) < 2:
        raise RescoreError("a mixture is made of two n-gram models or more; name them one after the other")
    parts = [_find(name) for name in names]
    known = [part for part in parts if part.manifest.tokenizer is not None]
    for part in known[1:]:
        one, other = known[0].manifest, part.manifest
        if (one.tokenizer_sha256, one.surface) != (other.tokenizer_sha256, other.surface):
            raise IncompatibleError(
                f"{known[0].name} is over the words of {_words(one)}, {part.name} over those of {_words(other)}; mix "
                "models that were built with one tokenizer"
            )
    return parts


def _words(manifest: Manifest) -> str:
    return f"{manifest.tokenizer}{' (--surface)' if manifest.surface else ''}"


def _find(name: str) -> NgramPart:
    path = SHIPPED_NGRAM if name == SHIPPED_NAME else user_path(name, "the model")
    file, manifest = find_ngram(path, ARPA_FILE)
    if not is_arpa(file):
        raise RescoreError(f"{path} is no ARPA file, and only these can be mixed; give the folder or the ARPA file")
    check_files(file, manifest)
    return NgramPart(name, file, manifest)


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
    if len(parts) < 2:
        raise RescoreError("a mixture is made of two n-gram models or more")
    if len(parts) != len(weights):
        raise RescoreError(f"{len(weights)} weights for {len(parts)} n-gram models; give one for each")
    if min(weights) <= 0 or not np.isfinite(sum(weights)):
        raise RescoreError("the weights of a mixture must be numbers above 0")
    check_place(out)
    if out.resolve() in [part.file.resolve().parent for part in parts]:
        raise OutputError(f"{out} is one of the models to mix, which would be lost; choose another --out")
    progress = progress or no_progress
    with writing_to(out, beside=True):
        models = []
        for done, part in enumerate(parts):
            progress("reading", done, len(parts))
            models.append(part.read())
        progress("mixing", 0, 1)
        model = Mixture(models).at(weights)
        shares = tuple(weight / sum(weights) for weight in weights)
        mixed = MixedNgram(
            str(out), model.order, tuple(map(len, model.orders)), tuple(part.name for part in parts), shares
        )
        words = next((part.manifest for part in parts if part.manifest.tokenizer is not None), Manifest())
        manifest = {
            "order": model.order,
            "tokenizer": words.tokenizer or WORDS,
            "tokenizer_sha256": words.tokenizer_sha256,
            "surface": words.surface,
            "mixture": [
                # Where a file lay says nothing about the model; its hash does.
                {"name": Path(part.name).name, "sha256": part.sha256, "weight": share}
                for part, share in zip(parts, shares, strict=True)
            ],
            "tuned": tuned,
            "ngrams": mixed.ngrams,
        }
        write_model(model, out, manifest, progress=progress)
        return mixed


class Mixture:
    """The probabilities that models give to every n-gram of any of them: looked up once, mixed by any weights. A word
    that a model does not know has probability 0 there."""

    def __init__(self, models: Sequence[NgramModel]) -> None:
        place = {word: i for i, word in enumerate(SPECIAL_WORDS)}
        for model in models:
            for word in model.vocabulary:
                place.setdefault(word, len(place))
        self._vocabulary = tuple(place)
        ids = [np.array([place[w] for w in m.vocabulary], dtype=np.int32) for m in models]
        self._levels = _all_ngrams(models, ids)  # by order, int32 [n-grams, order]
        self._probabilities = [self._look_up(model) for model in models]  # of each model, by order, [n-grams]
        self._below = [
            # Of each n-gram of the next order: the places of its context and of its suffix here.
            (_places(words, longer[:, :-1]), _places(words, longer[:, 1:]))
            for words, longer in pairwise(self._levels)
        ]

    def _look_up(self, model: NgramModel) -> list[np.ndarray]:
        own = {word: i for i, word in enumerate(model.vocabulary)}
        word_of = np.array([own.get(word, UNKNOWN) for word in self._vocabulary], dtype=np.int32)
        known = np.array([word in own for word in self._vocabulary])
        automaton = Automaton.compile(model)
        probabilities = []
        for words in self._levels:
            states = np.full(len(words), ROOT, dtype=np.int32)
            for column in words[:, :-1].T:
                states = automaton.advance_many(states, word_of[column])[1]
            scores, _ = automaton.advance_many(states, word_of[words[:, -1]])
            probabilities.append(np.where(known[words[:, -1]], np.exp(scores / SCORE_SCALE), 0.0))
        return probabilities

    def at(self, weights: Sequence[float]) -> NgramModel:
        """The mixture with these weights, each above 0; they are scaled to sum to one."""
        shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        mixed = [
            sum((share * p for share, p in zip(shares, of_models, strict=True)), np.zeros(1))
            for of_models in zip(*self._probabilities, strict=True)
        ]
        orders = []
        for n, (words, p) in enumerate(zip(self._levels, mixed, strict=True)):
            backoff = np.zeros(len(words))
            if n < len(self._below):
                context, suffix = self._below[n]
                # The mass that the longer n-grams leave, spread over what the shorter ones give all other words.
                left = 1.0 - np.bincount(context, mixed[n + 1], minlength=len(words))
                lower = 1.0 - np.bincount(context, p[suffix], minlength=len(words))
                extended = np.bincount(context, minlength=len(words)) > 0
                ratio = np.clip(left, LEAST, None) / np.clip(lower, LEAST, None)
                backoff = np.where(extended, np.log(np.clip(ratio, LEAST, 1 / LEAST)) / LN10, 0.0)
            log10p = np.log(np.clip(p, LEAST, 1.0)) / LN10
            if n == 0:
                log10p[words[:, 0] == SENTENCE_START] = 0.0  # never predicted; lmplz writes 0
            orders.append(NgramArrays(words, log10p.astype(np.float32), backoff.astype(np.float32)))
        return NgramModel(self._vocabulary, tuple(orders))


def _all_ngrams(models: Sequence[NgramModel], ids: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The n-grams of all models by order, sorted, with the prefixes and suffixes of the longer ones among them."""
    order = max(model.order for model in models)
    levels = [np.zeros((0, n + 1), dtype=np.int32) for n in range(order)]
    for n in range(order - 1, -1, -1):
        parts = [i[m.orders[n].words] for m, i in zip(models, ids, strict=True) if n < m.order]
        if n + 1 < order:
            parts += [levels[n + 1][:, :-1], levels[n + 1][:, 1:]]
        levels[n] = np.unique(np.concatenate(parts), axis=0).astype(np.int32)
    return levels


def _places(rows: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """The place of each of `parts` in sorted rows that hold it."""
    both, inverse = np.unique(np.concatenate([rows, parts]), axis=0, return_inverse=True)
    assert len(both) == len(rows), "every prefix and suffix is there"
    return np.asarray(inverse.ravel()[len(rows) :])
