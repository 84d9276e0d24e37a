"""Rescorers by name: the built-in ones, those of other packages, and what a wrong name is told."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from lattices.errors import RescoreError, UnknownNameError
from lattices.lattice import Lattice
from lattices.search import p_best
from rescore import rescorers
from rescore.rescorers import Context, Rescorer, Target, load_rescorer, rescorer_names
from rescore.rescorers.base import check_drafts

LATTICE = Lattice(
    np.array([[[5, 1], [2, 7], [3, 4]]], dtype=np.int32),
    np.log(np.array([[[0.6, 0.3], [0.5, 0.4], [0.7, 0.2]]], dtype=np.float32)),
)


class Fixed(Rescorer):
    """Another package's rescorer: the first token, then what the text after the colon says."""

    def __init__(self, text: str) -> None:
        if text == "rude":
            raise RescoreError("no such file rude; give another")
        self.rest = [int(part) for part in text.split(",")]

    def draft(self, lattices, contexts, p):
        return np.array([[[first, *self.rest]] for first in lattices.token_ids[:, 0, 0]], dtype=np.int32)


class Draftless(Rescorer):
    """A plug-in that lacks the one method that it must have."""

    def __init__(self, text: str) -> None:
        pass


class Lookalike:
    """A plug-in that has the method but is no `Rescorer`."""

    def __init__(self, text: str) -> None:
        pass

    def draft(self, lattices, contexts, p):
        raise NotImplementedError


@pytest.fixture
def plug_in(monkeypatch: pytest.MonkeyPatch):
    """Makes other packages register what the test says."""

    def register(**values: str) -> None:
        points = [EntryPoint(name, value, rescorers.ENTRY_POINTS) for name, value in values.items()]
        monkeypatch.setattr(
            rescorers, "entry_points", lambda group, name=None: [p for p in points if name in (None, p.name)]
        )

    return register


def test_none_gives_the_p_best_drafts():
    draft = load_rescorer("none").draft
    assert draft(LATTICE, [Context([])], 1).tolist() == [[[5, 2, 3]]]
    assert draft(LATTICE, [Context([])], 3).tolist() == p_best(LATTICE, 3).drafts.tolist()


def test_oracle_gives_the_path_that_is_accepted_longest():
    draft = load_rescorer("oracle").draft
    assert draft(LATTICE, [Context([], future=np.array([5, 7, 4]))], 1).tolist() == [[[5, 7, 4]]]
    after_one = Context([], output_ids=[9], future=np.array([9, 5, 7, 8]))
    assert draft(LATTICE, [after_one], 4).tolist() == [[[5, 7, 3]]]


@pytest.mark.parametrize("typed", ["none:foo", "oracle:2"])
def test_a_built_in_rescorer_takes_no_text(typed):
    with pytest.raises(RescoreError, match="takes no text after a colon; write --rescorer"):
        load_rescorer(typed)


def test_unknown_names_are_told_the_nearest(plug_in):
    plug_in(fixed=f"{__name__}:Fixed")
    with pytest.raises(UnknownNameError, match="unknown rescorer 'orakle'; did you mean oracle"):
        load_rescorer("orakle")
    with pytest.raises(UnknownNameError, match="known: context-ngram, fixed, learned-bigram, neural"):
        load_rescorer("zzz:4")


def test_other_packages_register_rescorers(plug_in):
    plug_in(fixed=f"{__name__}:Fixed", none=f"{__name__}:Fixed")
    assert rescorer_names() == [
        "context-ngram", "fixed", "learned-bigram", "neural", "neural-32m", "neural-61m", "neural-94m", "ngram",
        "ngram-neural", "none", "oracle",
    ]  # fmt: skip
    assert load_rescorer("fixed:8,9").draft(LATTICE, [Context([])], 1).tolist() == [[[5, 8, 9]]]
    assert isinstance(load_rescorer("none"), rescorers.Unrescored), "a built-in name can't be taken over"


def test_a_plug_in_needs_draft_only(plug_in):
    plug_in(fixed=f"{__name__}:Fixed")
    made = load_rescorer("fixed:8,9")
    assert (made.alpha, made.identity, made.coverage(np.array([1, 2]))) == (None, "", 1.0)
    assert made.fit(Target(10, (0,), None)) is made
    made.prefill([Context([1])])
    changed = made.weighted(2.0)
    assert (changed.alpha, made.alpha, changed.rest) == (2.0, None, made.rest) and isinstance(changed, Fixed)


def test_the_example_of_the_docs_is_one(plug_in, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "rescorers.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.S)
    made: dict[str, type] = {}
    exec(example, made)
    monkeypatch.setitem(globals(), "Last", made["Last"])
    plug_in(last=f"{__name__}:Last")
    drafts = load_rescorer("last").draft(LATTICE, [Context([])], 1)
    check_drafts(drafts, LATTICE, p=1)
    assert drafts.tolist() == [[[5, 2, 4]]]


def test_another_packages_failure_is_one_line_that_names_it(plug_in):
    plug_in(
        fixed=f"{__name__}:Fixed", absent="no_such_module:Thing", shapeless="builtins:str",
        alike=f"{__name__}:Lookalike", draftless=f"{__name__}:Draftless",
    )  # fmt: skip
    with pytest.raises(RescoreError, match=r"can't load the rescorer 'absent' of the package no_such_module"):
        load_rescorer("absent")
    with pytest.raises(RescoreError, match=r"can't load the rescorer 'fixed'.*invalid literal"):
        load_rescorer("fixed:x")
    with pytest.raises(RescoreError, match=r"'shapeless' .* is no rescore.rescorers.Rescorer \(builtins:str\); mend"):
        load_rescorer("shapeless")
    with pytest.raises(RescoreError, match=r"'alike' .* is no rescore.rescorers.Rescorer"):
        load_rescorer("alike")
    with pytest.raises(RescoreError, match=r"can't load the rescorer 'draftless'.*abstract.*draft"):
        load_rescorer("draftless")
    with pytest.raises(RescoreError, match=r"^no such file rude; give another$"):
        load_rescorer("fixed:rude")


@pytest.mark.parametrize(
    "drafts",
    [[[5, 2, 3]], [[[5, 2]]], [[[5, 2, 3]]] * 2, [[[5, 2, 3]] * 3], [[]], [[[4, 2, 3]]], [[[5, 2, 3], [2, 5, 3]]]],
    ids=["no batch", "too short", "too many lattices", "more than p", "none", "other start", "second starts otherwise"],
)
def test_drafts_that_break_the_promise_are_caught(drafts):
    check_drafts(np.array([[[5, 2, 3], [5, 9, 9]]]), LATTICE, p=2)
    with pytest.raises(AssertionError, match="a rescorer gave"):
        check_drafts(np.array(drafts), LATTICE, p=2)
