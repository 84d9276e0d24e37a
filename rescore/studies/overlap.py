"""Which examples of a task share text with training corpora: runs of n words (13, as Brown et al. 2020, appendix C).

Words are runs of letters, digits and underscores, case folded and in one Unicode form (NFKC); everything between them
counts for nothing. An example's runs are those of its prompt and of each reference; runs go on over line ends, not from
one text to the next. Runs are compared by 64-bit hashes, so a wrong find is possible, but not to be expected in less
than billions of corpora.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from lattices.errors import RescoreError
from lm.ngram.corpus import HUB_PREFIX, CorpusSource, find_sources, source_texts
from rescore.groups import digest
from rescore.options import Limit
from rescore.runs.leave_out import SCHEMA
from rescore.table import SHARE, Column, Table
from rescore.tasks import Example, load_task
from rescore.tasks.data import load_examples

WORDS_IN_A_ROW = 13
WORD = re.compile(r"\w+")
BATCH = 1 << 20  # words of a corpus that are compared at a time
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: no word of a run is lost
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SharedText:
    """An example that shares text: its `id`, the digest of its `prompt` (`rescore.groups.digest`), the `share` of its
    runs that are in any of the corpora, and by name of corpus (`corpora`) that in each that has some."""

    id: str
    prompt: str
    share: float
    corpora: dict[str, float]


@dataclass(frozen=True)
class TaskOverlap:
    """One task: its number of `examples`, where they come from (`source`), those that share text (`found`), in their
    order, and how many are `too_short` to share a run: neither the prompt nor a reference has n words."""

    task: str
    examples: int
    source: dict[str, Any]
    found: tuple[SharedText, ...]
    too_short: int


@dataclass(frozen=True)
class Overlap:
    """What `find_overlap` found with runs of `n` words: examples of which more than the share `threshold` is in the
    `corpora`."""

    n: int
    threshold: float
    corpora: tuple[str, ...]
    tasks: tuple[TaskOverlap, ...]

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}


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
    held = [
        load_examples(task, data=data / f"{task.name}.jsonl" if data and data.is_dir() else data, limit=limit)
        for task in loaded
    ]
    runs = _Runs(n)
    of_examples = [[runs.of_example(example) for example in found.examples] for found in held]
    every = np.unique(np.concatenate([np.zeros(0, np.uint64), *(run for of in of_examples for run in of)]))
    places = [[np.searchsorted(every, run) for run in of] for of in of_examples]
    names = _names(sources)
    there = {name: np.zeros(len(every), dtype=np.bool_) for name in names}
    for done, (name, source) in enumerate(zip(names, sources, strict=True)):
        if progress:
            progress("read corpora", done, len(sources))
        for found in runs.of_source(source):
            at = np.searchsorted(every, found)
            at[at == len(every)] = 0
            there[name][at[every[at] == found] if len(every) else []] = True
        if runs.words == 0 and (len(sources) == 1 or source.name in map(str, corpora)):
            raise RescoreError(f"{source.name} holds no words, so nothing can be shared with it; give another --corpus")
    anywhere = np.logical_or.reduce([np.zeros(len(every), np.bool_), *there.values()])
    made = []
    for task, of, at_task in zip(loaded, held, places, strict=True):
        shared = []
        for example, at in zip(of.examples, at_task, strict=True):
            share = float(anywhere[at].mean()) if len(at) else 0.0
            if share > threshold:
                by_name = {name: float(found[at].mean()) for name, found in there.items() if found[at].any()}
                shared.append(SharedText(example.id, digest(example.prompt), share, by_name))
        made.append(
            TaskOverlap(task.name, len(of.examples), of.source, tuple(shared), sum(not len(at) for at in at_task))
        )
    return Overlap(n, threshold, tuple(names), tuple(made))


def overlap_table(overlap: Overlap) -> Table:
    """The examples that share text, with how much of each."""
    rows = [
        [task.task, shared.id, ", ".join(shared.corpora), shared.share]
        for task in overlap.tasks
        for shared in task.found
    ]
    counts = ", ".join(f"{task.task} {len(task.found)} of {task.examples}" for task in overlap.tasks)
    note = f"examples that share {overlap.n} words in a row with the corpora: {counts}"
    if short := ", ".join(f"{task.task} {task.too_short}" for task in overlap.tasks if task.too_short):
        note += f"\nexamples of fewer than {overlap.n} words, which can't share so many (--n takes fewer): {short}"
    if not rows:
        return Table([], [], note=note)
    shares = f"shared: of the runs of {overlap.n} words in prompt and references, those that are in the corpora too"
    columns = [Column("task"), Column("example"), Column("corpora"), Column("shared", SHARE)]
    return Table(columns, rows, note=f"{shares};\n{note}")


class _Runs:
    """Hashes of runs of n words. Words that no example has are all alike: a run with one of them is none."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.words = 0  # of the source that was read last
        self._keys: dict[str, int] = {}

    def of_example(self, example: Example) -> np.ndarray:
        """The different runs of an example, uint64."""
        found = []
        for text in (example.prompt, *example.references):
            keys = [self._key(word) for word in _words(text)]
            found.append(self._hashes(np.array(keys, dtype=np.uint64)))
        return np.unique(np.concatenate(found))

    def of_source(self, source: CorpusSource) -> Iterator[np.ndarray]:
        """The runs of a corpus that consist of words of examples, in batches of uint64."""
        held: list[int] = []
        self.words = 0
        get = self._keys.get
        for text, goes_on in source_texts(source):
            if not goes_on:
                held.append(0)
            words = _words(text)
            self.words += len(words)
            held += [get(word, 0) for word in words]
            if len(held) >= BATCH:
                yield self._hashes(np.array(held, dtype=np.uint64))
                held = held[max(0, len(held) - self.n + 1) :]
        yield self._hashes(np.array(held, dtype=np.uint64))

    def _key(self, word: str) -> int:
        if word not in self._keys:
            self._keys[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big") | 1
        return self._keys[word]

    def _hashes(self, keys: np.ndarray) -> np.ndarray:
        """uint64 `[words]`, 0 for words that are in no run -> uint64 `[runs]`."""
        count = len(keys) - self.n + 1
        if count < 1:
            return np.zeros(0, np.uint64)
        hashes = np.zeros(count, np.uint64)
        for place in range(self.n):
            hashes = hashes * FACTOR + keys[place : place + count]
        gaps = np.concatenate([[0], np.cumsum(keys == 0)])
        whole: np.ndarray = hashes[gaps[self.n :] == gaps[:count]]
        return whole


def _words(text: str) -> list[str]:
    # Folding leaves some letters in parts again: once more after it.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return WORD.findall(folded)


def _names(sources: Sequence[CorpusSource]) -> list[str]:
    """The names of files; their paths where two have one name."""
    short = [Path(source.name).name for source in sources]
    return [name if short.count(name) == 1 else source.name for name, source in zip(short, sources, strict=True)]
