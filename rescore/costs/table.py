"""The table of costs: what a decoding step takes by tokens and context, with heads, and what choosing drafts takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import numpy as np

from lm.records import Count, plain

MOST_MS = 1e9  # of one step, so that sums of them stay finite
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=MOST_MS)]
StepMilliseconds = Annotated[float, msgspec.Meta(gt=0, le=MOST_MS)]
SCHEMA = "rescore.costs/3"
LEAST_MS = 1e-3  # of a step


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it was measured.

    cpu: model; cores: that the process may use; threads: of torch; gpu: model, where that does the work. torch,
    transformers: versions.
    """

    cpu: str
    cores: Count
    threads: Count
    torch: str
    transformers: str
    gpu: str | None

    def __str__(self) -> str:
        where = self.gpu or f"{self.cpu}, {_several(self.cores, 'core')}"
        libraries = f"torch {self.torch}, transformers {self.transformers}"
        return f"{where}, {_several(self.threads, 'thread')}, {libraries}"


def _several(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


@dataclass(frozen=True, kw_only=True)
class HeadsCost:
    """What block heads (sha256 of their weights, `h` of them used) add to a step that asks them.

    vocabulary_ms: the same where they draft from so many tokens.
    """

    sha256: str
    h: Count
    ms: Milliseconds
    vocabulary_ms: dict[Count, Milliseconds] = field(default_factory=dict)

    def of(self, vocabulary: int | None) -> float:
        """Of heads that draft from so many tokens (None: all): straight lines between what was measured."""
        sizes = sorted(self.vocabulary_ms)
        if vocabulary is None or not sizes:
            return self.ms
        return float(np.interp(vocabulary, sizes, [self.vocabulary_ms[size] for size in sizes]))


@dataclass(frozen=True, kw_only=True)
class ChoiceCost:
    """What drafting and rescoring take in a step, the heads apart: median.

    rescorer: what drafts and chooses, as `rescore.runs.run.Run.chooses` names it; k, p: as in `Run`.
    """

    rescorer: str
    k: Count
    p: Count
    ms: Milliseconds


class Costs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of costs.

    base, weights_sha256, config_sha256, dtype: of the base LM (`lm.base.model.BaseIdentity`); device: it ran on;
    compiles: as `lm.base.model.BaseLM` has it.
    contexts: cached tokens; nodes: tokens of the verify call; both rising.
    step_ms `[contexts][nodes]`: medians of a step of one draft: the call, accepting, and keeping what was accepted.
    tree_ms: what several drafts as a tree add to it (None: the base takes no tree mask, drafts are a batch).
    heads: None where the base has none. choices: of the rescorers and drafters that were measured.
    """

    base: str
    weights_sha256: str
    config_sha256: str
    dtype: str
    device: str
    compiles: bool
    machine: Machine
    contexts: Annotated[list[Count], msgspec.Meta(min_length=1)]
    nodes: Annotated[list[Count], msgspec.Meta(min_length=1)]
    step_ms: list[list[StepMilliseconds]]
    tree_ms: Milliseconds | None
    heads: HeadsCost | None
    choices: list[ChoiceCost] = []
    schema: str = SCHEMA

    def curves(self, most: int) -> np.ndarray:
        """Of steps of 1 to `most` tokens at each of the contexts, float64 `[contexts, most]`; see `steps`."""
        return _lines(np.arange(1, most + 1), self.nodes, np.array(self.step_ms))

    def steps(self, contexts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Of n steps of one draft, float64 `[n]`, by their cached tokens and the tokens of their calls, int `[n]`:
        straight lines between what was measured, and beyond it the last ones' slopes."""
        at_sizes = _lines(tokens, self.nodes, np.array(self.step_ms))  # [contexts, n]
        return between(self.contexts, at_sizes, contexts)

    def choice_ms(self, rescorer: str, k: int, p: int) -> float | None:
        """See `ChoiceCost`; None where it was not measured."""
        return next((c.ms for c in self.choices if (c.rescorer, c.k, c.p) == (rescorer, k, p)), None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = plain(self)
        return found


def between(contexts: Sequence[int], values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Values `[contexts, n]` at other contexts int `[n]` (or one for all), float64 `[n]`; a step takes some time."""
    low, share = _places(at, contexts)
    high = np.minimum(low + 1, len(contexts) - 1)
    columns = np.arange(values.shape[1])
    return np.asarray(np.maximum(values[low, columns] * (1 - share) + values[high, columns] * share, LEAST_MS))


def _lines(at: np.ndarray, xs: Sequence[int], ys: np.ndarray) -> np.ndarray:
    """Values `[m, len(xs)]` at other places `[n]`, `[m, n]`."""
    low, share = _places(at, xs)
    return np.asarray(ys[:, low] * (1 - share) + ys[:, np.minimum(low + 1, len(xs) - 1)] * share)


def _places(at: np.ndarray, xs: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The measured place below each, and how far it is on to the next one: beyond 1 after the last; before the first
    that itself."""
    if len(xs) == 1:
        return np.zeros(np.shape(at), dtype=np.int64), np.zeros(np.shape(at))
    known = np.array(xs)
    low = np.clip(np.searchsorted(known, at, side="right") - 1, 0, len(xs) - 2)
    return low, np.maximum((at - known[low]) / (known[low + 1] - known[low]), 0.0)
