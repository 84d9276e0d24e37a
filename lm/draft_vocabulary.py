"""Draft vocabularies: a base's tokens by how often it says them, so that block heads need to look at a part only.

A file (`DraftVocabulary`, JSON) ranks the tokens that stand in corpora, best the base's own output; the others follow
by their ids, in which tokenizers that merge pairs have the frequent ones first. `rescore build-draft-vocabulary` makes
it. Heads that draft from a part (FR-Spec, Zhao et al. 2025, of a draft model) propose less; what the base says stays.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shlex
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lattices.paths import user_path
from lm.base.own_output import OwnOutput, own_output
from lm.files import SHIPPED, atomic_file
from lm.keys import remembered_sha256
from lm.ngram.build import is_model_folder
from lm.ngram.corpus import CorpusSource, check_there, check_unchanged, encode_tokens, find_sources
from lm.ngram.counting import Progress, no_progress
from lm.ngram.recover import counts_of_tokens
from lm.options import Corpora, Field, Utf8Errors, Writer
from lm.records import Count, plain, read_record

SCHEMA = "rescore.draft-vocabulary/1"
SHIPPED_FILE = "draft-vocabulary/vocabulary.json"
REBUILD = "build it again (rescore build-draft-vocabulary)"
Whole = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]
SIZES = (1024, 2048, 4096, 8192, 16384, 32768)  # whose share of the corpora is shown


class DraftVocabulary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is in the file.

    tokenizer: the base LM's name that it was built with; vocab_size: token ids of its tokenizer.
    corpora: what was counted, n-gram models among them; tokens: in all of that.
    token_ids: those that were there, the most frequent first, equal ones by id; counts: of each.
    """

    schema: str = SCHEMA
    version: str
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: Count
    corpora: tuple[CorpusSource, ...]
    tokens: Count
    token_ids: list[Whole]
    counts: list[Whole]

    def ranked(self, vocab_size: int) -> np.ndarray:
        """All token ids of a base with so many, int64 `[vocab_size]`, the most frequent first."""
        seen = np.array(self.token_ids, dtype=np.int64)
        return np.concatenate([seen, np.setdiff1d(np.arange(vocab_size), seen)])


@dataclass(frozen=True)
class DraftVocabularySummary:
    """What was built: of so many tokens, `coverage` by size is the share of them that the most frequent ones are."""

    path: str
    tokenizer: str
    tokens: int
    distinct_tokens: int
    coverage: dict[int, float]

    def use(self) -> str:
        """The command that uses it next."""
        base = "" if self.tokenizer == OwnOutput.base else f"--base {shlex.quote(self.tokenizer)} "
        sizes = ",".join(str(size) for size in (4096, 8192) if size in self.coverage) or max(self.coverage)
        return f"rescore eval {base}--draft-vocabulary {sizes} --drafter {shlex.quote(f'heads:ranking={self.path}')}"


