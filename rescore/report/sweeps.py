"""Sweeps of weights that `rescore tune` kept: the ones that a run's weights came from."""

from __future__ import annotations

from typing import Any

from lattices.errors import RescoreError
from lm.files import cache_directory, read_json_object
from rescore.tuning import Tuned

FIELDS = ("task", "rescorer", "k", "p", "alphas", "block_efficiency", "alpha", "held_out")


def kept_sweeps(config: dict[str, Any], task: str) -> tuple[Tuned, ...]:
    """The sweeps in the cache behind the tuned weights of a task of a run, in the run's order.

    A sweep belongs to a weight if task, rescorer, k, p, the held-out examples and the best weight are the same. Files
    that can't be read are passed over: a sweep is shown where there is one.
    """
    wanted = {
        (typed, int(p)): chosen
        for typed, by_p in config.get("alphas", {}).get(task, {}).items()
        for p, chosen in by_p.items()
        if chosen.get("from") == "tuned"
    }
    found: dict[tuple[str, int], Tuned] = {}
    for path in sorted((cache_directory() / "tuned").glob(f"{task}-*.json")) if wanted else ():
        try:
            fields = read_json_object(path, missing=f"can't read {path}")
            tuned = Tuned(**{name: fields[name] for name in FIELDS})
        except (RescoreError, KeyError):
            continue
        chosen = wanted.get((tuned.rescorer, tuned.p))
        if chosen is None or tuned.task != task or tuned.k != config["options"].get("k"):
            continue
        if tuned.alpha == chosen["alpha"] and list(tuned.held_out) == list(chosen.get("held_out", ())):
            found[tuned.rescorer, tuned.p] = tuned
    return tuple(found[key] for key in wanted if key in found)
