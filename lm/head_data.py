"""What block heads are trained on: final hidden states of the base LM beside the tokens they must predict.

Row i of a segment is the state that chose (or, on given text, should have chosen) the segment's token i; so head j at
row i must predict token i + j - 1. States are kept as float16 on disk and memory-mapped. Sources: a corpus of the
base's own output (`lm.corpus`, states included), chat pairs (JSON lines with `prompt` and `response`) and plain text;
for the last two the base LM runs once over the text and the states are kept in the training folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lm.base import BaseLM
from lm.corpus import CORPUS_FILE, HIDDEN_FILE, SETTINGS_FILE
from lm.files import atomic_folder, read_json_lines, sha256_of_file

CHUNK = 256  # tokens of plain text that see each other; short chunks keep attention cheap on a CPU
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class HeadData:
    """States float16 `[n, d]` (memory-mapped), targets int32 `[n]`, segment ends int64 `[s]` (rows, rising)."""

    states: np.ndarray
    targets: np.ndarray
    ends: np.ndarray
    source: str
    sha256: str

    def __len__(self) -> int:
        return len(self.targets)

    def segments(self) -> np.ndarray:
        """First and last-plus-one row of every segment, int64 `[s, 2]`."""
        return np.stack([np.concatenate([[0], self.ends[:-1]]), self.ends], axis=1)


def read_head_data(
    base: BaseLM,
    path: Path,
    cache: Path,
    *,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> HeadData:
    """States and targets of one corpus: a folder made by `generate_corpus`, a `.jsonl` of chat pairs, or text.

    States that must be computed are kept under `cache`. `max_tokens` bounds how much of a text is taken.
    """
    if path.is_dir():
        return _own_output(base, path)
    if not path.is_file():
        raise RescoreError(f"no corpus at {path}; give a text file, a .jsonl of pairs or a folder of generate-corpus")
    digest = sha256_of_file(path)
    stamp = f"{digest}{base.identity.weights_sha256}{max_tokens}"
    folder = cache / f"states-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        sequences = list(_pairs(base, path) if path.suffix == ".jsonl" else _chunks(base, path))
        _run_base(base, _bounded(sequences, max_tokens), folder, path, progress)
    ends = np.fromfile(folder / "ends.i64", dtype=np.int64)
    targets = np.fromfile(folder / "targets.i32", dtype=np.int32)
    states = np.memmap(folder / HIDDEN_FILE, dtype=np.float16, mode="r").reshape(-1, base.hidden_size)
    return HeadData(states, targets, ends, str(path.name), digest)


def _own_output(base: BaseLM, folder: Path) -> HeadData:
    try:
        made_by = json.loads((folder / SETTINGS_FILE).read_text())["base"]
    except (OSError, ValueError, KeyError) as error:
        raise RescoreError(f"{folder} is not a folder made by generate-corpus ({SETTINGS_FILE} is missing)") from error
    expected = dataclasses.asdict(base.identity)
    for field in ("weights_sha256", "tokenizer_sha256"):  # the name and dtype may differ
        if made_by[field] != expected[field]:
            raise IncompatibleError(f"the corpus in {folder} is the output of another base LM ({made_by['name']})")
    targets: list[int] = []
    ends: list[int] = []
    for _, record in read_json_lines(folder / CORPUS_FILE, torn_tail=True):
        targets += record["output_ids"]
        ends.append(len(targets))
    if not targets:
        raise InvalidDataError(f"the corpus in {folder} is empty")
    states = np.memmap(folder / HIDDEN_FILE, dtype=np.float16, mode="r").reshape(-1, base.hidden_size)
    if len(states) < len(targets):
        raise InvalidDataError(f"{folder / HIDDEN_FILE} has {len(states)} rows for {len(targets)} tokens; make it again")
    return HeadData(
        states[: len(targets)],
        np.asarray(targets, dtype=np.int32),
        np.asarray(ends, dtype=np.int64),
        str(folder.name),
        sha256_of_file(folder / CORPUS_FILE),
    )


def _pairs(base: BaseLM, path: Path) -> Iterator[tuple[list[int], list[int]]]:
    for number, record in read_json_lines(path):
        prompt, response = record.get("prompt"), record.get("response")
        if not isinstance(prompt, str) or not isinstance(response, str) or not prompt or not response:
            raise InvalidDataError(f"{path} line {number} needs text in the fields 'prompt' and 'response'")
        prompt_ids = base.encode_prompt(prompt, chat=base.is_chat, max_tokens=2 * CHUNK)
        end = [base.tokenizer.eos_token_id] if base.tokenizer.eos_token_id is not None else []
        response_ids = base.tokenizer(response, add_special_tokens=False)["input_ids"][:CHUNK] + end
        yield prompt_ids, response_ids


def _chunks(base: BaseLM, path: Path) -> Iterator[tuple[list[int], list[int]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidDataError(f"can't read {path} as UTF-8 text: {error}") from error
    text = "\n".join(line for line in lines if line.strip())
    if not text:
        raise InvalidDataError(f"the corpus {path} is empty")
    ids = base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    for start in range(0, len(ids) - 1, CHUNK):
        chunk = ids[start : start + CHUNK]
        if len(chunk) > 1:
            yield chunk[:1], chunk[1:]


def _bounded(
    sequences: list[tuple[list[int], list[int]]], max_tokens: int | None
) -> list[tuple[list[int], list[int]]]:
    """Sequences spread evenly over the corpus, of `max_tokens` targets in all."""
    total = sum(len(targets) for _, targets in sequences)
    if max_tokens is None or total <= max_tokens:
        return sequences
    share = max_tokens / total
    return [s for i, s in enumerate(sequences) if int((i + 1) * share) > int(i * share)]


def _run_base(
    base: BaseLM,
    sequences: list[tuple[list[int], list[int]]],
    folder: Path,
    path: Path,
    progress: Callable[[int, int], None] | None,
) -> None:
    if not sequences:
        raise InvalidDataError(f"the corpus {path} is too short to train on")
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]) + len(sequences[i][1]))
    with atomic_folder(folder) as temporary, (temporary / HIDDEN_FILE).open("wb") as stream:
        targets: list[int] = []
        ends: list[int] = []
        while order:
            longest = len(sequences[order[-1]][0]) + len(sequences[order[-1]][1])
            batch = [order.pop() for _ in range(min(len(order), max(1, BATCH_TOKENS // longest)))]
            ids = torch.zeros(len(batch), longest, dtype=torch.long, device=base.device)
            for row, index in enumerate(batch):
                both = sequences[index][0] + sequences[index][1]
                ids[row, : len(both)] = torch.tensor(both)
            # Right padding: no token sees what stands behind it, so no mask is needed.
            _, hidden = base.forward(ids)
            for row, index in enumerate(batch):
                prompt, answer = sequences[index]
                states = hidden[row, len(prompt) - 1 : len(prompt) + len(answer) - 1]
                stream.write(states.to(torch.float16).cpu().numpy().tobytes())
                targets += answer
                ends.append(len(targets))
            if progress:
                progress(len(ends), len(sequences))
        np.asarray(targets, dtype=np.int32).tofile(temporary / "targets.i32")
        np.asarray(ends, dtype=np.int64).tofile(temporary / "ends.i64")