def build_draft_vocabulary(
    *,
    corpus: Corpora,
    out: Annotated[Path, "File for it."],
    tokenizer: Annotated[str | None, "Base LM whose tokens are counted. Default: --base, else smollm2-135m."] = None,
    base: Writer = None,
    field: Field = "text",
    errors: Utf8Errors = "strict",
    own: OwnOutput,
    progress: Progress | None = None,
) -> DraftVocabularySummary:
    """Counts the tokens of corpora (see `lm.ngram.corpus`, `own:PROMPTS` too) and writes them, ranked, into a file.

    A corpus may also be a folder of `build-ngram`: how often each token stood in that model's text follows from its
    probabilities (`lm.ngram.recover`). The end of a text counts as end-of-text; of own output if the base ended it.
    Raises `InvalidDataError` for corpora that can't be used, `IncompatibleError` for those of another tokenizer,
    `OutputError` where `out` can't be written.
    """
    from lm.base.catalog import load_tokenizer  # torch, which reading one does without
    from lm.base.identity import tokenizer_sha256

    check_there(corpus)
    progress, name = progress or no_progress, tokenizer or base or OwnOutput.base
    loaded: Any = load_tokenizer(name)
    digest, vocab_size = tokenizer_sha256(loaded), max(loaded.get_vocab().values()) + 1
    generate = partial(
        own_output, settings=dataclasses.replace(own, base=base or name), tokenizer_sha256=digest, progress=progress
    )
    counts = np.zeros(vocab_size, dtype=np.int64)
    models = [each for each in corpus if is_model_folder(Path(each))]
    texts = [each for each in corpus if each not in models]
    sources = find_sources(texts, generate=generate) if texts or not models else []
    with tempfile.TemporaryDirectory(prefix="rescore-") as folder:
        stream = Path(folder) / "tokens.i32"
        for source in sources:
            encode_tokens(
                [source], stream, tokenizer=loaded, left_context=0, field=field, errors=errors, progress=progress
            )
            token_ids = np.fromfile(stream, np.int32)
            if source.kind != "own" and loaded.eos_token_id is not None:  # own output has it where the base ended it
                token_ids[token_ids < 0] = loaded.eos_token_id
            counts += np.bincount(token_ids[token_ids >= 0], minlength=vocab_size)
    check_unchanged(sources)
    for model in models:
        found, file, manifest = counts_of_tokens(Path(model))
        if manifest.tokenizer_sha256 != digest or len(found) > vocab_size + 1:
            raise IncompatibleError(f"the n-gram model {model} is of other tokens than {name}'s; give another")
        counts[: len(found) - 1] += found[:-1]
        if loaded.eos_token_id is not None:
            counts[loaded.eos_token_id] += found[-1]
        sources.append(CorpusSource("ngram", str(model), remembered_sha256(file), file.stat().st_size))
    ranked = np.lexsort((np.arange(vocab_size), -counts))[: np.count_nonzero(counts)]
    document = DraftVocabulary(
        version=importlib.metadata.version("rescore"), tokenizer=name, tokenizer_sha256=digest, vocab_size=vocab_size,
        tokens=int(counts.sum()), token_ids=ranked.tolist(), counts=counts[ranked].tolist(),
        corpora=tuple(source.without_place() for source in sources),
    )  # fmt: skip
    with atomic_file(out) as temporary:  # in one line: a number a line would be twice as much
        temporary.write_text(json.dumps(plain(document)) + "\n", encoding="utf-8")
    shares = counts[ranked].cumsum() / document.tokens
    sizes = [size for size in SIZES if size < len(ranked)]
    coverage = {size: float(shares[size - 1]) for size in sizes} | {len(ranked): 1.0}
    return DraftVocabularySummary(str(out), name, document.tokens, len(ranked), coverage)


def read_draft_vocabulary(path: Path | str) -> DraftVocabulary:
    """The draft vocabulary in a file, checked. Raises `RescoreError` if there is none, `InvalidDataError` if it is
    broken or of another version."""
    place = user_path(path, "the draft vocabulary")
    missing = f"no draft vocabulary in {place}"
    found = read_record(place, DraftVocabulary, missing=missing, advice=REBUILD, schema=SCHEMA)
    token_ids, counts = (np.array(each, dtype=np.int64) for each in (found.token_ids, found.counts))
    if (
        not len(token_ids)
        or len(token_ids) != len(counts)
        or token_ids.max() >= found.vocab_size
        or len(np.unique(token_ids)) != len(token_ids)
        or (np.diff(counts) > 0).any()
        or sum(found.counts) != found.tokens
    ):
        raise InvalidDataError(f"{place} holds no ranking of tokens by their counts; {REBUILD}")
    return found


def find_draft_vocabulary(path: str, *, tokenizer_sha256: str | None, base: str) -> DraftVocabulary:
    """That of a file (empty: the shipped one of the tokenizer) for the base LM that `base` names in errors.

    Raises as `read_draft_vocabulary`, `RescoreError` if none is shipped, `IncompatibleError` for one of another
    tokenizer.
    """
    for place in [Path(path)] if path else sorted(SHIPPED.glob(f"*/{SHIPPED_FILE}")):
        found = read_draft_vocabulary(place)
        if tokenizer_sha256 in (None, found.tokenizer_sha256):
            return found
    if path:
        raise IncompatibleError(
            f"the draft vocabulary {path} is of the tokenizer of {found.tokenizer}, and {base} has another; build one: "
            "rescore build-draft-vocabulary --tokenizer BASE"
        )
    raise RescoreError(
        f"no draft vocabulary is shipped for the tokenizer of {base}; build one (rescore build-draft-vocabulary), then "
        "heads:vocabulary=N,ranking=FILE"
    )
