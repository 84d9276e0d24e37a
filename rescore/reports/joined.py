"""What several drafters proposed where the steps of a decode began, read again for people to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lattices.errors import RescoreError
from lattices.joined.lookup import advance as advance_match
from lattices.joined.sources import HEADS, MODEL, Sources, first_match, gather, room_for, still_following
from lattices.lattice import Lattice
from rescore.drafters import Drafter, LatticeDrafter, load_drafter
from rescore.drafters.asked import fit_drafter
from rescore.drafters.proposals import Proposals
from rescore.drafters.recorded import recorded_already
from rescore.drafters.traced import Traced
from rescore.replaying import contexts_of
from rescore.reports.walks import Candidate, Walk
from rescore.rescorers.base import Context
from rescore.runs.evaluated import Evaluation
from rescore.runs.records import SOURCES, sources_of
from rescore.runs.weights import target_of
from rescore.tracing import TracedExample, given_settings


class JoinedLattices:
    """What the drafters of a run's decodes proposed, as far as that can be read again: no model is run for it.

    notices: of drafters whose proposals can't be, so that their runs' lattices are not shown.
    """

    def __init__(self, run: Evaluation, task: str, k: int) -> None:
        self.notices: list[str] = []
        self._run, self._task, self._k = run, task, k
        self._trace = run.trace(task)
        self._drafters: dict[tuple[str, ...], tuple[Drafter, ...]] = {}
        self._drafted: dict[str, dict[str, Lattice]] = {}

    def along(
        self, example: TracedExample, walks: Iterable[Walk], *, top: int, positions: Container[int] | None = None
    ) -> dict[tuple[str, ...], dict[int, list[list[Candidate]]]]:
        """By the drafters of the walks, and the position where steps began: what they proposed after each token that
        the longest of these steps accepted (slots 2, 3, ...), the `top` of each source and what the base chose.

        positions: only these (None: all). No positions where the drafters can't be read.
        """
        reached: dict[tuple[str, ...], dict[int, int]] = {}
        for walk in walks:
            steps = reached.setdefault(walk.drafters, {})
            for step in walk.steps:
                if positions is None or step.start in positions:
                    steps[step.start] = max(step.accepted, steps.get(step.start, 0))
        return {drafters: self._at(example, drafters, steps, top) for drafters, steps in reached.items() if drafters}

    def _at(
        self, example: TracedExample, drafters: tuple[str, ...], steps: Mapping[int, int], top: int
    ) -> dict[int, list[list[Candidate]]]:
        chosen = self._loaded(drafters)
        if not chosen:
            return {}
        (context,) = contexts_of([example], self._drafted)
        output, found = example.output_ids, {}
        for position, accepted in sorted(steps.items()):  # the text so far only grows
            context.output_ids[:] = output[:position].tolist()
            proposals = Proposals(chosen, [context], output[position : position + 1], self._k)
            path = output[position : position + accepted + 1].astype(np.int32)
            found[position] = candidates_along(proposals.sources(0, context), path, accepted, top)
        return found

    def _loaded(self, specs: tuple[str, ...]) -> tuple[Drafter, ...]:
        if specs not in self._drafters:
            try:
                self._drafters[specs] = tuple(map(self._load, specs)) if self._trace else ()
            except RescoreError as error:
                self._drafters[specs] = ()
                self.notices.append(f"{self._task}: no lattice of {'+'.join(specs)} is shown: {error}")
        return self._drafters[specs]

    def _load(self, spec: str) -> Drafter:
        assert self._trace is not None
        identity = self._identity(spec)
        if spec.partition(":")[0] == SOURCES[MODEL]:
            drafter: Drafter = _Recorded(spec, identity)
        else:
            drafter = fit_drafter(load_drafter(spec), target_of(self._trace))
            if (drafter.identity or spec) != identity:
                raise RescoreError(f"{spec} is no longer what drafted; rescore eval with it drafts again")
        if isinstance(drafter, Traced):
            self._drafted[spec] = drafter.lattices_of(self._trace)
        elif isinstance(drafter, LatticeDrafter):
            known = recorded_already(self._trace, drafter, task=self._task, settings=self._settings())
            if known is None:
                raise _unrecorded(spec)
            self._drafted[spec] = known
        return drafter

    def _settings(self) -> dict[str, Any]:
        """See `Recording.all_settings`."""
        config = self._run.config
        settings = {name: value for name, value in config.traces[self._task].items() if name != "k"}
        if not config.inputs[self._task].trace:
            return settings
        return given_settings(settings, config.data[self._task]["sha256"], config.device)

    def _identity(self, spec: str) -> str:
        """What a drafter drafted with, by the order in which records and configuration name them."""
        for run in self._run.config.runs[self._task]:
            for record in self._run.records(self._task, run.rescorer, run.p, run.k):
                if spec in (of := list(record.alone_accepted or ())):
                    return run.drafters[of.index(spec)]
        return spec


class _Recorded(LatticeDrafter):
    """A drafter of which only what it drafted is read."""

    kind = MODEL

    def __init__(self, name: str, identity: str) -> None:
        self.name, self.identity = name, identity

    def computed(self, contexts: Sequence[Context], firsts: np.ndarray, k: int) -> Lattice:
        """Refused: what is not in the context."""
        raise _unrecorded(self.name)


def _unrecorded(spec: str) -> RescoreError:
    return RescoreError(f"what {spec} drafted is not in the cache; rescore eval with it records it again")


def candidates_along(sources: Sources, path: np.ndarray, accepted: int, top: int) -> list[list[Candidate]]:
    """What is proposed after each of the first `accepted` tokens of a path, int32 `[m]`, m >= accepted: the `top` of
    each source, and what the path goes on with."""
    room, found = room_for(sources), []
    state, length = first_match(sources.lookup, path[0])
    following = (1 << len(sources.chains.kinds)) - 1
    for depth in range(1, accepted + 1):
        count = gather(sources, depth, state, following, room)
        wanted = path[depth] if depth < len(path) else None
        shown: Counter[str] = Counter()
        candidates = []
        for place, (token, origins) in enumerate(zip(room.token_ids[:count], room.origins[:count], strict=True)):
            names = sources_of(int(origins))
            if token == wanted or any(shown[name] < top for name in names):
                probability = float(np.exp(sources.logps[depth, place])) if origins & HEADS else None
                candidates.append(Candidate(int(token), names, probability))
            shown.update(names)
        found.append(candidates)
        if wanted is not None:
            state, length = advance_match(sources.lookup, state, length, wanted)
            following = still_following(sources.chains, depth, following, wanted)
    return found
