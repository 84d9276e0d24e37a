"""The law of sampled output in every way of drafting, exactly: every random decision of live decodes of a tiny model is
followed into each of its outcomes.

`benchmarks/check_sampling.py` draws instead, by the numbers that decodes are drawn by.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sampled.decodes import WRONG_RULES, Decodes, Output, Remembered, law_of
from sampled.enumerated import exact_law, farthest, outcomes, whole_law
from sampled.models import PROMPT, Tiny, make_tiny, ways_of
from transformers import AutoModelForCausalLM

from rescore.acceptance import sampling
from rescore.generation.custom import custom_generate
from rescore.rescorers import RESCORERS

EXACT = 1e-9
TEMPERATURE, TOP_K, TOP_P, LENGTH = 0.9, 4, 0.9, 3
RULE = Remembered(TEMPERATURE, top_k=TOP_K, top_p=TOP_P)
NARROW = Remembered(TEMPERATURE, top_k=2)  # few outputs, so that each can be decoded from beginning to end
SHORTER = {  # what can be drawn makes many ways to go: outputs of two tokens, the second of which may be drafted
    "draws, tree of 3", "draws, batch of 2", "draws of a draft model, tree of 2", "draws of eagle, tree of 2",
}  # fmt: skip
LABELS = [way.label for way in ways_of(Path("tiny"))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def defined(tiny: Tiny, length: int = LENGTH) -> dict[Output, float]:
    """The law by its definition: each token's probability is the softmax over the logits that are left."""
    found: dict[Output, float] = {}
    open_: list[tuple[Output, float]] = [((), 1.0)]
    while open_:
        output, share = open_.pop()
        if len(output) == length or set(output) & tiny.base.eos_token_ids:
            found[output] = share
            continue
        logits, _ = tiny.base.forward(torch.tensor([[*PROMPT, *output]]), last=1)
        scores = logits[0, 0].float().numpy() / np.float32(TEMPERATURE)  # single precision, as transformers draws
        order = np.argsort(-scores)
        scores[order[TOP_K:]] = -np.inf
        probs = softmax(scores)[order]
        scores[order[np.cumsum(probs) - probs >= TOP_P]] = -np.inf  # the likelier ones have that much together
        open_ += [((*output, token), share * p) for token, p in enumerate(softmax(scores).tolist()) if p > 0]
    return found


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores.astype(np.float64) - scores.max())
    return weights / weights.sum()


def decodes(tiny: Tiny, label: str, length: int = LENGTH) -> Decodes:
    (way,) = (way for way in ways_of(tiny.folder) if way.label == label)
    return Decodes(tiny, way, length)


def test_every_rescorer_that_generates_is_among_them():
    names = {str(way.run.rescorer).partition(":")[0] for way in ways_of(Path("tiny")) if way.run}
    assert names == {name for name in RESCORERS.names() if name != "oracle" and not name.startswith("neural-")}


@pytest.mark.parametrize("label", LABELS)
def test_the_output_keeps_the_law(tiny: Tiny, label: str):
    length = LENGTH - 1 if label in SHORTER else LENGTH
    found, steps = exact_law(decodes(tiny, label, length), RULE)
    law = defined(tiny, length)
    assert farthest(found, law) < EXACT
    tokens = sum(len(output) * share for output, share in law.items())
    assert steps < tokens - 0.001 or label == "no drafts", "drafts are accepted at all"


@pytest.mark.parametrize("label", [label for label in LABELS if not label.startswith("draws")])
def test_so_do_decodes_from_beginning_to_end(tiny: Tiny, label: str):
    """None is taken for one that came to the same place: what drafters remember between steps changes nothing."""
    assert farthest(whole_law(decodes(tiny, label), NARROW), law_of(tiny, NARROW, LENGTH)) < EXACT


@pytest.mark.parametrize("wrong", WRONG_RULES)
def test_wrong_rules_are_found_out(tiny: Tiny, wrong: Callable[..., object], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampling, "try_candidates", wrong)
    found, _ = exact_law(decodes(tiny, WRONG_RULES[wrong], LENGTH - 1), RULE)
    assert farthest(found, defined(tiny, LENGTH - 1)) > 1e-3


@pytest.mark.parametrize("label", ["heads, tree of 4", "context-ngram"])
def test_custom_generate_keeps_the_law(tiny: Tiny, label: str, monkeypatch: pytest.MonkeyPatch):
    model = AutoModelForCausalLM.from_pretrained(tiny.at("base"), dtype=torch.float64).eval()
    (way,) = (way for way in ways_of(tiny.folder) if way.label == label)
    custom, prompt = custom_generate(heads=tiny.heads, rescorer=way.run), torch.tensor([PROMPT])
    how = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 2, "max_new_tokens": LENGTH, "pad_token_id": 0}
    how |= {"attention_mask": torch.ones_like(prompt), "custom_generate": custom}

    def generated(source: object) -> tuple[Output, int]:
        monkeypatch.setattr(sampling, "RandomSource", lambda *seed: source)
        output = model.generate(prompt, **how)
        return tuple(output[0, len(PROMPT) :].tolist()), len(custom.decoded.accepted)

    found, longest = defaultdict[Output, float](float), 0
    for (output, steps), probability in outcomes(generated):
        found[output] += probability
        longest = max(longest, len(output) - steps)
    assert farthest(found, law_of(tiny, NARROW, LENGTH)) < EXACT
    assert longest > 0, "drafts are accepted"
