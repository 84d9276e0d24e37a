"""The weights of a mixture by replay: the sweep, its curve, and what it is measured on."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluating import Options, recorded_trace
from test_ngram_rescorer import VOCAB, bigram_model, options, save  # noqa: F401 (a fixture)

from lattices.errors import IncompatibleError, RescoreError
from lm.files import write_json
from lm.ngram.arpa import write_arpa
from lm.ngram.mix import NgramPart, find_parts, mix_ngrams
from rescore.accounting import account
from rescore.replaying import replay
from rescore.rescorers.ngram import Ngram
from rescore.runs.weights import target_of
from rescore.studies.ngram_mixing import best_weights, tune_mixture
from rescore.tracing import read_trace


@pytest.fixture
def ngram(tmp_path: Path) -> Path:
    return save(tmp_path / "ngram", bigram_model())


@pytest.fixture
def trace(options: Options, tmp_path: Path) -> Path:  # noqa: F811
    """Six examples."""
    recorded_trace(options, tmp_path / "trace")
    return tmp_path / "trace"


@pytest.fixture
def parts(tmp_path: Path) -> list[NgramPart]:
    """Three random bigram models."""
    names = []
    for seed in range(3):
        folder = save(tmp_path / f"model-{seed}", bigram_model(seed))
        write_arpa(bigram_model(seed), folder / "model.arpa")
        names.append(str(folder))
    return find_parts(names)


def test_two_models(parts: list[NgramPart], trace: Path, tmp_path: Path):
    found = tune_mixture(parts[:2], trace, limit=2, k=8, alpha=0.7)
    assert found.held_out == ("q4", "q5") and (found.k, found.alpha) == (8, 0.7)
    assert found.parts == tuple(part.name for part in parts[:2])
    expected = [(1.0, 0.0), (0.0, 1.0), *((n / 10, round(1 - n / 10, 6)) for n in range(1, 10))]
    assert list(found.curve) == expected
    by_weights = dict(zip(found.curve, found.block_efficiency, strict=True))
    assert by_weights[found.weights] == max(found.block_efficiency[2:]) and 1.0 not in found.weights
    # The curve is what the rescorer ngram gives with these folders.
    loaded = read_trace(trace)
    mix_ngrams(parts[:2], found.weights, tmp_path / "mixed")
    folders = {found.weights: tmp_path / "mixed", (1.0, 0.0): Path(parts[0].name)}
    for weights, folder in folders.items():
        rescorer = Ngram(str(folder)).fit(target_of(loaded)).weighted(0.7)
        accepted = replay(loaded.examples[-2:], rescorer, k=8)
        assert account(accepted, loaded.header.h).block_efficiency == by_weights[weights]


def test_three_models_and_half_of_the_trace(parts: list[NgramPart], trace: Path):
    calls: list[tuple[str, int, int]] = []
    found = tune_mixture(parts, trace, k=8, progress=lambda *what: calls.append(what))
    assert found.held_out == ("q3", "q4", "q5")
    assert found.curve[:3] == ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    assert all(sum(weights) == pytest.approx(1, abs=1e-5) for weights in found.curve)
    assert found.block_efficiency[found.curve.index(found.weights)] == max(found.block_efficiency[3:])
    assert calls[-1][0] == "tune mixture" and all(done <= total for _, done, total in calls)


@pytest.mark.parametrize("target", [(0.3, 0.7), (0.6, 0.4)])
def test_the_sweep_finds_the_best_of_two(target: tuple[float, float]):
    assert best_weights(2, lambda w: -abs(w[0] - target[0])) == target


def test_the_sweep_of_more_ends_where_nothing_changes():
    asked: list[tuple[float, ...]] = []

    def flat(weights: tuple[float, ...]) -> float:
        asked.append(weights)
        return 1.0

    assert best_weights(3, flat) == (0.333333,) * 3
    assert len(asked) == 3 * 10, "one round"
    best = best_weights(3, lambda w: -sum((a - b) ** 2 for a, b in zip(w, (0.2, 0.3, 0.5), strict=True)))
    assert best == pytest.approx((0.2, 0.3, 0.5), abs=0.06)


def test_mistakes(parts: list[NgramPart], trace: Path, tmp_path: Path):
    foreign = save(tmp_path / "foreign", bigram_model(), tokenizer_sha256="0" * 64)
    write_arpa(bigram_model(), foreign / "model.arpa")
    write_json(foreign / "manifest.json", {"tokenizer": "another", "tokenizer_sha256": "0" * 64})
    for call, kind, said in (
        (lambda: tune_mixture(parts, trace, limit=0), RescoreError, "--held-out 0"),
        (lambda: tune_mixture(parts, trace, alpha=0), RescoreError, "--alpha 0"),
        (lambda: tune_mixture(parts, trace, k=1000), RescoreError, "k = 1000, but the trace holds"),
        (lambda: tune_mixture(parts, tmp_path / "none"), RescoreError, "no trace in"),
        (lambda: tune_mixture(find_parts([str(foreign)] * 2), trace, k=8), IncompatibleError, "another tokenizer"),
    ):
        with pytest.raises(kind, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
