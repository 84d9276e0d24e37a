"""What heads and rescorers learn from: final hidden states of the base LM beside the tokens they must predict.

Row i of a segment is the state that chose (or, on given text, should have chosen) the segment's token i; so head j at
row i must predict token i + j - 1. States are float16 on disk and memory-mapped. Sources: a corpus of the base's own
output (`lm.base.corpus`, states included), chat pairs (JSON lines or other rows with `prompt` and `response`) and plain
text. Over the last two the base LM runs once; their states are kept in the training folder, in shards: what an
interrupted run has finished is not done again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar
from zipfile import BadZipFile

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lm.base.corpus import CORPUS_FILE, HIDDEN_FILE, STATE_BYTES, corpus_lines, read_settings, tokens_of
from lm.base.model import BaseLM
from lm.files import atomic_file, is_text, sha256_of_file
from lm.keys import key_of
from lm.locks import warn, writing_to
from lm.text_files import TextFile, identify, rows, text_lines
from lm.training.losses import choose_precision

CHUNK = 256  # tokens of plain text that see each other; short chunks keep attention cheap on a CPU
BATCH_TOKENS = 2048
STATES = 3  # changes with how a corpus is cut and what is kept of it
SEGMENTS_FILE = "segments.npz"
SHARD_TARGETS = 1 << 16  # of a text's cached states; what a kill can lose
CACHE_GB = 20.0

Tokens = tuple[list[int], list[int]]  # of a segment: what is before it, and its targets
T = TypeVar("T")


class Rows:
    """Arrays of rows `[n_i, d]`, one after the other, as one; what is taken of it is an array in memory."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.at(np.arange(*rows.indices(len(self))))

    def at(self, places: np.ndarray) -> np.ndarray:
        """The rows at these places, int64 `[n]`."""
        taken = np.empty((len(places), *self.parts[0].shape[1:]), self.parts[0].dtype)
        part = np.searchsorted(self.starts, places, side="right") - 1
        for i in np.unique(part):
            taken[part == i] = self.parts[i][places[part == i] - self.starts[i]]
        return taken


@dataclass(frozen=True)
class HeadData:
    """The segments of one corpus, one after the other."""

    states: Rows  # float16 [n, d], memory-mapped
    targets: np.ndarray  # int32 [n]
    ends: np.ndarray  # int64 [s], rows where segments end, rising
    contexts: np.ndarray  # int32, the tokens before each segment, one after the other
    context_ends: np.ndarray  # int64 [s]
    source: str  # name of the corpus
    sha256: str  # of the corpus

    def __len__(self) -> int:
        return len(self.targets)

    def segments(self) -> np.ndarray:
        """First and last-plus-one row of every segment, int64 `[s, 2]`."""
        return np.stack([np.concatenate([[0], self.ends[:-1]]), self.ends], axis=1)

    def context(self, segment: int) -> np.ndarray:
        """The tokens before a segment, int32: the prompt, whose last token's state is the segment's first."""
        start = self.context_ends[segment - 1] if segment else 0
        return self.contexts[start : self.context_ends[segment]]


class Segment(NamedTuple):
    """A segment or its beginning."""

    place: int  # of its data among several
    number: int  # of the segment in it
    start: int  # its first row
    end: int  # its last row plus one

    @property
    def targets(self) -> int:
        """How many tokens are to be predicted."""
        return self.end - self.start


def segments_of(data: Sequence[HeadData], *, least: int = 1) -> list[Segment]:
    """Every segment with at least so many targets, in order."""
    return [
        Segment(place, number, start, end)
        for place, source in enumerate(data)
        for number, (start, end) in enumerate(source.segments().tolist())
        if end - start >= least
    ]


def until(targets: int, segments: Sequence[Segment]) -> list[Segment]:
    """The first segments that hold so many targets, the last one cut."""
    taken: list[Segment] = []
    for segment in segments:
        if targets <= 0:
            break
        taken.append(segment._replace(end=min(segment.end, segment.start + targets)))
        targets -= segment.targets
    return taken


