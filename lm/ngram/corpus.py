"""Corpora for n-gram models and lookup: files, folders, own output, hub data sets -> one stream of ids on disk.

Knows nothing about counting. A document becomes its words and one `</s>` (id 2); the counting puts `<s>` in front.
Words are numbered from 3 in the order in which they first appear; 0, 1, 2 are `<unk>`, `<s>`, `</s>`.

What is a document. A line of a text file, a row of JSON lines, a JSON array, CSV, Parquet or Arrow (its `field` holds
text, line ends included, or a list of token ids; `lm.text_files` tells them apart), a row of a hub data set
(`hub:name[:split[:field]]`), or an example of a folder made by `rescore generate-corpus`: the last `left_context`
prompt ids, then the output ids. Files may be packed (`.gz`, `.zst`, `.bz2`, `.xz`); of a folder all whose names end as
such files do are read, below as well, in the order of their names.

What is a word. With a tokenizer: a token id; blank lines are passed over, and the end-of-text token ends a document
wherever it stands, once, as `</s>` says the same. Own output that stops without it was cut off, so no `</s>` is counted
there (`BREAK`). Without a tokenizer: what stands between white space as `lmplz` sees it (space, tab, CR, LF, NUL); a
blank line counts as an empty sentence, as it does there. A last line without a line end gets its `</s>` as the others
do (`lmplz` leaves it out).
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError, unreadable
from lattices.joined.corpus_index import END
from lattices.ngrams import SENTENCE_END, SPECIAL_WORDS
from lattices.paths import user_path
from lm.base.corpus import CORPUS_FILE, SETTINGS_FILE, corpus_lines, read_settings
from lm.base.own_output import OWN_PREFIX
from lm.files import write_array, writing
from lm.keys import remembered_sha256
from lm.ngram.counting import BREAK, Progress, no_progress
from lm.text_files import blocks, identify, may_hold_text, rows

HUB_PREFIX, HUB_SPLIT = "hub:", "train"
MEND_UTF8 = "mend it, or go on with --errors replace"
DOCUMENT_END, DOCUMENT_CUT = -2, -3  # between the token ids of a batch
SEPARATORS = bytes.maketrans(b"\t\r\0", b"   ")
BATCH = 1 << 20  # characters or token ids that are numbered at a time


@dataclass(frozen=True)
class CorpusSource:
    """One thing to read: `kind` is `text`, `records`, `own` (a folder of `generate-corpus`) or `hub`.

    `sha256` is of the file's bytes (of a hub data set, of its fingerprint); `size` in bytes (rows).
    """

    kind: str
    name: str
    sha256: str
    size: int

    @property
    def path(self) -> Path:
        """The file that is read (not of a hub data set)."""
        return Path(self.name) / CORPUS_FILE if self.kind == "own" else Path(self.name)

    def without_place(self) -> CorpusSource:
        """The same, named without its folder: where a file lay says nothing about what is made of it; its hash does."""
        return self if self.kind == "hub" else dataclasses.replace(self, name=Path(self.name).name)


@dataclass(frozen=True)
class EncodedCorpus:
    """A stream of word ids on disk."""

    path: Path  # raw int32
    vocabulary: tuple[str, ...]  # special words first
    documents: int
    tokens: int  # without `</s>`

    def ids(self) -> np.ndarray:
        """int32 `[t]`, memory-mapped."""
        return np.asarray(np.memmap(self.path, np.int32, "r+"))


def find_sources(
    corpora: Sequence[Path | str], *, generate: Callable[[Path], Path] | None = None
) -> list[CorpusSource]:
    """What `corpora` (files, folders, `hub:...` names) stand for, in order; raises `RescoreError` if not there.

    `generate` gives the folder of own output for the prompts in a file; with it a corpus may be `own:PROMPTS`, which is
    generated once all others are there.
    """
    if not corpora:
        raise RescoreError("no corpus given; name at least one file, folder or hub data set")
    prompts = [str(corpus) for corpus in corpora if generate and str(corpus).startswith(OWN_PREFIX)]
    sources = {str(corpus): _find(corpus) for corpus in corpora if str(corpus) not in prompts}
    if generate:
        sources |= {corpus: _find(generate(Path(corpus.removeprefix(OWN_PREFIX)))) for corpus in prompts}
    return [source for corpus in corpora for source in sources[str(corpus)]]


def check_there(corpora: Sequence[Path | str]) -> None:
    """Raises `RescoreError` for a file or folder that is not there, before a tokenizer is loaded for it."""
    for corpus in corpora:
        if not str(corpus).startswith((HUB_PREFIX, OWN_PREFIX)):
            path = user_path(corpus, "the corpus")
            try:
                path.stat()
            except OSError as error:
                raise unreadable(path, error) from error


def check_unchanged(sources: Iterable[CorpusSource]) -> None:
    """Raises `IncompatibleError` if a file no longer holds what was found there."""
    if not all(map(_is_unchanged, sources)):
        raise IncompatibleError("the corpora were replaced while they were read; run the command again")


def _is_unchanged(source: CorpusSource) -> bool:  # a hub data set does not change in its cache
    return source.kind == "hub" or remembered_sha256(source.path) == source.sha256


def _find(corpus: Path | str) -> list[CorpusSource]:
    if isinstance(corpus, str) and corpus.startswith(HUB_PREFIX):
        dataset, _ = _open_hub(corpus)
        digest = hashlib.sha256(str(dataset._fingerprint).encode()).hexdigest()
        return [CorpusSource("hub", corpus, digest, len(dataset))]
    path = user_path(corpus, "the corpus")
    if not path.is_dir():
        return [_file_source(path)]
    if (path / SETTINGS_FILE).is_file() and (path / CORPUS_FILE).is_file():
        return [dataclasses.replace(_file_source(path / CORPUS_FILE), kind="own", name=str(path))]
    files = sorted(file for file in path.rglob("*") if may_hold_text(file) and _is_open_file(file, path))
    if not files:
        raise RescoreError(f"the folder {path} holds no .txt or .jsonl files (nor .csv, .parquet, nor .gz of those)")
    return [_file_source(file) for file in files]


def _is_open_file(path: Path, folder: Path) -> bool:
    """Whether it is a file, and neither it nor a folder on the way to it is hidden (what a stopped build left is)."""
    return path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _file_source(path: Path) -> CorpusSource:
    kind = "records" if identify(path).has_rows else "text"
    try:
        return CorpusSource(kind, str(path), remembered_sha256(path), path.stat().st_size)
    except OSError as error:
        raise unreadable(path, error) from error


def encode_corpora(
    sources: Sequence[CorpusSource],
    path: Path,
    *,
    tokenizer: Any | None = None,
    left_context: int = 3,
    field: str = "text",
    errors: str = "strict",
    surface: bool = False,
    progress: Progress = no_progress,
) -> EncodedCorpus:
    """Writes the stream of word ids of all sources to `path`.

    `tokenizer` is a Hugging Face tokenizer, or None for words at white space. Words are written as decimal token ids,
    or with `surface` as the tokenizer's token strings. `errors` is `strict` or `replace` (bad UTF-8 becomes U+FFFD).
    Raises `InvalidDataError` with the line number of what can't be read, and for corpora without a word; `OutputError`
    if `path` can't be written. `progress("reading", done, total)` counts bytes.
    """
    if errors not in ("strict", "replace"):
        raise RescoreError(f"errors = {errors!r}; choose strict or replace")
    numbering: _Numbering = _Words(field, errors)
    if tokenizer is not None:
        numbering = _Tokens(field, errors, tokenizer, left_context=left_context, surface=surface)
    documents, tokens = _write(
        path, sources, numbering, lambda _, ids: ids, ends=(SENTENCE_END, BREAK), unit="word", progress=progress
    )
    return EncodedCorpus(path, (*SPECIAL_WORDS, *numbering.names()), documents, tokens)


def encode_tokens(
    sources: Sequence[CorpusSource],
    path: Path,
    *,
    tokenizer: Any,
    left_context: int,
    field: str = "text",
    errors: str = "strict",
    progress: Progress = no_progress,
) -> tuple[int, int]:
    """Writes the token ids of all sources to `path`, raw int32, with `END` of `lattices.joined.corpus_index` after each
    document; gives the documents and their tokens.

    Of own output that the base finished the end-of-text token is one of them: it says it there itself. Other options
    and errors are those of `encode_corpora`.
    """
    numbering = _Tokens(field, errors, tokenizer, left_context=left_context, surface=False)

    def token_ids(source: CorpusSource, words: np.ndarray) -> np.ndarray:
        ids: np.ndarray = np.array([*[END] * len(SPECIAL_WORDS), *numbering.token_ids], np.int32)[np.maximum(words, 0)]
        if source.kind == "own":
            ids = np.insert(ids, np.flatnonzero(words == SENTENCE_END), numbering.end_of_text)
        return np.asarray(ids)

    return _write(path, sources, numbering, token_ids, ends=(END,), unit="token", progress=progress)


def _write(
    path: Path,
    sources: Sequence[CorpusSource],
    numbering: _Numbering,
    ids_of: Callable[[CorpusSource, np.ndarray], np.ndarray],
    *,
    ends: tuple[int, ...],
    unit: str,
    progress: Progress,
) -> tuple[int, int]:
    """Writes what `ids_of` makes of the word ids of each part of the sources; gives the documents, after each of which
    stands one of `ends`, and the ids beside those. Raises as `encode_corpora`; `unit`: what it calls an id."""
    documents = tokens = done = 0
    total = sum(source.size for source in sources)
    with writing(path), path.open("wb") as out:
        for source in sources:
            for words in numbering.parts(source):
                ids = ids_of(source, words)
                write_array(out, ids)
                ended = int(np.count_nonzero(np.isin(ids, ends)))
                documents += ended
                tokens += len(ids) - ended
                progress("reading", done, total)
            done += source.size
    progress("reading", total, total)
    if not tokens:
        raise InvalidDataError(f"there is no {unit} in {', '.join(source.name for source in sources)}")
    return documents, tokens


class _Numbering(ABC):
    """What sources hold as word ids, in the order in which words first appear."""

    def __init__(self, field: str, errors: str) -> None:
        self.field, self.errors = field, errors

    @abstractmethod
    def parts(self, source: CorpusSource) -> Iterator[np.ndarray]:
        """int32 ids of a source, some documents at a time."""

    @abstractmethod
    def names(self) -> list[str]:
        """All words but the special ones."""

    def blocks(self, source: CorpusSource) -> Iterator[tuple[int, bytes]]:
        """(number of the first line, whole lines of valid UTF-8, each with its line end) of a text."""
        return blocks(identify(source.path), errors=self.errors, advice=MEND_UTF8)

    def values(self, source: CorpusSource) -> Iterator[tuple[str, str | list[int]]]:
        """(where it stands, text or ids) of every row of a source."""
        for where, value in self._hub_values(source.name) if source.kind == "hub" else self._file_values(source.path):
            if isinstance(value, str):
                if self.errors == "replace":
                    value = value.encode("utf-8", "replace").decode()
                elif any("\ud800" <= c <= "\udfff" for c in value):
                    raise InvalidDataError(f"{where} has half a surrogate pair; try --errors replace")
            elif not isinstance(value, list) or any(type(i) is not int for i in value):
                raise InvalidDataError(f"{where} has neither text nor a list of ids in the field")
            yield where, value

    def _file_values(self, path: Path) -> Iterator[tuple[str, Any]]:
        file = identify(path)
        for number, record in rows(file, errors=self.errors, advice=MEND_UTF8):
            where = f"{path} {file.unit} {number}"
            if self.field not in record:
                names = ", ".join(list(record)[:8])
                raise InvalidDataError(f"{where} has no field {self.field!r} (it has: {names}); choose --field")
            yield where, record[self.field]

    def _hub_values(self, corpus: str) -> Iterator[tuple[str, Any]]:
        dataset, own_field = _open_hub(corpus)
        field = own_field or self.field
        if field not in dataset.column_names:
            raise InvalidDataError(f"{corpus} has no field {field!r}; it has: {', '.join(dataset.column_names)}")
        values = (value for batch in dataset.iter(batch_size=1000) for value in batch[field])
        for number, value in enumerate(values, start=1):
            yield f"{corpus} line {number}", value


def _open_hub(corpus: str) -> tuple[Any, str | None]:
    """(data set, field or None) of `hub:name[:split[:field]]`."""
    import datasets

    name, split, field = [*corpus.removeprefix(HUB_PREFIX).split(":"), "", ""][:3]
    try:
        return datasets.load_dataset(name, split=split or HUB_SPLIT), field or None
    except Exception as error:  # the hub's own errors, its HTTP library's and Python's
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RescoreError(f"can't load {corpus} ({reason}); check the name, the split and the network") from error


Item = TypeVar("Item")


def _batches(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Items together, of about `BATCH` characters or ids."""
    batch: list[Item] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total > BATCH:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


