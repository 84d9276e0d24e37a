"""What is to be done for one task: its runs, checked and fitted, with the peers beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lattices.errors import IncompatibleError, RescoreError
from rescore.acceptance import Rule
from rescore.acceptance.rules import check_rule
from rescore.calls import usable_verify
from rescore.checks import check_held_k
from rescore.costs.kept import of_elsewhere
from rescore.costs.predicting import predicted_speedup
from rescore.costs.table import Costs
from rescore.decoding import GREEDY
from rescore.drafters.base import is_lattice_alone
from rescore.drafters.drafting import Drafting, check_drafters
from rescore.drafters.heads import Heads
from rescore.peers import Peer
from rescore.rescorers import Rescorer
from rescore.runs.inputs import Notify
from rescore.runs.log import ExampleLog, Key
from rescore.runs.recording import Recording
from rescore.runs.records import ExampleRecord, ResultsDocument, RunRecord, is_oracle
from rescore.runs.run import NONE, Choosing, Run, label_of, load_choosing, runs_of
from rescore.runs.summary import summarize
from rescore.runs.weights import (
    alpha_notices,
    alpha_of,
    coverage_notices,
    fit_with_costs,
    fitted_to,
    identities_of,
    target_before,
    target_of,
)
from rescore.tracing import Trace

if TYPE_CHECKING:
    from lm.base.model import BaseLM

Asked = Sequence[str | Run | Rescorer]  # runs, as a caller names them


@dataclass(frozen=True)
class Work:
    """The runs of one task: their rescorers with drafters by label, and their records in the order of the runs; and the
    peers. rule: what the runs' labels say of it; costs: by which runs are planned and predicted."""

    recording: Recording
    runs: list[Run]
    choosing: dict[str, Choosing]
    records: list[RunRecord]
    peers: list[Peer]
    rule: Rule = GREEDY
    costs: Costs | None = None

    @property
    def name(self) -> str:
        return self.recording.name

    @property
    def sides(self) -> list[Run | Peer]:
        return [*self.runs, *self.peers]

    def key(self, side: Run | Peer) -> Key:
        # A peer has no lattice: it stands beside the runs with the most entries.
        own = (side.name, 1, max(run.k for run in self.runs)) if isinstance(side, Peer) else side.key
        return (self.name, *own)

    def notices(self, *, live: bool) -> list[str]:
        """What to know of the recording, of the runs' weights and of the costs."""
        recording, costs = self.recording, self.costs
        lines = [*recording.notices, *alpha_notices(self.records, recording)]
        elsewhere = of_elsewhere(costs, recording, target_before(recording), live=live) if costs else None
        return [*lines, elsewhere] if elsewhere else lines

    def fitted(self, trace: Trace, notify: Notify, shared: BaseLM | None = None) -> dict[Run, Drafting]:
        """How each run drafts, fitted to a trace, with its weight.

        Raises `IncompatibleError` if a rescorer or drafter is no longer what the records of the runs name.
        """
        device, models = self.recording.models.device, self.recording.loads
        target = target_of(trace, device=device, shared=shared, models=models, costs=self.costs)
        fitted = fitted_to(target, self.choosing)
        for record in self.records:
            if identities_of(fitted[record.rescorer]) != (record.identity, record.drafters):
                raise IncompatibleError(f"{record.rescorer} was replaced while it was read; run the command again")
        for line in coverage_notices(trace, fitted, max(run.k for run in self.runs)):
            notify(line)
        drafting = {}
        for run, record in zip(self.runs, self.records, strict=True):
            rescorer, drafters = fitted[run.label]
            rescorer = rescorer.weighted(record.alpha.alpha) if record.alpha else rescorer
            drafting[run] = Drafting(rescorer, drafters, run.k, run.p)
        return drafting

    def summarize(self, log: ExampleLog, document: ResultsDocument, *, seed: int) -> None:
        """Adds the results of what is finished, in the order of the runs, peers last."""
        alphas = {run: record.alpha.alpha for run, record in zip(self.runs, self.records, strict=True) if record.alpha}
        for side in self.sides:
            key = self.key(side)
            if records := log.records(key, self.recording.ids):
                unrescored = log.records((self.name, self.rule.marked(NONE), 1, key[-1]), self.recording.ids)
                summed = partial(summarize, records, seed=seed, unrescored=unrescored, sampled=document.config.sampled)
                if isinstance(side, Peer):
                    document.results.append(summed(peer=True))
                    continue
                predicted = self._predicted(side, records, document.config.verify)
                drafters = self.choosing[side.label][1]
                document.results.append(summed(alpha=alphas.get(side), drafters=drafters, predicted=predicted))

    def verify(self, asked: str, p: int) -> str:
        """How a replayed decode would verify p drafts: what the base takes no tree of is a batch, as far as is
        known."""
        return usable_verify(asked, p, trees=self.costs is None or self.costs.tree_ms is not None)

    def _predicted(self, run: Run, records: Sequence[ExampleRecord], asked: str) -> float | None:
        choice_ms = self.costs.choice_ms(run.chooses, run.k, run.p) if self.costs else None
        if self.costs is None or choice_ms is None:
            return None
        live = records[0].live
        verify = live.verify if live else self.verify(asked, run.p)
        vocabulary = next((d.size for d in self.choosing[run.label][1] if isinstance(d, Heads)), None)
        return predicted_speedup(records, self.costs, choice_ms, verify=verify, vocabulary=vocabulary)


