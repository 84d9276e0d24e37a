"""ARPA files in and out: the text format of back-off n-gram models, in the layout that KenLM's `lmplz` prints.

Knows nothing about estimation or scoring. Reads blocks of lines with whole-column operations, about a second per
million n-grams; pyarrow writes several million a second. Format: `\\data\\`, `ngram N=COUNT` lines, sections
`\\N-grams:` of lines `log10p TAB word ... [TAB log10 back-off]`, `\\end\\`.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from lattices.errors import InvalidDataError, unreadable
from lattices.ngrams import MAX_ORDER, SPECIAL_WORDS, UNKNOWN, NgramArrays, NgramModel
from lm.files import atomic_file

MISSING_LOG10P = -100.0  # KenLM's default for <unk> where a file has none
BLOCK_LINES = 1 << 16  # read at a time; their tokens take about ten times as much memory
BLOCK_ROWS = 1 << 14  # n-grams written at a time
PREAMBLE_BYTES = 1 << 20  # text allowed before \data\
PLAIN_END = 1e21  # the first number that is written with an exponent
GZIP_MAGIC, UTF8_BOM, KENLM_MAGIC = b"\x1f\x8b", b"\xef\xbb\xbf", b"mmap lm http://kheafield.com/code"
SPACES = b" \t\r\n"  # what separates words, as in KenLM; other white space may be part of a word
_IS_SPACE = np.isin(np.arange(256), list(SPACES))
UPPER_UNKNOWN = b"<UNK>"  # stands for <unk>, as in KenLM, but only where the file has no <unk> of its own
SPECIAL_IDS = {word.encode(): i for i, word in enumerate(SPECIAL_WORDS)}


class Rows(NamedTuple):
    """N-grams of one order as they stand in a file."""

    numbers: np.ndarray  # of their lines, int64 [m]
    words: np.ndarray  # int32 [m, n]
    log10p: np.ndarray  # float32 [m]
    log10_backoff: np.ndarray  # float32 [m]


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
            stream: io.BufferedReader = stack.enter_context(path.open("rb"))
            if stream.peek(2).startswith(GZIP_MAGIC):
                unpacked = stack.enter_context(gzip.open(stream))
                stream = io.BufferedReader(unpacked)  # type: ignore[arg-type]  # it has lines, faster
            return _Reader(stream, path).model()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InvalidDataError(f"{path} is a damaged or truncated gzip file: {error}") from error
        except OSError as error:
            raise unreadable(path, error) from error


class _Reader:
    """One file: `number` is that of the line given out last (from 1), `ids` the words of the 1-grams."""

    def __init__(self, stream: io.BufferedReader, path: Path) -> None:
        self.stream, self.path, self.number = stream, path, 0
        self.lines: Iterator[bytes] = iter(stream)
        self.vocabulary: list[bytes] = list(SPECIAL_IDS)
        self.ids: dict[bytes, int] = {}

    def fail(self, line: int, problem: str) -> NoReturn:
        raise InvalidDataError(f"{self.path} line {line} {problem}")

    def next_text(self) -> bytes:
        """The next line that isn't blank, without white space at its ends; b"" at the end of the file."""
        for line in self.lines:
            self.number += 1
            if text := line.strip(SPACES):
                return text
        return b""

    def expect(self, header: bytes, what: str) -> None:
        if not (text := self.next_text()):
            self.cut_short(what)
        if text != header:
            self.fail(self.number, f"should be {header.decode()}, not {_shown(text)}")

    def cut_short(self, what: str) -> NoReturn:
        raise InvalidDataError(
            f"{self.path} ends after line {self.number} without {what}: the file is cut short; get it again"
        )

    def blocks(self) -> Iterator[bytes]:
        """The lines up to the next one that starts with a backslash (no n-gram's line does)."""
        while block := list(islice(self.lines, BLOCK_LINES)):
            text, end = b"".join(block), len(block)
            if text.startswith(b"\\") or b"\n\\" in text:
                end = next(i for i, line in enumerate(block) if line.startswith(b"\\"))
            yield text if end == len(block) else b"".join(block[:end])
            self.number += end
            if end < len(block):
                self.lines = chain(block[end:], self.lines)
                return

    def model(self) -> NgramModel:
        counts = self.counts()
        orders: list[NgramArrays] = []
        keys: list[np.ndarray] = []  # of orders 2 and up, see `sort`
        for n, count in enumerate(counts, start=1):
            header = b"\\%d-grams:" % n
            self.expect(header, f"the section {header.decode()}")
            start = self.number
            parts = [self.parse(block, n, highest=n == len(counts)) for block in chain([b""], self.blocks())]
            rows = Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))
            if len(rows.numbers) != count:
                self.fail(
                    start,
                    f"starts a section of {len(rows.numbers)} {n}-grams, but the header says {count}: the file is cut "
                    "short or damaged",
                )
            orders.append(self.unigrams(rows) if n == 1 else self.sort(rows, keys))
        self.expect(b"\\end\\", "\\end\\")
        if text := self.next_text():
            self.fail(self.number, f"follows \\end\\: {_shown(text)}")
        return NgramModel(tuple(b"\n".join(self.vocabulary).decode().split("\n")), tuple(orders))

    def counts(self) -> list[int]:
        """The numbers of n-grams that the header announces."""
        read, line = 0, b""
        while line.strip(SPACES) != b"\\data\\":
            if read >= PREAMBLE_BYTES or not (line := self.stream.readline(PREAMBLE_BYTES)):
                raise InvalidDataError(f"{self.path} is not an ARPA file: it has no line \\data\\")
            if not read and line.startswith(KENLM_MAGIC):
                raise InvalidDataError(f"{self.path} is a KenLM binary, not an ARPA file; load it with lm.ngram.kenlm")
            line = line if read else line.removeprefix(UTF8_BOM)
            read, self.number = read + len(line), self.number + 1
        counts: list[int] = []
        while (line := self.next_text()).startswith(b"ngram"):
            match = re.fullmatch(rb"ngram[ \t]+([0-9]{1,4})[ \t]*=[ \t]*([0-9]{1,18})", line)
            if not match or int(match[1]) != len(counts) + 1:
                self.fail(self.number, f"should be 'ngram {len(counts) + 1}=COUNT', not {_shown(line)}")
            counts.append(int(match[2]))
            if len(counts) > MAX_ORDER:
                self.fail(self.number, f"announces {len(counts)}-grams; orders up to {MAX_ORDER} are supported")
        if not line:
            self.cut_short("the section \\1-grams:")
        if not counts or counts[0] == 0:
            self.fail(self.number, "ends a header without any 1-grams")
        self.lines = chain([line], self.lines)  # a section's, which has its own check
        self.number -= 1
        return counts

    def parse(self, block: bytes, n: int, *, highest: bool) -> Rows:
        """The n-grams in lines of a section, in the order of the file."""
        tokens, widths = _tokenize(block)
        lines = np.flatnonzero(widths)
        numbers, widths = self.number + 1 + lines, widths[lines]
        if (bad := np.flatnonzero((widths < n + 1) | (widths > n + 2))).size:
            i = bad[0]
            fields = f"{n + 1} or {n + 2}" if not highest else str(n + 1)
            self.fail(numbers[i], f"has {widths[i]} fields; a {n}-gram has {fields}: the file is cut short or damaged")
        first = np.cumsum(widths) - widths
        columns = [tokens[first + i].tolist() for i in range(n + 1)]
        log10p = _floats(columns[0], lambda i, text: self.fail(numbers[i], f"has {text} for a log10 probability"))
        if (log10p > 0).any():
            i = int(np.argmax(log10p > 0))
            self.fail(numbers[i], f"has the positive log10 probability {_shown(columns[0][i])}; none is above 0")
        log10_backoff = np.zeros(len(lines), dtype=np.float32)
        longer = np.flatnonzero(widths == n + 2)
        log10_backoff[longer] = _floats(
            tokens[first[longer] + n + 1].tolist(),
            lambda i, text: self.fail(numbers[longer[i]], f"has {text} for a log10 back-off"),
        )
        if highest and log10_backoff.any():
            i = int(np.flatnonzero(log10_backoff)[0])
            self.fail(numbers[i], f"has a back-off, but no {n + 1}-grams follow the {n}-grams")
        if n == 1:
            self.number_words(columns[1], numbers)
        words = np.empty((len(lines), n), dtype=np.int32)
        for place, column in enumerate(columns[1:]):
            try:
                words[:, place] = list(map(self.ids.__getitem__, column))
            except KeyError:
                row, word = next((r, w) for r, w in enumerate(column) if w not in self.ids)
                self.fail(numbers[row], f"has the word {_shown(word)}, which no 1-gram of the file has")
        return Rows(numbers, words, log10p, log10_backoff)

    def number_words(self, words: Sequence[bytes], numbers: np.ndarray) -> None:
        if _fails(b"\n".join(words).decode):
            row = next(i for i, word in enumerate(words) if _fails(word.decode))
            self.fail(numbers[row], f"is not UTF-8: {_shown(words[row])}")
        for row, word in enumerate(words):
            if word in self.ids:
                self.fail(numbers[row], f"has the 1-gram {_shown(word)} for the second time")
            self.ids[word] = SPECIAL_IDS.get(word, len(self.vocabulary))
            if word not in SPECIAL_IDS:
                self.vocabulary.append(word)

    def unigrams(self, rows: Rows) -> NgramArrays:
        """The 1-grams by word id, with the special words that the file lacks; n-grams may hold `<unk>` without one."""
        ids, unknown = rows.words[:, 0], SPECIAL_WORDS[UNKNOWN].encode()
        if UPPER_UNKNOWN in self.ids and unknown not in self.ids:
            upper = self.ids[UPPER_UNKNOWN]
            del self.vocabulary[upper]
            ids = np.where(ids == upper, UNKNOWN, ids - (ids > upper))
            renumbered = {word: i - (i > upper) for word, i in self.ids.items()}
            self.ids = {**renumbered, UPPER_UNKNOWN: UNKNOWN, unknown: UNKNOWN}
        self.ids.setdefault(unknown, UNKNOWN)
        default = rows.log10p[ids == UNKNOWN][0] if (ids == UNKNOWN).any() else MISSING_LOG10P
        every = np.arange(len(self.vocabulary), dtype=np.int32)
        by_id = NgramArrays(every[:, None], np.full(len(every), default, np.float32), np.zeros(len(every), np.float32))
        by_id.log10p[ids], by_id.log10_backoff[ids] = rows.log10p, rows.log10_backoff
        return by_id

    def sort(self, rows: Rows, keys: list[np.ndarray]) -> NgramArrays:
        """The n-grams of an order above 1, sorted by their words.

        An n-gram's key is its context's place in the order below x vocabulary + last word, so keys sort as n-grams do;
        those of this order go to `keys`. Fails for an n-gram whose first n - 1 words are no n-gram, as KenLM does: no
        back-off could reach it.
        """
        numbers, words, log10p, log10_backoff = rows
        size, n = len(self.vocabulary), words.shape[1]
        place = words[:, 0].astype(np.int64)
        for m, shorter in enumerate(keys, start=1):
            context = place * size + words[:, m]
            place = np.searchsorted(shorter, context)
            absent = np.append(shorter, -1)[place] != context
            if absent.any():
                i = int(np.argmax(absent))
                start = self.text_of(words[i, : m + 1])
                self.fail(numbers[i], f"has a {n}-gram that starts with {start}, which is no {m + 1}-gram of the file")
        own = place * size + words[:, -1]
        if (own[1:] <= own[:-1]).any():
            order = np.argsort(own, kind="stable")
            own, words, log10p, log10_backoff = own[order], words[order], log10p[order], log10_backoff[order]
            same = own[1:] == own[:-1]
            if same.any():
                # Of equal n-grams the later line comes second.
                again = order[1:][same].min()
                ngram = self.text_of(words[np.flatnonzero(order == again)[0]])
                self.fail(numbers[again], f"has the {n}-gram {ngram} for the second time")
        keys.append(own)
        return NgramArrays(words, log10p, log10_backoff)

    def text_of(self, ngram: np.ndarray) -> str:
        return _shown(b" ".join(self.vocabulary[word] for word in ngram))


