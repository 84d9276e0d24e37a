"""N-gram models of other people through KenLM: ARPA files and KenLM binaries, which can't be enumerated.

KenLM trusts its binaries: a header with order 0 or a damaged body ends the process, a header with zero counts scores
everything 0. So a binary's header is checked here against the size of the file, then a child process loads it and
scores some of its own words, and only what survives that is loaded into this process. What a damaged number deep in
the body does to single scores no check can tell. Layout of the binaries: KenLM's `lm/binary_format.cc`, version 5.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import kenlm
import numpy as np

from lattices.errors import InvalidDataError, RescoreError
from lattices.ngrams import SENTENCE_END, SENTENCE_START, SPECIAL_WORDS, UNKNOWN

MAGIC = b"mmap lm http://kheafield.com/code"
VERSION_5 = MAGIC + b" format version 5\n\0"
# Behind the magic (56 bytes with padding) test values of the machine's byte order and floats.
SANITY = struct.pack("<56s3f3IQ", VERSION_5, 0.0, 1.0, -0.5, 1, 0xFFFFFFFF, 0, 1)
FIXED = struct.Struct("<B3xfI?3xI")  # order, probing multiplier, model type, has words, version of the search
MIN_ORDER, MAX_ORDER = 2, 6  # what KenLM loads, as its Python package is built
PROBING, REST_PROBING, TRIE, QUANTIZED_TRIE, ARRAY_TRIE, QUANTIZED_ARRAY_TRIE = range(6)
PROBED_WORDS = 2_000
LOWEST_LOG10P = -10_000.0  # below it a score is a damaged number, not a probability
PROBE_TIMEOUT_S = 60.0  # KenLM searches a damaged hash table for ever

# Runs in the child: stdin holds words (JSON), stdout gets what is wrong with the model, or nothing.
_PROBE = """
import json, math, sys
import kenlm
path, words, lowest = json.load(sys.stdin)
config = kenlm.Config()
config.load_method, config.show_progress = kenlm.LoadMethod.LAZY, False
try:
    model = kenlm.Model(path, config)
except (OSError, RuntimeError) as error:
    sys.exit(print(error))
missing = [word for word in ["<s>", "</s>", *words] if word not in model and word not in ("<unk>", "<UNK>")]
if missing:
    sys.exit(print(f"it does not find its own word {missing[0]!r}"))
start, empty = kenlm.State(), kenlm.State()
model.BeginSentenceWrite(start)
model.NullContextWrite(empty)
state, scores = start, []
for word in [*words, "<unk>", "</s>"]:
    after = kenlm.State()
    scores += [model.BaseScore(state, word, after), model.BaseScore(empty, word, kenlm.State())]
    scores.append(model.BaseScore(start, word, kenlm.State()))
    state = after
wrong = [score for score in scores if not lowest <= score < 1e-4]
if wrong:
    print(f"it gives {wrong[0]} for a log10 probability")
elif not any(scores):
    print("it gives every word the probability 1")
