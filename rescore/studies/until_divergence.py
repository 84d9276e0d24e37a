"""Lossy acceptance from a trace: what rules keep until their output leaves the greedy one ([B] sections 5.1 to 5.3).

A trace holds what the base says along its greedy output. A rule that looks at the likeliest tokens only is known there
up to the first token that it keeps and greedy decoding would not; what the base says after that token is in no trace.
So nothing here is of whole outputs: those come from live decoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from lattices.errors import RescoreError
from rescore.acceptance import Rule
from rescore.acceptance.lossy import OfLikeliest
from rescore.accounting import account, block_efficiency
from rescore.checks import VERIFY_MODES
from rescore.costs.table import Costs
from rescore.peers import Peer
from rescore.replaying import Limits, replay_steps
from rescore.runs.inputs import Progress, add_notice
from rescore.runs.recording import Recording
from rescore.runs.records import Interval
from rescore.runs.work import Asked, prepared
from rescore.studies.records import Record
from rescore.table import (
    COUNT,
    EXAMPLES,
    GROUPS,
    NUMBER,
    NUMBER_INTERVAL,
    RESCORER,
    SHARE,
    TASK,
    Column,
    K,
    P,
    Table,
)  # fmt: skip
from rescore.tracing import Trace

TREE = VERIFY_MODES[0]
LIVE = "decode with it: --mode live"
MARGIN = 0.1  # nats, on average: half precision rounds by as much; what a drafter guesses is off by far more


@dataclass(frozen=True)
class UntilDivergence(Record):
    """One run on one task, `n` examples of so many `groups`.

    diverged: examples in which the rule keeps a token that greedy decoding would not.
    steps: until then, that step included; of_steps: their share of the steps of greedy acceptance.
    hit_rate: tokens kept in each of these steps, of the last one up to that token; its interval is by group.
    greedy: tokens that greedy acceptance keeps in the same steps.
    """

    task: str
    rescorer: str
    k: int
    p: int
    n: int
    groups: int
    diverged: int
    steps: int
    of_steps: float
    hit_rate: float
    hit_rate_ci95: Interval | None
    greedy: float


@dataclass
class UntilDivergences(Record):
    """All runs by one rule, and what the user should know of them."""

    acceptance: str
    rows: list[UntilDivergence] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def until_divergence(
    recordings: Sequence[Recording],
    runs: Asked,
    rule: Rule,
    *,
    verify: str = TREE,
    details: bool = False,
    costs: Costs | str | None = None,
    peers: Iterable[str | Peer] = (),
    out: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> UntilDivergences:
    """Replays every run on every task up to the first token that the rule keeps and greedy decoding would not.

    Arguments as for `rescore.runs.evaluation.evaluate`. Raises `RescoreError` for a rule that asks for more than a
    trace knows, for what is of whole evaluations (a way to verify, details, peers, a folder), and as `evaluate`.
    """
    of_whole = {
        "--out": out is not None,
        "--peer": bool(peers),
        "--details": details,
        f"--verify {verify}": verify != TREE,
    }
    if asked := next((option for option, given in of_whole.items() if given), None):
        raise RescoreError(
            f"{asked} is for whole evaluations, and a trace knows no whole output of {rule.name} acceptance; drop it, "
            "or add --mode live"
        )
    found = UntilDivergences(rule.name)
    tell = partial(add_notice, found.notices, None)
    for recording in recordings:
        judging = _decidable(rule, recording)
        work = prepared(recording, runs, {}, live=False, costs=costs, peers=[], rule=rule)
        for line in work.notices(live=False):
            tell(line)
        trace = recording.trace(progress=progress)
        _check_first_slot(judging, recording, trace)
        drafting = work.fitted(trace, tell)
        drafters = (drafter for each in drafting.values() for drafter in each.drafters)
        of_models = recording.drafted(trace, drafters, progress)
        for run, each in drafting.items():
            limits = Limits.of(trace.header)
            whole = replay_steps(trace.examples, each, of_models, limits=limits)
            steps = replay_steps(trace.examples, each, of_models, limits=limits, rule=judging)
            kept = [[*s.accepted[:-1], s.diverged or s.accepted[-1]] for s in steps]
            groups = [example.group for example in trace.examples]
            longest = each.longest(trace.header.h)
            accounting = account(kept, longest, groups=groups, seed=seed)
            found.rows.append(UntilDivergence(
                task=recording.name, rescorer=run.label, k=run.k, p=run.p, n=len(kept), groups=accounting.groups,
                diverged=sum(s.diverged is not None for s in steps), steps=accounting.steps,
                of_steps=accounting.steps / sum(len(s.accepted) for s in whole),
                hit_rate=accounting.block_efficiency, hit_rate_ci95=accounting.block_efficiency_ci95,
                greedy=block_efficiency([s.accepted for s in steps]),
            ))  # fmt: skip
    return found


def _decidable(rule: Rule, recording: Recording) -> OfLikeliest:
    """The rule. Raises `RescoreError` with the reason where a trace can't tell what it keeps."""
    if not isinstance(rule, OfLikeliest):
        raise RescoreError(
            f"{rule.name} acceptance goes by the base's whole distribution, its entropy too, and a trace keeps the "
            f"{recording.k} likeliest tokens of it; {LIVE}"
        )
    if rule.width > recording.k:
        raise RescoreError(
            f"{rule.name} acceptance goes by the {rule.width} likeliest tokens, and the trace of {recording.name} "
            f"keeps {recording.k}; give fewer, or --k {rule.width} where it is recorded anew, or {LIVE}"
        )
    imported = recording.settings.get("imported")
    if isinstance(imported, dict) and imported.get("missing"):
        raise RescoreError(_lacks(recording, "they were not logged"))
    return rule


