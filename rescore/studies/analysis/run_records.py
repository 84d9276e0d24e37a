"""What a results folder says of one rescorer: its `Result` and its weight, as records of the analyses."""

from __future__ import annotations

from rescore.runs.records import Result, RunConfig
from rescore.studies.analysis.records import Efficiency, Wallclock


def efficiency_in(result: Result) -> Efficiency:
    """The block efficiency of a result."""
    return Efficiency(
        result.steps, result.tokens, result.block_efficiency, result.block_efficiency_ci95,
        result.block_efficiency_macro,
    )  # fmt: skip


def alpha_source(config: RunConfig, result: Result) -> str | None:
    """Where the weight of a rescorer came from (`option`, `tuned`, `default`); None if it has none."""
    alpha = config.alpha(result.task, result.rescorer, result.p, result.k)
    return alpha.source if alpha else None


def wallclock_in(result: Result) -> Wallclock | None:
    """The times of a live result; None for a replayed one."""
    if result.latency is None:
        return None
    return Wallclock(**{name: getattr(result.latency, name) for name in Wallclock.__dataclass_fields__})
