"""Corpora for n-gram models: files, folders, own output and hub data sets -> one stream of word ids on disk.

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

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lattices.ngrams import SENTENCE_END, SPECIAL_WORDS
from lattices.paths import user_path
from lm.files import sha256_of_file, writing
from lm.ngram.counting import BREAK
from lm.text_files import blocks, identify, may_hold_text, rows

HUB_PREFIX, HUB_SPLIT = "hub:", "train"
LINE_END = b"\n"
MEND_UTF8 = "mend it, or go on with --errors replace"
DOCUMENT_END, DOCUMENT_CUT = -2, -3  # between the token ids of a batch
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CorpusSource:
    """One thing to read: `kind` is `text`, `records`, `own` (a folder of `generate-corpus`) or `hub`.

    `sha256` is of the file's bytes (of a hub data set, of its fingerprint); `size` in bytes (rows).
    """

    kind: str
    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class EncodedCorpus:
    """A stream of word ids in the file `path` (raw int32) with its vocabulary, special words first.

    `token_ids[i]` is the token id of word i + 3, empty without a tokenizer. `tokens` counts words without `</s>`.
    """

    path: Path
    vocabulary: tuple[str, ...]
    token_ids: tuple[int, ...]
    documents: int
    tokens: int

    def ids(self) -> np.ndarray:
        """int32 `[t]`, memory-mapped."""
        return np.asarray(np.memmap(self.path, np.int32, "r+"))


def find_sources(corpora: Sequence[Path | str]) -> list[CorpusSource]:
    """What `corpora` (files, folders, `hub:...` names) stand for, in order; raises `RescoreError` if not there."""
    if not corpora:
        raise RescoreError("no corpus given; name at least one file, folder or hub data set")
    sources: list[CorpusSource] = []
    for corpus in corpora:
        if isinstance(corpus, str) and corpus.startswith(HUB_PREFIX):
            dataset, _ = _open_hub(corpus)
            digest = hashlib.sha256(str(dataset._fingerprint).encode()).hexdigest()
            sources.append(CorpusSource("hub", corpus, digest, len(dataset)))
            continue
        path = user_path(corpus, "the corpus")
        if path.is_dir():
            sources += _folder_sources(path)
        else:
            sources.append(_file_source(path))
    return sources


def _folder_sources(folder: Path) -> list[CorpusSource]:
    from lm.base.corpus import CORPUS_FILE, SETTINGS_FILE

    if (folder / SETTINGS_FILE).is_file() and (folder / CORPUS_FILE).is_file():
        found = _file_source(folder / CORPUS_FILE)
        return [CorpusSource("own", str(folder), found.sha256, found.size)]
    files = sorted(path for path in folder.rglob("*") if may_hold_text(path) and _is_open_file(path, folder))
    if not files:
        raise RescoreError(f"the folder {folder} holds no .txt or .jsonl files (nor .csv, .parquet, nor .gz of those)")
    return [_file_source(path) for path in files]


def _is_open_file(path: Path, folder: Path) -> bool:
    """Whether it is a file, and neither it nor a folder on the way to it is hidden (what a stopped build left is)."""
    return path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _file_source(path: Path) -> CorpusSource:
    kind = "records" if identify(path).has_rows else "text"
    try:
        return CorpusSource(kind, str(path), sha256_of_file(path), path.stat().st_size)
    except OSError as error:
        raise RescoreError(f"can't read {path}: {error.strerror}") from error


def encode_corpora(
    sources: Sequence[CorpusSource],
    path: Path,
    *,
    tokenizer: Any | None = None,
    left_context: int = 3,
    field: str = "text",
    errors: str = "strict",
    surface: bool = False,
    progress: Progress | None = None,
) -> EncodedCorpus:
    """Writes the stream of word ids of all sources to `path`.

    `tokenizer` is a Hugging Face tokenizer, or None for words at white space. Words are written as decimal token ids,
    or with `surface` as the tokenizer's token strings. `errors` is `strict` or `replace` (bad UTF-8 becomes U+FFFD).
    Raises `InvalidDataError` with the line number of what can't be read, and for corpora without a word; `OutputError`
    if `path` can't be written. `progress("reading", done, total)` counts bytes.
    """
    if errors not in ("strict", "replace"):
        raise RescoreError(f"errors = {errors!r}; choose strict or replace")
    numbering: _WordNumbering | _TokenNumbering = _WordNumbering() if tokenizer is None else _TokenNumbering(tokenizer)
    token_ids: list[int] = []
    documents = tokens = done = 0
    total = sum(source.size for source in sources)
    with writing(path), path.open("wb") as out:
        for source in sources:
            if tokenizer is None:
                parts = _word_parts(source, field, errors, numbering)
            else:
                parts = _token_parts(source, field, errors, numbering, tokenizer, left_context)
            for ids in parts:
                ids.tofile(out)
                ends = int(np.count_nonzero((ids == SENTENCE_END) | (ids == BREAK)))
                documents += ends
                tokens += len(ids) - ends
                if progress:
                    progress("reading", done, total)
            done += source.size
    if progress:
        progress("reading", total, total)
    if not tokens:
        raise InvalidDataError(f"there is no word in {', '.join(source.name for source in sources)}")
    if tokenizer is not None and isinstance(numbering, _TokenNumbering):
        token_ids = numbering.token_ids()
        names = [str(i) for i in token_ids]
        if surface:
            names = [
                _writable(s, i) for s, i in zip(tokenizer.convert_ids_to_tokens(token_ids), token_ids, strict=True)
            ]
    elif isinstance(numbering, _WordNumbering):
        names = numbering.words()
    return EncodedCorpus(path, (*SPECIAL_WORDS, *names), tuple(token_ids), documents, tokens)


def _writable(surface: str, token_id: int) -> str:
    """A token's string if an ARPA file can hold it, else a name made of its id."""
    usable = surface and surface not in SPECIAL_WORDS and not any(c in surface for c in " \t\r\n\0")
    return surface if usable else f"<token-{token_id}>"


