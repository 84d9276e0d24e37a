"""N-gram models of other people through KenLM: its binaries, which can't be enumerated, scored and searched.

KenLM trusts its binaries: a damaged one can end the process or score everything 0. So a child process loads it first
and scores some of its own words, and only what survives that is loaded into this process. What a damaged number deep
in the body does to single scores no check can tell. Layout: KenLM's `lm/binary_format.cc`, version 5.

The search gives the same scores and order of paths as `lattices.ngram_search`, from a plain dynamic program over the
last order - 1 tokens with one call of KenLM per state and word, a beam's p-th best path as the floor and the heads
alone as the bound. This bound needs log-probs of at most 0, which a proper model has; one whose back-offs make
probabilities above 1 may lose paths here. Some hundred times slower than the automaton.
"""

from __future__ import annotations

import json
import mmap
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import kenlm
import numpy as np

from lattices.automaton import LN10, SCORE_SCALE
from lattices.errors import InvalidDataError
from lattices.lattice import Lattice
from lattices.ngram_search import ARC_SCALE, LOWEST_HEAD, checked_weight
from lattices.ngrams import SENTENCE_END, SENTENCE_START, SPECIAL_WORDS, UNKNOWN
from lattices.search import PBest, draft_count, p_best

# After 88 bytes of magic and sanity values: order, probing multiplier, model type, whether the file ends with its
# words, version of the search, number of 1-grams.
HEADER, HEADER_AT = struct.Struct("<B3xfI?3xIQ"), 88
PROBED_WORDS = 2_000
LOWEST_LOG10P = -10_000.0  # below it a score is a damaged number, not a probability
PROBE_TIMEOUT_S = 60.0  # KenLM searches a damaged hash table for ever
BEAM = 64
_Prefix = tuple[int, tuple[int, ...], Any]  # minus the score (so that sorting puts the best first), tokens, state
_order = itemgetter(0, 1)

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


class KenlmModel:
    """A model scored by KenLM; `KenlmModel.load` makes one. Words are strings as in the file; states never change."""

    def __init__(self, model: Any) -> None:
        self.order: int = model.order
        self._model = model
        self._start = kenlm.State()
        model.BeginSentenceWrite(self._start)

    @classmethod
    def load(cls, path: Path) -> KenlmModel:
        """Loads a KenLM binary, by its first bytes. Raises `InvalidDataError` in one line for what KenLM can't load or
        would load wrongly."""
        _probe(path, _own_words(path))
        config = kenlm.Config()
        config.show_progress = False
        try:
            model = kenlm.Model(str(path), config)
        except (OSError, RuntimeError, ValueError) as error:
            raise InvalidDataError(f"KenLM can't load {path}: {_reason(str(error))}") from error
        return cls(model)

    def is_unknown(self, word: str) -> bool:
        """Whether the word is scored as `<unk>`; that itself counts as unknown, as in KenLM."""
        return word not in self._model

    def begin_sentence(self) -> Any:
        """The state after `<s>`."""
        return self._start

    def empty_context(self) -> Any:
        """The state that knows nothing of what was before."""
        state = kenlm.State()
        self._model.NullContextWrite(state)
        return state

    def score(self, state: Any, word: str) -> tuple[float, Any]:
        """log10 probability of a word after `state`, and the state after the word."""
        after = kenlm.State()
        return self._model.BaseScore(state, word, after), after

    def full_score(self, state: Any, word: str) -> tuple[float, int, Any]:
        """As `score`, with the length of the longest n-gram of the file that ends in the word (1: no context used)."""
        after = kenlm.State()
        result = self._model.BaseFullScore(state, word, after)
        return result.log_prob, result.ngram_length, after


