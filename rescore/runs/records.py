"""What a run leaves: the record of a finished example, of a result, and of the configuration (docs/formats.md)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec

from lm.records import Count, Number, object_of, plain
from rescore.acceptance.rules import mark_of, marked, unmarked
from rescore.calls import Call
from rescore.costs.table import Costs
from rescore.runs.inputs import Inputs

SCHEMA = "rescore.results/8"
Interval = tuple[Number, Number]
# Kinds of drafters by the bits of `lattices.joined.sources`, which is not imported to name them.
SOURCES = {1: "heads", 2: "lookup", 4: "draft-model", 8: "corpus-lookup", 16: "trace"}


def sources_of(origins: int) -> tuple[str, ...]:
    """What the bits of where a token comes from are called."""
    return tuple(name for bit, name in SOURCES.items() if origins & bit)


@dataclass
class Seconds:
    """Where the time went; what `total` has beside its three parts is glue.

    prefill: base LM over the prompt, before the first step.
    verify, draft, rescore: of all steps, in the base LM, the drafters, the rescorer.
    total: of all steps.
    """

    prefill: float = 0.0
    verify: float = 0.0
    draft: float = 0.0
    rescore: float = 0.0
    total: float = 0.0

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Adds what runs inside to one of the parts."""
        start = time.perf_counter()
        yield
        setattr(self, part, getattr(self, part) + time.perf_counter() - start)


@dataclass(frozen=True, kw_only=True)
class LiveExample:
    """What live decoding measures of one example.

    first_difference: position (from 0) of the first token that greedy decoding chose otherwise; None: identical.
    margin: the greedy logit margin there.
    verify: how drafts were verified, `tree` or `batch`.
    seconds: of this decode; rescore_seconds: of each rescored step.
    autoregressive_tokens, autoregressive_seconds: of greedy decoding beside it.
    """

    first_difference: Count | None
    margin: float | None
    verify: str
    seconds: Seconds
    rescore_seconds: list[float]
    autoregressive_tokens: Count
    autoregressive_seconds: Seconds
    autoregressive_quality: dict[str, float] = field(default_factory=dict)


class ExampleRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One example decoded by one run: a line of `examples.jsonl`.

    rescorer: label of the run; k: lattice entries of a slot; p: drafts of a step.
    group: key of the source that the example shares with others.
    h: heads; longest: tokens of a draft at most (None: h). prompt_tokens: of the prompt.
    accepted: tokens accepted by each step; drafts: the winning draft of each step; calls: what each step verified (in
        replay: would have; none of a peer).
    oracle_accepted: by each step of the oracle's decode of the trace, also where a live output is another; None of a
        peer, which has no drafts to choose among.
    unrescored_accepted: by the unrescored draft where each step began; None where the lattices there are not known.
    origins, alone_accepted: `rescore.drafters.provenance.Provenance`, of several drafters.
    quality: the task's metrics by name; cut: whether the output stopped at the limit (None: not known).
    """

    task: str
    rescorer: str
    k: Count
    p: Count
    id: str
    group: str
    h: Count
    longest: Count | None = None
    prompt_tokens: Count
    quality: dict[str, float]
    cut: bool | None = None
    accepted: list[Count]
    drafts: list[list[Count]]
    calls: list[Call] = []
    oracle_accepted: list[Count] | None = None
    unrescored_accepted: list[Count] | None = None
    origins: list[list[Count]] | None = None
    alone_accepted: dict[str, list[Count]] | None = None
    output_ids: list[Count]
    live: LiveExample | None = None


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Shares of steps that accepted more, as many, fewer tokens than the unrescored draft would have there."""

    won: Number
    tied: Number
    lost: Number


