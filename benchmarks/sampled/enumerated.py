"""The exact law of what random decisions lead to: every outcome of each of them in turn, instead of a drawn one."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np

from rescore.acceptance.rules import RandomSource
from rescore.acceptance.sampling import Sampling
from rescore.decoding import Decoded
from sampled.decodes import Decodes, Output, Place, Question

Given = TypeVar("Given")


class Branch(RandomSource):
    """Decides as `path` says, and after its end for the first outcome that is possible.

    probability: of all that was decided. others: paths that part from this one after the end of `path`.
    """

    def __init__(self, path: tuple[int, ...]) -> None:
        self.path, self.probability = path, 1.0
        self.taken: tuple[int, ...] = ()
        self.others: list[tuple[int, ...]] = []

    def accepts(self, p: float, q: float = 1.0) -> bool:
        share = min(1.0, p / q)
        return bool(self._decide([1 - share, share]))

    def draw(self, probs: np.ndarray) -> int:
        return self._decide((probs / probs.sum()).tolist())

    def _decide(self, shares: list[float]) -> int:
        possible = [outcome for outcome, share in enumerate(shares) if share > 0]
        if len(self.taken) < len(self.path):
            outcome = self.path[len(self.taken)]
        else:
            outcome, *others = possible
            self.others += [(*self.taken, other) for other in others]
        self.taken += (outcome,)
        self.probability *= shares[outcome]
        return outcome


def outcomes(of: Callable[[RandomSource], Given]) -> Iterator[tuple[Given, float]]:
    """All that a function of a random source can give, each way to it with its probability."""
    paths: list[tuple[int, ...]] = [()]
    while paths:
        branch = Branch(paths.pop())
        given = of(branch)
        yield given, branch.probability
        paths += branch.others


def decided_by(rule: Sampling, source: RandomSource) -> Sampling:
    """The rule with another random source, which it keeps when it is started."""
    decided = copy.copy(rule)
    decided.random_source = source
    decided.started = lambda *key: decided  # type: ignore[method-assign]
    return decided


def exact_law(decodes: Decodes, rule: Sampling) -> tuple[dict[Output, float], float]:
    """Of all outputs that decodes come to, and the steps that a decode takes on average. Those that have come to one
    place are followed together from there."""
    law: dict[Output, float] = defaultdict(float)
    steps = 0.0
    places: dict[Place, tuple[float, list[Any]]] = {Place(): (1.0, [])}
    while places:
        further: dict[Place, tuple[float, list[Any]]] = {}
        for place, (share, answers) in places.items():
            asked = decodes.asked(place, answers)
            if isinstance(asked, Decoded):
                law[tuple(asked.output_ids)] += share
                steps += share * len(asked.accepted)
                continue
            for answer, probability in outcomes(partial(_answer, asked, rule)):
                after = asked.place(place, answer)
                already, led = further.get(after, (0.0, [*answers, answer]))
                further[after] = (already + share * probability, led)
        places = further
    return law, steps


def _answer(question: Question, rule: Sampling, source: RandomSource) -> Any:
    return question.answer(decided_by(rule, source))


def whole_law(decodes: Decodes, rule: Sampling) -> dict[Output, float]:
    """The same by decodes from beginning to end, one for each of the ways that they can go."""
    law: dict[Output, float] = defaultdict(float)
    for decoded, probability in outcomes(lambda source: decodes.whole(decided_by(rule, source))):
        law[tuple(decoded.output_ids)] += probability
    return law


def farthest(law: dict[Output, float], other: dict[Output, float]) -> float:
    """By how much the probability of an output differs at most."""
    return max(abs(law.get(output, 0.0) - other.get(output, 0.0)) for output in {*law, *other})
