"""Mixes n-gram models, with weights that are given or found by replay: the block efficiency of held-out examples of a
trace decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from lattices.automaton import Automaton
from lattices.errors import IncompatibleError, RescoreError
from lattices.lattice import Lattice
from lattices.ngrams import NgramModel
from lm.ngram.load import LoadedNgram
from lm.ngram.mix import MixedNgram, Mixture, NgramPart, find_parts, mix_ngrams
from rescore.accounting import account
from rescore.checks import MAX_ALPHA, check_held_k
from rescore.replaying import replay
from rescore.rescorers import Context, Rescorer
from rescore.rescorers.ngram import DEFAULT_ALPHA
from rescore.runs.inputs import Progress
from rescore.runs.run import DEFAULT_K
from rescore.runs.weights import target_of
from rescore.tasks.groups import held_out
from rescore.tracing import Trace, read_trace

SHARES = tuple(n / 10 for n in range(1, 10))
ROUNDS = 3  # of three models or more, at most: each sweeps every model's weight once
HELD_OUT = 40
Weights = tuple[float, ...]


@dataclass(frozen=True)
class TunedMixture:
    """The sweep of a mixture's weights, with one draft a step (p = 1)."""

    parts: tuple[str, ...]  # names of the models
    curve: tuple[Weights, ...]  # weights of the parts, sum 1; first each model alone, for comparison
    block_efficiency: tuple[float, ...]  # with each of the curve
    weights: Weights  # the best with all models in
    alpha: float  # of the rescorer
    k: int
    held_out: tuple[str, ...]  # ids of the examples


@dataclass(frozen=True)
class MixedModels:
    """What was mixed, and how its weights were found (None: they were given)."""

    mixed: MixedNgram
    tuned: TunedMixture | None
    notices: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """As one JSON document."""
        return {**asdict(self.mixed), "tuned": asdict(self.tuned) if self.tuned else None}


def mix_models(
    model: Annotated[Sequence[str], "Two or more: folders of build-ngram, ARPA files, shipped (the model).", "MODEL"],
    out: Annotated[Path, "Folder for the mixture, a model like those of build-ngram."],
    *,
    limit: Annotated[
        int | None, "With --trace: examples to tune on, the last ones, at most half of them. Default: 40.", "--held-out"
    ] = None,
    k: Annotated[int | None, "With --trace: tokens of each head that are in the lattice. Default: 16."] = None,
    alpha: Annotated[float | None, "With --trace: weight of the rescorer. Default: 0.5."] = None,
    weights: Annotated[Sequence[float], "Weights, one for each model, like 0.7,0.3."] = (),
    trace: Annotated[Path | None, "Instead of weights: a trace folder, on whose last examples they are tuned."] = None,
    progress: Progress | None = None,
) -> MixedModels:
    """Writes the mixture of models by name to the folder `out`, with `weights`, or such as `tune_mixture` finds.

    Raises `RescoreError` for both or neither of weights and trace, and as `tune_mixture` and `mix_ngrams`.
    """
    if bool(weights) == bool(trace):
        raise RescoreError("give the weights of the mixture (--weights 0.7,0.3) or a trace to tune them on (--trace)")
    tuning = {"held-out": limit, "k": k, "alpha": alpha}
    if weights and (given := [name for name, value in tuning.items() if value is not None]):
        raise RescoreError(f"--{given[0]} is for tuning on a --trace, and the weights are given; drop it")
    parts, tuned = find_parts(model), None
    if trace is not None:
        tuned = tune_mixture(parts, trace, limit=limit, k=k, alpha=alpha, progress=progress)
        weights = tuned.weights
    mixed = mix_ngrams(parts, weights, out, tuned=asdict(tuned) if tuned else None, progress=progress)
    total = sum(weights)
    scaled = abs(total - 1.0) > 1e-6
    return MixedModels(mixed, tuned, (f"the weights add up to {total:g}; they are scaled to 1",) if scaled else ())