def chosen_share(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers below `count` at random: this share to measure on (at least one, never all), and the rest."""
    order = np.random.default_rng([seed, 0xDA7A]).permutation(count)
    taken = max(1, min(int(count * share), count - 1))
    return order[:taken], order[taken:]


def check_there(corpora: Sequence[Path]) -> None:
    """Raises `RescoreError` for a corpus that is not there."""
    if missing := [path for path in corpora if not path.exists()]:
        advice = "give a text file, a .jsonl of pairs or a folder of generate-corpus"
        raise RescoreError(f"no corpus at {missing[0]}; {advice}")


def check_apart(data: Sequence[Any]) -> None:
    """Raises `RescoreError` if a corpus is there twice: what one copy holds out would be learned from the other."""
    seen: set[str] = set()
    for source in data:
        if source.sha256 in seen:
            raise RescoreError(f"{source.source} is there twice among the corpora; give each of them once")
        seen.add(source.sha256)


def tokens_read(data: Sequence[HeadData], segment: Segment) -> int:
    """Tokens that an LM reads to predict a segment's: the context, and all targets but the last."""
    return len(data[segment.place].context(segment.number)) + segment.targets - 1


def body_states(
    model: Any,
    data: Sequence[HeadData],
    segments: Sequence[Segment],
    *,
    device: torch.device,
    dtype: torch.dtype,
    arguments: Callable[[list[list[int]], torch.Tensor], dict[str, Any]],
    prefix: Callable[[list[int]], list[int]] = list,
) -> torch.Tensor:
    """What the body of a transformers LM makes of whole segments: float32 `[n, d]`, a state per target.

    arguments: what it is given to read texts `[b, n]` after prompts, and prefix: what of a prompt they begin with
    (`BaseLM.body_arguments`, `BaseLM.prefix`).
    """
    prompts = [data[place].context(number).tolist() for place, number, _, _ in segments]
    before = [prefix(prompt) for prompt in prompts]
    texts = [
        np.concatenate([np.array(first, dtype=np.int64), data[place].targets[start : end - 1]])
        for first, (place, _, start, end) in zip(before, segments, strict=True)
    ]
    ids = pad_sequence([torch.from_numpy(text) for text in texts], batch_first=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = model.base_model(**arguments(prompts, ids.to(device)))
    starts, ends = (torch.tensor([len(part) for part in parts])[:, None] for parts in (before, texts))
    columns = torch.arange(ids.shape[1])
    at = (columns >= starts - 1) & (columns < ends)  # [b, n], the token before each target
    states: torch.Tensor = output.last_hidden_state[at.to(device)].float()
    return states


def cached(data: Sequence[HeadData], segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """The base's own states before the segments' targets, float16 `[n, d]`, and the targets, int32 `[n]`."""
    states = np.concatenate([data[s.place].states[s.start : s.end] for s in segments])
    return states, np.concatenate([data[s.place].targets[s.start : s.end] for s in segments])


def read_head_data(
    base: BaseLM,
    path: Path,
    cache: Path,
    *,
    max_tokens: int | None = None,
    cache_gb: float = CACHE_GB,
    precision: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> HeadData:
    """States and targets of one corpus: a folder made by `generate_corpus`, rows of chat pairs, or text
    (`lm.text_files`).

    cache: folder for states that must be computed (broken ones are computed again).
    max_tokens: targets that a text gives at most.
    cache_gb: what a text's states may take, 10^9 bytes.
    precision: in which the base computes them, as `lm.training.losses.choose_precision`; they are stored in 16 bits.

    Raises `RescoreError` for a corpus that is missing, empty, too short or too large, `InvalidDataError` (with the line
    number) for a broken one, `IncompatibleError` for the output of another base LM, `OutputError` if another process
    writes to `cache`.
    """
    if path.is_dir():
        return _own_output(base, path)
    check_there([path])
    file = identify(path)
    digest = sha256_of_file(path)
    dtype = choose_precision(precision, base.device)
    key = key_of({
        "format": STATES, "base": {**dataclasses.asdict(base.identity), "name": None}, "precision": str(dtype),
        "corpus": digest, "kind": file.layout, "max_tokens": max_tokens,
    }, 16)  # fmt: skip
    folder = cache / f"states-{key}"

    def write_segments(stream: IO[bytes]) -> None:
        arrays: dict[str, Any] = _segments_of_text(base, file, max_tokens, cache_gb)
        np.savez(stream, **arrays)

    arrays = kept_file(folder / SEGMENTS_FILE, "the segments", read_arrays, write_segments)
    bounds = arrays.pop("shards").tolist()
    data = HeadData(Rows([]), **arrays, source=path.name, sha256=digest)

    def shard(number: int, first: int, last: int) -> np.ndarray:
        def read(path: Path) -> np.ndarray:
            return _mapped_states(path, data.ends[last - 1] - (data.ends[first - 1] if first else 0), base.hidden_size)

        def write(stream: IO[bytes]) -> None:
            with torch.autocast(base.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                _write_states(base, data, range(first, last), stream, progress)

        return kept_file(folder / f"shard-{number:05d}.f16", "the states", read, write)

    shards = [shard(number, *ends) for number, ends in enumerate(itertools.pairwise(bounds))]
    return dataclasses.replace(data, states=Rows(shards))


def kept_file(path: Path, what: str, read: Callable[[Path], T], write: Callable[[IO[bytes]], None]) -> T:
    """What is in a file that a training keeps below its folder; it is written first if need be.

    `read` raises `ValueError` or what numpy and the system raise for a broken file (`what` it holds is made again).
    Raises `OutputError` if the file can't be written, or another process writes to the training's folder.
    """
    if path.is_file():
        try:
            return read(path)
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            warn(f"{what} in {path} are broken ({error}); they are made again")
    with writing_to(path.parents[1]):
        try:
            with atomic_file(path) as temporary, temporary.open("wb") as stream:
                write(stream)
        finally:
            with suppress(OSError):  # files are in it, unless the first one failed
                path.parent.rmdir()
    return read(path)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays in an `.npz` file, by name, as `kept_file` reads it."""
    with np.load(path) as arrays:
        return {**arrays}


def _own_output(base: BaseLM, folder: Path) -> HeadData:
    settings = read_settings(folder)
    made_by = settings["base"]
    for field in ("weights_sha256", "tokenizer_sha256"):  # the name and dtype may differ
        if made_by[field] != getattr(base.identity, field):
            raise IncompatibleError(
                f"the corpus in {folder} is the output of another base LM ({made_by['name']}: {field} differs); make "
                f"one: rescore generate-corpus --base {base.identity.name} --prompts ... --out DIR"
            )
    path = folder / CORPUS_FILE
    sequences: list[Tokens] = []
    for number, record in corpus_lines(folder):
        for field in ("prompt_ids", "output_ids"):
            if field not in record:
                raise InvalidDataError(f"{path} line {number} has no field {field!r}")
            ids = record[field]
            if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < base.vocab_size for i in ids):
                raise InvalidDataError(
                    f"{path} line {number} has other things than token ids below {base.vocab_size} in the field "
                    f"{field!r}; make the corpus again"
                )
        sequences.append(tokens_of(record, with_prompts=settings["with_prompts"]))
    arrays = _arrays(sequences)
    if not len(arrays["targets"]):
        raise InvalidDataError(f"the corpus in {folder} is empty")
    try:
        states = _mapped_states(folder / HIDDEN_FILE, len(arrays["targets"]), base.hidden_size)
    except ValueError as error:
        raise InvalidDataError(f"{folder / HIDDEN_FILE} {error}; remove {folder} and make it again") from error
    return HeadData(Rows([states]), **arrays, source=folder.name, sha256=sha256_of_file(path))


def _arrays(sequences: Sequence[Tokens]) -> dict[str, np.ndarray]:
    """The fields of `HeadData` but for the states: tokens int32, ends int64."""
    contexts, targets = ([sequence[i] for sequence in sequences] for i in (0, 1))
    arrays = {}
    for name, ends, parts in (("contexts", "context_ends", contexts), ("targets", "ends", targets)):
        arrays[name] = np.fromiter(itertools.chain.from_iterable(parts), np.int32)
        arrays[ends] = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return arrays


def _mapped_states(path: Path, rows: int, hidden_size: int) -> np.ndarray:
    """The first rows of a file of states; a generation that still goes on may have written more."""
    there = path.stat().st_size // (hidden_size * STATE_BYTES) if path.is_file() else 0
    if there < rows:
        raise ValueError(f"has the states of {there} of {rows} tokens")
    return np.memmap(path, dtype=np.float16, mode="r", shape=(rows, hidden_size))


def _segments_of_text(base: BaseLM, file: TextFile, max_tokens: int | None, cache_gb: float) -> dict[str, np.ndarray]:
    """What is to be read of a text, in the order in which its states are kept; `shards` has the first segment of each
    shard, and the number of segments."""
    if base.has_encoder and not file.has_rows:
        raise IncompatibleError(
            f"{base.identity.name} has an encoder, and {file.path} is text without prompts; give pairs of prompt and "
            "response (.jsonl), or a folder of generate-corpus"
        )
    sequences = _bounded(list(_pairs(base, file) if file.has_rows else _chunks(base, file)), max_tokens)
    if not sequences:
        what = "empty" if file.path.stat().st_size == 0 else "too short to train on"
        raise InvalidDataError(f"the corpus {file.path} is {what}")
    ends = np.cumsum([len(targets) for _, targets in sequences])
    needed = ends[-1] * base.hidden_size * STATE_BYTES / 1e9
    if needed > cache_gb:
        raise RescoreError(
            f"the states of {file.path} ({ends[-1]} tokens) take {needed:.3g} GB, more than the limit of {cache_gb:g}; "
            "raise --cache-gb or lower --max-tokens"
        )
    cuts = np.searchsorted(ends, np.arange(SHARD_TARGETS, ends[-1] + SHARD_TARGETS, SHARD_TARGETS)) + 1
    shards = np.unique([0, *np.minimum(cuts, len(sequences))])
    ordered: list[Tokens] = []
    for first, last in itertools.pairwise(shards.tolist()):  # by falling length, for batches with little padding
        ordered += sorted(sequences[first:last], key=lambda s: len(s[0]) + len(s[1]))[::-1]
    return {**_arrays(ordered), "shards": shards}


def _pairs(base: BaseLM, file: TextFile) -> Iterator[Tokens]:
    for number, record in rows(file):
        for field in ("prompt", "response"):
            if not is_text(record.get(field)):
                raise InvalidDataError(f"{file.path} {file.unit} {number} has no text in the field {field!r}")
        end = [base.tokenizer.eos_token_id] if base.tokenizer.eos_token_id is not None else []
        # As what is written, which some tokenizers (Marian's) cut otherwise than what is read.
        response_ids = base.tokenizer(text_target=record["response"], add_special_tokens=False)["input_ids"]
        # An encoder leaves the context to the answer.
        most = base.context_length - len(base.prefix([])) if base.has_encoder else base.context_length // 2
        longest = min(CHUNK, most)
        answer = response_ids[:longest] if len(response_ids) > longest else response_ids + end
        room = min(2 * CHUNK, base.prompt_room(len(answer)))
        yield base.encode_prompt(record["prompt"], chat=base.is_chat, max_tokens=room), answer


def _chunks(base: BaseLM, file: TextFile) -> Iterator[Tokens]:
    text = "\n".join(line for line in text_lines(file) if line.strip())
    if not text:
        raise InvalidDataError(f"the corpus {file.path} is empty")
    ids = base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    size = min(CHUNK, base.context_length)
    for start in range(0, len(ids) - 1, size):
        chunk = ids[start : start + size]
        if len(chunk) > 1:
            yield chunk[:1], chunk[1:]


def _bounded(sequences: list[Tokens], max_tokens: int | None) -> list[Tokens]:
    """Sequences spread evenly over the corpus, of at most `max_tokens` targets in all."""
    total = sum(len(targets) for _, targets in sequences)
    if max_tokens is None or total <= max_tokens:
        return sequences
    chosen, passed, taken = [], 0, 0
    for sequence in sequences:
        passed += len(sequence[1])
        if taken + len(sequence[1]) <= max_tokens * passed // total:
            chosen.append(sequence)
            taken += len(sequence[1])
    if not chosen:
        raise RescoreError(f"max_tokens = {max_tokens} leaves nothing of a corpus of {total} tokens; raise it")
    return chosen


def _write_states(
    base: BaseLM, data: HeadData, numbers: range, stream: IO[bytes], progress: Callable[[int, int], None] | None
) -> None:
    """Writes the states of some segments, which come by falling length."""
    bounds = data.segments()
    while numbers:
        longest = len(data.context(numbers[0])) + int(np.diff(bounds[numbers[0]])[0])
        batch = numbers[: max(1, BATCH_TOKENS // longest)]
        contexts = [data.context(number).tolist() for number in batch]
        for states in base.states_before(contexts, [data.targets[slice(*bounds[n])].tolist() for n in batch]):
            stream.write(states.to(torch.float16).cpu().numpy().tobytes())
        numbers = numbers[len(batch) :]
        if progress:
            progress(numbers.start, len(bounds))
