"""Tunes the weight of rescorers by replay on held-out examples: of the last groups of the data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from lattices.errors import IncompatibleError, RescoreError
from lattices.paths import user_path
from lm.environment import environment
from lm.executors import HERE, Executor
from lm.files import write_json
from lm.keys import key_of
from lm.records import plain
from rescore.accounting import block_efficiency
from rescore.checks import check_held_k
from rescore.drafters.asked import fit_drafter
from rescore.replaying import Drafted, replay
from rescore.rescorers import JOINT, Rescorer
from rescore.rescorers.joint_fit import JointData
from rescore.rescorers.joint_weights import JointFit, write_weights
from rescore.runs.inputs import Inputs, Notify, Progress
from rescore.runs.recording import Recording, open_recording
from rescore.runs.records import Tuned
from rescore.runs.run import DEFAULT_K, Choosing, Run, load_choosing, says_drafters
from rescore.runs.weights import (
    coverage_notices,
    fitted_to,
    identities_of,
    target_before,
    target_of,
    tuned_path,
)
from rescore.specs import MAIN, format_spec, parse_spec
from rescore.tracing import Trace

DEFAULT_ALPHAS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
HELD_OUT = 100


def tune(
    recordings: Recording | Iterable[Recording],
    rescorers: Sequence[str | Rescorer],
    *,
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    ks: Sequence[int] = (DEFAULT_K,),
    ps: Sequence[int] = (1, 16),
    drafters: Sequence[str] = (),
    held_out: int = HELD_OUT,
    evaluated: Collection[str] = (),
    keep: bool = True,
    executor: Executor = HERE,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> list[Tuned]:
    """Sweeps the weight of every rescorer on every task, 0 among the `alphas`.

    drafters: what rescorers choose among that do not say it themselves (none: their own).
    held_out: examples of the last groups of the data, at most half of the groups (`rescore.tasks.groups.held_out`).
    evaluated: groups that are not tuned on while there are others.
    keep: keeps the best weights on this machine, for runs whose alpha is `tuned`.
    executor: who records and replays.
    Raises `RescoreError` for a rescorer without weight and for what `evaluate` refuses.
    """
    swept = tuple(sorted({0.0, *alphas}))
    runs = []
    for rescorer in dict.fromkeys(rescorers):
        among = () if says_drafters(rescorer) else tuple(drafters)
        runs += [Run(rescorer, p=p, k=k, drafters=among) for k in ks for p in ps]
    for alpha in alphas:
        Run(alpha=alpha)  # refuses what is no weight
    if given := [run for run in runs if run.alpha is not None]:
        raise RescoreError(f"{given[0].label} says its weight, which is to be tuned; leave it out")
    choosing = load_choosing(runs)
    if weightless := [label for label, (rescorer, _) in choosing.items() if rescorer.alpha is None]:
        raise RescoreError(f"the rescorer {weightless[0]} has no weight to tune; give one that has, like ngram")
    executor.begin()
    sweeps = []
    for recording in [recordings] if isinstance(recordings, Recording) else recordings:
        recording = recording.held_out(held_out, evaluated=evaluated)
        check_held_k(recording.k, max(ks))
        recording.announce(notify)
        fitted_to(target_before(recording), choosing)  # refuses what it does before anything is decoded
        trace = recording.trace(executor=executor, progress=progress)
        fitted = fitted_to(target_of(trace, device=recording.models.device, models=recording.loads), choosing)
        for line in coverage_notices(trace, fitted, max(ks)):
            if notify:
                notify(line)
        of_models = recording.drafted(trace, (drafter for _, each in fitted.values() for drafter in each), progress)
        efficiency: dict[Run, list[float]] = {run: [] for run in runs}
        sweep: Callable[[tuple[Run, float]], float] = _Sweep(trace, of_models, fitted)
        if not executor.is_local:
            names = {label: identities_of(each) for label, each in fitted.items()}
            models = recording.models
            sweep = _SweepByWorkers(
                trace, of_models, models.inputs_of_worker, recording.k, models.heads_needed, runs, names
            )
        every = list(product(runs, swept))
        for done, ((run, _), value) in enumerate(zip(every, executor.map(sweep, every), strict=True), start=1):
            efficiency[run].append(value)
            if progress:
                progress(f"tune {recording.name}", done, len(runs) * len(swept))
        for run, values in efficiency.items():
            tuned = Tuned(
                task=recording.name, rescorer=run.label, k=run.k, p=run.p, alphas=swept,
                block_efficiency=tuple(values), alpha=swept[values.index(max(values))],
                held_out=recording.ids, held_out_groups=tuple(dict.fromkeys(recording.groups)),
                identity=fitted[run.label][0].identity, data_sha256=recording.data_sha256,
            )  # fmt: skip
            if keep:
                path = tuned_path(recording, fitted[run.label], k=run.k, p=run.p)
                write_json(path, {**plain(tuned), "settings": recording.settings, **environment()})
            sweeps.append(tuned)
    return sweeps


@dataclass(frozen=True)
class _Sweep:
    """Gives the block efficiency of a run with a weight."""

    trace: Trace
    drafted: Drafted
    fitted: Mapping[str, Choosing]

    def __call__(self, weighted: tuple[Run, float]) -> float:
        run, alpha = weighted
        rescorer, drafters = self.fitted[run.label]
        how: dict[str, Any] = {"k": run.k, "p": run.p, "drafters": drafters, "drafted": self.drafted}
        return block_efficiency(replay(self.trace.examples, rescorer.weighted(alpha), **how))


@dataclass(frozen=True)
class _SweepByWorkers:
    """The same in a worker, which loads rescorers itself: they must be those that are `named` (`identities_of`)."""

    trace: Trace
    drafted: Drafted
    inputs: Inputs
    k: int
    heads_needed: bool
    runs: list[Run]
    named: dict[str, tuple[str, list[str]]]

    def __call__(self, weighted: tuple[Run, float]) -> float:
        key = key_of([plain(self.trace.header), self.named, [(run.label, run.k, run.p) for run in self.runs]])
        if key not in _OF_WORKER:
            recording = open_recording(self.inputs, k=self.k, heads_needed=self.heads_needed)
            target = target_of(self.trace, device=recording.models.device, models=recording.loads)
            fitted = fitted_to(target, load_choosing(self.runs))
            if {label: identities_of(each) for label, each in fitted.items()} != self.named:
                raise IncompatibleError("a worker finds other rescorers than there are here; give all the same files")
            _OF_WORKER.clear()
            _OF_WORKER[key] = fitted
        return _Sweep(self.trace, self.drafted, _OF_WORKER[key])(weighted)


_OF_WORKER: dict[str, Mapping[str, Choosing]] = {}  # of its last sweep


def is_joint(specs: Sequence[str], out: Path | None, without: Sequence[str] = (), alphas: Sequence[float] = ()) -> bool:
    """Whether weights of `joint` are asked for, which are fitted and not swept.

    Raises `RescoreError` for joint beside others, without a folder or with `alphas` to try, and for a folder, or
    features to leave out, without joint.
    """
    joint = [spec for spec in specs if spec.partition(":")[0] == JOINT]
    if joint and (len(specs) > 1 or out is None):
        raise RescoreError("the weights of joint are fitted alone, into a folder: --rescorer joint --out DIR")
    if joint and alphas:
        raise RescoreError("the weights of joint are fitted, none are tried; drop --alphas")
    for option, given in (("--out", out is not None), ("--without", without)):
        if given and not joint:
            raise RescoreError(f"{option} is for the weights of joint; drop it, or give --rescorer joint")
    return bool(joint)


def fitted_spec(spec: str, out: Path | None) -> str:
    """What uses the weights that were fitted for `spec` into a folder, all else as it was asked for."""
    _, arguments = parse_spec(spec)
    return format_spec(JOINT, {MAIN: str(out), **{key: value for key, value in arguments.items() if key != MAIN}})


def fit_joint(
    recordings: Recording | Iterable[Recording],
    out: str | Path | None,
    spec: str = JOINT,
    *,
    drafters: Sequence[str] = (),
    without: Sequence[str] = (),
    k: int = DEFAULT_K,
    held_out: int = HELD_OUT,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> JointFit:
    """Fits the weights of `joint` on held-out examples of all tasks together, and writes them into a folder.

    drafters: what joint is to choose among (none: heads and lookup); without: features that get no weight.
    held_out: examples of each task, as for `tune`. How well the probabilities hold is measured on half of the groups
    with weights of the other half. Raises `RescoreError` for what `evaluate` refuses, `OutputError`.
    """
    from rescore.rescorers.joint import Joint  # torch, which plans of suites do without

    run = Run(spec, k=k, drafters=tuple(drafters))
    joint = run.load()
    assert isinstance(joint, Joint)
    of_run = run.load_drafters(joint)
    data, bigrams, fitted = JointData(), set(), list(of_run)
    for recording in [recordings] if isinstance(recordings, Recording) else recordings:
        recording = recording.held_out(held_out)
        check_held_k(recording.k, k)
        recording.announce(notify)
        joint.ngram.fit(target_before(recording))  # not `fitted_to`: the weights need not be there yet
        trace = recording.trace(progress=progress)
        target = target_of(trace, device=recording.models.device, models=recording.loads)
        fitted = [fit_drafter(drafter, target) for drafter in of_run]
        of_models = recording.drafted(trace, fitted, progress)
        groups = [f"{recording.name} {group}" for group in recording.groups]
        statistics, bigram = joint.statistics_for(target)
        bigrams.add(bigram)
        data.add(trace.examples, groups, fitted, statistics, k=k, drafted=of_models)
    if len(bigrams) > 1:
        raise RescoreError("the traces are of bases with other learned bigrams; fit weights for each base")
    fit = data.fit(fitted, ngram=joint.ngram.model.sha256, bigram=bigrams.pop(), k=k, without=without)
    write_weights(user_path(out or "", "--out"), fit)
    return fit
