"""Tunes the weight of rescorers by replay on held-out examples: of the last groups of the data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import product
from pathlib import Path

from lattices.errors import RescoreError
from lattices.paths import user_path
from lm.files import write_json
from lm.records import plain
from rescore.accounting import block_efficiency
from rescore.checks import check_held_k
from rescore.replaying import replay
from rescore.rescorers import JOINT, Rescorer, load_rescorer, parse_spec
from rescore.rescorers.joint import Joint, write_weights
from rescore.rescorers.joint_fit import JointFit, fit_weights
from rescore.runs.environment import environment
from rescore.runs.inputs import Notify, Progress
from rescore.runs.recording import Recording
from rescore.runs.records import Tuned
from rescore.runs.run import DEFAULT_K, Run, load_rescorers
from rescore.runs.weights import coverage_notices, fit_before, fit_to, target_before, target_of, tuned_path
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
    held_out: int = HELD_OUT,
    evaluated: Collection[str] = (),
    keep: bool = True,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> list[Tuned]:
    """Sweeps the weight of every rescorer on every task, 0 among the `alphas`.

    held_out: examples of the last groups of the data, at most half of the groups (`rescore.groups.held_out`).
    evaluated: groups that are not tuned on while there are others.
    keep: keeps the best weights on this machine, for runs whose alpha is `tuned`.
    Raises `RescoreError` for a rescorer without weight and for what `evaluate` refuses.
    """
    swept = tuple(sorted({0.0, *alphas}))
    runs = [Run(rescorer, p=p, k=k) for rescorer in dict.fromkeys(rescorers) for k in ks for p in ps]
    for alpha in alphas:
        Run(alpha=alpha)  # refuses what is no weight
    if given := [run for run in runs if run.alpha is not None]:
        raise RescoreError(f"{given[0].label} says its weight, which is to be tuned; leave it out")
    by_label = load_rescorers(runs)
    if weightless := [label for label, rescorer in by_label.items() if rescorer.alpha is None]:
        raise RescoreError(f"the rescorer {weightless[0]} has no weight to tune; give one that has, like ngram")
    sweeps = []
    for recording in [recordings] if isinstance(recordings, Recording) else recordings:
        recording = recording.held_out(held_out, evaluated=evaluated)
        trace = _trace(recording, max(ks), lambda of: fit_before(of, by_label), progress, notify)
        fitted = fit_to(trace, by_label, device=recording.models.device)
        for line in coverage_notices(trace, fitted, max(ks)):
            if notify:
                notify(line)
        efficiency: dict[Run, list[float]] = {run: [] for run in runs}
        for done, (run, alpha) in enumerate(product(runs, swept), start=1):
            accepted = replay(trace.examples, fitted[run.label].weighted(alpha), k=run.k, p=run.p)
            efficiency[run].append(block_efficiency(accepted))
            if progress:
                progress(f"tune {recording.name}", done, len(runs) * len(swept))
        for run, values in efficiency.items():
            rescorer = fitted[run.label]
            tuned = Tuned(
                task=recording.name, rescorer=run.label, k=run.k, p=run.p, alphas=swept,
                block_efficiency=tuple(values), alpha=swept[values.index(max(values))],
                held_out=recording.ids, held_out_groups=tuple(dict.fromkeys(recording.groups)),
                identity=rescorer.identity, data_sha256=recording.data_sha256,
            )  # fmt: skip
            if keep:
                path = tuned_path(recording, rescorer, k=run.k, p=run.p)
                write_json(path, {**plain(tuned), "settings": recording.settings, **environment()})
            sweeps.append(tuned)
    return sweeps


def _trace(
    recording: Recording,
    k: int,
    check: Callable[[Recording], object],
    progress: Progress | None,
    notify: Notify | None,
) -> Trace:
    """The trace of examples to tune on; before anything is decoded it is known that it holds k, and what `check`
    refuses."""
    check_held_k(recording.k, k)
    if notify:
        for line in recording.notices:
            notify(line)
    check(recording)
    return recording.trace(progress=progress)


def is_joint(specs: Sequence[str], out: Path | None) -> bool:
    """Whether weights of `joint` are asked for, which are fitted and not swept.

    Raises `RescoreError` for joint beside others, without a folder, and for a folder without joint.
    """
    joint = [spec for spec in specs if parse_spec(spec)[0] == JOINT]
    if joint and (len(specs) > 1 or out is None):
        raise RescoreError("the weights of joint are fitted alone, into a folder: --rescorer joint --out DIR")
    if out is not None and not joint:
        raise RescoreError("--out is for the weights of joint; drop it, or give --rescorer joint")
    return bool(joint)


def fit_joint(
    recordings: Recording | Iterable[Recording],
    out: str | Path | None,
    spec: str = JOINT,
    *,
    k: int = DEFAULT_K,
    held_out: int = HELD_OUT,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> JointFit:
    """Fits the weights of `joint` on held-out examples of all tasks together, and writes them into a folder.

    held_out: examples of each task, as for `tune`. How well the probabilities hold is measured on half of the groups
    with weights of the other half. Raises `RescoreError` for what `evaluate` refuses, `OutputError`.
    """
    joint = load_rescorer(spec)
    assert isinstance(joint, Joint)
    examples, groups = [], []
    for recording in [recordings] if isinstance(recordings, Recording) else recordings:
        recording = recording.held_out(held_out)
        # Not `fit_before`: the weights need not be there yet.
        trace = _trace(recording, k, lambda of: joint.search_for(target_before(of)), progress, notify)
        search = joint.search_for(target_of(trace))
        examples += [(example, search) for example in trace.examples]
        groups += [f"{recording.name} {group}" for group in recording.groups]
    fit = fit_weights(examples, groups, k=k)
    write_weights(user_path(out or "", "--out"), fit, joint.ngram)
    return fit
