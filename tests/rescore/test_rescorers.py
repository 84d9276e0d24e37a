"""Rescorers by name: the built-in ones, those of other packages, and what a wrong name is told."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import numpy as np
import pytest

from lattices.errors import RescoreError, UnknownNameError
from lattices.lattice import Lattice
from lattices.search import p_best
from lm.neural.model import SIZES
from rescore import specs
from rescore.rescorers import RESCORERS, Context, Rescorer, Target, load_rescorer
from rescore.rescorers.base import check_drafts
from rescore.rescorers.unrescored import Unrescored
from rescore.runs.run import Run, runs_of
from rescore.specs import parse_spec

LATTICE = Lattice(
    np.array([[[5, 1], [2, 7], [3, 4]]], dtype=np.int32),
    np.log(np.array([[[0.6, 0.3], [0.5, 0.4], [0.7, 0.2]]], dtype=np.float32)),
)
FIRSTS = np.array([5])


class Fixed(Rescorer):
    """Another package's rescorer: the first token, then what the spec says."""

    def __init__(self, rest: str, times: int = 1, *, rude: bool = False) -> None:
        if rude:
            raise RescoreError("no such file; give another")
        self.rest = [int(part) * times for part in rest.split(",")]

    def draft(self, lattices, contexts, p):
        return np.array([[[first, *self.rest]] for first in lattices.token_ids[:, 0, 0]], dtype=np.int32)


class Weighted(Fixed):
    """A plug-in with a weight."""

    alpha = 1.0


class Draftless(Rescorer):
    """A plug-in that lacks the one method that it must have."""


class Lookalike:
    """A plug-in that has the method but is no `Rescorer`."""

    def draft(self, lattices, contexts, p):
        raise NotImplementedError


@pytest.fixture
def plug_in(monkeypatch: pytest.MonkeyPatch):
    """Makes other packages register what the test says."""

    def register(**values: str) -> None:
        points = EntryPoints(EntryPoint(name, value, RESCORERS.group) for name, value in values.items())
        monkeypatch.setattr(specs, "plug_ins", lambda group: points.select(group=group))

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


@pytest.mark.parametrize(
    ("spec", "name", "arguments"),
    [
        ("none", "none", {}),
        ("ngram:lm.arpa", "ngram", {"": "lm.arpa"}),
        ("ngram:path=lms/squad@2,alpha=0.5", "ngram", {"path": "lms/squad@2", "alpha": "0.5"}),
        ("ngram:C:/a b,c.arpa,p=16", "ngram", {"": "C:/a b,c.arpa", "p": "16"}),
        ("neural:path=x=y,z,k=4", "neural", {"path": "x=y,z", "k": "4"}),
        ("ngram:./a=b", "ngram", {"": "./a=b"}),
    ],
)
def test_a_spec_is_a_name_and_its_values(spec, name, arguments):
    assert parse_spec(spec) == (name, arguments)


@pytest.mark.parametrize("spec", ["ngram:", "ngram:path=", "ngram:path=a,path=b", "ngram:,alpha=1"])
def test_a_spec_with_a_gap_or_a_repeat_is_refused(spec):
    with pytest.raises(RescoreError, match=f"^--rescorer {spec}: .*; "):
        parse_spec(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("none:foo", "the rescorer none takes no text after a colon; write --rescorer none"),
        ("oracle:p=2", "the rescorer oracle takes no text after a colon; write --rescorer oracle"),
        ("none:alpha=1", "the rescorer none takes no text after a colon; write --rescorer none"),
        ("context-ngram:none,shares=1", "the rescorer context-ngram takes no shares; it takes path, share, alpha"),
        ("neural-32m:path=x", "the rescorer neural-32m takes no path; it takes alpha"),
        ("neural-32m:x", "the rescorer neural-32m takes no value without its key; it takes alpha"),
        ("ngram:a,path=x", "--rescorer ngram: path is there twice, once without its name; give it once"),
        ("context-ngram:none,share=much", "--rescorer context-ngram: share is a number, and 'much' is none"),
        ("context-ngram:none,alpha=-1", "alpha = -1; a rescorer's weight is from 0 to 64"),
        ("context-ngram:none,alpha=x", "--rescorer context-ngram: alpha is a number, and 'x' is none"),
        ("ngram-neural:first=ngram,share=0.1", "ngram-neural: share is for first=context-ngram; drop it"),
    ],
)  # fmt: skip
def test_keys_and_values_that_a_rescorer_does_not_take(spec, message):
    with pytest.raises(RescoreError) as caught:
        load_rescorer(spec)
    assert str(caught.value) == message


def test_the_weight_is_a_key_of_every_rescorer_that_has_one(plug_in):
    plug_in(fixed=f"{__name__}:Fixed", weighted=f"{__name__}:Weighted")
    assert load_rescorer("context-ngram:none").alpha == 1.0
    assert load_rescorer("context-ngram:none,alpha=0.25").alpha == 0.25
    assert load_rescorer("weighted:8,9,alpha=2").alpha == 2.0
    with pytest.raises(RescoreError, match="the rescorer fixed takes no alpha; it takes rest, times, rude"):
        load_rescorer("fixed:8,9,alpha=2")