# Reading


def _text_blocks(path: Path, errors: str) -> Iterator[tuple[int, bytes]]:
    """(number of the first line, whole lines of valid UTF-8, each with its line end)."""
    return blocks(identify(path), errors=errors, advice=MEND_UTF8)


def _records(path: Path, field: str, errors: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, value of the field) of every row of a file."""
    file = identify(path)
    for number, record in rows(file, errors=errors, advice=MEND_UTF8):
        where = f"{path} {file.unit} {number}"
        if field not in record:
            known = ", ".join(list(record)[:8])
            raise InvalidDataError(f"{where} has no field {field!r} (it has: {known}); choose --field")
        yield where, record[field]


def _open_hub(corpus: str) -> tuple[Any, str | None]:
    """(data set, field or None) of `hub:name[:split[:field]]`."""
    import datasets

    name, split, field = [*corpus.removeprefix(HUB_PREFIX).split(":"), "", ""][:3]
    try:
        return datasets.load_dataset(name, split=split or HUB_SPLIT), field or None
    except Exception as error:  # the hub's own errors, its HTTP library's and Python's
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RescoreError(f"can't load {corpus} ({reason}); check the name, the split and the network") from error


def _hub_values(corpus: str, field: str) -> Iterator[tuple[str, Any]]:
    dataset, own_field = _open_hub(corpus)
    field = own_field or field
    if field not in dataset.column_names:
        known = ", ".join(dataset.column_names)
        raise InvalidDataError(f"{corpus} has no field {field!r}; it has: {known}")
    number = 0
    for batch in dataset.iter(batch_size=1000):
        for value in batch[field]:
            number += 1
            yield f"{corpus} line {number}", value


def _values(source: CorpusSource, field: str, errors: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, text or list of ids) of a source of records."""
    found = _hub_values(source.name, field) if source.kind == "hub" else _records(Path(source.name), field, errors)
    for where, value in found:
        if isinstance(value, str):
            if errors == "replace":
                value = value.encode("utf-8", "replace").decode()
            elif any("\ud800" <= c <= "\udfff" for c in value):
                raise InvalidDataError(f"{where} has half a surrogate pair; try --errors replace")
        elif not isinstance(value, list) or any(type(i) is not int for i in value):
            raise InvalidDataError(f"{where} has neither text nor a list of ids in the field")
        yield where, value


