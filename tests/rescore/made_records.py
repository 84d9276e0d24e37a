"""Records as runs leave them, with only what a test is about given."""

from __future__ import annotations

from typing import Any

from rescore.calls import Call
from rescore.runs.inputs import Inputs
from rescore.runs.records import ExampleRecord, Latency, Result, RunConfig


def example_record(**changes: Any) -> ExampleRecord:
    """An example of one step that accepted one token."""
    fields: dict[str, Any] = {
        "task": "squad", "rescorer": "none", "k": 16, "p": 1, "id": "a", "group": "g", "h": 2, "quality": {},
        "prompt_tokens": 5, "accepted": [1], "drafts": [[1, 2]], "calls": [Call(2, 1, True)], "oracle_accepted": [1],
        "output_ids": [1],
    }  # fmt: skip
    return ExampleRecord(**fields | changes)


def made_result(**changes: Any) -> Result:
    """A replayed result: 12 tokens in 10 steps of two examples, blocks of 3 unless `marginal` says."""
    marginal = changes.get("marginal", [1.0, 0.2, 0.0])
    fields: dict[str, Any] = {
        "task": "squad", "rescorer": "none", "k": 16, "p": 1, "h": len(marginal), "alpha": None, "n": 2, "groups": 2,
        "block_efficiency": 1.2, "block_efficiency_ci95": None, "block_efficiency_macro": 1.2,
        "oracle_block_efficiency": 2.5, "gain": None, "gain_ci95": None, "against_unrescored": None, "steps": 10,
        "tokens": 12, "accepted_histogram": [0, 8, 2, 0], "marginal": marginal, "conditional": marginal, "quality": {},
        "cut_at_limit": None, "predicted_speedup": None, "identical": None, "divergence": None, "latency": None,
        "autoregressive_quality": None, "sources": [], "peer": changes.get("oracle_block_efficiency", 2.5) is None,
    }  # fmt: skip
    return Result(**fields | changes)


def made_latency(**changes: Any) -> Latency:
    """Times of a live result."""
    fields: dict[str, Any] = {
        "verify": "tree", "prefill_ms": 123.4, "autoregressive_ms": 20.0, "verify_ms": 21.0, "draft_ms": 1.5,
        "rescore_ms": 0.25, "rescore_p50_ms": 0.2, "rescore_p95_ms": 0.4, "glue_share": 0.031,
        "tokens_per_second": 87.6, "autoregressive_tokens_per_second": 50.0, "speedup": 1.752,
        "speedup_ci95": (1.5, 2.0),
    }  # fmt: skip
    return Latency(**fields | changes)


def run_config(**changes: Any) -> RunConfig:
    """The configuration of a replay of squad."""
    fields: dict[str, Any] = {
        "inputs": {"squad": Inputs(task="squad")}, "runs": {}, "versions": {},
        "git_revision": None, "device": "cpu", "threads": 1, "data": {},
        "traces": {"squad": {"k": 16}},
    }  # fmt: skip
    return RunConfig(**fields | changes)
