"""Sweeps of weights: the ones that a run's weights came from, kept by `rescore tune` or by the run's suite."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lattices.errors import RescoreError
from lm.files import cache_directory, read_json_lines, read_json_object
from lm.records import convert_record
from rescore.runs.evaluated import Evaluation
from rescore.runs.records import Tuned
from rescore.suites.files import RUNS_FOLDER, TUNED_FILE


def kept_sweeps(run: Evaluation, task: str) -> tuple[Tuned, ...]:
    """The sweeps behind the tuned weights of a task of a run, in the run's order: its suite's, and those in the cache.

    A sweep belongs to a weight if task, rescorer, k, h (where it says), p, the held-out examples and the best weight
    are the same. Files that can't be read are passed over: a sweep is shown where there is one.
    """
    k, h = run.results[0].k, run.config.inputs[task].h
    wanted = {
        (r.rescorer, r.p): r.alpha
        for r in run.config.runs.get(task, ())
        if r.k == k and r.alpha and r.alpha.source == "tuned"
    }
    found: dict[tuple[str, int], Tuned] = {}
    for fields in _kept(run, task) if wanted else ():
        if fields.get("h", h) != h:
            continue
        try:
            tuned = convert_record(fields, Tuned, where="", advice="")
        except RescoreError:
            continue
        if len(tuned.alphas) != len(tuned.block_efficiency):
            continue
        chosen = wanted.get((tuned.rescorer, tuned.p))
        if chosen is None or tuned.task != task or tuned.k != k:
            continue
        if tuned.alpha == chosen.alpha and tuned.held_out == chosen.held_out:
            found.setdefault((tuned.rescorer, tuned.p), tuned)
    return tuple(found[key] for key in wanted if key in found)


def _kept(run: Evaluation, task: str) -> Iterator[dict[str, Any]]:
    """Lines of the suite's file, then documents of the cache; what can't be read is passed over."""
    folder = (run.folder or Path()).resolve().parent
    if folder.name == RUNS_FOLDER:
        try:
            kept = [fields for _, fields in read_json_lines(folder.parent / TUNED_FILE, torn_tail=True)]
            yield from reversed(kept)  # of two sweeps of one run the later is the one that was used
        except RescoreError:
            pass
    for path in sorted((cache_directory() / "tuned").glob(f"{glob.escape(task)}-*.json")):
        try:
            yield read_json_object(path, missing=f"can't read {path}")
        except RescoreError:
            continue
