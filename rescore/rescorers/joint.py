"""`joint`: the likeliest prefix tree of what heads, the text so far and n-gram statistics propose together.

A log-linear model with a few dozen weights (`lattices.joined`) says how likely each candidate is to be the base's own
choice; its weights are fitted on held-out traces (`rescore.runs.tuning.fit_joint`). Drafts are chosen as a set: the p
branches of the tree with the highest expected accepted length. They may be longer than the heads' blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lattices.joined.candidates import WEIGHTS, room_for
from lattices.joined.likeliest import best_branches, branches, likeliest_nodes
from lattices.lattice import Lattice
from lattices.ngram_search import NgramSearch
from lattices.paths import user_path
from lm.files import SHIPPED, read_json_object, write_json
from lm.keys import key_of
from lm.records import plain
from rescore.rescorers.base import Context, Rescorer, Target
from rescore.rescorers.joint_fit import JointFit, sources_at
from rescore.rescorers.lookup import lookup_of, stacked
from rescore.rescorers.ngram import Ngram

SCHEMA = "rescore.joint/1"
WEIGHTS_FILE = "joint.json"
LONGEST = 16  # tokens of a draft, the base's own included
EXPLORED = (24, 3)  # nodes of the tree that is searched: so many, and so many more a draft


class Joint(Rescorer):
    """See `rescore.rescorers.base.Rescorer`.

    path: the folder of fitted weights; empty: those that are shipped for the base.
    ngram: the n-gram model as `Ngram` takes it; empty: the one that is shipped.
    tokens: of a draft after the base's own, at most.
    """

    def __init__(self, path: str = "", *, ngram: str = "", tokens: int = LONGEST - 1) -> None:
        if tokens < 1:
            raise RescoreError(f"joint: tokens = {tokens}; a draft has one or more after the base's own")
        self.tokens = tokens
        self.longest = tokens + 1
        self.ngram = Ngram(ngram)
        self.path = user_path(path, "joint:") if path else None
        self.identity = f"joint {self.ngram.identity} {tokens}"
        self._weights: np.ndarray | None = None
        if self.path is not None:
            self._use(read_weights(self.path, self.ngram))
        self._search: NgramSearch | None = None
        self._ends = np.zeros(0, dtype=np.int32)

    def _use(self, weights: np.ndarray) -> None:
        self._weights = weights
        self.identity = f"joint {self.ngram.identity} {self.tokens} {key_of(weights.tolist())}"

    def fit(self, target: Target) -> Self:
        """See `Rescorer.fit`."""
        fitted = copy.copy(self)
        fitted._search = self.search_for(target)
        fitted._ends = np.array(target.eos_token_ids, dtype=np.int32)
        if fitted._weights is None:
            fitted._use(read_weights(shipped_weights(target), self.ngram))
        return fitted

    def search_for(self, target: Target) -> NgramSearch:
        """The n-gram model for a base LM. Raises as `fit`."""
        search = self.ngram.fit(target).search()
        if not isinstance(search, NgramSearch):
            raise RescoreError(f"joint can't use the KenLM binary {self.ngram.path}; give its ARPA file")
        return search

    def prefill(self, contexts: Sequence[Context]) -> None:
        """See `Rescorer.prefill`."""
        for context in contexts:
            lookup_of(context)

    def coverage(self, token_ids: np.ndarray) -> float:
        """See `Rescorer.coverage`: that of the n-gram model."""
        return self._search.coverage(token_ids) if self._search else 1.0

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        """See `Rescorer.draft`."""
        if self._search is None or self._weights is None:
            raise RescoreError("joint must be fitted to a base LM first (fit)")
        room = room_for(lattices.k, 0)
        drafts = []
        for row, context in enumerate(contexts):
            sources = sources_at(self._search, lattices.token_ids[row], lattices.logps[row], context)
            count = EXPLORED[0] + EXPLORED[1] * p
            tree = likeliest_nodes(
                sources, self._weights, int(lattices.token_ids[row, 0, 0]), count, self.tokens + 1, self._ends, room
            )
            token_ids, parents, depths, logps, _ = tree
            drafts.append(branches(token_ids, parents, depths, best_branches(parents, logps, p)))
        return stacked(drafts)


def shipped_weights(target: Target) -> Path:
    """The folder of the weights for a base. Raises `RescoreError` if none are shipped."""
    name = target.base.name if target.base else ""
    folder = SHIPPED / name / "joint"
    if not name or not (folder / WEIGHTS_FILE).is_file():
        raise RescoreError(
            f"no weights of joint are shipped for {name or 'a base that the trace does not name'}; fit some: "
            "rescore tune --rescorer joint --out DIR, then --rescorer joint:DIR"
        )
    return folder


def read_weights(folder: Path, ngram: Ngram) -> np.ndarray:
    """Fitted weights, float64 `[WEIGHTS]`.

    Raises `InvalidDataError` for a broken file, `IncompatibleError` for weights of other features or of another n-gram
    model.
    """
    path = folder / WEIGHTS_FILE
    fields = read_json_object(path, missing=f"no weights of joint in {folder}")
    if (schema := fields.get("schema")) != SCHEMA:
        raise InvalidDataError(f"{path} has schema {schema!r}; this version reads {SCHEMA!r}; fit them again")
    values = fields.get("weights")
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        raise InvalidDataError(f"{path}: weights must be a list of numbers; fit them again")
    if len(values) != WEIGHTS or not np.isfinite(values).all():
        raise IncompatibleError(
            f"{path} has {len(values)} weights where {WEIGHTS} finite ones are needed; fit them again"
        )
    if fields.get("ngram") != ngram.model.sha256:
        raise IncompatibleError(f"{path} was fitted with another n-gram model than {ngram.path}; fit the weights again")
    return np.array(values, dtype=np.float64)


def write_weights(folder: Path, fit: JointFit, ngram: Ngram) -> None:
    """Writes fitted weights and how they were fitted. Raises `OutputError`."""
    write_json(folder / WEIGHTS_FILE, {"schema": SCHEMA, "ngram": ngram.model.sha256, **plain(fit)})
