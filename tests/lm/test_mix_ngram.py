"""Mixing model folders: a model like any other, with its parts on record; one line per mistake."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import refused

from lattices.automaton import Automaton
from lattices.errors import IncompatibleError, OutputError, RescoreError
from lm.files import sha256_of_file
from lm.ngram.arpa import read_arpa
from lm.ngram.build import NgramOptions, build_ngram
from lm.ngram.load import load_ngram
from lm.ngram.mix import find_parts, mix, mix_ngrams
from lm.ngram.score import score_file

TEXT = Path(__file__).parent / "reference" / "fable.txt"
FALLBACK = (0.5, 1.0, 1.5)
KENLM_BINARY = TEXT.parent / "kenlm" / "trie.bin"


def build(out: Path, text: str | None = None, **options) -> Path:
    corpus = TEXT
    if text is not None:
        corpus = out.with_suffix(".txt")
        corpus.write_text(text)
    chosen = {"tokenizer": "words", "order": 3, "discount_fallback": FALLBACK, **options}
    build_ngram([corpus], out, NgramOptions(**chosen))
    return out


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """A trigram and a bigram model of words."""
    other = build(tmp_path / "other", "the fox and the crow\nthe crow sings\n" * 3, order=2)
    return [str(build(tmp_path / "fable")), str(other)]


def test_a_model_folder_with_its_parts_on_record(two: list[str], tmp_path: Path) -> None:
    out = tmp_path / "mixed"
    mixed = mix_ngrams(find_parts(two), (3, 1), out)
    assert sorted(p.name for p in out.iterdir()) == ["automaton.bin", "manifest.json", "model.arpa"]
    models = [read_arpa(Path(name) / "model.arpa") for name in two]
    expected, written = mix(models, (3, 1)), read_arpa(out / "model.arpa")
    assert written.vocabulary == expected.vocabulary and mixed.ngrams == tuple(map(len, written.orders))
    for ours, theirs in zip(written.orders, expected.orders, strict=True):
        np.testing.assert_allclose(ours.log10p, theirs.log10p, atol=1e-6)
    assert (mixed.order, mixed.weights, mixed.parts) == (3, (0.75, 0.25), tuple(two))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["mixture"] == [
        {"name": Path(name).name, "sha256": sha256_of_file(Path(name) / "model.arpa"), "weight": weight}
        for name, weight in zip(two, (0.75, 0.25), strict=True)
    ]
    assert (manifest["tokenizer"], manifest["tokenizer_sha256"], manifest["tuned"]) == ("words", None, None)
    assert isinstance(load_ngram(out).model, Automaton) and load_ngram(out).order == 3
    assert score_file(str(TEXT), out).unknown == 0


def test_a_mixture_is_a_part_and_is_replaced(two: list[str], tmp_path: Path) -> None:
    out = tmp_path / "mixed"
    mix_ngrams(find_parts(two), (1, 1), out)
    three = mix_ngrams(find_parts([str(out), two[0]]), (1, 1), tmp_path / "again")
    assert three.order == 3
    mix_ngrams(find_parts(two), (9, 1), out)
    assert json.loads((out / "manifest.json").read_text())["mixture"][0]["weight"] == 0.9


def test_arpa_files_go_with_folders(two: list[str], tmp_path: Path) -> None:
    arpa = tmp_path / "x.arpa"
    arpa.write_bytes((Path(two[1]) / "model.arpa").read_bytes())
    for names in ([two[0], str(arpa)], [str(arpa), two[0]]):
        mix_ngrams(find_parts(names), (1, 1), tmp_path / "mixed")
        assert json.loads((tmp_path / "mixed" / "manifest.json").read_text())["tokenizer"] == "words"


def test_own_is_the_shipped_model() -> None:
    first, second = find_parts(["shipped", "shipped"])
    assert first.file.name == "model.arpa.gz" and first.manifest.tokenizer == "smollm2-135m" and first == second


def test_what_can_not_be_mixed(two: list[str], tmp_path: Path, tiny_folder: Path) -> None:
    tokens = str(build(tmp_path / "tokens", tokenizer=str(tiny_folder)))
    surface = str(build(tmp_path / "surface", tokenizer=str(tiny_folder), surface=True))
    bare = Path(build(tmp_path / "bare"))
    (bare / "model.arpa").unlink()
    (tmp_path / "empty").mkdir()
    for names, said in (
        ([two[0]], "two n-gram models or more"),
        ([two[0], str(tmp_path / "none")], "no n-gram model at .*none; give a folder"),
        ([two[0], str(tmp_path / "empty")], "no n-gram model in .*empty"),
        ([two[0], str(bare)], "has no model.arpa"),
        ([two[0], str(KENLM_BINARY)], "is no ARPA file"),
        ([two[0], str(Path(two[1]) / "automaton.bin")], "is no ARPA file"),
    ):
        with pytest.raises(RescoreError, match=said):
            find_parts(names)
    for names in ([two[0], tokens], [tokens, surface], [tokens, "shipped"]):
        assert "one tokenizer" in refused(lambda names=names: find_parts(names), IncompatibleError)


def test_weights_and_places_that_make_no_sense(two: list[str], tmp_path: Path) -> None:
    parts = find_parts(two)
    assert "give one for each" in refused(lambda: mix_ngrams(parts, (1.0,), tmp_path / "x"))
    assert "above 0" in refused(lambda: mix_ngrams(parts, (1.0, 0.0), tmp_path / "x"))
    assert "one of the models to mix" in refused(lambda: mix_ngrams(parts, (1, 1), Path(two[0])), OutputError)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("all my work")
    assert "no n-gram model" in refused(lambda: mix_ngrams(parts, (1, 1), tmp_path / "thesis"), OutputError)
    assert not (tmp_path / "x").exists()
