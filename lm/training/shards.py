"""Shards of the base LM's states as they are kept beside a training (`lm.training.data`), read back and checked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lattices.errors import InvalidDataError, RescoreError
from lm.base.corpus import HIDDEN_FILE, STATE_BYTES
from lm.files import read_json_object
from lm.locks import tell

DONE_FILE = "done.json"


class Shard(NamedTuple):
    """The fields of `HeadData`, of some of its segments."""

    targets: np.ndarray
    ends: np.ndarray
    contexts: np.ndarray
    context_ends: np.ndarray
    states: np.ndarray


def read_shard(folder: Path, hidden_size: int) -> Shard:
    """One shard, its states memory-mapped. Raises `InvalidDataError` or `OSError` for one that is not whole."""
    ends, context_ends = (np.fromfile(folder / f"{name}.i64", dtype=np.int64) for name in ("ends", "context_ends"))
    targets, contexts = (np.fromfile(folder / f"{name}.i32", dtype=np.int32) for name in ("targets", "contexts"))
    for tokens, places in ((targets, ends), (contexts, context_ends)):
        if not len(places) or places[-1] != len(tokens) or (np.diff(places) < 0).any():
            raise InvalidDataError(f"{folder} has not as many tokens as it says; remove it and make it again")
    return Shard(targets, ends, contexts, context_ends, states_of(folder, len(targets), hidden_size))


def whole_shards(folder: Path, hidden_size: int) -> list[Shard] | None:
    """The shards of finished states; None if they are not finished, or broken."""
    if not (folder / DONE_FILE).is_file():
        return None
    try:
        targets = read_json_object(folder / DONE_FILE, missing="").get("targets")
        shards = [read_shard(shard, hidden_size) for shard in sorted(folder.glob("shard-*"))]
        return shards if sum(len(shard.targets) for shard in shards) == targets else None
    except (RescoreError, OSError, ValueError):
        return None


def remove_broken(folder: Path, hidden_size: int) -> None:
    """Makes room for states that are whole."""
    finished = (folder / DONE_FILE).is_file()
    for shard in sorted(folder.glob("shard-*")):
        try:
            read_shard(shard, hidden_size)
        except (RescoreError, OSError, ValueError) as error:
            tell(f"the states in {shard} are broken ({error}); they are made again")
            shutil.rmtree(shard, ignore_errors=True)
            finished = False
    if finished:  # a shard is gone, or `DONE_FILE` is broken
        tell(f"the states in {folder} are not whole; what is missing is made again")
    (folder / DONE_FILE).unlink(missing_ok=True)


def states_of(folder: Path, rows: int, hidden_size: int) -> np.ndarray:
    """The first rows of a folder's `hidden.f16`; a generation that still goes on may have written more."""
    path = folder / HIDDEN_FILE
    there = path.stat().st_size // (hidden_size * STATE_BYTES) if path.is_file() else 0
    if there < rows:
        raise InvalidDataError(f"{path} has the states of {there} of {rows} tokens; remove {folder} and make it again")
    return np.memmap(path, dtype=np.float16, mode="r", shape=(rows, hidden_size))