def prepared(
    recording: Recording,
    asked: Asked,
    loaded: dict[object, Any],
    *,
    live: bool,
    costs: Costs | str | None,
    peers: list[Peer],
    rule: Rule,
) -> Work:
    """The runs of one task, checked; rescorers that other tasks have `loaded` are shared."""
    named = runs_of(asked)
    if not named:
        raise RescoreError("nothing is to be run; give a rescorer at least (--rescorer none)")
    runs = [replace(run, label=rule.marked(run.label)) for run in named]
    keys = [*(run.key for run in runs), *((peer.name, 1, max(run.k for run in runs)) for peer in peers)]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise RescoreError("{} with p = {} and k = {} is there twice; give one another label".format(*twice))
    for run in runs:
        if run.needs_heads and recording.h == 1 and not recording.given:
            raise RescoreError(
                f"{run.label} needs block heads, and {recording.name} was recorded without; record again"
            )
        check_held_k(recording.k, run.k)
    choosing = load_choosing(runs, loaded)
    check_choosing(choosing, rule, live=live)
    _check_weights(named, [choosing[run.label][0] for run in runs])
    fitted, table = fit_with_costs(recording, choosing, costs)
    records = []
    for run in runs:
        identity, of_drafters = identities_of(fitted[run.label])
        alpha = alpha_of(recording, run, fitted[run.label])
        records.append(
            RunRecord(rescorer=run.label, k=run.k, p=run.p, alpha=alpha, identity=identity, drafters=of_drafters)
        )
    return Work(recording, runs, choosing, records, peers, rule, table)


def check_choosing(choosing: Mapping[str, Choosing], rule: Rule, *, live: bool) -> None:
    """Raises `RescoreError` for rescorers and drafters that can't be decoded with, or not be judged by the rule."""
    for label, (rescorer, drafters) in choosing.items():
        check_drafters(drafters, live=live)
        check_rule(rule, label, draws=rescorer.random, lattices_only=is_lattice_alone(drafters))
        if is_oracle(label) and rule.name != GREEDY.name:
            raise RescoreError("the oracle knows greedy decoding's output, and this will be another; leave it out")


def check_identities(work: Iterable[Work]) -> None:
    """Raises `RescoreError` for a rescorer or drafter that a folder's results could not be known to be of."""
    for run, record in (pair for task in work for pair in zip(task.runs, task.records, strict=True)):
        if (isinstance(run.rescorer, Rescorer) and not record.identity) or "" in record.drafters:
            raise RescoreError(
                f"a folder's results could not be known to be of {run.label}: set its `identity` (and that of its "
                "drafters), a hash of what it scores or drafts with, or leave out `out` and save the evaluation"
            )


def _check_weights(runs: Sequence[Run], rescorers: Sequence[Rescorer]) -> None:
    """Raises `RescoreError` for weights that change nothing: one for all runs need not be used by each of them."""
    weighted = [(run, rescorer.alpha) for run, rescorer in zip(runs, rescorers, strict=True) if run.alpha is not None]
    unused = [run for run, weight in weighted if weight is None]
    # What says its weight itself, or is called something else, is not called as it would be without.
    of_all = [run for run, _ in weighted if run.label in (run.chooses, label_of(run.rescorer, run.drafters))]
    own = [run for run in unused if run not in of_all]
    if own or (unused and len(of_all) == len(unused)):
        labels = dict.fromkeys(run.label for run in own or unused)
        raise RescoreError(f"no weight is used by --rescorer {' or '.join(labels)}; drop --alpha")