# Words at white space


class _WordNumbering:
    """Ids of words in the order of their first appearance: an open-addressing hash table over bytes."""

    def __init__(self) -> None:
        self._slots = np.full(1 << 16, -1, np.int32)
        self._hashes = np.zeros(1 << 15, np.uint64)
        self._starts = np.zeros((1 << 15) + 1, np.int64)
        self._store = np.zeros(1 << 20, np.uint8)
        self._state = np.zeros(3, np.int64)  # words known, position in the text, ids written
        head = np.frombuffer(" ".join(SPECIAL_WORDS).encode(), np.uint8)
        self._scan(head, np.empty(len(head) + 1, np.int32), specials=0)

    def _scan(self, text: np.ndarray, ids: np.ndarray, *, specials: int) -> int:
        """Ids of the text's words into `ids`; returns -1, or the position of a special word."""
        self._state[1:] = 0
        while True:
            status = _scan_words(text, ids, specials, self._slots, self._hashes, self._starts, self._store, self._state)
            if status != _FULL:
                return int(self._state[1]) if status == _SPECIAL else -1
            known = int(self._state[0])
            if 2 * known >= len(self._hashes):
                self._hashes = np.concatenate([self._hashes, np.zeros_like(self._hashes)])
                self._starts = np.concatenate([self._starts, np.zeros(len(self._starts) - 1, np.int64)])
                self._slots = np.full(2 * len(self._slots), -1, np.int32)
                _refill_slots(self._slots, self._hashes, known)
            self._store = np.concatenate([self._store, np.zeros(len(self._store) + len(text), np.uint8)])

    def encode(self, block: bytes, name: str, number: int | None) -> np.ndarray:
        """int32 ids of whole lines, `</s>` at every line end; `number` is the first line's (None: `name` says it)."""
        text = np.frombuffer(block, np.uint8)
        ids = np.empty(len(text) + 1, np.int32)
        position = self._scan(text, ids, specials=len(SPECIAL_WORDS))
        if position >= 0:
            word = block[position : position + 6].split()[0].decode("utf-8", "replace")
            where = name if number is None else f"{name} line {number + block.count(LINE_END, 0, position)}"
            raise InvalidDataError(
                f"{where} holds {word} as a word, which stands for something else in an n-gram model; "
                f"replace it in the text"
            )
        return ids[: self._state[2]]

    def words(self) -> list[str]:
        """All words but the special ones."""
        known, store = int(self._state[0]), self._store.tobytes()
        starts = self._starts[: known + 1].tolist()
        return [store[a:b].decode("utf-8") for a, b in itertools.pairwise(starts[len(SPECIAL_WORDS) :])]


_DONE, _FULL, _SPECIAL = 0, 1, 2


