"""Perplexity of a text under an n-gram model, with the counts that say what it is worth: unknown words, n-gram lengths.

`score_file` is what the command `score-ngram` does; `score_text` knows nothing about files. A model reads a sentence
word by word: `lm.ngram.kenlm.KenlmModel` strings, an automaton through `AutomatonScorer` its word ids. The numbers are
those of KenLM's `query`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from lattices.automaton import Automaton
from lattices.errors import IncompatibleError, RescoreError
from lattices.ngrams import SENTENCE_END, UNKNOWN
from lm.ngram.build import ARPA_FILE, AUTOMATON_FILE, MANIFEST_FILE, WORDS
from lm.ngram.corpus import EncodedCorpus, encode_corpora, find_sources
from lm.ngram.counting import BREAK, Progress, no_progress
from lm.ngram.kenlm import KenlmModel
from lm.ngram.load import Manifest, load_ngram, read_manifest
from lm.options import TEXTS, Field, Utf8Errors

SCORED_WORDS = 100_000  # between two calls of `progress`


class AutomatonScorer:
    """An automaton that is asked as `lm.ngram.kenlm.KenlmModel` is: by word ids, of which 0 is unknown."""

    order = 0  # it does not tell how long the n-gram was that gave a score

    def __init__(self, automaton: Automaton) -> None:
        self.automaton = automaton

    def begin_sentence(self) -> int:
        """The state after `<s>`."""
        return self.automaton.start

    def full_score(self, state: int, word: int) -> tuple[float, int, int]:
        """log10 probability of a word, 0, state after it."""
        log10p, after = self.automaton.advance(state, word)
        return log10p, 0, after

    def is_unknown(self, word: int) -> bool:
        """Whether a word is scored as `<unk>`."""
        return word == UNKNOWN


@dataclass(frozen=True)
class NgramScore:
    """What a text scores. Tokens are its words and, if they were scored, one `</s>` a sentence.

    `log10p` is the sum over all `tokens`, `log10p_unknown` the part of the `unknown` ones. `hits[n - 1]` tokens had
    their probability from an n-gram (None: the model does not tell).
    """

    sentences: int
    tokens: int
    unknown: int
    log10p: float
    log10p_unknown: float
    hits: tuple[int, ...] | None

    @property
    def perplexity(self) -> float:
        """10 ** (-log10p / tokens): unknown words count with the probability of `<unk>`; nan without tokens."""
        return _perplexity(self.log10p, self.tokens)

    @property
    def perplexity_known(self) -> float:
        """The perplexity without the unknown words' part (they stay in the contexts); nan if all are unknown."""
        return _perplexity(self.log10p - self.log10p_unknown, self.tokens - self.unknown)

    @property
    def unknown_share(self) -> float:
        """Unknown tokens / tokens; nan without tokens."""
        return self.unknown / self.tokens if self.tokens else math.nan

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON: what is no finite number is None."""
        derived = {name: getattr(self, name) for name in ("perplexity", "perplexity_known", "unknown_share")}
        return asdict(self) | {name: value if math.isfinite(value) else None for name, value in derived.items()}


def score_file(
    text: Annotated[Path | str, f"One of: {TEXTS}.", "TEXT"],
    ngram: Annotated[Path, "Folder of build-ngram, ARPA file or KenLM binary."],
    *,
    tokenizer: Annotated[
        str | None, "As in build-ngram; default: the model's (words for files without a manifest)."
    ] = None,
    field: Field = "text",
    errors: Utf8Errors = "strict",
    progress: Progress | None = None,
) -> NgramScore:
    """Scores a text (anything that `lm.ngram.corpus` reads, cut into documents and words as it does).

    `ngram` is what `lm.ngram.load.load_ngram` takes: a folder of `build-ngram`, an automaton or ARPA file, scored by
    our automaton, or a KenLM binary, scored by KenLM. `tokenizer` is the name of a base LM, or `words` for words at
    white space; by default what the model's manifest says, and `words` for a file without one. Raises
    `IncompatibleError` for a tokenizer that the model was not made for, `RescoreError` for what isn't there,
    `InvalidDataError` for what is broken.
    """
    manifest, progress = _manifest(ngram), progress or no_progress
    sources = find_sources([text])
    cut = _tokenizer(tokenizer, manifest, ngram)
    loaded = load_ngram(ngram)
    with tempfile.TemporaryDirectory(prefix="rescore-") as work:
        encoded = encode_corpora(
            sources, Path(work) / "stream.i32", tokenizer=cut, left_context=loaded.order - 1, field=field,
            errors=errors, surface=manifest.surface, progress=progress,
        )  # fmt: skip
        if isinstance(loaded.model, KenlmModel):
            words = np.array(encoded.vocabulary, dtype=object)
            return score_text(loaded.model, _sentences(encoded, words, progress))
        place = {word: i for i, word in enumerate(loaded.model.vocabulary)}
        words = np.array([place.get(word, UNKNOWN) for word in encoded.vocabulary])
        return score_text(AutomatonScorer(loaded.model), _sentences(encoded, words, progress))


def _manifest(ngram: Path) -> Manifest:
    """The manifest of the folder of `build-ngram` that `ngram` is or lies in; what is known of others: nothing."""
    if not ngram.exists():
        raise RescoreError(f"no n-gram model at {ngram}; give a folder of rescore build-ngram, an ARPA or .bin file")
    if ngram.is_dir():
        return read_manifest(ngram)
    beside = ngram.name in (ARPA_FILE, AUTOMATON_FILE) and (ngram.parent / MANIFEST_FILE).is_file()
    return read_manifest(ngram.parent) if beside else Manifest()


def _tokenizer(asked: str | None, manifest: Manifest, ngram: Path) -> Any | None:
    """The tokenizer to read the text with, None for words at white space."""
    made_with, made_for = manifest.tokenizer or WORDS, manifest.tokenizer_sha256
    name = asked or made_with
    foreign = f"{ngram} was made with the tokenizer {made_with}; give that, or leave --tokenizer out"
    if name == WORDS:
        if made_for:
            raise IncompatibleError(foreign)
        return None
    if manifest.tokenizer == WORDS:
        raise IncompatibleError(foreign)
    from lm.base.catalog import load_tokenizer
    from lm.base.identity import tokenizer_sha256

    loaded = load_tokenizer(name)
    if made_for and tokenizer_sha256(loaded) != made_for:
        if asked:
            raise IncompatibleError(foreign)
        raise IncompatibleError(f"the tokenizer {name} is not what {ngram} was made with: it has changed since")
    return loaded


def _sentences(encoded: EncodedCorpus, words: np.ndarray, progress: Progress) -> Iterator[list[Any]]:
    """The model's words of every document, `</s>` included; there is none where a document was cut."""
    ids = encoded.ids()
    begin = reported = 0
    for end in np.flatnonzero((ids == SENTENCE_END) | (ids == BREAK)).tolist():
        if begin >= reported:
            progress("scoring", begin, len(ids))
            reported = begin + SCORED_WORDS
        yield words[ids[begin : end + (ids[end] != BREAK)]].tolist()
        begin = end + 1


def score_text(model: AutomatonScorer | KenlmModel, sentences: Iterable[Sequence[Any]]) -> NgramScore:
    """Scores sentences, each after `<s>`, of the words that the model takes, the `</s>` that ends one among them.

    Raises `RescoreError` if there is no sentence at all.
    """
    hits = [0] * model.order
    count = tokens = unknown = 0
    log10p = log10p_unknown = 0.0
    for sentence in sentences:
        count += 1
        state = model.begin_sentence()
        for word in sentence:
            token_log10p, length, state = model.full_score(state, word)
            if hits:
                hits[length - 1] += 1
            tokens += 1
            log10p += token_log10p
            if model.is_unknown(word):
                unknown += 1
                log10p_unknown += token_log10p
    if not count:
        raise RescoreError("there is no text to score; give at least one line")
    return NgramScore(count, tokens, unknown, log10p, log10p_unknown, tuple(hits) or None)


def _perplexity(log10p: float, tokens: int) -> float:
    if not tokens:
        return math.nan
    exponent = -log10p / tokens
    return math.inf if exponent > 300.0 else 10.0**exponent
