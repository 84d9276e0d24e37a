"""What analyses return: plain records of numbers, ready for JSON. docs/analyses.md defines every number.

Heads, block positions and accepted lengths are counted from 1; lists "by head" have an entry for each of the heads
1..h. Shares are between 0 and 1, and None where nothing was counted. Entropies are in nats.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


class Record:
    """A dataclass that becomes one JSON object."""

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, records inside as objects."""
        fields: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        return fields


@dataclass(frozen=True)
class Efficiency(Record):
    """Block efficiency of one decode (see `rescore.accounting.Accounting`): `tokens` / `steps`, its 95 %
    interval by group (None for fewer than four groups) and the mean over examples; None where nothing was decoded.
    """

    steps: int
    tokens: int
    block_efficiency: float | None
    block_efficiency_ci95: tuple[float, float] | None
    block_efficiency_macro: float | None


@dataclass(frozen=True)
class Repetition(Record):
    """Consecutive repetition in `drafts` drafts, all of h tokens: cut ones do not count.

    `share`: of the neighbouring pairs of tokens, those that are equal; `repeating`: of the drafts, those with at least
    one such pair; `mean_longest_run`: the mean over drafts of the longest run of one token (1: no repetition);
    `by_pair[i-1]`: share of drafts whose tokens i and i + 1 are equal, i = 1..h-1.
    """

    drafts: int
    share: float | None
    repeating: float | None
    mean_longest_run: float | None
    by_pair: tuple[float | None, ...]


@dataclass(frozen=True)
class TraceRepetition(Record):
    """Repetition in a trace: `decode`: of the unrescored drafts at the steps of the unrescored decode (the figure to
    compare with); `every_position`: of the unrescored drafts at all positions; `output`: of what the base LM itself
    goes on with at all positions that have h tokens before the end of the output, which no rescorer should fall
    below."""

    decode: Repetition
    every_position: Repetition
    output: Repetition


@dataclass(frozen=True)
class BeforeAfter(Record):
    """Repetition at the steps of one rescored decode: `before` in the unrescored drafts of the steps' positions,
    `after` in the drafts that won; `examples` that both are known of."""

    examples: int
    before: Repetition
    after: Repetition


@dataclass(frozen=True)
class HeadEntropy(Record):
    """Entropy of one head's whole distribution over all positions: mean, standard deviation, `quantiles` at
    `Entropies.levels`, and `histogram` counts in the bins of `Entropies.edges` (beyond the last edge: last bin)."""

    head: int
    mean: float | None
    std: float | None
    quantiles: tuple[float, ...]
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class Entropies(Record):
    """Confidence of the heads at `positions` positions, every position read; `edges` of the histograms' bins in
    nats, one more than bins. `h_max`: the most heads k such that the mean entropy does not fall over heads 1..k;
    None without positions."""

    positions: int
    levels: tuple[float, ...]
    edges: tuple[float, ...]
    heads: tuple[HeadEntropy, ...]
    h_max: int | None


@dataclass(frozen=True)
class HmaxPoint(Record):
    """One task (or trace): its `h_max` and the block efficiency of its unrescored decode."""

    name: str
    h_max: int
    block_efficiency: float


@dataclass(frozen=True)
class HmaxCorrelation(Record):
    """Pearson's R of h_max and block efficiency over `points`, one for each task, all of blocks of `h` tokens (None: no
    points); None for fewer than three, or where one never varies."""

    h: int | None
    points: tuple[HmaxPoint, ...]
    pearson: float | None


