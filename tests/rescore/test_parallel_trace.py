"""The script of the docs by which a drafter that runs elsewhere comes as a trace: it says what the drafter says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import Command, once, refused
from evaluating import Options, evaluated, recorded_trace

from lm.base.model import BaseLM
from lm.heads.block_heads import load_heads
from rescore.tracing import read_trace

SCRIPT = Path(__file__).parents[2] / "docs" / "recipes" / "trace_of_drafter.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trace_of_drafter", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def drafts(
    script: ModuleType, rescore: Command, options: Options, tiny_base: BaseLM, tiny_heads_folder: Path, tmp_path: Path
) -> Path:
    """What the tiny heads propose, as if they ran elsewhere: along outputs that were recorded without them."""
    heads = load_heads(tiny_base, str(tiny_heads_folder))
    asked = ("--base", options["base"], "--data", options["data"], "--dtype", "float64", "--device", "cpu")
    limits = ("--task", "squad", "--max-new-tokens", 24, "--k", 8)
    ran = rescore("trace", *asked, *limits, "--drafter", "none", "--out", tmp_path / "outputs")
    assert ran.code == 0 and "h = 1, K = 8" in ran.out, ran.err

    def propose(prompt_ids: list[int], output_ids: list[int]) -> np.ndarray:
        ids = torch.tensor([[*prompt_ids, *output_ids[:-1]]])
        _, hidden = tiny_base.forward(ids, last=len(output_ids))
        states = hidden[0]
        chosen = torch.tensor(output_ids)
        slots = heads.slots(tiny_base, states, tiny_base.project(states), tokens=chosen)
        return torch.cat([each.logits for each in slots], dim=1)[:, 1:].detach().numpy()

    script.write_trace(str(tmp_path / "outputs"), str(tmp_path / "drafts"), propose, name="elsewhere", k=8)
    return tmp_path / "drafts"


def test_the_trace_is_that_of_the_same_heads_here(drafts: Path, options: Options, tmp_path: Path):
    theirs, ours = read_trace(drafts), recorded_trace(options, tmp_path / "ours")
    assert (theirs.header.h, theirs.header.k, theirs.header.settings["drafter"]) == (4, 8, "elsewhere")
    for one, other in zip(theirs.examples, ours.examples, strict=True):
        assert (one.id, one.prompt, one.references) == (other.id, other.prompt, other.references)
        assert np.array_equal(one.output_ids, other.output_ids)
        assert np.array_equal(one.lattice.token_ids, other.lattice.token_ids)
        np.testing.assert_allclose(one.lattice.logps, other.lattice.logps, atol=1e-5)
        np.testing.assert_allclose(one.entropies, other.entropies, atol=1e-5)


def test_it_is_measured_like_heads_and_beside_others(drafts: Path, options: Options, tmp_path: Path):
    """The commands of the docs."""
    alone = {"trace": str(drafts), "device": "cpu", "k": 8, "rescorers": ("none", "context-ngram:none", "oracle")}
    here = evaluated(options | {"rescorers": alone["rescorers"]}).results
    assert [r.block_efficiency for r in evaluated(alone | {"p": (1,)})] == [r.block_efficiency for r in here]
    among = f"trace:{drafts}"
    sides = ("lookup", among, f"oracle:drafters=lookup+{among}")
    beside = alone | {"trace": str(tmp_path / "outputs"), "rescorers": sides}
    lookup, own, both = evaluated(beside).results
    assert own.block_efficiency == here[0].block_efficiency
    assert both.block_efficiency >= max(lookup.block_efficiency, own.block_efficiency)
    assert both.oracle_block_efficiency == both.block_efficiency


def test_slot_1_is_the_bases_own_for_lossy_rules(drafts: Path, rescore: Command, model: list[object]):
    asked = ("--rescorer", "none", "--k", 8, "--acceptance", "top-k:2", "--json")
    theirs, ours = (
        rescore("eval", "--trace", drafts, *asked),
        rescore("eval", *once(*model, "--max-new-tokens", 24, *asked)),
    )
    assert theirs.code == ours.code == 0, (theirs.err, ours.err)
    (one,), (other,) = theirs.document["rows"], ours.document["rows"]
    assert (one["diverged"], one["steps"], one["hit_rate"]) == (other["diverged"], other["steps"], other["hit_rate"])


def test_more_entries_than_the_outputs_have(script: ModuleType, drafts: Path, tmp_path: Path):
    with pytest.raises(AssertionError, match="holds the base's 8 likeliest tokens"):
        script.write_trace(str(tmp_path / "outputs"), str(tmp_path / "more"), lambda *_: None, name="x", k=9)


def test_what_has_no_lattices_is_not_recorded(rescore: Command, model: list[object], tmp_path: Path):
    rescore("trace", *model, "--drafter", "lookup", "--out", tmp_path / "t").refused("has no lattices of its own")
    refused(lambda: read_trace(tmp_path / "t"), "no trace in")