def _own_words(path: Path) -> list[str]:
    """A sample of the words at the end of a binary; none if it was written without them."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if len(data) < HEADER_AT + HEADER.size:
            raise InvalidDataError(f"{path} is a KenLM binary cut short after {len(data)} bytes; get it again")
        *_, has_words, _, count = HEADER.unpack_from(data, HEADER_AT)
        if not has_words:
            return []
        start = data.find(SPECIAL_WORDS[UNKNOWN].encode() + b"\0", HEADER_AT)
        words = data[start:].split(b"\0") if start >= 0 else [b""]
    # A file without a 1-gram <unk> does not count it, but has its string.
    if words.pop() or len(words) not in (count, count + 1):
        raise InvalidDataError(f"{path} does not end with its {count} words; the file is cut short or damaged")
    sample = words[1 :: max(1, len(words) // PROBED_WORDS)]
    try:
        return [word.decode() for word in sample if word != SPECIAL_WORDS[SENTENCE_START].encode()]
    except UnicodeDecodeError as error:
        raise InvalidDataError(f"{path} holds words that aren't UTF-8; the file is damaged") from error


def _probe(path: Path, words: Sequence[str]) -> None:
    """Loads the model in a child process and scores `words`; raises `InvalidDataError` if that fails."""
    task = json.dumps([str(path.absolute()), list(words), LOWEST_LOG10P])
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _PROBE],  # -P: imports nothing from the working directory
            input=task.encode(),
            capture_output=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InvalidDataError(
            f"KenLM can't load {path}: no answer within {PROBE_TIMEOUT_S:g} s; the file is damaged, or the machine busy"
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


class KenlmSearch:
    """Searches lattices with a KenLM model whose words are decimal token ids; `eos_token_ids` are its `</s>`, and with
    `end_token` (a token id) a path ends where it takes that token, as in `NgramSearch`."""

    def __init__(self, model: KenlmModel, eos_token_ids: Sequence[int], *, end_token: int | None = None) -> None:
        self.model, self.end_token = model, end_token
        self._word = {token: SPECIAL_WORDS[SENTENCE_END] for token in eos_token_ids}

    def coverage(self, token_ids: np.ndarray) -> float:
        """Share of these tokens that the model knows."""
        tokens = np.unique(token_ids, return_counts=True)
        known = [count for token, count in zip(*tokens, strict=True) if not self.model.is_unknown(self._of(token))]
        return float(sum(known) / max(1, token_ids.size))

    def p_best_after(self, lattice: Lattice, lefts: Sequence[Sequence[int]], p: int, *, weight: float) -> PBest:
        """The p best drafts of every lattice `[n, h, k]` after its left context; see `NgramSearch.p_best`."""
        count, factor = draft_count(lattice, p), checked_weight(weight)
        if factor == 0:
            return p_best(lattice, p)
        n, h, _ = lattice.token_ids.shape
        drafts, scores = np.zeros((n, count, h), dtype=np.int32), np.zeros((n, count), dtype=np.int64)
        heads = np.rint(np.maximum(lattice.logps, LOWEST_HEAD).astype(np.float64) * ARC_SCALE).astype(np.int64)
        for i in range(n):
            state = self.model.empty_context()
            for token in lefts[i][max(0, len(lefts[i]) - self.model.order + 1) :]:
                state = self.model.score(state, self._of(token))[1]
            paths = self._search(lattice.token_ids[i].tolist(), heads[i].tolist(), state, factor, count)
            paths += [paths[0]] * (count - len(paths))  # end-of-text leaves fewer ways than places
            for place, (minus, tokens, _) in enumerate(paths):
                drafts[i, place], scores[i, place] = tokens, -minus
        return PBest(drafts, scores / ARC_SCALE)

    def _of(self, token: int) -> str:
        return self._word.get(token, str(token))

    def _search(self, ids: list[list[int]], heads: list[list[int]], state: Any, factor: int, p: int) -> list[_Prefix]:
        h, kept = len(ids), self.model.order - 1
        remaining = self._remaining(ids, heads)
        known: dict[tuple[int, tuple[int, ...]], list[tuple[int, Any]]] = {}

        def longer(prefix: _Prefix, j: int) -> list[_Prefix]:
            minus, tokens, before = prefix
            if before is None:  # after end-of-text: one way on, which costs nothing
                return [(minus, (*tokens, ids[j][0]), None)]
            key = (j, tokens[max(0, len(tokens) - kept) :])
            if key not in known:  # what KenLM says depends on these tokens only (and what stood before slot 1)
                scored = ((token, *self.model.score(before, self._of(token))) for token in ids[j])
                known[key] = [
                    (round(log10p * LN10 * SCORE_SCALE), None if token == self.end_token else after)
                    for token, log10p, after in scored
                ]
            return [
                (minus - heads[j][e] - factor * score, (*tokens, ids[j][e]), after)
                for e, (score, after) in enumerate(known[key])
            ]

        first = longer((0, (), state), 0)[0]
        beam = [first]
        for j in range(1, h):
            beam = sorted((new for prefix in beam for new in longer(prefix, j)), key=_order)[: max(BEAM, p)]
        floor = beam[p - 1][0] if len(beam) >= p else None  # minus scores: more than this is out

        groups = {(first[2] is None, first[1][-kept:] if kept else ()): [first]}
        for j in range(1, h):
            grown: dict[tuple[bool, tuple[int, ...]], list[_Prefix]] = {}
            for group in groups.values():
                for prefix in group:
                    for new in longer(prefix, j):
                        ended = new[2] is None
                        if floor is None or new[0] - (0 if ended else remaining[j]) <= floor:
                            grown.setdefault((ended, new[1][max(0, len(new[1]) - kept) :]), []).append(new)
            groups = {key: sorted(group, key=_order)[:p] for key, group in grown.items()}
        return sorted((prefix for group in groups.values() for prefix in group), key=_order)[:p]

    def _remaining(self, ids: list[list[int]], heads: list[list[int]]) -> list[int]:
        """The most that the heads give from the slots after each: all of them, or up to an end-of-text."""
        remaining = [0]
        for slot, scores in zip(ids[:0:-1], heads[:0:-1], strict=True):
            ends = [score for token, score in zip(slot, scores, strict=True) if token == self.end_token]
            remaining.insert(0, max([scores[0] + remaining[0], *ends]))
        return remaining