@dataclass(frozen=True)
class OracleCurves(Record):
    """What a perfect choice would reach, in replayed decodes.

    `unrescored`: the plain drafts. `by_k[i]`: the oracle in lattices of `ks[i]` entries, all heads refined.
    `by_refined[i][m]`: block efficiency where the oracle chooses from `ks[i]` entries in the slots of the first m heads
    behind head 1 (slots 2..m+1), the rest being arg-max; m = 0..h-1, so m = 0 is unrescored and m = h - 1 is `by_k[i]`.
    `gain_by_refined[i][m]` = by_refined[i][m] / unrescored - 1. `by_heads_unrescored[j-1]` and
    `by_heads_oracle[i][j-1]`: with blocks of j tokens, heads 1..j only, j = 1..h. Numbers are None without positions.
    """

    ks: tuple[int, ...]
    unrescored: Efficiency
    by_k: tuple[Efficiency, ...]
    by_refined: tuple[tuple[float | None, ...], ...]
    gain_by_refined: tuple[tuple[float | None, ...], ...]
    by_heads_unrescored: tuple[float | None, ...]
    by_heads_oracle: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class PCurve(Record):
    """Block efficiency by number of drafts: `points[i]` verifies the `ps[i]` best drafts of `rescorer` at `k`
    entries per slot; `alphas[i]` is the rescorer's weight (None: it has none). `none` is the "0-gram"."""

    rescorer: str
    k: int
    ps: tuple[int, ...]
    alphas: tuple[float | None, ...]
    points: tuple[Efficiency, ...]


@dataclass(frozen=True)
class HeadRanks(Record):
    """Where one head has the token that the base LM chose: of `positions` positions (those where the output is that
    long), `counts[r]` have it as entry r of the slot, from 0; `counts[-1]` lack it. `recall[i]`: share among the first
    `Ranks.ks[i]` entries. `mean_reciprocal_rank`: mean of 1 / (r + 1), 0 where it is lacking."""

    head: int
    positions: int
    counts: tuple[int, ...]
    recall: tuple[float | None, ...]
    mean_reciprocal_rank: float | None


@dataclass(frozen=True)
class Ranks(Record):
    """Ranks of the base LM's choice in lattices of `entries` per slot, every position read."""

    entries: int
    ks: tuple[int, ...]
    heads: tuple[HeadRanks, ...]


@dataclass(frozen=True)
class HeadAcceptance(Record):
    """The arg-max of one head against the base LM's choice, every position read.

    `unconditional`: share of the `positions` where it is right; `conditional`: the same of those `reached` by correct
    arg-maxes of all heads before it. `marginal` and `conditional_decode`: of the steps of the unrescored decode
    (`rescore.accounting.Accounting`), the share that accepted at least `head` tokens, and that over the head before;
    steps at the end of an output count as not accepting what is not there.
    """

    head: int
    positions: int
    unconditional: float | None
    reached: int
    conditional: float | None
    marginal: float | None
    conditional_decode: float | None


@dataclass(frozen=True)
class ReliabilityBin(Record):
    """Positions where the head's probability of its arg-max is in (low, high] (the first bin includes 0): how many, the
    mean of that probability, and the share where the arg-max is the base LM's choice."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class HeadCalibration(Record):
    """Whether one head's probabilities are to be believed. `ece`: expected calibration error, the mean over
    positions of |accuracy - confidence| of their bin; `confidence` and `accuracy` over all of them; `brier`: mean of
    (probability - right)^2. Head 1 is right by definition (its arg-max is the output), so its `ece` is what it lacks
    to 1."""

    head: int
    positions: int
    ece: float | None
    confidence: float | None
    accuracy: float | None
    brier: float | None
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True)
class Outcomes(Record):
    """The steps of one rescored decode against the unrescored draft at each step's position.

    `won`, `tied`, `lost`: steps that accepted more, as many, fewer tokens; `tokens_won` and `tokens_lost`: by how many,
    summed. `joint[i-1][j-1]`: steps where the unrescored draft would have accepted i tokens and the chosen one j, so
    its diagonal is the ties. None of the following where drafts or trace are unknown:

    `repairs`: wins where the first token that the unrescored draft got wrong repeats the token before it;
    `regressions`: losses where the first token that the chosen draft got wrong repeats the token before it;
    `fewer_repeats`: wins whose draft has fewer equal neighbours than the unrescored one, `more_repeats`: losses whose
    draft has more (looser, and not about the token that decided). The shares are of `won` and `lost`.
    """

    steps: int
    won: int
    tied: int
    lost: int
    tokens_won: int
    tokens_lost: int
    joint: tuple[tuple[int, ...], ...]
    repairs: int | None
    regressions: int | None
    fewer_repeats: int | None
    more_repeats: int | None
    repair_share: float | None
    regress_share: float | None
    fewer_repeats_share: float | None
    more_repeats_share: float | None


@dataclass(frozen=True)
class Wallclock(Record):
    """Times of a live run, milliseconds (fields of `rescore.runs.summary.latency`): per token of autoregressive
    decoding, and per step of verifying, of the heads and of the rescorer (mean, median, 95th percentile); the measured
    speed-up over autoregressive decoding in the same run, and block efficiency x autoregressive / (verify + heads +
    rescore)."""

    autoregressive_ms: float
    verify_ms: float
    heads_ms: float
    rescore_ms: float
    rescore_p50_ms: float
    rescore_p95_ms: float
    glue_share: float
    speedup: float
    predicted_speedup: float | None


@dataclass(frozen=True)
class RescorerAnalysis(Record):
    """One rescorer at one p on one task of a run: `alpha` and where it came from (`option`, `tuned`, `default`;
    None: the rescorer has no weight); `gain` over the unrescored decode of the same run and its paired interval
    (None where there is none). `repetition` needs the trace and the drafts, `outcomes` an output that is the
    trace's, `wallclock` live mode; None where they are lacking."""

    rescorer: str
    p: int
    k: int
    alpha: float | None
    alpha_source: str | None
    efficiency: Efficiency
    oracle_block_efficiency: float
    gain: float | None
    gain_ci95: tuple[float, float] | None
    repetition: BeforeAfter | None
    outcomes: Outcomes | None
    wallclock: Wallclock | None


