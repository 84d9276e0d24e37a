"""What heads and rescorers learn from: final hidden states of the base LM beside the tokens they must predict.

Row i of a segment is the state that chose (or, on given text, should have chosen) the segment's token i; so head j at
row i must predict token i + j - 1. States are kept as float16 on disk and memory-mapped. Sources: a corpus of the
base's own output (`lm.base.corpus`, states included), chat pairs (JSON lines or other rows with `prompt` and
`response`) and
plain text; for the last two the base LM runs once over the text and the states are kept in the training folder, in
shards: what an interrupted run has finished is not done again.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lm.base.corpus import CORPUS_FILE, HIDDEN_FILE, STATE_BYTES, corpus_lines, read_settings
from lm.base.model import BaseLM
from lm.files import atomic_folder, is_text, sha256_of_file, write_json
from lm.keys import key_of
from lm.locks import writing_to
from lm.text_files import TextFile, identify, rows, text_lines
from lm.training.losses import choose_precision
from lm.training.shards import DONE_FILE, Shard, read_shard, remove_broken, states_of, whole_shards

CHUNK = 256  # tokens of plain text that see each other; short chunks keep attention cheap on a CPU
BATCH_TOKENS = 2048
STATES = 2  # changes with how a corpus is cut and what is kept of it
SHARD_TARGETS = 1 << 16  # of a text's cached states; what a kill can lose
CACHE_GB = 20.0


class Rows:
    """Arrays of rows `[n_i, d]`, one after the other, as one; a slice of it is an array in memory."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, end, step = rows.indices(len(self))
        assert step == 1, "rows that follow each other"
        first, last = np.searchsorted(self.starts, (start, max(start, end - 1)), side="right") - 1
        cut = [
            self.parts[i][max(0, start - self.starts[i]) : max(0, end - self.starts[i])]
            for i in range(first, min(last + 1, len(self.parts)))
        ]
        return np.concatenate(cut) if cut else np.array(self.parts[0][:0])

    def at(self, places: np.ndarray) -> np.ndarray:
        """The rows at these places, int64 `[n]`."""
        part = np.searchsorted(self.starts, places, side="right") - 1
        return np.stack([self.parts[i][place - self.starts[i]] for i, place in zip(part, places, strict=True)])


@dataclass(frozen=True)
class HeadData:
    """States float16 `[n, d]` (memory-mapped), targets int32 `[n]`, segment ends int64 `[s]` (rows, rising).

    `contexts` int32: the tokens before each segment, one after the other, `context_ends` int64 `[s]` their ends.
    """

    states: Rows
    targets: np.ndarray
    ends: np.ndarray
    contexts: np.ndarray
    context_ends: np.ndarray
    source: str
    sha256: str

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
    """Some rows of a segment: `place` of its data among several, `number` of the segment in it, first and last-plus-one
    row; `start` is the segment's own first row."""

    place: int
    number: int
    start: int
    end: int

    @property
    def targets(self) -> int:
        """How many tokens are to be predicted."""
        return self.end - self.start


def segments_of(data: Sequence[HeadData], *, least: int = 1) -> list[Segment]:
    """Every segment with at least so many targets, in order."""
    found = []
    for place, source in enumerate(data):
        for number, (start, end) in enumerate(source.segments().tolist()):
            if end - start >= least:
                found.append(Segment(place, number, start, end))
    return found


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
    for path in corpora:
        if not path.exists():
            raise RescoreError(
                f"no corpus at {path}; give a text file, a .jsonl of pairs or a folder of generate-corpus"
            )


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


