"""What the tests of evaluations share: runs on the tiny model, with a rescorer that looks ahead."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluating import Options, evaluated

import lm.base.catalog
from rescore import rescorers
from rescore.rescorers import Rescorer
from rescore.runs.records import Result

Make = Callable[..., Options]


class Peek(Rescorer):
    """Drafts that are right for 1 to h tokens, by turns: the random heads alone are seldom right for two."""

    def draft(self, lattices, contexts, p):
        drafts = np.repeat(lattices.token_ids[:, None, :, 0], min(p, 2), axis=1)
        for row, context in enumerate(contexts):
            done = len(context.output_ids)
            ahead = context.future[done : done + 1 + done % lattices.h]
            drafts[row, -1, : len(ahead)] = ahead
        return drafts


@pytest.fixture(autouse=True, name="peek")
def peek_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes it a rescorer called peek, for the tests of every file that imports this."""
    monkeypatch.setitem(rescorers.RESCORERS.built_in, "peek", Peek)


@pytest.fixture(name="make")
def make_fixture(tiny_folder: Path, tiny_heads_folder: Path, squad_file: Path) -> Make:
    """Options for the tiny model (h = 4) and six examples."""
    common: dict[str, Any] = {
        "base": str(tiny_folder), "heads": str(tiny_heads_folder), "data": str(squad_file), "dtype": "float64",
        "device": "cpu", "max_new_tokens": 14, "k": 8, "rescorers": ("none", "oracle", "peek"),
    }  # fmt: skip
    return lambda **changes: dict(**common | changes)


def run(options: Options, **more: Any) -> list[Result]:
    return evaluated(options, **more).document.results


def without_times(results: list[Result]) -> list[Result]:
    return [
        dataclasses.replace(r, latency=None, identical=None, divergence=None, autoregressive_quality=None)
        for r in results
    ]


def no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm.base.catalog, "load_base", lambda *_, **__: pytest.fail("the base LM was loaded"))
