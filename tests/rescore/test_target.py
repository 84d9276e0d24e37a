"""`Target`: what a rescorer is told of the base LM, however much is known of it."""

from __future__ import annotations

import dataclasses

import pytest
from evaluating import Options, opened, recorded_trace

from rescore.rescorers import Target
from rescore.runs.weights import target_before, target_of


@pytest.fixture
def options(tiny_folder, tiny_heads_folder, squad_file) -> Options:
    return dict(
        base=str(tiny_folder), heads=str(tiny_heads_folder), data=str(squad_file), dtype="float64", device="cpu", k=4,
        max_new_tokens=4, limit=2,
    )  # fmt: skip


def test_a_base_a_recording_and_its_trace_are_the_same_target(tiny_base, options, tmp_path):
    of_base = Target.of(tiny_base.identity, tiny_base.vocab_size, tiny_base.eos_token_ids)
    assert of_base == Target(257, (256,), tiny_base.identity.tokenizer_sha256, tiny_base.identity)
    (recording,) = opened(options)
    assert target_before(recording) == dataclasses.replace(of_base, eos_token_ids=()), "it is not decoded yet"
    trace = recorded_trace(options, tmp_path / "trace")
    (given,) = opened({"trace": str(tmp_path / "trace")}, k=4)
    assert target_of(trace) == target_before(given) == of_base


def test_what_a_trace_does_not_say(tiny_base):
    whole = dataclasses.asdict(tiny_base.identity)
    assert Target.of(whole, 9, (3, 1)) == Target(9, (1, 3), whole["tokenizer_sha256"], tiny_base.identity)
    assert Target.of({"tokenizer_sha256": "a", "name": "mine"}, 9) == Target(9, (), "a")
    assert Target.of(None, 9) == Target.of("mine", 9) == Target(9, (), None)  # type: ignore[arg-type]
