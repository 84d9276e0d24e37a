"""The built-in models end to end, with the heads that are shipped: conversion, a trace, replay and live decoding."""

from __future__ import annotations

import pytest
from evaluating import evaluated

from rescore.runs.records import Identical


@pytest.mark.usefixtures("converted")
@pytest.mark.parametrize("base", ["smollm2-135m", "smollm2-135m-bpd"])
def test_a_built_in_model_decodes_exactly_and_gains(base):
    # What compiling changes is the same for both, and takes long.
    compiled, count = ("auto", 2) if base == "smollm2-135m" else ("off", 1)
    options = dict(base=base, rescorers=("none", "oracle"), limit=count, max_new_tokens=24, compile=compiled)
    replayed = evaluated(options).document.results
    live = evaluated(dict(options, mode="live")).document.results
    for a, b in zip(replayed, live, strict=True):
        assert a.accepted_histogram == b.accepted_histogram
        assert b.identical == Identical(n=count, identical=count)
    unrescored, oracle = replayed
    assert oracle.block_efficiency > unrescored.block_efficiency > 1.0


@pytest.mark.usefixtures("converted")
def test_small_models_that_share_what_the_base_has_laid_out_change_no_output():
    rescorers = ("neural-61m", "draft-model:neural-61m")
    options = dict(mode="live", rescorers=rescorers, limit=1, max_new_tokens=24, compile="off")
    for result in evaluated(options | {"base": "smollm2-135m"}).document.results:
        assert result.identical == Identical(n=1, identical=1) and result.block_efficiency > 1.0
