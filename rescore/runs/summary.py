"""Sums up the finished examples of one rescorer on one task: records of `rescore.runs.log.ExampleLog` to a
`Result`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from rescore.accounting import Difference, account, block_efficiency, paired_difference, speedup_interval
from rescore.drafters import Drafter
from rescore.runs.records import (
    SOURCES,
    Divergence,
    ExampleRecord,
    Identical,
    Latency,
    Outcomes,
    Result,
    SourceShare,
    is_unrescored,
)


def summarize(
    records: Sequence[ExampleRecord],
    *,
    seed: int,
    alpha: float | None = None,
    unrescored: Sequence[ExampleRecord] = (),
    drafters: Sequence[Drafter] = (),
    predicted: float | None = None,
    sampled: bool = False,
    peer: bool = False,
) -> Result:
    """The result of the records (one at least) of one task, rescorer and p.

    `alpha` of the rescorer is named in the result; `seed` of the bootstrap; `unrescored`: the records of `none` at
    p = 1, by the same rule, of the same run, which the gain is over (none: no gain); `drafters`: what the rescorer
    chose among; `predicted`: its speed-up; `sampled`: outputs were drawn, and are nobody else's;
    `peer`: another library decoded.
    """
    first = records[0]
    longest = first.longest or first.h
    groups = [r.group for r in records]
    accounting = account([r.accepted for r in records], longest, groups=groups, seed=seed)
    best = [r.oracle_accepted for r in records if r.oracle_accepted is not None]
    live = [r.live for r in records if r.live is not None]
    gain, differ = _gain(records, unrescored, seed=seed), _divergence(records)
    return Result(
        task=first.task,
        rescorer=first.rescorer,
        k=first.k,
        p=first.p,
        h=first.h,
        alpha=alpha,
        n=len(records),
        oracle_block_efficiency=block_efficiency(best) if best else None,
        gain=gain.gain if gain else None,
        gain_ci95=gain.gain_ci95 if gain else None,
        against_unrescored=_against_unrescored(records),
        **dataclasses.asdict(accounting),
        quality=_means(r.quality for r in records),
        autoregressive_quality=_means(each.autoregressive_quality for each in live) if live else None,
        cut_at_limit=_cut_at_limit(records),
        predicted_speedup=predicted,
        identical=Identical(n=len(records), identical=len(records) - len(differ)) if live and not sampled else None,
        divergence=differ if live and not sampled else None,
        latency=latency(records, seed=seed) if live else None,
        sources=_sources(records, drafters),
        peer=peer,
    )


def _gain(records: Sequence[ExampleRecord], unrescored: Sequence[ExampleRecord], *, seed: int) -> Difference | None:
    """The gain over the unrescored draft on the examples that both finished; None for it itself or without any."""
    if is_unrescored(records[0].rescorer, records[0].p):
        return None
    plain = {r.id: r.accepted for r in unrescored}
    both = [r for r in records if r.id in plain]
    if not both:
        return None
    groups = [r.group for r in both]
    return paired_difference([plain[r.id] for r in both], [r.accepted for r in both], groups=groups, seed=seed)


def _means(qualities: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """By metric the mean over the examples that have it."""
    scores: dict[str, list[float]] = {}
    for quality in qualities:
        for name, score in quality.items():
            scores.setdefault(name, []).append(score)
    return {name: float(np.mean(values)) for name, values in scores.items()}


def is_cut(output_ids: Sequence[int] | np.ndarray, eos_token_ids: Collection[int]) -> bool | None:
    """Whether an output stopped at the limit of tokens, before its end-of-text; None where that token is not known."""
    return int(output_ids[-1]) not in eos_token_ids if eos_token_ids else None


def _cut_at_limit(records: Sequence[ExampleRecord]) -> float | None:
    """The share of the outputs that were cut; None where that is not known of all."""
    known = [r.cut for r in records if r.cut is not None]
    return sum(known) / len(records) if len(known) == len(records) else None


def _divergence(records: Sequence[ExampleRecord]) -> list[Divergence]:
    return [
        Divergence(id=r.id, position=r.live.first_difference, margin=r.live.margin)
        for r in records
        if r.live is not None and r.live.first_difference is not None and r.live.margin is not None
    ]


def _against_unrescored(records: Sequence[ExampleRecord]) -> Outcomes | None:
    if any(r.unrescored_accepted is None for r in records):
        return None
    pairs = [pair for r in records for pair in zip(r.accepted, r.unrescored_accepted or (), strict=True)]
    won, lost = sum(n > plain for n, plain in pairs), sum(n < plain for n, plain in pairs)
    return Outcomes(won=won / len(pairs), tied=(len(pairs) - won - lost) / len(pairs), lost=lost / len(pairs))


def _sources(records: Sequence[ExampleRecord], drafters: Sequence[Drafter]) -> list[SourceShare]:
    """A share for each kind of drafter, of the examples where it is known what all of them proposed."""
    known = [(r.origins, r.alone_accepted) for r in records if r.origins is not None and r.alone_accepted is not None]
    origins = [bits for of_steps, _ in known for step in of_steps for bits in step[1:]]
    by_kind: dict[int, list[str]] = {}
    for drafter in drafters if known else ():
        by_kind.setdefault(drafter.kind, []).append(drafter.name)
    shares = []
    for kind, names in by_kind.items():
        # Of several drafters of one kind the best of each step.
        alone = [max(each) for _, of in known for each in zip(*(of[name] for name in names), strict=True)]
        shares.append(SourceShare(
            source=SOURCES.get(kind, names[0]),
            proposed=sum(bool(bits & kind) for bits in origins) / len(origins) if origins else None,
            only=sum(bits == kind for bits in origins) / len(origins) if origins else None,
            alone=float(np.mean(alone)),
        ))  # fmt: skip
    return shares


def latency(records: Sequence[ExampleRecord], *, seed: int) -> Latency:
    """Times of live records; all of them are live."""
    live = [r.live for r in records if r.live is not None]
    steps = sum(len(r.accepted) for r in records)
    tokens = sum(len(r.output_ids) for r in records)
    greedy_tokens = sum(r.autoregressive_tokens for r in live)

    def total(part: str) -> float:
        return float(sum(getattr(r.seconds, part) for r in live))

    spent, greedy = total("total"), float(sum(r.autoregressive_seconds.total for r in live))
    rescoring = np.array([s for r in live for s in r.rescore_seconds] or [0.0]) * 1e3
    parts = {f"{part}_ms": total(part) / steps * 1e3 for part in ("verify", "draft", "rescore")}
    step = sum(parts.values())
    return Latency(
        verify=live[0].verify,
        prefill_ms=total("prefill") / len(live) * 1e3,
        autoregressive_ms=greedy / greedy_tokens * 1e3,
        **parts,
        rescore_p50_ms=float(np.quantile(rescoring, 0.5)),
        rescore_p95_ms=float(np.quantile(rescoring, 0.95)),
        glue_share=1.0 - step / (spent / steps * 1e3),
        tokens_per_second=tokens / spent,
        autoregressive_tokens_per_second=greedy_tokens / greedy,
        speedup=(tokens / spent) / (greedy_tokens / greedy),
        speedup_ci95=speedup_interval(
            [(len(r.output_ids), r.live.seconds.total) for r in records if r.live],
            [(r.autoregressive_tokens, r.autoregressive_seconds.total) for r in live],
            groups=[r.group for r in records],
            seed=seed,
        ),
    )