def _check_first_slot(rule: OfLikeliest, recording: Recording, trace: Trace) -> None:
    """Raises `RescoreError` where a rule goes by more than the first entry of slot 1 and these are not the base's own.

    A drafter's trace may have the base's slot 1 or, beside the base's token, its own guesses at it. It is the base's
    where its first two entries are as far apart as the base's margin, which every trace has.
    """
    if rule.width == 1 or "drafter" not in recording.settings:
        return
    apart = [e.lattice.logps[:, 0, 0] - e.lattice.logps[:, 0, 1] - e.margins for e in trace.examples]
    if not np.abs(np.concatenate(apart)).mean() <= MARGIN:  # so written, an infinite one is refused, too
        raise RescoreError(_lacks(recording, "its slot 1 is a drafter's but for the first entry"))


def _lacks(recording: Recording, why: str) -> str:
    return f"the trace of {recording.name} does not hold the base's own likeliest tokens: {why}; {LIVE}"


def until_divergence_table(found: UntilDivergences) -> Table:
    """A line for each run."""
    columns = [
        TASK, RESCORER, K, P, EXAMPLES, GROUPS, Column("diverged", COUNT), Column("steps", COUNT),
        Column("of all", SHARE, field="of_steps"), Column("until then", NUMBER, "hit_rate"),
        Column("95 %", NUMBER_INTERVAL, "hit_rate", "hit_rate_ci95"), Column("greedy there", NUMBER, "greedy"),
    ]  # fmt: skip
    title = f"LOSSY, until first divergence: {found.acceptance} acceptance, as far as traces of greedy outputs know it"
    note = (
        "diverged = examples in which a token is kept that greedy decoding would not; steps = until then, that step\n"
        "included, and their share of greedy acceptance's; until then = tokens kept in each of these steps, of the\n"
        "last one up to that token, so a lower bound; greedy there = what greedy acceptance keeps in the same steps.\n"
        "What follows, whole outputs, their scores and times: --mode live."
    )
    return Table.of(columns, found.rows, title=title, note=note)