@dataclass(frozen=True, kw_only=True)
class Identical:
    """Outputs that are greedy decoding's, of n."""

    n: Count
    identical: Count


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """An output that is not: the first token that differs (from 0), and the greedy logit margin there."""

    id: str
    position: Count
    margin: Number


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Times of live decoding, prefill apart.

    verify: how drafts were verified (tree or batch).
    prefill_ms: per example; autoregressive_ms: per token.
    verify_ms, draft_ms, rescore_ms and its median and 95th percentile: per step.
    glue_share: share of a step's time that is none of these; of a peer, what is not in the base LM.
    speedup: tokens_per_second over autoregressive_tokens_per_second; speedup_ci95: by group, paired.
    """

    verify: str
    prefill_ms: Number
    autoregressive_ms: Number
    verify_ms: Number
    draft_ms: Number
    rescore_ms: Number
    rescore_p50_ms: Number
    rescore_p95_ms: Number
    glue_share: Number
    tokens_per_second: Number
    autoregressive_tokens_per_second: Number
    speedup: Number
    speedup_ci95: Interval | None


@dataclass(frozen=True, kw_only=True)
class SourceShare:
    """What drafters of one kind brought to a run that has several.

    source: the kind (`SOURCES`).
    proposed, only: shares of the accepted drafted tokens (all but each step's first) that it had proposed, and that it
        alone had; None where no step accepted one.
    alone: block efficiency of its own drafts at the run's positions.
    """

    source: str
    proposed: Number | None
    only: Number | None
    alone: Number


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run on one task.

    rescorer: label of the run, by default its spec, or spec of a peer; k, p, h: as in `ExampleRecord`; alpha: the
    weight (None: it has none).
    n: examples, of so many groups.
    block_efficiency ... conditional: see `rescore.accounting.Accounting`.
    oracle_block_efficiency: of the best path of what the run's own drafters proposed; None of a peer, and where
        outputs are not greedy decoding's. peer: it is one.
    gain, gain_ci95: over `none` with p = 1 (by the same rule) in the same run, paired; None where that was not run,
        and for it itself.
    against_unrescored: None where a live output is not the trace's, and of a peer.
    autoregressive_quality: that of decoding token by token beside it (live), greedily or drawn alike.
    quality: mean of each metric over the examples with references (empty: the text is not known).
    cut_at_limit: share of outputs that did not come to their end (None: the end-of-text token is not known).
    predicted_speedup: over greedy decoding, by the run's costs (`rescore.costs.predicting`); None without any, or where
        they lack the time of this rescorer.
    identical, divergence, latency: of live decoding, else None.
    sources: where accepted tokens came from, of several drafters.
    """

    task: str
    rescorer: str
    k: Count
    p: Count
    h: Count
    alpha: Number | None
    n: Count
    groups: Count
    block_efficiency: Number
    block_efficiency_ci95: Interval | None
    block_efficiency_macro: Number
    oracle_block_efficiency: Number | None
    gain: Number | None
    gain_ci95: Interval | None
    against_unrescored: Outcomes | None
    steps: Count
    tokens: Count
    accepted_histogram: list[Count]
    marginal: Annotated[list[Number], msgspec.Meta(min_length=1)]
    conditional: list[Number | None]
    quality: dict[str, Number]
    autoregressive_quality: dict[str, Number] | None
    cut_at_limit: Number | None
    predicted_speedup: Number | None
    identical: Identical | None
    divergence: list[Divergence] | None
    latency: Latency | None
    sources: list[SourceShare]
    peer: bool

    @property
    def longest(self) -> int:
        """Tokens of a draft at most: what the block efficiency can't be above."""
        return len(self.marginal)

    @property
    def is_oracle(self) -> bool:
        """Whether this is a perfect choice among what drafters propose."""
        return is_oracle(self.rescorer)

    @property
    def is_peer(self) -> bool:
        """Whether another library decoded (`rescore.peers`), beside the runs."""
        return self.peer

    @property
    def is_unrescored(self) -> bool:
        """Whether this is what gains are over."""
        return is_unrescored(self.rescorer, self.p)

    @property
    def mark(self) -> str:
        """The rule that the output came about by, as the label says it; empty: greedy decoding's own."""
        return mark_of(self.rescorer)

    def gap_share(self, unrescored: Result | None) -> float | None:
        """How much of the way from the unrescored drafts to the oracle of its own drafters this is; None where there is
        no way."""
        if unrescored is None or self.is_unrescored or self.oracle_block_efficiency is None:
            return None
        gap = self.oracle_block_efficiency - unrescored.block_efficiency
        return None if gap <= 0 else (self.block_efficiency - unrescored.block_efficiency) / gap


def is_oracle(rescorer: str) -> bool:
    """Whether a run of this label is a perfect choice, of whatever drafters (`oracle:drafters=heads+lookup`)."""
    return unmarked(rescorer).partition(":")[0] == "oracle"


def is_unrescored(rescorer: str, p: int) -> bool:
    """Whether a run of this label is what the others by its rule are compared with."""
    return (unmarked(rescorer), p) == ("none", 1)


class Alpha(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename={"source": "from"}):
    """The weight of a rescorer and where it came from.

    held_out, held_out_groups: the examples that it was tuned on and their groups; swept: the weights tried.
    data_sha256: of the data that it was tuned on; other_data: these are not the data of the run.
    """

    alpha: Number
    source: Literal["option", "tuned", "default"]
    held_out: tuple[str, ...] = ()
    held_out_groups: tuple[str, ...] = ()
    swept: tuple[Number, ...] | None = None
    data_sha256: str | None = None
    other_data: bool = False


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The sweep of one rescorer's weight on one task with one k and p.

    rescorer: label of the runs (by default the spec).
    block_efficiency: with each of alphas, 0 among them; alpha: the best (the smallest of equals).
    held_out, held_out_groups: ids and groups of the examples; data_sha256: of the data that they are from.
    identity: what the rescorer scores with.
    """

    task: str
    rescorer: str
    k: int
    p: int
    alphas: tuple[Number, ...]
    block_efficiency: tuple[Number, ...]
    alpha: Number
    held_out: tuple[str, ...]
    held_out_groups: tuple[str, ...] = ()
    identity: str = ""
    data_sha256: str | None = None

    def as_alpha(self, *, data_sha256: str | None) -> Alpha:
        """The best weight, for an evaluation on data with this hash."""
        return Alpha(
            alpha=self.alpha, source="tuned", held_out=self.held_out, held_out_groups=self.held_out_groups,
            swept=self.alphas, data_sha256=self.data_sha256, other_data=self.data_sha256 != data_sha256,
        )  # fmt: skip


class RunRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A run as it was made.

    rescorer: its label; k, p as in `rescore.runs.run.Run`.
    alpha: its weight (None: it has none); identity: what it scores with (hashes).
    drafters: what it chooses among, with hashes where they draft with more than the text (none: heads).
    """

    rescorer: str
    k: Count
    p: Count
    alpha: Alpha | None = None
    identity: str = ""
    drafters: list[str] = []

    def __str__(self) -> str:
        return f"{self.rescorer} (p = {self.p}, k = {self.k})"


@dataclass(kw_only=True)
class RunConfig:
    """All that the numbers of an evaluation follow from, and what the user was told.

    mode: replay or live; verify: tree or batch (live, and by costs); seed: of the bootstrap intervals.
    acceptance: the rule by which tokens came about, or how they were drawn (sampled), by which seed; lossy: the outputs
        are not the base's.
    peers: what was measured beside the runs, by spec, and its version. inputs, runs: by task.
    data: by task where its examples are from; traces: by task what its trace is of, and its k.
    costs: by task what steps cost, where runs were planned or predicted by that.
    """

    mode: Literal["replay", "live"] = "replay"
    acceptance: str = "greedy"
    lossy: bool = False
    sampled: bool = False
    sampling_seed: Count = 0
    verify: Literal["tree", "batch"] = "tree"
    seed: Count = 0
    inputs: dict[str, Inputs]
    runs: dict[str, list[RunRecord]]
    peers: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str]
    git_revision: str | None
    device: str
    threads: int
    data: dict[str, dict[str, Any]]
    traces: dict[str, dict[str, Any]]
    costs: dict[str, Costs] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def decides(self) -> dict[str, Any]:
        """What two evaluations that go on in one folder have in common.

        Not in it: the versions (those that the numbers follow from are the traces') and notices (why the hub did not
        serve, this time).
        """
        names = ("mode", "acceptance", "sampling_seed", "verify", "seed", "peers", "inputs", "data", "traces")
        return {name: plain(getattr(self, name)) for name in names} | {
            "runs": {task: ", ".join(map(str, runs)) for task, runs in self.runs.items()},
            # Of costs only what the calls depend on: others can be predicted by later.
            "without_trees": [task for task, costs in self.costs.items() if costs.tree_ms is None],
            "weights": {  # by name, so that a difference names them
                task: {
                    str(run): {
                        **(plain(run.alpha) if run.alpha else {}),
                        "identity": run.identity,
                        "drafters": run.drafters,
                    }
                    for run in runs
                    if run.alpha or run.identity or run.drafters
                }
                for task, runs in self.runs.items()
            },
        }

    def base(self, task: str) -> dict[str, Any]:
        """What the trace of a task says of its base LM; empty where it was made elsewhere and does not."""
        return object_of(self.traces[task], "base")

    def marked(self, label: str) -> str:
        """The label of a run as its results have it."""
        return marked(label, self.acceptance, lossy=self.lossy, sampled=self.sampled)

    def alpha(self, task: str, rescorer: str, p: int, k: int) -> Alpha | None:
        """The weight of a run and where it came from; None where it has none."""
        runs = (run for run in self.runs.get(task, ()) if (run.rescorer, run.p, run.k) == (rescorer, p, k))
        return next((run.alpha for run in runs), None)


@dataclass(kw_only=True)
class ResultsDocument:
    """`results.json`."""

    schema: str = SCHEMA
    config: RunConfig
    results: list[Result] = field(default_factory=list)
