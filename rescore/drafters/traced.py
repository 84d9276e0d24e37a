"""`trace:FOLDER`: what another drafter proposed, as a trace of the same outputs holds it (`rescore.tracing`)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from lattices.errors import IncompatibleError, RescoreError
from lattices.joined.sources import TRACED
from lattices.lattice import Lattice
from lattices.paths import user_path
from rescore.drafters.base import LatticeDrafter
from rescore.rescorers.base import Context, Target
from rescore.tracing import Trace, content_sha256, read_header, read_trace


class Traced(LatticeDrafter):
    """Proposes what is recorded in a trace.

    path: the folder of the trace, of the very outputs that are replayed.
    """

    kind = TRACED
    decodes = False

    def __init__(self, path: str = "") -> None:
        if not path:
            raise RescoreError("the drafter trace needs a folder; write trace:FOLDER")
        self.path = user_path(path, "trace:")
        header = read_header(self.path)
        self.longest, self.held = header.h, header.k
        self.identity = self._content()

    @property
    def source(self) -> str:
        return f"trace {Path(self.path).name}"

    def fit(self, target: Target) -> Self:
        header = read_header(self.path)
        if header.vocab_size > target.vocab_size:
            raise IncompatibleError(
                f"the drafter's trace {self.path} has a vocabulary of {header.vocab_size}, more than the base's "
                f"{target.vocab_size}; give one of the same base LM"
            )
        fitted = copy.copy(self)
        fitted.identity = self._content()
        return fitted

    def _content(self) -> str:
        return f"trace {content_sha256(self.path, read_header(self.path).parts)}"

    def computed(self, contexts: Sequence[Context], firsts: np.ndarray, k: int) -> Lattice:
        raise RescoreError(f"--drafter trace:{self.path} is a trace, which can be replayed only; drop --mode live")

    def lattices_of(self, trace: Trace) -> dict[str, Lattice]:
        """Its lattices `[t, h, K]` for the examples of the trace that is replayed.

        Raises `IncompatibleError` if it lacks one of them, or has another output for it.
        """
        theirs = {example.id: example for example in read_trace(self.path).examples}
        if self._content() != self.identity:
            raise IncompatibleError(f"the drafter's trace {self.path} was replaced meanwhile; run the command again")
        for example in trace.examples:
            own = theirs.get(example.id)
            if own is None:
                raise IncompatibleError(
                    f"the drafter's trace {self.path} lacks the example {example.id!r} of the trace that is replayed"
                )
            if not np.array_equal(own.output_ids, example.output_ids):
                raise IncompatibleError(
                    f"the drafter's trace {self.path} has another output for the example {example.id!r} than the trace "
                    "that is replayed; both must be of the same base LM, prompts and limits"
                )
        return {example.id: theirs[example.id].lattice for example in trace.examples}