@njit(cache=True, nogil=True)
def _scan_words(
    text: np.ndarray,
    ids: np.ndarray,
    specials: int,
    slots: np.ndarray,
    hashes: np.ndarray,
    starts: np.ndarray,
    store: np.ndarray,
    state: np.ndarray,
) -> int:
    """Goes on from `state`; stops at a word with an id below `specials`, and where a table is half full."""
    known, position, written = state[0], state[1], state[2]
    mask = len(slots) - 1
    status = _DONE
    while position < len(text):
        byte = text[position]
        if byte == 10:
            ids[written] = SENTENCE_END
            written += 1
            position += 1
            continue
        if byte == 32 or byte == 9 or byte == 13 or byte == 0:
            position += 1
            continue
        end = position
        digest = np.uint64(14695981039346656037)  # FNV-1a, then mixed, since its low bits alone are weak
        while end < len(text):
            byte = text[end]
            if byte == 32 or byte == 10 or byte == 9 or byte == 13 or byte == 0:
                break
            digest = (digest ^ np.uint64(byte)) * np.uint64(1099511628211)
            end += 1
        digest ^= digest >> np.uint64(32)
        digest *= np.uint64(0x9E3779B97F4A7C15)
        digest ^= digest >> np.uint64(29)
        slot = np.int64(digest & np.uint64(mask))
        word = -1
        while slots[slot] >= 0:
            candidate = slots[slot]
            begin = starts[candidate]
            if hashes[candidate] == digest and starts[candidate + 1] - begin == end - position:
                same = True
                for i in range(end - position):
                    if store[begin + i] != text[position + i]:
                        same = False
                        break
                if same:
                    word = candidate
                    break
            slot = (slot + 1) & mask
        if word < 0:
            if 2 * known >= len(hashes) or starts[known] + end - position > len(store):
                status = _FULL
                break
            word = known
            slots[slot] = known
            hashes[known] = digest
            for i in range(end - position):
                store[starts[known] + i] = text[position + i]
            starts[known + 1] = starts[known] + end - position
            known += 1
        elif word < specials:
            status = _SPECIAL
            break
        ids[written] = word
        written += 1
        position = end
    state[0], state[1], state[2] = known, position, written
    return status


@njit(cache=True, nogil=True)
def _refill_slots(slots: np.ndarray, hashes: np.ndarray, known: int) -> None:
    mask = len(slots) - 1
    for word in range(known):
        slot = np.int64(hashes[word] & np.uint64(mask))
        while slots[slot] >= 0:
            slot = (slot + 1) & mask
        slots[slot] = word


def _word_parts(source: CorpusSource, field: str, errors: str, numbering: Any) -> Iterator[np.ndarray]:
    if source.kind == "own":
        raise RescoreError(f"{source.name} holds token ids; choose the tokenizer of its base instead of words")
    if source.kind == "text":
        for number, block in _text_blocks(Path(source.name), errors):
            yield numbering.encode(block, source.name, number)
        return
    for where, value in _values(source, field, errors):
        # A record is one document, so the line ends in it are white space.
        line = value.replace("\n", " ") if isinstance(value, str) else " ".join(map(str, value))
        yield numbering.encode(line.encode() + b"\n", where, None)


# Token ids


class _TokenNumbering:
    """Ids of token ids in the order of their first appearance."""

    def __init__(self, tokenizer: Any) -> None:
        self.limit = max(tokenizer.get_vocab().values()) + 1
        self.end_of_text = -4 if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
        self._number = np.zeros(self.limit, np.int32)  # 0: not seen
        self._seen = np.zeros(self.limit, np.int64)
        self._known = 0

    def encode(self, tokens: np.ndarray) -> np.ndarray:
        """int32 word ids of token ids int64 `[t]` with `DOCUMENT_END` or `DOCUMENT_CUT` after every document."""
        ids = np.empty(len(tokens), np.int32)
        written, self._known = _number_tokens(
            tokens, self.end_of_text, len(SPECIAL_WORDS), self._number, self._seen, self._known, ids
        )
        return ids[:written]

    def token_ids(self) -> list[int]:
        """The token ids in their new order."""
        return self._seen[: self._known].tolist()  # type: ignore[no-any-return]


@njit(cache=True, nogil=True)
def _number_tokens(
    tokens: np.ndarray,
    end_of_text: int,
    lowest: int,
    number: np.ndarray,
    seen: np.ndarray,
    known: int,
    ids: np.ndarray,
) -> tuple[int, int]:
    written = 0
    open_document = False  # whether words came since the last end: no empty documents
    for token in tokens:
        if token in (DOCUMENT_END, DOCUMENT_CUT, end_of_text):
            if open_document:
                ids[written] = BREAK if token == DOCUMENT_CUT else SENTENCE_END
                written += 1
            open_document = False
            continue
        if number[token] == 0:
            number[token] = known + lowest
            seen[known] = token
            known += 1
        ids[written] = number[token]
        written += 1
        open_document = True
    return written, known


