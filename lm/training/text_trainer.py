"""What the trainings of heads and rescorers share: segments of text and their split, precision, vocabulary subset."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from lattices.errors import InvalidDataError, RescoreError
from lm.base.model import BaseLM
from lm.training.data import HeadData, Segment, check_apart, chosen_share, segments_of, until
from lm.training.losses import VocabularySubset, choose_precision, frozen_projection
from lm.training.options import TextOptions
from lm.training.trainer import Measured, Trainer

Options = TypeVar("Options", bound=TextOptions)


class TextTrainer(Trainer[Measured], Generic[Measured, Options]):
    """A training on segments of text.

    Attributes: `base`, `data`, `options` (with the precision that `auto` stands for here), `dtype`, `segments` to learn
    from, `held_out` ones to measure on, `subset` of the vocabulary, `projection` `[vocab, d]` of the base.
    """

    learner = "heads"  # who learns, in errors
    least_targets = 1  # of a segment
    measured_targets = 8192

    options: Options

    def _take(self, base: BaseLM, data: Sequence[HeadData], options: Options, held_out: HeadData | None = None) -> None:
        """Sets the attributes; `held_out`: text of another origin to measure on, instead of a share of `data`."""
        options.check()
        self.dtype = choose_precision(options.precision, base.device)
        # What `auto` stands for depends on the machine; the record and a resumed run need the precision itself.
        self.options = dataclasses.replace(options, precision=str(self.dtype).removeprefix("torch."))
        self.base, self.data, self.measured_on = base, list(data), held_out
        check_apart(self.data)
        segments = segments_of(self.data, least=self.least_targets)
        if len(segments) < 2:
            raise InvalidDataError(
                f"the corpus has fewer than two segments of text; {self.learner} need more to learn from"
            )
        if held_out is None:
            measured, learned = chosen_share(len(segments), options.held_out, options.seed)
            self.segments, parts = [segments[i] for i in learned], [segments[i] for i in measured]
        else:
            self.segments, parts = segments, self._other_text(held_out)
        self.held_out = until(self.measured_targets, parts)
        self.subset = VocabularySubset(
            [d.targets for d in data], base.vocab_size, options.vocabulary, options.negatives
        )
        self.projection = frozen_projection(base, self.dtype)

    def _other_text(self, held_out: HeadData) -> list[Segment]:
        if held_out.sha256 in {d.sha256 for d in self.data}:
            raise RescoreError(f"{held_out.source} can't be both trained on and held out")
        place = len(self.data)
        self.data.append(held_out)
        measured = [s._replace(place=place) for s in segments_of([held_out], least=self.least_targets)]
        if not measured:
            raise InvalidDataError(f"{held_out.source} has no text of two tokens; heads can't be measured on it")
        return measured

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
