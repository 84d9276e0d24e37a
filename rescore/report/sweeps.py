"""Sweeps of weights: the ones that a run's weights came from, left by `rescore tune` or by the run's suite."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from lattices.errors import RescoreError
from lm.files import cache_directory, read_json_lines, read_json_object
from lm.records import convert_record
from rescore.runs.finished import FinishedRun
from rescore.runs.records import Tuned
from rescore.runs.suite_files import RUNS_FOLDER, TUNED_FILE


def sweeps_of(run: FinishedRun, task: str) -> tuple[Tuned, ...]:
    """The sweeps from which the tuned weights of a task of a run came, in the run's order.

    A sweep belongs to a weight if task, rescorer, k, h (where it says), p, the held-out examples and the best weight
    are the same. Files that can't be read are passed over: a sweep is shown where there is one.
    """
    options = run.config.options
    weights = {
        (rescorer, p): weight
        for rescorer, by_p in run.config.alphas.get(task, {}).items()
        for p, weight in by_p.items()
        if weight.source == "tuned"
    }
    sweeps: dict[tuple[str, int], Tuned] = {}
    for fields in _candidates(run, task) if weights else ():
        with suppress(RescoreError):
            tuned = convert_record(fields, Tuned, where="", advice="")
            weight = weights.get((tuned.rescorer, tuned.p))
            if (
                weight is not None
                and (tuned.task, tuned.k, fields.get("h", options.h)) == (task, options.k, options.h)
                and (tuned.alpha, tuned.held_out) == (weight.alpha, weight.held_out)
                and len(tuned.alphas) == len(tuned.block_efficiency)
            ):
                sweeps.setdefault((tuned.rescorer, tuned.p), tuned)
    return tuple(sweeps[key] for key in weights if key in sweeps)


def _candidates(run: FinishedRun, task: str) -> Iterator[dict[str, Any]]:
    """Lines of the suite's file, then documents of the cache; what can't be read is passed over."""
    folder = run.folder.resolve().parent
    if folder.name == RUNS_FOLDER:
        with suppress(RescoreError):
            lines = [fields for _, fields in read_json_lines(folder.parent / TUNED_FILE, torn_tail=True)]
            yield from reversed(lines)  # of two sweeps of one run the later is the one that was used
    for path in sorted((cache_directory() / "tuned").glob(f"{glob.escape(task)}-*.json")):
        with suppress(RescoreError):
            yield read_json_object(path, missing=f"can't read {path}")
