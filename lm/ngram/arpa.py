"""ARPA files in and out: the text format of back-off n-gram models, in the layout that KenLM's `lmplz` prints.

Knows nothing about estimation or scoring. Reads in blocks of lines with whole-column operations, about a second per
million n-grams; writing takes less. Format: `\\data\\`, `ngram N=COUNT` lines, sections `\\N-grams:` of lines
`log10p TAB word ... [TAB log10 back-off]`, `\\end\\`.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from lattices.errors import InvalidDataError, RescoreError
from lattices.ngrams import SENTENCE_END, SENTENCE_START, SPECIAL_WORDS, UNKNOWN, NgramArrays, NgramModel
from lm.files import atomic_file
from lm.ngram.arpa_text import LineFormatter

MAX_ORDER = 6
MISSING_LOG10P = -100.0  # KenLM's default for <unk> where a file has none
BLOCK_BYTES = 1 << 22  # read at a time; the tokens of a block take about ten times as much
PREAMBLE_BYTES = 1 << 20  # text allowed before \data\
GZIP_MAGIC, UTF8_BOM, KENLM_MAGIC = b"\x1f\x8b", b"\xef\xbb\xbf", b"mmap lm http://kheafield.com/code"
SPACES = b" \t\r\n"  # what separates words, as in KenLM; other white space may be part of a word
_IS_SPACE = np.isin(np.arange(256), list(SPACES))
UPPER_UNKNOWN = b"<UNK>"  # stands for <unk>, as in KenLM, but only where the file has no <unk> of its own


def read_arpa(path: Path) -> NgramModel:
    """The model in an ARPA file (plain or gzip).

    Words get ids in the order of the file, the special ones first. A missing back-off is 0. A file without `<unk>`,
    `<s>` or `</s>` gets them with the log10 probability of `<unk>`, which is -100 (KenLM's default) if that is the
    missing one. Text before `\\data\\`, a byte order mark, CRLF and blank lines are passed over.

    Raises `InvalidDataError` with the line for a file that breaks the format (truncated, counts that differ from the
    header's, duplicates, log-probs that are positive or not finite, words without a 1-gram, n-grams whose first n - 1
    words are no n-gram, order above 6, invalid UTF-8), `RescoreError` if it can't be read.
    """
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(path.open("rb"))
            packed = stream.read(2) == GZIP_MAGIC
            stream.seek(0)
            lines = _Lines(stack.enter_context(gzip.open(stream)) if packed else stream, path)
            return _read_model(lines)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InvalidDataError(f"{path} is a damaged or truncated gzip file: {error}") from error
        except OSError as error:
            raise RescoreError(f"can't read {path}: {error.strerror or error}") from error


def write_arpa(model: NgramModel, path: Path) -> None:
    """Writes a model as ARPA, atomically; compressed if the name ends in `.gz`.

    Floats have the fewest digits that read back as the same float32 (`lm.ngram.arpa_text`). Raises `InvalidDataError`
    for a model that no ARPA file can hold (numbers that aren't finite, words that are empty or hold white space),
    `OutputError` if `path` can't be written.
    """
    _check_writable(model, path)
    formatter = LineFormatter(model.vocabulary)
    with atomic_file(path) as temporary, ExitStack() as stack:
        stream: BinaryIO | gzip.GzipFile = stack.enter_context(temporary.open("wb"))
        if path.suffix == ".gz":
            # No name and no time in the header: the same model gives the same bytes.
            stream = stack.enter_context(gzip.GzipFile("", "wb", compresslevel=6, fileobj=stream, mtime=0))
        header = "".join(f"ngram {n}={len(ngrams)}\n" for n, ngrams in enumerate(model.orders, start=1))
        stream.write(f"\\data\\\n{header}".encode())
        for n, ngrams in enumerate(model.orders, start=1):
            stream.write(f"\n\\{n}-grams:\n".encode())
            for block in formatter.blocks(ngrams, with_backoff=n < model.order):
                stream.write(block)
        stream.write(b"\n\\end\\\n")


class _Lines:
    """A file as header lines and blocks of whole lines; `number` is the number (from 1) of the next line."""

    def __init__(self, stream: BinaryIO | gzip.GzipFile, path: Path) -> None:
        self.stream, self.path, self.number, self.buffer = stream, path, 1, b""

    def fail(self, line: int, problem: str) -> NoReturn:
        raise InvalidDataError(f"{self.path} line {line} {problem}")

    def truncated(self, expected: str) -> NoReturn:
        raise InvalidDataError(
            f"{self.path} ends after line {self.number - 1} without {expected}: the file is cut short; get it again"
        )

    def line(self) -> bytes | None:
        """The next line without white space at its ends; None at the end of the file."""
        while (end := self.buffer.find(b"\n")) < 0:
            if not (more := self.stream.read(BLOCK_BYTES)):
                end = len(self.buffer)
                break
            self.buffer += more
        if not self.buffer:
            return None
        line, self.buffer = self.buffer[:end].strip(SPACES), self.buffer[end + 1 :]
        self.number += 1
        return line

    def next_text(self, expected: str) -> bytes:
        """The next line that isn't blank."""
        self.skip_blank()
        if (line := self.line()) is None:
            self.truncated(expected)
        return line

    def skip_blank(self) -> None:
        """Passes over white space and blank lines (all at once: a damaged file can have millions)."""
        while True:
            rest = self.buffer.lstrip(SPACES)
            self.number += self.buffer.count(b"\n", 0, len(self.buffer) - len(rest))
            self.buffer = rest
            if rest or not (more := self.stream.read(BLOCK_BYTES)):
                return
            self.buffer = more

    def blocks(self) -> Iterator[bytes]:
        """The lines up to the next one that starts with a backslash (no n-gram's line does)."""
        while True:
            if self.buffer.startswith(b"\\"):
                return
            end = self.buffer.find(b"\n\\") + 1
            cut = end or self.buffer.rfind(b"\n") + 1
            if cut:
                block, self.buffer = self.buffer[:cut], self.buffer[cut:]
                yield block
                self.number += block.count(b"\n")
            if end:
                return
            if not (more := self.stream.read(BLOCK_BYTES)):
                if self.buffer:
                    block, self.buffer = self.buffer, b""
                    yield block
                    self.number += 1
                return
            self.buffer += more


def _read_model(lines: _Lines) -> NgramModel:
    counts = _read_counts(lines)
    vocabulary: list[bytes] = list(map(str.encode, SPECIAL_WORDS))
    ids: dict[bytes, int] = {}
    orders: list[NgramArrays] = []
    keys: list[np.ndarray] = []
    for n, count in enumerate(counts, start=1):
        header = b"\\%d-grams:" % n
        if (found := lines.next_text(f"the section {header.decode()}")) != header:
            lines.fail(lines.number - 1, f"should be {header.decode()}, not {_shown(found)}")
        first_line = lines.number
        parts = _Section(n, highest=n == len(counts))
        for block in lines.blocks():
            parts.add(block, lines, vocabulary, ids)
        if parts.count != count:
            lines.fail(
                first_line - 1,
                f"starts a section of {parts.count} {n}-grams, but the header says {count}: the file is cut short or "
                f"damaged",
            )
        if n == 1:
            if UPPER_UNKNOWN in ids and SPECIAL_WORDS[UNKNOWN].encode() not in ids:
                parts.rename_unknown(vocabulary, ids)
            ids.setdefault(SPECIAL_WORDS[UNKNOWN].encode(), UNKNOWN)  # n-grams may hold <unk> without a unigram
        orders.append(parts.arrays(lines, vocabulary))
        if n > 1:
            keys.append(_keys_by_context(orders[-1].words, keys, parts, lines, vocabulary))
    if (found := lines.next_text("\\end\\")) != b"\\end\\":
        lines.fail(lines.number - 1, f"should be \\end\\, not {_shown(found)}")
    lines.skip_blank()
    if (line := lines.line()) is not None:
        lines.fail(lines.number - 1, f"follows \\end\\: {_shown(line)}")
    return NgramModel(tuple(b"\n".join(vocabulary).decode().split("\n")), tuple(orders))


def _read_counts(lines: _Lines) -> list[int]:
    start = lines.stream.read(PREAMBLE_BYTES)
    lines.buffer = start.removeprefix(UTF8_BOM)
    if start.startswith(KENLM_MAGIC):
        raise InvalidDataError(f"{lines.path} is a KenLM binary, not an ARPA file; load it with lm.ngram.kenlm_model")
    data = re.search(rb"^[ \t]*\\data\\[ \t\r]*$", lines.buffer, flags=re.MULTILINE)
    if not data:
        raise InvalidDataError(f"{lines.path} is not an ARPA file: it has no line \\data\\")
    lines.number += lines.buffer.count(b"\n", 0, data.end())
    lines.buffer = lines.buffer[data.end() :]
    counts: list[int] = []
    while (line := lines.next_text("the section \\1-grams:")).startswith(b"ngram"):
        match = re.fullmatch(rb"ngram[ \t]+([0-9]{1,4})[ \t]*=[ \t]*([0-9]{1,18})", line)
        if not match or int(match[1]) != len(counts) + 1:
            lines.fail(lines.number - 1, f"should be 'ngram {len(counts) + 1}=COUNT', not {_shown(line)}")
        counts.append(int(match[2]))
        if len(counts) > MAX_ORDER:
            lines.fail(lines.number - 1, f"announces {len(counts)}-grams; orders up to {MAX_ORDER} are supported")
    if not counts or counts[0] == 0:
        lines.fail(lines.number - 1, "ends a header without any 1-grams")
    # The line is a section's, which has its own check.
    lines.buffer = line + b"\n" + lines.buffer
    lines.number -= 1
    return counts


class _Section:
    """The n-grams of one order, gathered block by block."""

    def __init__(self, n: int, *, highest: bool) -> None:
        self.n, self.highest, self.count = n, highest, 0
        self.words: list[np.ndarray] = []
        self.log10p: list[np.ndarray] = []
        self.log10_backoff: list[np.ndarray] = []
        self.line_numbers: list[np.ndarray] = []

    def add(self, block: bytes, lines: _Lines, vocabulary: list[bytes], ids: dict[bytes, int]) -> None:
        n = self.n
        tokens, first, widths, numbers = _tokenize(block)
        numbers += lines.number
        if not len(first):
            return
        if (bad := np.flatnonzero((widths < n + 1) | (widths > n + 2))).size:
            i = bad[0]
            fields = f"{n + 1} or {n + 2}" if not self.highest else str(n + 1)
            lines.fail(numbers[i], f"has {widths[i]} fields; a {n}-gram has {fields}: the file is cut short or damaged")
        with_backoff = widths == n + 2
        if with_backoff.all() or not with_backoff.any():  # one width: plain slices of the token list
            width = int(widths[0])
            columns = [tokens[i::width] for i in range(width)]
        else:
            array = np.array(tokens, dtype=object)
            columns = [array[first + i].tolist() for i in range(n + 1)]
            columns.append(array[first[with_backoff] + n + 1].tolist())
        log10p = _floats(columns[0], lambda i, text: lines.fail(numbers[i], f"has {text} for a log10 probability"))
        if (log10p > 0).any():
            i = int(np.argmax(log10p > 0))
            lines.fail(numbers[i], f"has the positive log10 probability {_shown(columns[0][i])}; none is above 0")
        log10_backoff = np.zeros(len(first), dtype=np.float32)
        if len(columns) > n + 1:
            rows = np.flatnonzero(with_backoff)
            log10_backoff[rows] = _floats(
                columns[n + 1], lambda i, text: lines.fail(numbers[rows[i]], f"has {text} for a log10 back-off")
            )
            if self.highest and log10_backoff.any():
                i = int(np.flatnonzero(log10_backoff)[0])
                lines.fail(numbers[i], f"has a back-off, but no {n + 1}-grams follow the {n}-grams")
        if n == 1:
            words = _new_words(columns[1], numbers, lines, vocabulary, ids)[:, None]
        else:
            words = np.empty((len(first), n), dtype=np.int32)
            for i in range(n):
                try:
                    words[:, i] = list(map(ids.__getitem__, columns[i + 1]))
                except KeyError:
                    row, word = next((r, w) for r, w in enumerate(columns[i + 1]) if w not in ids)
                    lines.fail(numbers[row], f"has the word {_shown(word)}, which no 1-gram of the file has")
        self.count += len(first)
        self.words.append(words)
        self.log10p.append(log10p)
        self.log10_backoff.append(log10_backoff)
        self.line_numbers.append(numbers)

    def rename_unknown(self, vocabulary: list[bytes], ids: dict[bytes, int]) -> None:
        """Makes `<UNK>` the unknown word; the words behind it move up by one id."""
        old = ids[UPPER_UNKNOWN]
        del vocabulary[old]
        for words in self.words:
            words[words == old] = UNKNOWN
            words[words > old] -= 1
        ids.update({word: i - (i > old) for word, i in ids.items()} | {UPPER_UNKNOWN: UNKNOWN})

    def arrays(self, lines: _Lines, vocabulary: Sequence[bytes]) -> NgramArrays:
        words = np.concatenate([np.empty((0, self.n), np.int32), *self.words])
        log10p = np.concatenate([np.empty(0, np.float32), *self.log10p])
        log10_backoff = np.concatenate([np.empty(0, np.float32), *self.log10_backoff])
        if self.n == 1:
            words, log10p, log10_backoff = _with_specials(words, log10p, log10_backoff)
        keys = _sort_keys(words, len(vocabulary))
        if not _is_rising(keys):
            order = np.lexsort(keys[::-1])
            words, log10p, log10_backoff = words[order], log10p[order], log10_backoff[order]
            same = (words[1:] == words[:-1]).all(axis=1)
            if same.any():
                # Stable sort: of two equal n-grams the later line comes second.
                ngram = words[1:][same][np.argmin(order[1:][same])]
                line = self.line_of((np.concatenate(self.words) == ngram).all(axis=1), occurrence=1)
                lines.fail(line, f"has the {self.n}-gram {_joined(ngram, vocabulary)} for the second time")
        return NgramArrays(words, log10p, log10_backoff)

    def line_of(self, rows: np.ndarray, *, occurrence: int = 0) -> int:
        """The line of one of the rows (in the file's order) that a mask `[m]` marks."""
        return int(np.concatenate(self.line_numbers)[np.flatnonzero(rows)[occurrence]])


def _keys_by_context(
    words: np.ndarray, lower: Sequence[np.ndarray], section: _Section, lines: _Lines, vocabulary: Sequence[bytes]
) -> np.ndarray:
    """Rising int64 keys `[m]` of n-grams: row of the first n - 1 words in the order below x vocabulary + last word.

    `lower[i]` are the keys of order i + 2. Fails for n-grams whose first n - 1 words are no n-gram, as KenLM does: no
    back-off could reach them.
    """
    size = len(vocabulary)
    differs = (words[1:, :-1] != words[:-1, :-1]).any(axis=1)
    first = np.flatnonzero(np.concatenate([np.ones(min(1, len(words)), dtype=bool), differs]))
    contexts = words[first, :-1]
    rows = contexts[:, 0].astype(np.int64)
    for m, keys in enumerate(lower, start=1):
        wanted = rows * size + contexts[:, m]
        rows = np.searchsorted(keys, wanted)
        absent = np.append(keys, -1)[rows] != wanted
        if absent.any():
            context = contexts[int(np.argmax(absent))]
            line = section.line_of((np.concatenate(section.words)[:, :-1] == context).all(axis=1))
            prefix = _joined(context[: m + 1], vocabulary)
            lines.fail(line, f"has a {section.n}-gram that starts with {prefix}, which is no {m + 1}-gram of the file")
    keys = np.repeat(rows, np.diff(np.append(first, len(words)))) * size
    keys += words[:, -1]
    return keys


def _joined(ngram: np.ndarray, vocabulary: Sequence[bytes]) -> str:
    return _shown(b" ".join(vocabulary[word] for word in ngram))


def _tokenize(block: bytes) -> tuple[list[bytes], np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of a block; of each line that isn't blank the index of its first token `[m]`, its tokens `[m]` and its
    number from 0 `[m]`."""
    octets = np.frombuffer(block, dtype=np.uint8)
    space = _IS_SPACE[octets]
    starts = ~space
    starts[1:] &= space[:-1]
    ends = np.flatnonzero(octets == ord("\n"))
    if not len(ends) or ends[-1] != len(octets) - 1:
        ends = np.append(ends, len(octets))
    widths = np.diff(np.searchsorted(np.flatnonzero(starts), ends), prepend=0)
    first = np.cumsum(widths) - widths
    numbers = np.flatnonzero(widths)
    # bytes.split takes two more characters for white space than ARPA does.
    wider = b"\x0b" in block or b"\x0c" in block
    tokens = re.findall(rb"[^ \t\r\n]+", block) if wider else block.split()
    return tokens, first[numbers], widths[numbers], numbers


def _floats(fields: Sequence[bytes], fail: Callable[[int, str], NoReturn]) -> np.ndarray:
    """float32 `[m]`; `fail(row, field)` for the first that is no finite number."""
    try:
        if b"_" in b" ".join(fields):  # Python takes 1_0 for 10
            raise ValueError
        with np.errstate(over="ignore"):
            values = np.array(list(map(float, fields)), dtype=np.float64).astype(np.float32)
    except ValueError:
        row = next(i for i, field in enumerate(fields) if b"_" in field or _fails(float, field))
        fail(row, _shown(fields[row]))
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values)))
        fail(row, _shown(fields[row]))
    return values


def _new_words(
    words: Sequence[bytes], numbers: np.ndarray, lines: _Lines, vocabulary: list[bytes], ids: dict[bytes, int]
) -> np.ndarray:
    """Gives the words of 1-grams ids; int32 `[m]`."""
    try:
        b"\n".join(words).decode()
    except UnicodeDecodeError:
        row = next(i for i, word in enumerate(words) if _fails(word.decode))
        lines.fail(numbers[row], f"is not UTF-8: {_shown(words[row])}")
    special = {word.encode(): i for i, word in enumerate(SPECIAL_WORDS)}
    found = np.empty(len(words), dtype=np.int32)
    for row, word in enumerate(words):
        if word in ids:
            lines.fail(numbers[row], f"has the 1-gram {_shown(word)} for the second time")
        if (id_ := special.get(word)) is None:
            id_ = len(vocabulary)
            vocabulary.append(word)
        ids[word] = found[row] = id_
    return found


def _fails(call: Callable[..., object], *arguments: object) -> bool:
    try:
        call(*arguments)
    except ValueError:
        return True
    return False


def _with_specials(
    words: np.ndarray, log10p: np.ndarray, log10_backoff: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """1-grams with those of the special words that the file lacks."""
    missing = [i for i in (UNKNOWN, SENTENCE_START, SENTENCE_END) if not (words[:, 0] == i).any()]
    unknown = MISSING_LOG10P if UNKNOWN in missing else float(log10p[words[:, 0] == UNKNOWN][0])
    added = np.full(len(missing), unknown, dtype=np.float32)
    return (
        np.concatenate([np.array(missing, dtype=np.int32)[:, None], words]),
        np.concatenate([added, log10p]),
        np.concatenate([np.zeros_like(added), log10_backoff]),
    )


def _sort_keys(words: np.ndarray, vocabulary_size: int) -> list[np.ndarray]:
    """int64 keys `[m]`, the first the most significant, that sort as the rows of `words` do."""
    bits = max(1, vocabulary_size.bit_length())
    per_key = 63 // bits
    keys = []
    for start in range(0, words.shape[1], per_key):
        key = np.zeros(len(words), dtype=np.int64)
        for column in range(start, min(start + per_key, words.shape[1])):
            key = (key << bits) | words[:, column]
        keys.append(key)
    return keys


def _is_rising(keys: Sequence[np.ndarray]) -> bool:
    """Whether every row is above the one before: sorted, and no duplicates."""
    above = np.zeros(max(0, len(keys[0]) - 1), dtype=bool)
    for key in reversed(keys):
        above = (key[1:] > key[:-1]) | ((key[1:] == key[:-1]) & above)
    return bool(above.all())


def _shown(text: bytes) -> str:
    """A piece of the file for a message: one line, not too long."""
    shown = repr(text[:60].decode(errors="backslashreplace"))
    return shown if len(text) <= 60 else f"{shown[:-1]}...'"


def _check_writable(model: NgramModel, path: Path) -> None:
    words = model.vocabulary
    if not 1 <= model.order <= MAX_ORDER:
        raise InvalidDataError(f"can't write {path}: a model of order {model.order}; orders are 1 to {MAX_ORDER}")
    for i, word in enumerate(words):
        if not word or re.search(r"[ \t\r\n\ud800-\udfff]", word):
            raise InvalidDataError(f"can't write {path}: word {i} is {word!r}, which an ARPA file can't hold")
    if len(set(words)) < len(words):
        raise InvalidDataError(f"can't write {path}: the vocabulary holds a word twice")
    for n, ngrams in enumerate(model.orders, start=1):
        if not (np.isfinite(ngrams.log10p).all() and np.isfinite(ngrams.log10_backoff).all()):
            raise InvalidDataError(f"can't write {path}: {n}-grams with log-probs or back-offs that aren't finite")
        if (ngrams.log10p > 0).any():
            raise InvalidDataError(f"can't write {path}: {n}-grams with positive log-probs")
