"""The law of sampled output in every way of drafting, by live decodes of a tiny model whose law is known exactly.

`benchmarks/check_sampling.py` does the same with many more decodes, and in the ways that are too slow for here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sampled.decodes import WRONG_RULES, Counted, Decodes, Output, Remembered, count, distance, law_of
from sampled.models import PROMPT, Tiny, make_tiny, ways_of
from transformers import AutoModelForCausalLM

from rescore.acceptance import sampling
from rescore.generation.custom import custom_generate
from rescore.rescorers import RESCORERS

DRAWS, LENGTH, WHOLE = 1000, 3, 5
RULE = Remembered(0.9, top_k=4)
SLOW = {  # their drafts take many forwards, or many drafts can come of one place: for the benchmark alone
    "draws, tree of 3", "draws, batch of 2", "draws of a draft model, tree of 2", "draws of eagle, tree of 2",
    "draft model", "joint of five drafters, tree of 6",
}  # fmt: skip
LABELS = [way.label for way in ways_of(Path("tiny")) if way.label not in SLOW]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def law(tiny: Tiny) -> dict[Output, float]:
    return law_of(tiny, RULE, LENGTH)


def farthest(law: dict[Output, float], draws: int = DRAWS) -> float:
    """How far from the law the frequencies of direct draws are: the farthest of 10,000 such samples."""
    shares = np.array(list(law.values()))
    samples = np.random.default_rng(0).multinomial(draws, shares / shares.sum(), size=10_000) / draws
    return float(np.abs(samples - shares).sum(axis=1).max() / 2)


def counted(tiny: Tiny, label: str, whole: int = 0) -> Counted:
    (way,) = (way for way in ways_of(tiny.folder) if way.label == label)
    return count(Decodes(tiny, way, LENGTH), RULE, DRAWS, whole)


def test_every_rescorer_that_generates_is_among_them():
    names = {str(way.run.rescorer).partition(":")[0] for way in ways_of(Path("tiny")) if way.run}
    assert names == {name for name in RESCORERS.names() if name != "oracle" and not name.startswith("neural-")}


@pytest.mark.parametrize("label", LABELS)
def test_the_output_keeps_the_law(tiny: Tiny, law: dict[Output, float], label: str):
    found = counted(tiny, label, WHOLE)
    assert distance(found.outputs, law) <= farthest(law)
    assert found.differing == 0, "decodes without shortcuts are the same"
    assert label == "no drafts" or found.block_efficiency > 1, "drafts are accepted at all"


@pytest.mark.parametrize("wrong", WRONG_RULES)
def test_wrong_rules_are_found_out(
    tiny: Tiny, law: dict[Output, float], wrong: Callable[..., object], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sampling, "try_candidates", wrong)
    assert distance(counted(tiny, WRONG_RULES[wrong]).outputs, law) > farthest(law)


@pytest.mark.parametrize("label", ["heads, tree of 4", "draws, tree of 2", "context-ngram"])
def test_so_does_custom_generate(tiny: Tiny, label: str):
    """Fewer decodes, all of them whole; of two tokens, the second of which may have been drafted."""
    draws, found, steps = 200, Counter[Output](), 0
    model = AutoModelForCausalLM.from_pretrained(tiny.at("base"), dtype=torch.float64).eval()
    (way,) = (way for way in ways_of(tiny.folder) if way.label == label)
    custom = custom_generate(heads=tiny.heads, rescorer=way.run)
    how = {"do_sample": True, "temperature": 0.9, "top_k": 3, "max_new_tokens": 3, "custom_generate": custom}
    prompt = torch.tensor([PROMPT])
    torch.manual_seed(0)
    for _ in range(draws):
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **how)
        found[tuple(output[0, len(PROMPT) :][:2].tolist())] += 1
        steps += len(custom.decoded.accepted)
    law = law_of(tiny, Remembered(0.9, top_k=3), 2)
    assert distance(found, law) <= farthest(law, draws)
    assert steps < 2.9 * draws, "drafts are accepted"