def padded_batch(
    data: Sequence[HeadData], segments: Sequence[Segment]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What an LM reads to predict the segments' targets: ids int64 `[b, longest]`, padded on the right, and the row and
    column of the token before each of the n targets, int64 `[n]` each."""
    longest = max(tokens_read(data, segment) for segment in segments)
    ids = torch.zeros(len(segments), longest, dtype=torch.long)
    rows, columns = [], []
    for row, (place, number, start, end) in enumerate(segments):
        context = data[place].context(number)
        sequence = np.concatenate([context, data[place].targets[start : end - 1]])
        ids[row, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
        columns.append(np.arange(len(context) - 1, len(sequence)))
        rows.append(np.full(len(columns[-1]), row))
    return ids, torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(columns))


def body_states(
    model: Any,
    data: Sequence[HeadData],
    segments: Sequence[Segment],
    *,
    device: torch.device,
    dtype: torch.dtype,
    takes_masks: bool,
) -> torch.Tensor:
    """What the body of a transformers causal LM makes of whole segments: float32 `[n, d]`, a state per target.

    `takes_masks`: whether all that the model lets tokens see is in a mask it is given (`BaseLM.supports_tree`).
    """
    ids, rows, columns = padded_batch(data, segments)
    longest = ids.shape[1]
    # Right padding: no token sees what stands behind it. A mask, where the model takes one, makes attention faster.
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril().expand(len(ids), 1, -1, -1)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        body = model.base_model
        positions = {}  # as `BaseLM.forward` gives them
        if "position_ids" in inspect.signature(body.forward).parameters:
            positions["position_ids"] = torch.arange(longest, device=device).expand(len(ids), -1)
        output = body(
            input_ids=ids.to(device), attention_mask=causal if takes_masks else None, use_cache=False, **positions
        )
    states: torch.Tensor = output.last_hidden_state[rows.to(device), columns.to(device)].float()
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

    States that must be computed are kept under `cache` (broken ones are made again), in at most `cache_gb` (10^9
    bytes); the base computes them in `precision` (as `lm.training.losses.choose_precision`: they are stored in 16
    bits anyway).
    `max_tokens` bounds how many targets a text gives. Raises `RescoreError` for a corpus that is missing, empty, too
    short or too large, `InvalidDataError` (with the line number) for a broken one, `IncompatibleError` for the output
    of another base LM, `OutputError` if another process writes to `cache`.
    """
    if path.is_dir():
        return _own_output(base, path)
    check_there([path])
    file = identify(path)
    digest = sha256_of_file(path)
    dtype = choose_precision(precision, base.device)
    made_of = {
        "format": STATES, "base": {**dataclasses.asdict(base.identity), "name": None}, "precision": str(dtype),
        "corpus": digest, "kind": file.layout, "max_tokens": max_tokens,
    }  # fmt: skip
    folder = cache / f"states-{key_of(made_of, 16)}"
    shards = whole_shards(folder, base.hidden_size)
    if shards is None:
        sequences = _bounded(list(_pairs(base, file) if file.has_rows else _chunks(base, file)), max_tokens)
        if not sequences:
            what = "empty" if path.stat().st_size == 0 else "too short to train on"
            raise InvalidDataError(f"the corpus {path} is {what}")
        targets = sum(len(answer) for _, answer in sequences)
        needed = targets * base.hidden_size * STATE_BYTES / 1e9
        if needed > cache_gb:
            raise RescoreError(
                f"the states of {path} ({targets} tokens) take {needed:.3g} GB, more than the limit of {cache_gb:g}; "
                "raise --cache-gb or lower --max-tokens"
            )
        with writing_to(cache):
            remove_broken(folder, base.hidden_size)
            _run_base(base, sequences, folder, dtype, progress)
        shards = [read_shard(shard, base.hidden_size) for shard in sorted(folder.glob("shard-*"))]
    return _joined(shards, path.name, digest)


def _joined(shards: list[Shard], source: str, digest: str) -> HeadData:
    every = {name: [getattr(shard, name) for shard in shards] for name in Shard._fields}
    for of, what in (("targets", "ends"), ("contexts", "context_ends")):
        before = np.cumsum([0, *map(len, every[of])])
        every[what] = [ends + start for ends, start in zip(every[what], before[:-1], strict=True)]
    return HeadData(
        Rows(every.pop("states")), **{n: np.concatenate(p) for n, p in every.items()}, source=source, sha256=digest
    )


def _own_output(base: BaseLM, folder: Path) -> HeadData:
    made_by = read_settings(folder)["base"]
    for field in ("weights_sha256", "tokenizer_sha256"):  # the name and dtype may differ
        if made_by[field] != getattr(base.identity, field):
            raise IncompatibleError(
                f"the corpus in {folder} is the output of another base LM ({made_by['name']}: {field} differs); make "
                f"one: rescore generate-corpus --base {base.identity.name} --prompts ... --out DIR"
            )
    gathered = _Gathered()
    for number, record in corpus_lines(folder):
        for field in ("prompt_ids", "output_ids"):
            if field not in record:
                raise InvalidDataError(f"{folder / CORPUS_FILE} line {number} has no field {field!r}")
            ids = record[field]
            if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < base.vocab_size for i in ids):
                raise InvalidDataError(
                    f"{folder / CORPUS_FILE} line {number} has other things than token ids below "
                    f"{base.vocab_size} in the field {field!r}; make the corpus again"
                )
        gathered.add(record["prompt_ids"], record["output_ids"])
    if not gathered.targets:
        raise InvalidDataError(f"the corpus in {folder} is empty")
    states = Rows([states_of(folder, len(gathered.targets), base.hidden_size)])
    digest = sha256_of_file(folder / CORPUS_FILE)
    return HeadData(states, **gathered.arrays(), source=folder.name, sha256=digest)