class _Words(_Numbering):
    """Words at white space."""

    def __init__(self, field: str, errors: str) -> None:
        super().__init__(field, errors)
        # Two more than have ids: the empty word, which stands between separators, and the line end.
        self._ids = {b"": -2, **{word.encode(): -1 for word in SPECIAL_WORDS}, b"\n": SENTENCE_END}

    def parts(self, source: CorpusSource) -> Iterator[np.ndarray]:
        if source.kind == "own":
            raise RescoreError(f"{source.name} holds token ids; choose the tokenizer of its base instead of words")
        if source.kind == "text":
            for number, block in self.blocks(source):
                yield self._encode(block, lambda line, number=number: f"{source.name} line {number + line}")  # type: ignore[misc]
            return
        for batch in _batches(self.values(source), lambda item: len(item[1])):
            # A record is one document, so the line ends in it are white space.
            lines = [v.replace("\n", " ") if isinstance(v, str) else " ".join(map(str, v)) for _, v in batch]
            yield self._encode("".join(f"{line}\n" for line in lines).encode(), lambda i, batch=batch: batch[i][0])  # type: ignore[misc]

    def _encode(self, block: bytes, place: Callable[[int], str]) -> np.ndarray:
        """int32 ids of whole lines, `</s>` at every line end; `place(i)` names line i of them, from 0, in errors."""
        import pyarrow
        import pyarrow.compute as pc

        text = pyarrow.array([block.translate(SEPARATORS).replace(b"\n", b" \n ")])
        words = pc.split_pattern(text, " ").values.dictionary_encode()
        distinct = words.dictionary.to_pylist()
        id_of = np.array([self._ids.setdefault(word, len(self._ids) - 2) for word in distinct], np.int32)
        ids: np.ndarray = id_of[words.indices.to_numpy()]
        if -1 in id_of:
            first = int(np.argmax(ids == -1))
            raise InvalidDataError(
                f"{place(int(np.count_nonzero(ids[:first] == SENTENCE_END)))} holds {words[first].as_py().decode()} as "
                "a word, which stands for something else in an n-gram model; replace it in the text"
            )
        return np.asarray(ids[ids >= 0])

    def names(self) -> list[str]:
        return [word.decode() for word in list(self._ids)[len(SPECIAL_WORDS) + 2 :]]