def test_unknown_names_are_told_the_nearest(plug_in):
    plug_in(fixed=f"{__name__}:Fixed")
    with pytest.raises(UnknownNameError, match="unknown rescorer 'orakle'; did you mean oracle"):
        load_rescorer("orakle")
    with pytest.raises(UnknownNameError, match="known: context-ngram, draws, eagle2-tree, fixed, joint"):
        load_rescorer("zzz:4")


def test_other_packages_register_rescorers(plug_in):
    plug_in(fixed=f"{__name__}:Fixed", none=f"{__name__}:Fixed")
    assert RESCORERS.names() == [
        "context-ngram", "draws", "eagle2-tree", "fixed", "joint", "learned-bigram", "medusa-tree", "neural",
        "neural-32m", "neural-61m", "neural-94m", "ngram", "ngram-neural", "none", "oracle",
    ]  # fmt: skip
    assert load_rescorer("fixed:8,9").draft(LATTICE, [Context([])], 1).tolist() == [[[5, 8, 9]]]
    assert load_rescorer("fixed:times=3,rest=1,2").draft(LATTICE, [Context([])], 1).tolist() == [[[5, 3, 6]]]
    assert isinstance(load_rescorer("none"), Unrescored), "a built-in name can't be taken over"


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
    check_drafts(drafts, FIRSTS, 1, 3)
    assert drafts.tolist() == [[[5, 2, 4]]]
    assert load_rescorer("last:head=2").draft(LATTICE, [Context([])], 1).tolist() == [[[5, 7, 3]]]


def test_another_packages_failure_is_one_line_that_names_it(plug_in):
    plug_in(
        fixed=f"{__name__}:Fixed", absent="no_such_module:Thing", shapeless="builtins:list",
        alike=f"{__name__}:Lookalike", draftless=f"{__name__}:Draftless",
    )  # fmt: skip
    with pytest.raises(RescoreError, match=r"can't load the rescorer 'absent' of the package no_such_module"):
        load_rescorer("absent")
    with pytest.raises(RescoreError, match=r"can't load the rescorer 'fixed'.*invalid literal"):
        load_rescorer("fixed:x")
    with pytest.raises(RescoreError, match=r"'shapeless' .* is no rescore.rescorers.Rescorer \(builtins:list\); mend"):
        load_rescorer("shapeless")
    with pytest.raises(RescoreError, match=r"'alike' .* is no rescore.rescorers.Rescorer"):
        load_rescorer("alike")
    with pytest.raises(RescoreError, match=r"can't load the rescorer 'draftless'.*abstract.*draft"):
        load_rescorer("draftless")
    with pytest.raises(RescoreError, match=r"^no such file; give another$"):
        load_rescorer("fixed:1,rude=true")


@pytest.mark.parametrize(
    "drafts",
    [
        [[5, 2, 3]],
        [[[5, 2, 3, 4]]],
        [[[5, 2, 3]]] * 2,
        [[[5, 2, 3]] * 3],
        [[]],
        [[[4, 2, 3]]],
        [[[5, 2, 3], [2, 5, 3]]],
    ],
    ids=["no batch", "too long", "too many lattices", "more than p", "none", "other start", "second starts otherwise"],
)
def test_drafts_that_break_the_promise_are_caught(drafts):
    check_drafts(np.array([[[5, 2, 3], [5, 9, -1]]]), FIRSTS, 2, 3)
    with pytest.raises(AssertionError, match="a rescorer gave"):
        check_drafts(np.array(drafts), FIRSTS, 2, 3)


def test_the_weight_of_a_spec_is_its_run_s():
    run = Run("context-ngram:none,alpha=0.25")
    assert (run.rescorer, run.alpha, run.label) == ("context-ngram:none", 0.25, "context-ngram:none,alpha=0.25")
    assert runs_of([run.label, "none"], alpha=3)[0] == run and runs_of(["context-ngram:none"], alpha=3)[0].alpha == 3
    with pytest.raises(RescoreError, match="the weight of ngram:alpha=2 is given twice; drop one"):
        Run("ngram:alpha=2", alpha=1)


@pytest.mark.parametrize("option", [{"ps": (2,)}, {"ks": (4,)}, {"alpha": 3.0}])
def test_an_option_that_no_spec_leaves_open_is_refused(option):
    (name,) = (key.rstrip("s") for key in option)
    spec = "context-ngram:p=16,k=8,alpha=1"
    with pytest.raises(RescoreError, match=f"--{name} is used by no --rescorer, each of which says its own {name}"):
        runs_of([spec], **option)
    assert len(runs_of([spec, "context-ngram"], **option)) == 2 and len(runs_of([spec])) == 1


def test_every_named_size_is_a_rescorer():
    assert {name for name in RESCORERS.names() if re.fullmatch(r"neural-\d+m", name)} == {*SIZES}


@pytest.mark.parametrize("label", ["none", "oracle"])
def test_what_others_are_measured_against_keeps_its_name(label: str):
    with pytest.raises(RescoreError, match=f"{label} is the name of another rescorer; give this one another label"):
        Run("ngram", label=label)
    assert Run(label).label == label and Run(label, label="plain").label == "plain"