class _Gathered:
    """Segments one after the other: the fields of `HeadData`, states apart."""

    def __init__(self) -> None:
        self.targets: list[int] = []
        self.ends: list[int] = []
        self.contexts: list[int] = []
        self.context_ends: list[int] = []

    def add(self, context: list[int], targets: list[int]) -> None:
        self.targets += targets
        self.ends.append(len(self.targets))
        self.contexts += context
        self.context_ends.append(len(self.contexts))

    def arrays(self) -> dict[str, np.ndarray]:
        """Tokens int32, ends int64."""
        return {name: np.asarray(v, np.int64 if name.endswith("ends") else np.int32) for name, v in vars(self).items()}


def _pairs(base: BaseLM, file: TextFile) -> Iterator[tuple[list[int], list[int]]]:
    for number, record in rows(file):
        for field in ("prompt", "response"):
            if not is_text(record.get(field)):
                raise InvalidDataError(f"{file.path} {file.unit} {number} has no text in the field {field!r}")
        end = [base.tokenizer.eos_token_id] if base.tokenizer.eos_token_id is not None else []
        response_ids = base.tokenizer(record["response"], add_special_tokens=False)["input_ids"]
        longest = min(CHUNK, base.context_length // 2)
        answer = response_ids[:longest] if len(response_ids) > longest else response_ids + end
        room = min(2 * CHUNK, base.context_length - len(answer))
        yield base.encode_prompt(record["prompt"], chat=base.is_chat, max_tokens=room), answer


def _chunks(base: BaseLM, file: TextFile) -> Iterator[tuple[list[int], list[int]]]:
    text = "\n".join(line for line in text_lines(file) if line.strip())
    if not text:
        raise InvalidDataError(f"the corpus {file.path} is empty")
    ids = base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    size = min(CHUNK, base.context_length)
    for start in range(0, len(ids) - 1, size):
        chunk = ids[start : start + size]
        if len(chunk) > 1:
            yield chunk[:1], chunk[1:]


def _bounded(sequences: list[tuple[list[int], list[int]]], max_tokens: int | None) -> list[tuple[list[int], list[int]]]:
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


def _run_base(
    base: BaseLM,
    sequences: list[tuple[list[int], list[int]]],
    folder: Path,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Writes the states of all sequences, shard by shard; shards that are there stay."""
    ends = np.cumsum([len(targets) for _, targets in sequences])
    cuts = np.searchsorted(ends, np.arange(SHARD_TARGETS, ends[-1] + SHARD_TARGETS, SHARD_TARGETS)) + 1
    start = 0
    for number, end in enumerate(np.unique(np.minimum(cuts, len(sequences))).tolist()):
        if not (shard := folder / f"shard-{number:05d}").is_dir():
            with torch.autocast(base.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                _write_shard(base, sequences[start:end], shard, start, len(sequences), progress)
        start = end
    write_json(folder / DONE_FILE, {"sequences": len(sequences), "targets": int(ends[-1])})


def _write_shard(
    base: BaseLM,
    sequences: list[tuple[list[int], list[int]]],
    shard: Path,
    done: int,
    total: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]) + len(sequences[i][1]))
    with atomic_folder(shard) as temporary, (temporary / HIDDEN_FILE).open("wb") as stream:
        gathered = _Gathered()
        while order:
            longest = len(sequences[order[-1]][0]) + len(sequences[order[-1]][1])
            batch = [order.pop() for _ in range(min(len(order), max(1, BATCH_TOKENS // longest)))]
            ids = torch.zeros(len(batch), longest, dtype=torch.long, device=base.device)
            for row, index in enumerate(batch):
                both = sequences[index][0] + sequences[index][1]
                ids[row, : len(both)] = torch.tensor(both)
            # Right padding: no token sees what stands behind it, so no mask is needed.
            _, hidden = base.forward(ids, projects=False)
            for row, index in enumerate(batch):
                prompt, answer = sequences[index]
                states = hidden[row, len(prompt) - 1 : len(prompt) + len(answer) - 1]
                stream.write(states.to(torch.float16).cpu().numpy().tobytes())
                gathered.add(prompt, answer)
            if progress:
                progress(done + len(gathered.ends), total)
        for name, array in gathered.arrays().items():
            array.tofile(temporary / f"{name}.i{8 * array.itemsize}")
