"""Which examples of a task share text with training corpora: runs of n words (13, as Brown et al. 2020, appendix C).

Words are runs of letters, digits and underscores, case folded and in one Unicode form (NFKC); everything between them
counts for nothing. An example's runs are those of its prompt and of each reference; runs go on over line ends, not from
one text to the next. Runs are compared by 64-bit hashes, so a false match is possible, but not to be expected in less
than billions of corpora.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from lattices.errors import RescoreError
from lm.ngram.corpus import HUB_PREFIX, MEND_UTF8, CorpusSource, find_sources
from lm.text_files import blocks, identify, rows
from rescore.options import Limit
from rescore.runs.inputs import Progress
from rescore.studies.records import Record
from rescore.table import SHARE, TASK, Column, Table
from rescore.tasks import Example, load_task
from rescore.tasks.data import load_examples
from rescore.tasks.groups import digest
from rescore.tasks.leave_out import SCHEMA

WORDS_IN_A_ROW = 13
WORD = re.compile(r"\w+")
BATCH = 1 << 20  # words of a corpus that are compared at a time
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: no word of a run is lost


@dataclass(frozen=True)
class SharedText:
    """An example that shares text.

    prompt: its digest (`rescore.tasks.groups.digest`); share: of its runs, those that are in any of the corpora.
    corpora: by name, the share of each that has some.
    """

    id: str
    prompt: str
    share: float
    corpora: dict[str, float]


@dataclass(frozen=True)
class TaskOverlap:
    """One task: its number of `examples`, where they come from, and those that share text (`found`), in order.

    too_short: how many can't share a run, since neither the prompt nor a reference has n words.
    """

    task: str
    examples: int
    source: dict[str, Any]
    found: tuple[SharedText, ...]
    too_short: int


@dataclass(frozen=True)
class Overlap(Record):
    """What `find_overlap` found with runs of `n` words: examples of which more than the share `threshold` is in the
    `corpora`."""

    n: int
    threshold: float
    corpora: tuple[str, ...]
    tasks: tuple[TaskOverlap, ...]

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {"schema": SCHEMA, **super().as_dict()}


def find_overlap(
    tasks: Annotated[Sequence[str], "A task, by name or as a YAML file; several.", "--task"],
    corpora: Annotated[
        Sequence[Path], "Training text: .txt, .jsonl (also .gz, .zst) or a folder of these; several.", "--corpus"
    ],
    *,
    data: Annotated[
        Path | None, "JSON lines file with the task's examples, or a folder with TASK.jsonl for each."
    ] = None,
    n: Annotated[int, "Words in a row that count as shared text."] = WORDS_IN_A_ROW,
    threshold: Annotated[float, "Only examples of which more than this share of the runs is in the corpora."] = 0.0,
    limit: Limit = None,
    progress: Progress | None = None,
) -> Overlap:
    """The examples of tasks (names or YAML files) of which more than `threshold` of the runs of n words are in corpora.

    `corpora`: text files, JSON lines (every string in them) and folders, also of `generate-corpus`; `data`: the file of
    the examples, or a folder with TASK.jsonl for each task; `limit` as in an evaluation. Raises `RescoreError` for
    what can't be read and for values that make no sense.
    """
    if n < 1:
        raise RescoreError(f"--n {n}; a run has at least one word")
    if not 0 <= threshold < 1:
        raise RescoreError(f"--threshold {threshold:g}; a share is from 0 to below 1")
    if not tasks:
        raise RescoreError("no task is given; name one: --task squad")
    if hub := [str(corpus) for corpus in corpora if str(corpus).startswith(HUB_PREFIX)]:
        raise RescoreError(f"{hub[0]}: a corpus is a file or a folder here")
    sources = find_sources(corpora)
    loaded = [load_task(name) for name in tasks]
    of_tasks = [
        load_examples(task, data=data / f"{task.name}.jsonl" if data and data.is_dir() else data, limit=limit)
        for task in loaded
    ]
    runs = _Runs(n)
    of_examples = [[runs.of_example(example) for example in of_task.examples] for of_task in of_tasks]
    every = _joined(run for of_task in of_examples for run in of_task)
    in_corpus: dict[str, np.ndarray] = {}  # by name: the runs of examples that it has
    for done, (name, source) in enumerate(zip(_names(sources), sources, strict=True)):
        if progress:
            progress("read corpora", done, len(sources))
        in_corpus[name] = _joined(np.intersect1d(batch, every) for batch in runs.of_source(source))
        if runs.words == 0 and (len(sources) == 1 or source.name in map(str, corpora)):
            raise RescoreError(f"{source.name} holds no words, so nothing can be shared with it; give another --corpus")
    anywhere = _joined(in_corpus.values())
    overlaps = []
    for task, of_task, of_each in zip(loaded, of_tasks, of_examples, strict=True):
        shared = []
        for example, run in zip(of_task.examples, of_each, strict=True):
            if (share := _share(run, anywhere)) > threshold:
                by_name = {name: of_it for name, hashes in in_corpus.items() if (of_it := _share(run, hashes))}
                shared.append(SharedText(example.id, digest(example.prompt), share, by_name))
        too_short = sum(not len(run) for run in of_each)
        overlaps.append(TaskOverlap(task.name, len(of_task.examples), of_task.source, tuple(shared), too_short))
    return Overlap(n, threshold, tuple(in_corpus), tuple(overlaps))


def _joined(hashes: Iterable[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]))


def _share(hashes: np.ndarray, among: np.ndarray) -> float:
    return float(np.isin(hashes, among).mean()) if len(hashes) else 0.0


def overlap_table(overlap: Overlap) -> Table:
    """The examples that share text, with how much of each."""
    rows = [[of.task, s.id, ", ".join(s.corpora), s.share] for of in overlap.tasks for s in of.found]
    counts = ", ".join(f"{task.task} {len(task.found)} of {task.examples}" for task in overlap.tasks)
    note = f"examples that share {overlap.n} words in a row with the corpora: {counts}"
    if short := ", ".join(f"{task.task} {task.too_short}" for task in overlap.tasks if task.too_short):
        note += f"\nexamples of fewer than {overlap.n} words, which can't share so many (--n takes fewer): {short}"
    if not rows:
        return Table([], [], note=note)
    shares = f"shared: of the runs of {overlap.n} words in prompt and references, those that are in the corpora too"
    return Table([TASK, Column("example"), Column("corpora"), Column("shared", SHARE)], rows, note=f"{shares};\n{note}")


class _Runs:
    """Hashes of runs of n words. Words that no example has are all alike: a run with one of them is none."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.words = 0  # of the source that was read last
        self._keys: dict[str, int] = {}

    def of_example(self, example: Example) -> np.ndarray:
        """The different runs of an example, uint64."""
        texts = (example.prompt, *example.references)
        return _joined(self._hashes([self._key(word) for word in _words(text)]) for text in texts)

    def of_source(self, source: CorpusSource) -> Iterator[np.ndarray]:
        """The runs of a corpus that consist of words of examples, in batches of uint64."""
        keys: list[int] = []
        self.words = 0
        get = self._keys.get
        for text, goes_on in _texts(source):
            if not goes_on:
                keys.append(0)
            words = _words(text)
            self.words += len(words)
            keys += [get(word, 0) for word in words]
            if len(keys) >= BATCH:
                yield self._hashes(keys)
                keys = keys[max(0, len(keys) - self.n + 1) :]
        yield self._hashes(keys)

    def _key(self, word: str) -> int:
        if word not in self._keys:
            self._keys[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big") | 1
        return self._keys[word]

    def _hashes(self, words: Sequence[int]) -> np.ndarray:
        """The hashes of the runs of keys of words, uint64; a key of 0, of a word that is in no run, ends them."""
        keys = np.array(words, dtype=np.uint64)
        count = max(0, len(keys) - self.n + 1)
        hashes = np.zeros(count, np.uint64)
        for place in range(self.n if count else 0):
            hashes = hashes * FACTOR + keys[place : place + count]
        gaps = np.concatenate([[0], np.cumsum(keys == 0)])
        whole: np.ndarray = hashes[gaps[len(keys) - count + 1 :] == gaps[:count]]
        return whole


def _words(text: str) -> list[str]:
    # Folding leaves some letters in parts again: once more after it.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return WORD.findall(folded)


def _names(sources: Sequence[CorpusSource]) -> list[str]:
    short = [Path(source.name).name for source in sources]
    return [name if short.count(name) == 1 else source.name for name, source in zip(short, sources, strict=True)]


def _texts(source: CorpusSource) -> Iterator[tuple[str, bool]]:
    """All text of a source (not of the hub), in pieces, and whether a piece goes on where the one before it stopped: a
    text file in blocks of whole lines, of records every string apart. Raises as `encode_corpora` does for bad files."""
    file = identify(source.path)
    if source.kind == "text":
        yield from ((block.decode("utf-8"), True) for _, block in blocks(file, advice=MEND_UTF8))
        return
    for _, record in rows(file, advice=MEND_UTF8):
        yield from ((text, False) for text in _strings(record))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