def _token_parts(
    source: CorpusSource, field: str, errors: str, numbering: Any, tokenizer: Any, left_context: int
) -> Iterator[np.ndarray]:
    if source.kind == "own":
        yield from map(numbering.encode, _own_tokens(Path(source.name), numbering, tokenizer, left_context))
        return
    texts: list[str] = []
    size = 0
    for value in _token_values(source, field, errors, numbering.limit):
        if isinstance(value, str):
            texts.append(value)
            size += len(value)
        if texts and (size > 1 << 20 or not isinstance(value, str)):
            yield numbering.encode(_tokenised(texts, tokenizer))
            texts, size = [], 0
        if not isinstance(value, str):
            yield numbering.encode(np.array([*value, DOCUMENT_END], np.int64))
    if texts:
        yield numbering.encode(_tokenised(texts, tokenizer))


def _token_values(source: CorpusSource, field: str, errors: str, limit: int) -> Iterator[Any]:
    """Texts that are not blank, and lists of token ids that the tokenizer has."""
    if source.kind == "text":
        for _, block in _text_blocks(Path(source.name), errors):
            for line in block.decode("utf-8").split("\n"):  # not splitlines: U+2028 ends no line
                if line.strip():
                    yield line.removesuffix("\r")
        return
    for where, value in _values(source, field, errors):
        if isinstance(value, list):
            _check_ids(value, limit, where)
        if value and (isinstance(value, list) or value.strip()):
            yield value


def _check_ids(ids: Sequence[int], limit: int, where: str) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < limit:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise InvalidDataError(f"{where} has the token id {wrong}; the tokenizer's go from 0 to {limit - 1}")


def _tokenised(texts: list[str], tokenizer: Any) -> np.ndarray:
    """int64 token ids of the texts, `DOCUMENT_END` after each."""
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    parts: list[Any] = []
    for ids in encoded:
        parts += ids
        parts.append(DOCUMENT_END)
    return np.array(parts, np.int64)


def _own_tokens(folder: Path, numbering: Any, tokenizer: Any, left_context: int) -> Iterator[np.ndarray]:
    """Per example: the end of the prompt, the output, and whether that was finished."""
    from lm.base.catalog import tokenizer_sha256
    from lm.base.corpus import CORPUS_FILE, Once, read_settings
    from lm.files import read_json_lines

    base = read_settings(folder)["base"]
    if base["tokenizer_sha256"] != tokenizer_sha256(tokenizer):
        raise IncompatibleError(f"{folder} was made with the tokenizer of {base['name']}; choose that as tokenizer")
    path = folder / CORPUS_FILE
    once = Once(path)
    for number, record in read_json_lines(path, torn_tail=True):
        once.check(number, record)
        prompt, output = record.get("prompt_ids", []), record.get("output_ids")
        for ids in (prompt, output):
            if not isinstance(ids, list) or any(type(i) is not int for i in ids):
                raise InvalidDataError(f"{path} line {number} is not an example of generate-corpus")
            _check_ids(ids, numbering.limit, f"{path} line {number}")
        if output:
            finished = output[-1] == numbering.end_of_text
            kept = [*prompt[max(0, len(prompt) - left_context) :], *output]
            yield np.array([*kept, DOCUMENT_END if finished else DOCUMENT_CUT], np.int64)


def source_texts(source: CorpusSource, *, errors: str = "strict") -> Iterator[tuple[str, bool]]:
    """All text of a source (not of the hub), in pieces, and whether a piece goes on where the one before it stopped: a
    text file in blocks of whole lines, of records every string apart. Raises as `encode_corpora` does for bad files."""
    path = Path(source.name)
    if source.kind == "own":
        from lm.base.corpus import CORPUS_FILE

        path = path / CORPUS_FILE
    if source.kind == "text":
        yield from ((block.decode("utf-8"), True) for _, block in _text_blocks(path, errors))
        return
    for _, record in rows(identify(path), errors=errors, advice=MEND_UTF8):
        yield from ((text, False) for text in _strings(record))


def _strings(value: object) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
