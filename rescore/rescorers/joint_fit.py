"""Fits the weights of `joint` on held-out traces: those that make the base's own choices likeliest.

Every position of every output is learned from: after each right prefix that begins there the candidates are gathered
as they are when drafting, the right one among them or not. The log-loss is convex in the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lattices.errors import UnknownNameError
from lattices.joined.candidates import WEIGHTS
from lattices.joined.outcomes import Outcomes, features_along, loss_and_gradient, outcome_logps, outcomes_for
from lattices.joined.sources import Room, room_for
from lattices.statistics import reliability
from rescore.drafters.base import Drafter
from rescore.drafters.proposals import Proposals, Statistics
from rescore.replaying import Drafted, contexts_of
from rescore.rescorers.joint_weights import FEATURES, JointFit
from rescore.tracing import TracedExample

AHEAD = 12  # tokens of the known output that are looked at from each position
RIDGE = 1.0  # squared weights beside the log-loss, summed over all prefixes
ROUNDS = 100
BINS = 10


class JointData:
    """What came after right prefixes of traced examples, example by example, and their groups."""

    def __init__(self) -> None:
        self.outcomes: list[Outcomes] = []
        self.groups: list[str] = []

    def add(
        self,
        examples: Sequence[TracedExample],
        groups: Sequence[str],
        drafters: Sequence[Drafter],
        statistics: Statistics,
        *,
        k: int,
        drafted: Drafted | None = None,
    ) -> None:
        """Adds examples with what (fitted) drafters and the statistics of their base say of them."""
        for example in examples:
            self.outcomes.append(_joined(list(_by_position(example, drafters, statistics, k, drafted))))
        self.groups += groups

    def fit(
        self, drafters: Sequence[Drafter], *, ngram: str, bigram: str, k: int, without: Sequence[str] = ()
    ) -> JointFit:
        """The weights. Raises `UnknownNameError` for features that there are not."""
        free = np.ones(WEIGHTS)
        for name in without:
            if name not in FEATURES:
                raise UnknownNameError("feature of joint", name, FEATURES)
            free[list(FEATURES[name])] = 0.0
        names = list(dict.fromkeys(self.groups))
        half = {name: place % 2 for place, name in enumerate(names)}
        losses, logps, right = [], [np.zeros(0)], [np.zeros(0, dtype=np.bool_)]
        for side in (0, 1) if len(names) > 1 else ():
            others, of_side = (
                _joined([data for data, group in zip(self.outcomes, self.groups, strict=True) if half[group] == which])
                for which in (1 - side, side)
            )
            measured = outcome_logps(_fit(others, free), of_side)
            ends = of_side.counts.cumsum()
            places = ends - of_side.counts + of_side.targets
            losses.append(-measured[places].sum())
            candidates = np.delete(np.arange(len(measured)), ends - 1)  # the last outcome of each prefix is none
            logps.append(measured[candidates])
            right.append(np.isin(candidates, places))
        data = _joined(self.outcomes)
        bins = reliability(np.exp(np.concatenate(logps)), np.concatenate(right), BINS)
        return JointFit(
            drafters=[drafter.source for drafter in drafters],
            ngram=ngram,
            bigram=bigram,
            k=k,
            weights=_fit(data, free).tolist(),
            without=list(without),
            examples=len(self.outcomes),
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


def _fit(data: Outcomes, free: np.ndarray) -> np.ndarray:
    """The best weights where `free` is 1; the others stay 0."""
    import torch

    weights = torch.zeros(WEIGHTS, dtype=torch.float64)
    optimizer = torch.optim.LBFGS([weights], max_iter=ROUNDS, history_size=20, line_search_fn="strong_wolfe")
    gradient, prefixes = np.zeros(WEIGHTS), len(data.targets)

    def closure() -> torch.Tensor:
        loss = loss_and_gradient(weights.numpy(), data, gradient)
        weights.grad = (torch.from_numpy(gradient * free) + RIDGE * weights) / prefixes
        return (loss + 0.5 * RIDGE * (weights**2).sum()) / prefixes

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.numpy().copy()


def _by_position(
    example: TracedExample, drafters: Sequence[Drafter], statistics: Statistics, k: int, drafted: Drafted | None
) -> Iterator[Outcomes]:
    room: Room | None = None
    (context,) = contexts_of([example], drafted)
    for position in range(len(example.output_ids)):
        path = example.output_ids[position : position + AHEAD]
        sources = Proposals(drafters, [context], path[:1], k).sources(0, context, statistics)
        room = room_for(sources, room)
        data = outcomes_for(len(path), room)
        prefixes, used = features_along(sources, path, room, data)
        sizes = (prefixes, prefixes, used, used, used)
        yield Outcomes(*(array[:size].copy() for array, size in zip(data, sizes, strict=True)))
        context.output_ids.append(int(example.output_ids[position]))