"""


@dataclass(frozen=True)
class BinaryHeader:
    """Header of a KenLM binary: `counts[n - 1]` n-grams; `model_type` 0 to 5 as in KenLM; `has_words`: the file ends
    with its vocabulary."""

    order: int
    multiplier: float
    model_type: int
    has_words: bool
    counts: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of the header itself."""
        return -(-(len(SANITY) + FIXED.size + 8 * self.order) // 8) * 8


class KenlmModel:
    """A model scored by KenLM; `KenlmModel.load` makes one.

    Words are strings as in the file; a word given as an id stands for `words[id]`, or, without `words`, for the id in
    decimal digits, which is how `build-ngram` writes token ids. States are KenLM's and never change.
    """

    def __init__(self, model: Any, path: Path, *, words: Sequence[str] | None = None) -> None:
        self.path = path
        self.words = words
        self.order: int = model.order
        self._model = model
        self._start = kenlm.State()
        model.BeginSentenceWrite(self._start)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        words: Sequence[str] | None = None,
        trusted: bool = False,
        probe_timeout_s: float = PROBE_TIMEOUT_S,
    ) -> KenlmModel:
        """Loads `.arpa`, `.arpa.gz` or a KenLM binary (told apart by content, not by name).

        `trusted` leaves out the child process that tries a binary first (a second or so). Raises `InvalidDataError`
        in one line for what KenLM can't load or would load wrongly, `RescoreError` if the file can't be read.
        """
        try:
            with path.open("rb") as stream:
                start, size = stream.read(len(MAGIC)), os.fstat(stream.fileno()).st_size
        except OSError as error:
            raise RescoreError(f"can't read {path}: {error.strerror}") from error
        if not start:
            raise InvalidDataError(f"{path} is empty; get it again")
        if start == MAGIC:
            own_words = _check_binary(path, size)
            if not trusted:
                _probe(path, own_words, timeout_s=probe_timeout_s)
        config = kenlm.Config()
        config.show_progress, config.arpa_complain = False, kenlm.ARPALoadComplain.NONE
        try:
            model = kenlm.Model(str(path), config)
        except (OSError, RuntimeError, ValueError) as error:
            raise InvalidDataError(f"KenLM can't load {path}: {_reason(str(error))}") from error
        return cls(model, path, words=words)

    def word_of(self, word: str | int) -> str:
        """The file's string of a word that may be an id."""
        if isinstance(word, str):
            return word
        return str(int(word)) if self.words is None else self.words[word]

    def __contains__(self, word: str | int) -> bool:
        """Whether the model knows the word; `<unk>` itself counts as unknown, as in KenLM."""
        return self.word_of(word) in self._model

    def is_unknown(self, word: str | int) -> bool:
        """Whether the word is scored as `<unk>`."""
        return word not in self

    @property
    def sentence_end(self) -> str:
        """The word that ends a sentence."""
        return SPECIAL_WORDS[SENTENCE_END]

    def begin_sentence(self) -> Any:
        """The state behind `<s>`."""
        return self._start

    def empty_context(self) -> Any:
        """The state that knows nothing of what was before."""
        state = kenlm.State()
        self._model.NullContextWrite(state)
        return state

    def score(self, state: Any, word: str | int) -> tuple[float, Any]:
        """log10 probability of a word behind `state`, and the state behind the word."""
        after = kenlm.State()
        return self._model.BaseScore(state, self.word_of(word), after), after

    def full_score(self, state: Any, word: str | int) -> tuple[float, int, Any]:
        """As `score`, with the length of the longest n-gram of the file that ends in the word (1: no context used)."""
        after = kenlm.State()
        result = self._model.BaseFullScore(state, self.word_of(word), after)
        return result.log_prob, result.ngram_length, after

    def score_ids(
        self, sequences: Sequence[Sequence[int]], *, begin: bool = True, end: bool = False
    ) -> list[np.ndarray]:
        """log10 probabilities of every id of every sequence, float32 `[len(sequence)]`; one more for `</s>` if `end`.

        `begin`: a sequence follows `<s>`, otherwise nothing.
        """
        return [self._score_sequence(sequence, begin=begin, end=end) for sequence in sequences]

    def _score_sequence(self, sequence: Sequence[int], *, begin: bool, end: bool) -> np.ndarray:
        words = [self.word_of(word) for word in sequence]
        if self.words is None:  # decimal digits hold no white space: one call into KenLM does
            scores = self._model.full_scores(" ".join(words), bos=begin, eos=end)
            return np.array([score[0] for score in scores], dtype=np.float32)
        state = self.begin_sentence() if begin else self.empty_context()
        out = np.empty(len(words) + end, dtype=np.float32)
        for i, word in enumerate([*words, self.sentence_end] if end else words):
            out[i], state = self.score(state, word)
        return out


