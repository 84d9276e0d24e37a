"""Tables of costs for tests, and what is evaluated by them: the tiny model (h = 4) and six examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from evaluating import Options, opened

from rescore.costs.table import ChoiceCost, Costs, HeadsCost, Machine


@pytest.fixture(name="options")
def options_fixture(tiny_folder: Path, tiny_heads_folder: Path, squad_file: Path) -> Options:
    """Options for the tiny model, on text that repeats itself enough for lookup to find something."""
    return dict(
        base=str(tiny_folder), heads=str(tiny_heads_folder), data=str(squad_file), dtype="float64", device="cpu", k=8,
        max_new_tokens=24,
    )  # fmt: skip


def costs_of(
    step_ms: list[list[float]],
    *,
    contexts: Sequence[int] = (64, 256),
    nodes: Sequence[int] = (1, 4, 16),
    tree_ms: float | None = 0.5,
    heads_ms: float | None = 10.0,
    heads: str = "ab" * 32,
    vocabulary_ms: Mapping[int, float] = MappingProxyType({}),
    choices: Sequence[ChoiceCost] = (),
    **base: str,
) -> Costs:
    """An invented table; base: `weights_sha256`, `config_sha256` and `dtype`."""
    return Costs(
        base="tiny", **{"weights_sha256": "w", "config_sha256": "c", "dtype": "float32"} | base, device="cpu",
        compiles=True, machine=Machine(cpu="a CPU", cores=2, threads=1, torch="2", transformers="5", gpu=None),
        contexts=list(contexts), nodes=list(nodes), step_ms=step_ms, tree_ms=tree_ms, choices=list(choices),
        heads=None if heads_ms is None else HeadsCost(
            sha256=heads, h=4, ms=heads_ms, vocabulary_ms=dict(vocabulary_ms)
        ),
    )  # fmt: skip


def costs_for(options: Options, step_ms: list[list[float]], **more: Any) -> Costs:
    """An invented table of the base and heads that are evaluated."""
    (recording,) = opened(options)
    identity, heads = recording.models.identity, recording.settings["heads_sha256"]
    names = ("weights_sha256", "config_sha256", "dtype")
    return costs_of(step_ms, heads=heads, **{name: getattr(identity, name) for name in names}, **more)
