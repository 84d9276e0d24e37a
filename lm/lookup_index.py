"""Lookup indexes of corpora on disk: what `rescore build-lookup` makes, opened with all that can be wrong checked.

A folder holds `tokens.npy` and `suffixes.npy` (the arrays of `lattices.joined.corpus_index.CorpusIndex`) and, written
last, `lookup.json` (`LookupRecord`). It takes its place as a whole. Corpora are those of `lm.ngram.corpus`.
"""

from __future__ import annotations

import importlib.metadata
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lattices.errors import IncompatibleError, InvalidDataError, OutputError, RescoreError, unreadable
from lattices.joined.corpus_index import CorpusIndex, build_suffix_array
from lattices.paths import user_path
from lm.base.own_output import OwnOutput, own_output
from lm.files import atomic_folder, changed_settings, sha256_of_file, write_array, write_json
from lm.keys import key_of, remembered_sha256
from lm.locks import writing_to
from lm.ngram.build import check_earlier
from lm.ngram.corpus import CorpusSource, check_there, check_unchanged, encode_tokens, find_sources
from lm.ngram.counting import Progress, no_progress
from lm.options import Field, Utf8Errors
from lm.records import Count, plain, read_record

SCHEMA = "rescore.lookup/1"
RECORD_FILE, TOKENS_FILE, SUFFIXES_FILE = "lookup.json", "tokens.npy", "suffixes.npy"
LEFT_CONTEXT = 15  # tokens of a prompt before own output, so that matches of 16 begin with its first token
REBUILD = "build it again (rescore build-lookup)"


@dataclass(frozen=True, kw_only=True)
class LookupOptions:
    """How a corpus is read."""

    tokenizer: str = "smollm2-135m"  # a base LM's name
    errors: Utf8Errors = "strict"
    field: Field = "text"


class ArrayFile(msgspec.Struct, frozen=True):
    """A file of an index as it was written."""

    bytes: Count
    sha256: str


class LookupRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What an index was made of: `lookup.json`."""

    schema: str
    version: str
    tokenizer: str  # the base LM's name that it was built with
    tokenizer_sha256: str
    vocab_size: Count
    largest_token_id: Count
    documents: Count
    tokens: Count
    field: str
    errors: str
    corpora: tuple[CorpusSource, ...]
    files: Mapping[str, ArrayFile]


@dataclass(frozen=True)
class LookupSummary:
    """What was built."""

    path: str  # the folder
    tokenizer: str
    documents: int
    tokens: int
    distinct_tokens: int
    longest_document: int  # tokens

    def use(self) -> str:
        """The command that uses the index next."""
        base = "" if self.tokenizer == LookupOptions.tokenizer else f"--base {shlex.quote(self.tokenizer)} "
        return f"rescore eval {base}--rescorer {shlex.quote(f'none,lookup,corpus-lookup:{self.path}')}"


@dataclass(frozen=True)
class LookupIndex:
    """An opened index. identity: hex sha256 of its arrays and the tokenizer, for keys of caches."""

    path: Path
    record: LookupRecord
    corpus: CorpusIndex
    identity: str


# Building


def build_lookup(
    corpora: Sequence[Path | str],
    out: Path,
    options: LookupOptions = LookupOptions(),
    *,
    own: OwnOutput | None = None,
    replace: bool = True,
    progress: Progress | None = None,
) -> LookupSummary:
    """Builds the index of `corpora` (see `lm.ngram.corpus`, `own:PROMPTS` too) in the folder `out`.

    own: how own output is generated; default: by the base of the tokenizer. replace: whether a finished index in `out`
    that was made of other things may be replaced; it is refused with the difference if not (`IncompatibleError`).

    Raises `InvalidDataError` for corpora that can't be used, such as those in which nothing follows anything,
    `OutputError` where `out` can't be written, holds other files or is written to by another process.
    `progress(stage, done, total)` is called now and then; an exception from it interrupts the build.
    """
    from lm.base.catalog import load_tokenizer  # torch, which opening an index does without
    from lm.base.identity import tokenizer_sha256

    progress = progress or no_progress
    check_place(out)
    check_there(corpora)
    with writing_to(out, beside=True):
        tokenizer: Any = load_tokenizer(options.tokenizer)
        tokenizer_hash = tokenizer_sha256(tokenizer)
        settings = own or OwnOutput(base=options.tokenizer)
        generate = partial(own_output, settings=settings, tokenizer_sha256=tokenizer_hash, progress=progress)
        sources = find_sources(corpora, generate=generate)
        named = tuple(source.without_place() for source in sources)
        _check_earlier(out, _of_what(tokenizer_hash, options.field, options.errors, named), replace=replace)
        with atomic_folder(out) as temporary:
            stream = temporary / "tokens.i32"
            documents, tokens = encode_tokens(
                sources, stream, tokenizer=tokenizer, left_context=LEFT_CONTEXT, field=options.field,
                errors=options.errors, progress=progress,
            )  # fmt: skip
            check_unchanged(sources)
            if tokens == documents:
                raise InvalidDataError("no document of the corpora has two tokens, so nothing follows anything in them")
            token_ids = np.fromfile(stream, np.int32)
            stream.unlink()
            progress("sorting", 0, 1)
            suffixes = build_suffix_array(token_ids)
            progress("sorting", 1, 1)
            arrays = {TOKENS_FILE: token_ids, SUFFIXES_FILE: suffixes}
            files = {name: _save(temporary / name, array) for name, array in arrays.items()}
            record = LookupRecord(
                schema=SCHEMA, version=importlib.metadata.version("rescore"), tokenizer=options.tokenizer,
                tokenizer_sha256=tokenizer_hash, vocab_size=max(tokenizer.get_vocab().values()) + 1,
                largest_token_id=int(token_ids.max()), documents=documents, tokens=tokens, field=options.field,
                errors=options.errors, corpora=named, files=files,
            )  # fmt: skip
            write_json(temporary / RECORD_FILE, plain(record))
    ends = np.flatnonzero(token_ids < 0)
    return LookupSummary(
        str(out), options.tokenizer, documents, tokens, distinct_tokens=len(np.unique(token_ids)) - 1,
        longest_document=int(np.diff(ends, prepend=-1).max()) - 1,
    )  # fmt: skip


def check_place(out: Path) -> None:
    """The whole folder is replaced, so it must be new, empty or an earlier index. Raises `OutputError`."""
    if out.is_file():
        raise OutputError(f"{out} is a file; the index is a folder, choose another --out")
    if out.is_dir() and not (out / RECORD_FILE).is_file() and any(out.iterdir()):
        raise OutputError(f"{out} holds files that are no lookup index, which would be lost; choose another --out")


def _save(path: Path, array: np.ndarray) -> ArrayFile:
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
        write_array(stream, array)
    return ArrayFile(path.stat().st_size, sha256_of_file(path))


def _of_what(tokenizer_hash: str, field: str, errors: str, corpora: Sequence[CorpusSource]) -> dict[str, Any]:
    """What tells one index from another."""
    return {
        "tokenizer_sha256": tokenizer_hash[:12], "field": field, "errors": errors,
        "corpora": {source.name: source.sha256[:12] for source in corpora},
    }  # fmt: skip


def _check_earlier(out: Path, made_of: dict[str, Any], *, replace: bool) -> None:
    if not (out / RECORD_FILE).is_file():
        return
    try:
        earlier = read_lookup_record(out)
    except RescoreError:
        if replace:
            return
        raise
    before = _of_what(earlier.tokenizer_sha256, earlier.field, earlier.errors, earlier.corpora)
    check_earlier(out, changed_settings(before, made_of, whole=True), what="index", replace=replace)


# Opening


def read_lookup_record(folder: Path) -> LookupRecord:
    """What the index in a folder was made of. Raises `RescoreError` if there is none, `InvalidDataError` for one of
    another version, a broken one and an empty one."""
    missing = f"no lookup index in {folder}"
    advice = "give a folder of rescore build-lookup"
    record = read_record(folder / RECORD_FILE, LookupRecord, missing=missing, advice=advice, schema=SCHEMA)
    if not record.tokens:
        raise InvalidDataError(f"the lookup index {folder} is of an empty corpus; {REBUILD}")
    return record


def open_lookup(
    folder: Path | str, *, tokenizer_sha256: str | None = None, vocab_size: int | None = None, base: str = "the base LM"
) -> LookupIndex:
    """Opens an index, mapped into memory.

    tokenizer_sha256, vocab_size: of the base LM that it is for, which `base` names in errors. Raises `RescoreError` if
    there is no index, `IncompatibleError` for one of another tokenizer or with tokens beyond the vocabulary,
    `InvalidDataError` for files that were cut short or changed since, other versions and an empty corpus.
    """
    path = user_path(folder, "the lookup index")
    record = read_lookup_record(path)
    if tokenizer_sha256 is not None and tokenizer_sha256 != record.tokenizer_sha256:
        raise IncompatibleError(
            f"the lookup index {path} was built with the tokenizer of {record.tokenizer} "
            f"({record.tokenizer_sha256[:12]}), and {base} has another ({tokenizer_sha256[:12]}); build one with "
            "rescore build-lookup --tokenizer BASE"
        )
    if vocab_size is not None and record.largest_token_id >= vocab_size:
        raise IncompatibleError(
            f"the lookup index {path} holds the token id {record.largest_token_id}, and those of {base} go from 0 to "
            f"{vocab_size - 1}; build one with rescore build-lookup --tokenizer BASE"
        )
    token_ids, suffixes = (_open_array(path / name, record.files) for name in (TOKENS_FILE, SUFFIXES_FILE))
    if (len(token_ids), len(suffixes)) != (record.tokens + record.documents, record.tokens):
        raise InvalidDataError(f"the lookup index {path} does not hold what its {RECORD_FILE} says; {REBUILD}")
    identity = key_of([SCHEMA, record.tokenizer_sha256, *(record.files[n].sha256 for n in sorted(record.files))])
    return LookupIndex(path, record, CorpusIndex(token_ids, suffixes), identity)


def _open_array(path: Path, files: Mapping[str, ArrayFile]) -> np.ndarray:
    """An array of an index, mapped into memory, whose size and hash are those written."""
    if (written := files.get(path.name)) is None:
        raise InvalidDataError(f"{path.with_name(RECORD_FILE)} says nothing of {path.name}; {REBUILD}")
    try:
        if (size := path.stat().st_size) != written.bytes:
            raise InvalidDataError(f"{path} has {size:,} bytes where {written.bytes:,} were written; {REBUILD}")
        if remembered_sha256(path) != written.sha256:
            raise InvalidDataError(f"{path} was changed after it was written; {REBUILD}")
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, EOFError) as error:  # numpy's for what is no array
        raise InvalidDataError(f"{path} is no array of a lookup index; {REBUILD}") from error
    if array.dtype != np.int32 or array.ndim != 1:
        raise InvalidDataError(f"{path} is no array of a lookup index; {REBUILD}")
    return array