class _Tokens(_Numbering):
    """Token ids of a tokenizer; their names are these in decimal digits, or the token strings (`surface`)."""

    def __init__(self, field: str, errors: str, tokenizer: Any, *, left_context: int, surface: bool) -> None:
        super().__init__(field, errors)
        self.tokenizer, self.left_context, self.surface = tokenizer, left_context, surface
        self.limit = max(tokenizer.get_vocab().values()) + 1
        self.end_of_text = -4 if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
        self.token_ids: list[int] = []  # in their new order
        self._number = np.zeros(self.limit, np.int32)  # 0: not seen

    def parts(self, source: CorpusSource) -> Iterator[np.ndarray]:
        documents: Iterable[str | list[int]]
        if source.kind == "own":
            documents = self._own_output(source)
        elif source.kind == "text":
            texts = (block.decode("utf-8") for _, block in self.blocks(source))
            lines = (line for text in texts for line in text.split("\n"))  # not splitlines: U+2028 ends no line
            documents = (line.removesuffix("\r") for line in lines if line.strip())
        else:
            values = (self._checked(value, where) for where, value in self.values(source))
            documents = (value for value in values if value and (isinstance(value, list) or value.strip()))
        return map(self._encode, _batches(documents, len))

    def _encode(self, batch: Sequence[str | list[int]]) -> np.ndarray:
        """int32 word ids of documents, texts or token ids; these may hold `DOCUMENT_CUT`. `</s>` or `BREAK` after each
        that is not empty."""
        texts = [value for value in batch if isinstance(value, str)]
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        of_texts = iter(self.tokenizer(texts, **options)["input_ids"] if texts else ())
        flat: list[int] = []
        for value in batch:
            flat += next(of_texts) if isinstance(value, str) else value
            flat.append(DOCUMENT_END)
        tokens = np.array(flat, np.int64)
        is_word = ~np.isin(tokens, (DOCUMENT_END, DOCUMENT_CUT, self.end_of_text))
        used = is_word.copy()
        used[1:] |= is_word[:-1]  # of ends that follow each other the first: no empty documents
        tokens, is_word = tokens[used], is_word[used]
        words = tokens[is_word]
        fresh, first = np.unique(words[self._number[words] == 0], return_index=True)
        fresh = fresh[np.argsort(first)]
        self._number[fresh] = len(SPECIAL_WORDS) + len(self.token_ids) + np.arange(len(fresh))
        self.token_ids += fresh.tolist()
        ids = np.where(tokens == DOCUMENT_CUT, np.int32(BREAK), np.int32(SENTENCE_END))
        ids[is_word] = self._number[words]
        return ids

    def names(self) -> list[str]:
        if not self.surface:
            return list(map(str, self.token_ids))
        return list(map(_writable, self.tokenizer.convert_ids_to_tokens(self.token_ids), self.token_ids))

    def _checked(self, value: str | list[int], where: str) -> str | list[int]:
        if isinstance(value, list) and value and not 0 <= min(value) <= max(value) < self.limit:
            wrong = min(value) if min(value) < 0 else max(value)
            raise InvalidDataError(f"{where} has the token id {wrong}; the tokenizer's go from 0 to {self.limit - 1}")
        return value

    def _own_output(self, source: CorpusSource) -> Iterator[list[int]]:
        """Per example: the end of the prompt, the output, and whether that was finished."""
        from lm.base.identity import tokenizer_sha256

        base = read_settings(Path(source.name))["base"]
        if base["tokenizer_sha256"] != tokenizer_sha256(self.tokenizer):
            raise IncompatibleError(
                f"{source.name} was made with the tokenizer of {base['name']}; choose that as tokenizer"
            )
        for number, record in corpus_lines(Path(source.name)):
            prompt, output = record.get("prompt_ids", []), record.get("output_ids")
            for ids in (prompt, output):
                if not isinstance(ids, list) or any(type(i) is not int for i in ids):
                    raise InvalidDataError(f"{source.path} line {number} is not an example of generate-corpus")
                self._checked(ids, f"{source.path} line {number}")
            if output:
                end = [] if output[-1] == self.end_of_text else [DOCUMENT_CUT]
                yield [*prompt[max(0, len(prompt) - self.left_context) :], *output, *end]


def _writable(surface: str, token_id: int) -> str:
    """A token's string if an ARPA file can hold it, else a name made of its id."""
    usable = surface and surface not in SPECIAL_WORDS and not any(c in surface for c in " \t\r\n\0")
    return surface if usable else f"<token-{token_id}>"
