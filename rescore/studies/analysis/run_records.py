"""What a results folder says of one rescorer: its `Result` and its weight, as records of the analyses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rescore.studies.analysis.records import Efficiency, Wallclock


def efficiency_in(result: Mapping[str, Any]) -> Efficiency:
    """The block efficiency of a result."""
    interval = result["block_efficiency_ci95"]
    return Efficiency(
        result["steps"],
        result["tokens"],
        result["block_efficiency"],
        tuple(interval) if interval else None,
        result["block_efficiency_macro"],
    )


def alpha_source(config: Mapping[str, Any], task: str, rescorer: str, p: int) -> str | None:
    """Where the weight of a rescorer came from (`option`, `tuned`, `default`); None if it has none."""
    found = config.get("alphas", {}).get(task, {}).get(rescorer, {})
    # Keys of JSON objects are strings.
    source = (found.get(str(p)) or found.get(p) or {}).get("from")
    return None if source is None else str(source)


def wallclock_in(result: Mapping[str, Any]) -> Wallclock | None:
    """The times of a live result; None for a replayed one."""
    latency = result["latency"]
    if latency is None:
        return None
    return Wallclock(**{name: latency[name] for name in Wallclock.__dataclass_fields__})