def _tokenize(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The words in whole lines (objects) and how many every line has."""
    octets = np.frombuffer(text, dtype=np.uint8)
    is_space = _IS_SPACE[octets]
    starts = ~is_space
    starts[1:] &= is_space[:-1]
    ends = np.flatnonzero(octets == ord("\n"))
    if text and not text.endswith(b"\n"):
        ends = np.append(ends, len(octets))
    widths = np.diff(np.searchsorted(np.flatnonzero(starts), ends), prepend=0)
    # bytes.split takes two more characters for white space than ARPA does.
    wider = b"\x0b" in text or b"\x0c" in text
    tokens = re.findall(rb"[^ \t\r\n]+", text) if wider else text.split()
    return np.array(tokens, dtype=object), widths


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


def _fails(call: Callable[..., object], *arguments: object) -> bool:
    try:
        call(*arguments)
    except ValueError:
        return True
    return False


def _shown(text: bytes) -> str:
    """A piece of the file for a message: one line, not too long."""
    shown = repr(text[:60].decode(errors="backslashreplace"))
    return shown if len(text) <= 60 else f"{shown[:-1]}...'"


def write_arpa(model: NgramModel, path: Path) -> None:
    """Writes a model as ARPA, atomically.

    Numbers are written as `lmplz` writes them: the fewest digits that read back as the same float32, plain from 1e-6
    to 1e21, with an exponent outside of that (`1e-7`), negative zero as 0. Raises `InvalidDataError` for a model that
    no ARPA file can hold (numbers that aren't finite, words that are empty or hold white space), `OutputError` if
    `path` can't be written.
    """
    _check_writable(model, path)
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        header = "".join(f"ngram {n}={len(ngrams)}\n" for n, ngrams in enumerate(model.orders, start=1))
        stream.write(f"\\data\\\n{header}".encode())
        for n, ngrams in enumerate(model.orders, start=1):
            stream.write(f"\n\\{n}-grams:\n".encode())
            for block in formatted_lines(ngrams, model.vocabulary, with_backoff=n < model.order):
                stream.write(block)
        stream.write(b"\n\\end\\\n")


def formatted_lines(ngrams: NgramArrays, vocabulary: Sequence[str], *, with_backoff: bool) -> Iterator[memoryview]:
    """`log10p TAB word ... [TAB log10 back-off]` for every n-gram, in blocks of whole lines; numbers must be finite."""
    import pyarrow
    import pyarrow.compute as pc

    words = pyarrow.array(vocabulary, pyarrow.string())
    separators = "\t" + " " * (ngrams.words.shape[1] - 1)
    for start in range(0, len(ngrams), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        fields = [_number_texts(ngrams.log10p[rows])]
        for separator, column in zip(separators, ngrams.words[rows].T, strict=True):
            fields += [separator, words.take(pyarrow.array(column))]
        if with_backoff:
            fields += ["\t", _number_texts(ngrams.log10_backoff[rows])]
        yield memoryview(pc.binary_join_element_wise(*fields, "\n", "").buffers()[2])


def _number_texts(values: np.ndarray) -> Any:
    import pyarrow
    import pyarrow.compute as pc

    texts = pc.cast(pyarrow.array(values + np.float32(0)), pyarrow.string())  # + 0: -0 becomes 0
    large = np.flatnonzero(np.abs(values) >= 1e7)  # arrow may write an exponent, with a plus
    if len(large):
        written = texts.to_pylist()
        for i in large:
            written[i] = written[i].replace("e+", "e") if abs(values[i]) >= PLAIN_END else f"{Decimal(written[i]):f}"
        texts = pyarrow.array(written, pyarrow.string())
    return texts


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
