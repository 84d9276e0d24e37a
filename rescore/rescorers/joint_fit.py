"""Fits the weights of `joint` on held-out traces: those that make the base's own choices likeliest.

Every position of every output is learned from: after each right prefix that begins there the candidates are gathered
as they are when drafting, the right one among them or not. The log-loss is convex in the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lattices.joined.candidates import (
    WEIGHTS,
    Outcomes,
    Sources,
    features_along,
    loss_and_gradient,
    outcome_logps,
    outcomes_for,
    room_for,
)
from lattices.ngram_search import NgramSearch
from lattices.statistics import reliability
from rescore.rescorers.base import Context
from rescore.rescorers.lookup import lookup_of
from rescore.tracing import TracedExample

AHEAD = 12  # tokens of the known output that are looked at from each position
RIDGE = 1.0  # squared weights beside the log-loss, summed over all prefixes
ROUNDS = 100
BINS = 10
Examples = Sequence[tuple[TracedExample, NgramSearch]]


@dataclass(frozen=True)
class JointFit:
    """Fitted weights, and how well their probabilities hold.

    weights: as `lattices.joined.candidates` has them. examples, groups, prefixes: what they were fitted on.
    log_loss: nats a prefix, of weights that were fitted on the other half of the groups; likewise the rest
        (None: there is one group only).
    calibration_error: expected calibration error of the candidates' probabilities (Guo et al. 2017).
    counts, confidences, accuracies: by bin of the reliability diagram (None where a bin is empty).
    """

    weights: list[float]
    examples: int
    groups: int
    prefixes: int
    log_loss: float | None
    calibration_error: float | None
    counts: list[int]
    confidences: list[float | None]
    accuracies: list[float | None]


def fit_weights(examples: Examples, groups: Sequence[str], *, k: int) -> JointFit:
    """Weights from traced examples (each with the n-gram model of its base) and their groups."""
    each = [_features(example, search, k) for example, search in examples]
    names = list(dict.fromkeys(groups))
    half = {name: place % 2 for place, name in enumerate(names)}
    losses, logps, right = [], [np.zeros(0)], [np.zeros(0, dtype=np.bool_)]
    for side in (0, 1) if len(names) > 1 else ():
        others = [data for data, group in zip(each, groups, strict=True) if half[group] != side]
        of_side = _joined([data for data, group in zip(each, groups, strict=True) if half[group] == side])
        measured = outcome_logps(_fit(_joined(others)), of_side)
        ends = of_side.counts.cumsum()
        places = ends - of_side.counts + of_side.targets
        losses.append(-measured[places].sum())
        is_right = np.zeros(len(measured), dtype=np.bool_)
        is_right[places] = True
        is_candidate = np.ones(len(measured), dtype=np.bool_)
        is_candidate[ends - 1] = False
        logps.append(measured[is_candidate])
        right.append(is_right[is_candidate])
    data = _joined(each)
    bins = reliability(np.exp(np.concatenate(logps)), np.concatenate(right), BINS)
    return JointFit(
        weights=_fit(data).tolist(),
        examples=len(examples),
        groups=len(names),
        prefixes=len(data.targets),
        log_loss=float(sum(losses)) / len(data.targets) if losses else None,
        calibration_error=bins.error if losses else None,
        counts=bins.count.tolist(),
        confidences=[None if np.isnan(c) else float(c) for c in bins.confidence],
        accuracies=[None if np.isnan(a) else float(a) for a in bins.accuracy],
    )


def _joined(parts: Sequence[Outcomes]) -> Outcomes:
    return Outcomes(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _fit(data: Outcomes) -> np.ndarray:
    import torch

    weights = torch.zeros(WEIGHTS, dtype=torch.float64)
    optimizer = torch.optim.LBFGS([weights], max_iter=ROUNDS, history_size=20, line_search_fn="strong_wolfe")
    gradient, prefixes = np.zeros(WEIGHTS), len(data.targets)

    def closure() -> torch.Tensor:
        loss = loss_and_gradient(weights.numpy(), data, gradient)
        weights.grad = (torch.from_numpy(gradient) + RIDGE * weights) / prefixes
        return (loss + 0.5 * RIDGE * (weights**2).sum()) / prefixes

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.numpy().copy()


def _features(example: TracedExample, search: NgramSearch, k: int) -> Outcomes:
    return _joined(list(_by_position(example, search, k)))


def _by_position(example: TracedExample, search: NgramSearch, k: int) -> Iterator[Outcomes]:
    room = room_for(k, 0)
    context = Context(example.prompt_ids.tolist())
    for position in range(len(example.output_ids)):
        path = example.output_ids[position : position + AHEAD]
        data = outcomes_for(len(path), room)
        lattice = example.lattice
        sources = sources_at(search, lattice.token_ids[position, :, :k], lattice.logps[position, :, :k], context)
        prefixes, used = features_along(sources, path, room, data)
        sizes = (prefixes, prefixes, used, used, used)
        yield Outcomes(*(array[:size].copy() for array, size in zip(data, sizes, strict=True)))
        context.output_ids.append(int(example.output_ids[position]))


def sources_at(search: NgramSearch, token_ids: np.ndarray, logps: np.ndarray, context: Context) -> Sources:
    """What candidates come from before a lattice `[h, k]`."""
    state = search.state_after(context.last(search.automaton.order - 1))
    none = np.zeros((0, 1))
    return Sources(
        np.ascontiguousarray(token_ids), np.ascontiguousarray(logps), lookup_of(context).tables,
        search.automaton.cells, search.automaton.roots, search.words, state,
        none.astype(np.int32), none.astype(np.float32),
    )  # fmt: skip
