"""Tunes the weight of rescorers by replay on held-out examples: of the last groups of the data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import product

import numpy as np
import torch

from lattices.errors import RescoreError
from lattices.joined import ACTIVE, WEIGHTS, features_along, loss_and_gradient, room_for
from lattices.ngram_search import NgramSearch
from lm.files import write_json
from lm.records import plain
from rescore.accounting import account
from rescore.checks import check_held_k
from rescore.replaying import replay
from rescore.rescorers import Context, Rescorer
from rescore.rescorers.joint import Joint, sources_at
from rescore.runs.environment import environment
from rescore.runs.inputs import Notify, Progress
from rescore.runs.recording import Recording
from rescore.runs.records import Tuned
from rescore.runs.run import DEFAULT_K, Run, load_rescorers
from rescore.runs.weights import check_tokenizers, coverage_notices, fit_to, target_of, tuned_path
from rescore.tracing import Trace, TracedExample

DEFAULT_ALPHAS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
HELD_OUT = 100
FITTED_DEPTH = 12  # tokens of the known output that are looked ahead when weights of `joint` are fitted
RIDGE = 1.0  # squared weights beside the log-loss, summed over all positions
ROUNDS = 100


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
    by_label = load_rescorers(runs)
    if weightless := [label for label, rescorer in by_label.items() if rescorer.alpha is None]:
        raise RescoreError(f"the rescorer {weightless[0]} has no weight to tune; give one that has, like ngram")
    sweeps = []
    for recording in [recordings] if isinstance(recordings, Recording) else recordings:
        recording = recording.held_out(held_out, evaluated=evaluated)
        check_held_k(recording.k, max(ks))
        if notify:
            for line in recording.notices:
                notify(line)
        check_tokenizers(recording, by_label.values())
        trace = recording.trace(progress=progress)
        fitted = fit_to(trace, by_label, device=recording.models.device)
        for line in coverage_notices(trace, fitted, max(ks)):
            if notify:
                notify(line)
        efficiency: dict[Run, list[float]] = {run: [] for run in runs}
        for done, (run, alpha) in enumerate(product(runs, swept), start=1):
            accepted = replay(trace.examples, fitted[run.label].weighted(alpha), k=run.k, p=run.p)
            efficiency[run].append(account(accepted, trace.header.h).block_efficiency)
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


def fit_joint(traces: Sequence[Trace], joint: Joint, *, k: int) -> tuple[np.ndarray, float]:
    """Weights that make the base's own choices likeliest on held-out traces, and the mean log-loss a prefix, in nats.

    Every position of every output is learned from, and from each what comes after it: the candidates after each right
    prefix, the right one among them or not. The loss is convex, so the weights do not depend on where it starts.
    """
    rows = [_features(trace, joint, k=k) for trace in traces]
    data = [np.concatenate([each[field] for each in rows]) for field in range(5)]
    weights = torch.zeros(WEIGHTS, dtype=torch.float64)
    optimizer = torch.optim.LBFGS([weights], max_iter=ROUNDS, history_size=20, line_search_fn="strong_wolfe")
    gradient, prefixes = np.zeros(WEIGHTS), len(data[0])

    def closure() -> torch.Tensor:
        loss = loss_and_gradient(weights.numpy(), *data, gradient)
        weights.grad = (torch.from_numpy(gradient) + RIDGE * weights) / prefixes
        return (loss + 0.5 * RIDGE * (weights**2).sum()) / prefixes

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.numpy().copy(), float(loss_and_gradient(weights.numpy(), *data, gradient)) / prefixes


def _features(trace: Trace, joint: Joint, *, k: int) -> list[np.ndarray]:
    """The arrays of `features_along`, of all positions of a trace."""
    search = joint.ngram.fit(target_of(trace)).search()
    assert isinstance(search, NgramSearch)
    parts = [part for example in trace.examples for part in _of_example(example, search, k)]
    return [np.concatenate([part[field] for part in parts]) for field in range(5)]


def _of_example(example: TracedExample, search: NgramSearch, k: int) -> Iterator[list[np.ndarray]]:
    room = room_for(k, 0)
    context = Context(example.prompt_ids.tolist())
    for position in range(len(example.output_ids) - 1):
        path = example.output_ids[position : position + FITTED_DEPTH]
        outcomes = len(path) * (len(room.token_ids) + 1)
        arrays = [np.zeros(len(path), dtype=np.int32) for _ in range(2)]
        arrays += [np.zeros(outcomes, dtype=np.int32)]
        arrays += [np.zeros((outcomes, ACTIVE), dtype=np.int16), np.zeros((outcomes, ACTIVE), dtype=np.float32)]
        lattice = example.lattice
        sources = sources_at(search, lattice.token_ids[position, :, :k], lattice.logps[position, :, :k], context)
        prefixes, used = features_along(sources, path, room, *arrays)
        yield [array[:size].copy() for array, size in zip(arrays, (prefixes, prefixes, used, used, used), strict=True)]
        context.output_ids.append(int(example.output_ids[position]))
