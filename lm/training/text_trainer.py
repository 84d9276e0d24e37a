"""What the trainings of heads and rescorers share: segments of text and their split, precision, vocabulary subset."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch

from lattices.errors import InvalidDataError, RescoreError
from lm.base.model import BaseLM
from lm.training.data import HeadData, check_apart, chosen_share, segments_of, until
from lm.training.losses import VocabularySubset, choose_precision, frozen_projection
from lm.training.options import TextOptions
from lm.training.trainer import Measured, Trainer

Options = TypeVar("Options", bound=TextOptions)


class TextTrainer(Trainer[Measured], Generic[Measured, Options]):
    """A training on segments of text.

    options: with the precision that `auto` stands for here; `dtype` is that precision.
    segments: to learn from; held_out: to measure on.
    subset: of the vocabulary, which the loss is over.
    projection: of the base, `[vocab, d]`.
    """

    learner = "heads"  # who learns, in errors
    least_targets = 1  # of a segment
    measured_targets = 8192

    options: Options

    def __init__(
        self, base: BaseLM, data: Sequence[HeadData], options: Options, *, held_out: HeadData | None = None
    ) -> None:
        """`held_out`: text of another origin to measure on, instead of a share of `data`."""
        options.check()
        self.dtype = choose_precision(options.precision, base.device)
        # What `auto` stands for depends on the machine; the record and a resumed run need the precision itself.
        self.options = dataclasses.replace(options, precision=str(self.dtype).removeprefix("torch."))  # type: ignore[arg-type]
        self.base, self.data, self.measured_on = base, list(data), held_out
        check_apart(self.data)
        self.segments = segments_of(self.data, least=self.least_targets)
        if len(self.segments) < 2:
            raise InvalidDataError(
                f"the corpus has fewer than two segments of text; {self.learner} need more to learn from"
            )
        if held_out is None:
            shares = chosen_share(len(self.segments), options.held_out, options.seed)
            measured, self.segments = ([self.segments[i] for i in share] for share in shares)
        elif held_out.sha256 in {d.sha256 for d in data}:
            raise RescoreError(f"{held_out.source} can't be both trained on and held out")
        else:
            self.data.append(held_out)
            measured = segments_of([held_out], least=self.least_targets)
            measured = [segment._replace(place=len(data)) for segment in measured]
            if not measured:
                raise InvalidDataError(f"{held_out.source} has no text of two tokens; heads can't be measured on it")
        self.held_out = until(self.measured_targets, measured)
        self.subset = VocabularySubset(
            [d.targets for d in data], base.vocab_size, options.vocabulary, options.negatives
        )
        self.projection = frozen_projection(base, self.dtype)
        torch.manual_seed(options.seed)
        parameters = self._new_parameters()
        super().__init__(parameters, self.options, base.device, rates=self._rates(parameters))

    @abstractmethod
    def _new_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Makes what is trained; what of it learns, by name."""

    def _rates(self, names: Iterable[str]) -> dict[str, float]:
        """Learning rates that are not the schedule's, as `Trainer` takes them."""
        return {}

    def _settings(self) -> dict[str, Any]:
        learned = self.data if self.measured_on is None else self.data[:-1]
        return {
            "options": dataclasses.asdict(self.options),
            "base": dataclasses.asdict(self.base.identity),
            "data": [source_of(source) for source in learned],
        }


def source_of(data: HeadData) -> dict[str, Any]:
    """What a training's record says of its data."""
    return {"source": data.source, "sha256": data.sha256, "tokens": len(data)}
