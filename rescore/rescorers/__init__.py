"""Rescorers by name. Others register an entry point in the group `rescore.rescorers`: a callable that takes the text
after the colon of `name:text` (empty without one) and returns a `Rescorer`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from lattices.errors import RescoreError, UnknownNameError
from lm.neural.model import SIZES
from rescore.rescorers.base import Context, Rescorer, Target
from rescore.rescorers.context_ngram import ContextNgram
from rescore.rescorers.learned_bigram import LearnedBigram
from rescore.rescorers.neural import Neural
from rescore.rescorers.ngram import Ngram
from rescore.rescorers.ngram_neural import NgramNeural
from rescore.rescorers.oracle import Oracle
from rescore.rescorers.unrescored import Unrescored

__all__ = ["Context", "Rescorer", "Target", "load_rescorer", "rescorer_names"]

ENTRY_POINTS = "rescore.rescorers"
PLAIN: dict[str, type[Unrescored] | type[Oracle]] = {"none": Unrescored, "oracle": Oracle}
WITH_TEXT: dict[str, Callable[[str], Rescorer]] = {
    "ngram": Ngram,
    "context-ngram": ContextNgram,
    "learned-bigram": LearnedBigram,
    "neural": Neural,
    "ngram-neural": NgramNeural,
}


def rescorer_names() -> list[str]:
    """Names that `load_rescorer` takes, sorted."""
    return sorted({*PLAIN, *WITH_TEXT, *SIZES, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def load_rescorer(specification: str) -> Rescorer:
    """The rescorer that `name` or `name:text` stands for; a built-in one goes before another package's of that name.

    Raises `UnknownNameError` with the nearest names, `RescoreError` if another package's rescorer can't be loaded.
    """
    name, _, text = specification.partition(":")
    if name in PLAIN or name in SIZES:
        if text:
            raise RescoreError(f"the rescorer {name} takes no text after a colon; write --rescorer {name}")
        return PLAIN[name]() if name in PLAIN else Neural(name)
    if specification.endswith(":"):
        raise RescoreError(f"--rescorer {specification}: nothing stands behind the colon; write {name} or {name}:TEXT")
    if name in WITH_TEXT:
        return WITH_TEXT[name](text)
    for point in entry_points(group=ENTRY_POINTS, name=name):
        return _load_entry_point(point, text)
    raise UnknownNameError("rescorer", name, rescorer_names())


def _load_entry_point(point: EntryPoint, text: str) -> Rescorer:
    origin = f"the rescorer {point.name!r} of the package {point.dist.name if point.dist else point.value}"
    try:
        rescorer: Rescorer = point.load()(text)
    except RescoreError:
        raise
    except Exception as error:  # another package's code may raise anything
        raise RescoreError(f"can't load {origin} ({error}); mend or uninstall that package") from error
    if not isinstance(rescorer, Rescorer):
        raise RescoreError(f"{origin} is no rescore.rescorers.Rescorer ({point.value}); mend or uninstall that package")
    return rescorer