def read_header(path: Path) -> BinaryHeader:
    """The header of a KenLM binary.

    Raises `InvalidDataError` for anything but a header that this KenLM loads, `RescoreError` if the file can't be
    read.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(len(SANITY) + FIXED.size + 8 * MAX_ORDER)
    except OSError as error:
        raise RescoreError(f"can't read {path}: {error.strerror}") from error
    if not data.startswith(MAGIC):
        raise InvalidDataError(f"{path} is not a KenLM binary")
    if data.startswith(MAGIC + b" incomplete"):
        raise InvalidDataError(f"{path} is a KenLM binary that was never finished; build it again")
    if len(data) < len(SANITY) + FIXED.size:
        raise InvalidDataError(f"{path} is a KenLM binary cut short after {len(data)} bytes; get it again")
    if not data.startswith(SANITY):
        raise InvalidDataError(
            f"{path} is a KenLM binary of another version or machine, or damaged; build it again from its ARPA file"
        )
    order, multiplier, model_type, has_words, _ = FIXED.unpack_from(data, len(SANITY))
    if not MIN_ORDER <= order <= MAX_ORDER:
        raise InvalidDataError(f"{path} says its order is {order}; KenLM loads {MIN_ORDER} to {MAX_ORDER}")
    if model_type > QUANTIZED_ARRAY_TRIE:
        raise InvalidDataError(f"{path} says its model type is {model_type}, which KenLM doesn't know")
    if not 1.0 <= multiplier < math.inf:
        raise InvalidDataError(f"{path} says its probing multiplier is {multiplier}; it must be at least 1")
    offset = len(SANITY) + FIXED.size
    if len(data) < offset + 8 * order:
        raise InvalidDataError(f"{path} is a KenLM binary cut short after {len(data)} bytes; get it again")
    counts = struct.unpack_from(f"<{order}Q", data, offset)
    # A higher order may be pruned away, but every model has <s>, </s> (<unk> needs no 1-gram) and bigrams.
    for n, least in ((1, 2), (2, 1)):
        if counts[n - 1] < least:
            raise InvalidDataError(f"{path} says it has {counts[n - 1]} {n}-grams; the file is damaged, get it again")
    return BinaryHeader(order, multiplier, model_type, has_words, counts)


def _check_binary(path: Path, size: int) -> list[str]:
    """Checks header and size; returns words to try the model with."""
    header = read_header(path)
    least = header.size + _vocabulary_size(header)
    bits = (0, 0)
    if header.model_type in (QUANTIZED_TRIE, QUANTIZED_ARRAY_TRIE) and size > least + 3:
        with path.open("rb") as stream:
            stream.seek(least + 1)  # behind the version
            bits = (stream.read(1)[0], stream.read(1)[0])
        if not all(1 <= b <= 25 for b in bits):
            raise InvalidDataError(f"{path} says it has {bits[0]} and {bits[1]} bits for its numbers; it is damaged")
    least += _search_size(header, *bits)
    if size < least:
        raise InvalidDataError(
            f"{path} has {size} bytes, but a model of its counts needs {least}; the file is cut short or damaged"
        )
    return _words_behind(path, least, header) if header.has_words else []


def _words_behind(path: Path, offset: int, header: BinaryHeader) -> list[str]:
    """A sample of the words at the end of the file."""
    unknown, count = SPECIAL_WORDS[UNKNOWN].encode() + b"\0", header.counts[0]
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # Arrays of pointers have a size that the counts don't give: the words start somewhere behind the bound.
        exact = header.model_type not in (ARRAY_TRIE, QUANTIZED_ARRAY_TRIE)
        found = data.find(unknown, offset, offset + len(unknown) if exact else len(data))
        words = data[max(found, 0) :].split(b"\0") if found >= 0 else [b""]
    # A file without a 1-gram <unk> does not count it, but has its string.
    if words.pop() or len(words) not in (count, count + 1):
        raise InvalidDataError(f"{path} does not end with its {count} words; the file is cut short or damaged")
    sample = words[1 :: max(1, len(words) // PROBED_WORDS)]
    try:
        return [word.decode() for word in sample if word != SPECIAL_WORDS[SENTENCE_START].encode()]
    except UnicodeDecodeError as error:
        raise InvalidDataError(f"{path} holds words that aren't UTF-8; the file is damaged") from error


def _vocabulary_size(header: BinaryHeader) -> int:
    if header.model_type in (PROBING, REST_PROBING):
        return 8 + 12 * _buckets(header.counts[0], header.multiplier)
    return 8 + 8 * header.counts[0]


def _search_size(header: BinaryHeader, prob_bits: int, backoff_bits: int) -> int:
    """Bytes behind the vocabulary; a lower bound for the types with arrays of pointers, else exact."""
    counts = header.counts
    if header.model_type in (PROBING, REST_PROBING):
        weights = 8 if header.model_type == PROBING else 12
        middle = sum((8 + weights) * _buckets(count, header.multiplier) for count in counts[1:-1])
        return (counts[0] + 1) * weights + middle + 12 * _buckets(counts[-1], header.multiplier)
    tables = 0
    middle_bits, longest_bits = 63, 31
    if header.model_type in (QUANTIZED_TRIE, QUANTIZED_ARRAY_TRIE):
        middle_bits, longest_bits = prob_bits + backoff_bits, prob_bits
        tables = (header.order - 1) * 4 * 2**prob_bits + (header.order - 2) * 4 * 2**backoff_bits + 8
    packed = 0
    for count, next_count in pairwise(counts[1:]):
        pointer = next_count.bit_length() if header.model_type in (TRIE, QUANTIZED_TRIE) else 0
        packed += _packed_size(count, counts[0].bit_length() + middle_bits + pointer)
    packed += _packed_size(counts[-1], counts[0].bit_length() + longest_bits)
    return tables + (counts[0] + 2) * 16 + packed


def _buckets(count: int, multiplier: float) -> int:
    with np.errstate(over="ignore"):
        scaled = float(np.float32(multiplier) * np.float32(count))  # float32, as KenLM computes it
    return max(count + 1, int(min(scaled, 2.0**62)))


def _packed_size(count: int, bits: int) -> int:
    return ((1 + count) * bits + 7) // 8 + 8


def _probe(path: Path, words: Sequence[str], *, timeout_s: float) -> None:
    """Loads the model in a child process and scores `words`; raises `InvalidDataError` if that fails."""
    task = json.dumps([str(path.absolute()), list(words), LOWEST_LOG10P])
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _PROBE],  # -P: imports nothing from the working directory
            input=task.encode(),
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InvalidDataError(
            f"KenLM can't load {path}: no answer within {timeout_s:g} s; the file is damaged, or the machine busy"
        ) from error
    reason = done.stdout.decode(errors="replace").strip()
    if done.returncode < 0:
        reason = f"it ends KenLM with signal {-done.returncode}; the file is damaged, get it again"
    elif done.returncode and not reason:
        errors = done.stderr.decode(errors="replace").strip().splitlines()
        reason = f"the process that tries it failed: {errors[-1] if errors else f'exit code {done.returncode}'}"
    if reason:
        raise InvalidDataError(f"KenLM can't load {path}: {_reason(reason)}")


def _reason(message: str) -> str:
    """KenLM's message on one line, without the path and the place in its source."""
    message = " ".join(message.split())
    if message.startswith("Cannot read model '") and "' (" in message:
        message = message.partition("' (")[2].removesuffix(")")
    message = re.sub(r"^\S+:[0-9]+ in .*? threw ", "", message)
    message = re.sub(r"^[\w:]+Exception( because `.*?')?\.? ", "", message)
    return message.rstrip(".")
