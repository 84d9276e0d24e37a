"""Sums up the finished examples of one rescorer on one task: records of `rescore.runs.results.ExampleLog` to a
`Result`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from rescore.accounting import Gain, account, paired_gain
from rescore.runs.results import Result

Record = dict[str, Any]  # a line of examples.jsonl (docs/formats.md)


def summarize(
    records: Sequence[Record],
    *,
    k: int,
    seed: int,
    alpha: float | None = None,
    unrescored: Sequence[Record] = (),
) -> Result:
    """The result of the records (one at least) of one task, rescorer and p.

    `alpha` of the rescorer is named in the result; `seed` of the bootstrap; `unrescored`: the records of `none` at
    p = 1 of the same run, which the gain is over (none: no gain).
    """
    first, h = records[0], records[0]["h"]
    groups = [r["group"] for r in records]
    accounting = account([r["accepted"] for r in records], h, groups=groups, seed=seed)
    oracle = account([r["oracle_accepted"] for r in records], h)
    live = "seconds" in first
    gain = _gain(records, unrescored, seed=seed)
    return Result(
        task=first["task"],
        rescorer=first["rescorer"],
        k=k,
        p=first["p"],
        alpha=alpha,
        n=len(records),
        oracle_block_efficiency=oracle.block_efficiency,
        gain=gain.gain if gain else None,
        gain_ci95=gain.gain_ci95 if gain else None,
        against_unrescored=_against_unrescored(records),
        **dataclasses.asdict(accounting),
        quality=_quality(records),
        cut_at_limit=_cut_at_limit(records),
        identical=_identical(records) if live else None,
        divergence=_divergence(records) if live else None,
        latency=latency(records, accounting.block_efficiency) if live else None,
    )


def _gain(records: Sequence[Record], unrescored: Sequence[Record], *, seed: int) -> Gain | None:
    """The gain over the unrescored draft on the examples that both finished; None for it itself or without any."""
    if (records[0]["rescorer"], records[0]["p"]) == ("none", 1):
        return None
    plain = {r["id"]: r["accepted"] for r in unrescored}
    both = [r for r in records if r["id"] in plain]
    if not both:
        return None
    groups = [r["group"] for r in both]
    return paired_gain([r["accepted"] for r in both], [plain[r["id"]] for r in both], groups=groups, seed=seed)


def _quality(records: Sequence[Record]) -> dict[str, float]:
    """By metric the mean over the examples that have it."""
    scores: dict[str, list[float]] = {}
    for r in records:
        for name, score in r["quality"].items():
            scores.setdefault(name, []).append(score)
    return {name: float(np.mean(values)) for name, values in scores.items()}


def is_cut(output_ids: Sequence[int] | np.ndarray, eos_token_ids: Collection[int]) -> bool | None:
    """Whether an output stopped at the limit of tokens, before its end-of-text; None where that token is not known."""
    return int(output_ids[-1]) not in eos_token_ids if eos_token_ids else None


def _cut_at_limit(records: Sequence[Record]) -> float | None:
    """The share of the outputs that were cut; None where that is not known of all."""
    known = [r["cut"] for r in records if r.get("cut") is not None]
    return sum(known) / len(records) if len(known) == len(records) else None


def _identical(records: Sequence[Record]) -> dict[str, int]:
    return {"n": len(records), "identical": sum(r["first_difference"] is None for r in records)}


def _divergence(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [
        {"id": r["id"], "position": r["first_difference"], "margin": r["margin"]}
        for r in records
        if r["first_difference"] is not None
    ]


def _against_unrescored(records: Sequence[Record]) -> dict[str, float] | None:
    """Shares of steps that accepted more (`won`), as many (`tied`) or fewer tokens than the unrescored draft there."""
    if not all("unrescored_accepted" in r for r in records):
        return None
    pairs = [(n, plain) for r in records for n, plain in zip(r["accepted"], r["unrescored_accepted"], strict=True)]
    won, lost = sum(n > plain for n, plain in pairs), sum(n < plain for n, plain in pairs)
    total = len(pairs)
    return {"won": won / total, "tied": (total - won - lost) / total, "lost": lost / total}


def latency(records: Sequence[Record], block_efficiency: float) -> dict[str, Any]:
    """Times of live records, prefill apart, and `verify`: how drafts were verified (tree or batch).

    `verify_ms`, `heads_ms`, `rescore_ms` (and its `p50`, `p95`): per step; `glue_share` of a step's time that is none
    of these; `autoregressive_ms` per token; `prefill_ms` per example; tokens per second of both decoders and their
    ratio, `speedup`; `predicted_speedup` = block efficiency x autoregressive / (verify + heads + rescore), None where
    no step needed a call.
    """
    steps = sum(len(r["accepted"]) for r in records)
    tokens = sum(len(r["output_ids"]) for r in records)
    greedy_tokens = sum(r["autoregressive_tokens"] for r in records)

    def total(name: str, of: str = "seconds") -> float:
        return float(sum(r[of][name] for r in records))

    spent = total("total")
    rescoring = np.array([s for r in records for s in r["rescore_seconds"]] or [0.0]) * 1e3
    autoregressive = total("total", "autoregressive_seconds")
    parts = {part: total(part) / steps * 1e3 for part in ("verify", "heads", "rescore")}
    known = sum(parts.values())
    return {
        "verify": records[0]["verify"],
        "prefill_ms": total("prefill") / len(records) * 1e3,
        "autoregressive_ms": autoregressive / greedy_tokens * 1e3,
        "verify_ms": parts["verify"],
        "heads_ms": parts["heads"],
        "rescore_ms": parts["rescore"],
        "rescore_p50_ms": float(np.quantile(rescoring, 0.5)),
        "rescore_p95_ms": float(np.quantile(rescoring, 0.95)),
        "glue_share": 1.0 - known / (spent / steps * 1e3),
        "tokens_per_second": tokens / spent,
        "autoregressive_tokens_per_second": greedy_tokens / autoregressive,
        "speedup": (tokens / spent) / (greedy_tokens / autoregressive),
        "predicted_speedup": block_efficiency * (autoregressive / greedy_tokens * 1e3) / known if known else None,
    }