@dataclass(frozen=True)
class TraceAnalysis(Record):
    """All analyses of one trace (`examples` of so many `groups`); an analysis that was not asked for is None.

    `k`: entries per slot of `p_curve` (of the rest: all that the trace holds, `entries`, or what it says).
    """

    name: str
    examples: int
    groups: int
    positions: int
    h: int
    k: int
    entries: int
    repetition: TraceRepetition | None = None
    entropy: Entropies | None = None
    oracle: OracleCurves | None = None
    p_curve: PCurve | None = None
    ranks: Ranks | None = None
    acceptance: tuple[HeadAcceptance, ...] | None = None
    calibration: tuple[HeadCalibration, ...] | None = None


@dataclass(frozen=True)
class RunAnalysis(Record):
    """All analyses of one task of a finished run: a `RescorerAnalysis` for every rescorer and p in the order of the
    results, block efficiency by p of those run with several, and those of the trace (None: it is gone)."""

    task: str
    h: int
    k: int
    examples: int
    groups: int
    mode: str
    rescorers: tuple[RescorerAnalysis, ...]
    by_p: tuple[PCurve, ...]
    trace: TraceAnalysis | None


@dataclass(frozen=True)
class TableCell(Record):
    """One rescorer on one task: its block efficiency, gain over unrescored, weight, and `n` examples of so many
    `groups`."""

    task: str
    block_efficiency: float
    block_efficiency_ci95: tuple[float, float] | None
    gain: float | None
    gain_ci95: tuple[float, float] | None
    alpha: float | None
    alpha_source: str | None
    n: int
    groups: int


@dataclass(frozen=True)
class TableRow(Record):
    """A rescorer at one p, h and k; `cells[i]` for `EfficiencyTable.tasks[i]`, None where it was not run. `mean_gain`:
    mean of the gains that there are."""

    rescorer: str
    p: int
    h: int
    k: int
    cells: tuple[TableCell | None, ...]
    mean_gain: float | None


@dataclass(frozen=True)
class EfficiencyTable(Record):
    """Rescorers x tasks over one or several runs (of other h, other tasks)."""

    tasks: tuple[str, ...]
    rows: tuple[TableRow, ...]


@dataclass(frozen=True)
class Contrast(Record):
    """Two rescorers of one run on one task, paired by example (`n` of so many `groups`): `gain` of `rescorer` over
    `against` (0.01 = 1 % more tokens a step) with its paired 95 % interval; for in-domain against general rescorers."""

    task: str
    p: int
    rescorer: str
    against: str
    n: int
    groups: int
    block_efficiency: float
    against_block_efficiency: float
    gain: float
    gain_ci95: tuple[float, float] | None