class _InMemory(Rescorer):
    """Rescoring with a model in memory, as `rescore.rescorers.ngram` does it with p = 1."""

    def __init__(self, model: NgramModel, trace: Trace, alpha: float) -> None:
        self.weight, self.order = alpha, model.order
        target = target_of(trace)
        loaded = LoadedNgram(Path(), Automaton.compile(model), None)
        self.search = loaded.search(target.vocab_size, target.eos_token_ids)

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        lefts = [context.last(self.order - 1) for context in contexts]
        return self.search.p_best_after(lattices, lefts, p, weight=self.weight).drafts


def tune_mixture(
    parts: Sequence[NgramPart],
    trace: Path,
    *,
    limit: int | None = None,
    k: int | None = None,
    alpha: float | None = None,
    progress: Progress | None = None,
) -> TunedMixture:
    """Sweeps the weights of a mixture on the last `limit` (40) examples of a trace, at most half of them.

    k: tokens of each head that are in the lattice (16); alpha: weight of the rescorer (0.5).
    Two models: the first one's weight from 0.1 to 0.9. More: the weight of one after the other so, the others keeping
    their proportions, from equal weights on, until nothing changes or `ROUNDS` are done. Raises `RescoreError` for
    settings that make no sense, `IncompatibleError` for models over other words than the trace's tokens.
    """
    limit = HELD_OUT if limit is None else limit
    k = DEFAULT_K if k is None else k
    alpha = DEFAULT_ALPHA if alpha is None else alpha
    if limit < 1:
        raise RescoreError(f"--held-out {limit}; at least one example is needed")
    if not 0 < alpha <= MAX_ALPHA:
        raise RescoreError(f"--alpha {alpha:g}; to tune a mixture it must be above 0 and at most {MAX_ALPHA:g}")
    loaded = read_trace(trace)
    check_held_k(loaded.header.k, k)
    made_for = target_of(loaded).tokenizer_sha256
    for part in parts:
        if part.manifest.tokenizer_sha256 and made_for and part.manifest.tokenizer_sha256 != made_for:
            raise IncompatibleError(f"{part.name} was made for another tokenizer than the base LM's of {trace}")
    examples = [loaded.examples[place] for place in held_out([e.group for e in loaded.examples], limit)]
    models = []
    for done, part in enumerate(parts):
        if progress:
            progress("reading", done, len(parts))
        models.append(part.read())
    mixture = Mixture(models)
    efficiencies: dict[Weights, float] = {}
    total = len(parts) + len(SHARES) * (1 if len(parts) == 2 else ROUNDS * len(parts))

    def efficiency(weights: Weights) -> float:
        if weights not in efficiencies:
            alone = weights.index(1.0) if 1.0 in weights else None
            model = mixture.at(weights) if alone is None else models[alone]
            accepted = replay(examples, _InMemory(model, loaded, alpha), k=k)
            efficiencies[weights] = account(accepted, loaded.header.h).block_efficiency
            if progress:
                progress("tune mixture", len(efficiencies), total)
        return efficiencies[weights]

    for place in range(len(parts)):
        efficiency(tuple(float(place == other) for other in range(len(parts))))
    best = best_weights(len(parts), efficiency)
    names, ids = tuple(part.name for part in parts), tuple(example.id for example in examples)
    return TunedMixture(names, tuple(efficiencies), tuple(efficiencies.values()), best, alpha, k, ids)


def best_weights(models: int, efficiency: Callable[[Weights], float]) -> Weights:
    """The weights of so many models that the sweep of `tune_mixture` ends with; of equals the first it meets."""
    best: Weights = tuple(round(1 / models, 6) for _ in range(models))
    for _ in range(1 if models == 2 else ROUNDS):
        before = best
        for place in range(1 if models == 2 else models):
            swept = [_with_share(best, place, share) for share in SHARES]
            candidates = swept if models == 2 else [best, *swept]
            best = max(candidates, key=efficiency)
        if best == before:
            break
    return best


def _with_share(weights: Weights, place: int, share: float) -> Weights:
    rest = (1 - share) / (1 - weights[place])
    return tuple(round(share if i == place else w * rest, 6) for i, w in enumerate(weights))
