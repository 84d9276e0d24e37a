"""Mixtures of n-gram models: the weighted sum where an n-gram is held, proper distributions everywhere; model folders
like any other, with their parts on record; one line per mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import refused

from lattices.automaton import Automaton
from lattices.errors import IncompatibleError, OutputError, RescoreError
from lattices.ngrams import SPECIAL_WORDS, NgramArrays, NgramModel
from lm.files import sha256_of_file
from lm.ngram.arpa import read_arpa
from lm.ngram.build import NgramOptions, build_ngram
from lm.ngram.load import load_ngram
from lm.ngram.mix import Mixture, find_parts, mix_ngrams
from lm.ngram.score import score_file


def normalised_model(seed: int, words: tuple[str, ...], order: int) -> NgramModel:
    """Random proper back-off model: interpolation of random counts at every order."""
    rng = np.random.default_rng(seed)
    vocabulary = (*SPECIAL_WORDS, *words)
    v = len(vocabulary)
    text = [1, *rng.integers(3, v, 60).tolist(), 2]
    levels, lower = [], {}
    for n in range(1, order + 1):
        grams = sorted({tuple(text[i : i + n]) for i in range(len(text) - n + 1)})
        if n == 1:
            grams = [(i,) for i in range(v)]
            p = {g: (0.0 if g == (1,) else 1 / (v - 1)) for g in grams}
        else:
            p = {}
            for context in sorted({g[:-1] for g in grams}):
                followers = [g for g in grams if g[:-1] == context]
                p |= {g: 0.5 / len(followers) + 0.5 * lower[g[1:]] for g in followers}
        backoff = {}
        for context in {g[:-1] for g in grams} if n > 1 else ():
            followers = [g for g in grams if g[:-1] == context]
            left = 1 - sum(p[g] for g in followers)
            rest = 1 - sum(lower[g[1:]] for g in followers)
            backoff[context] = np.log10(max(left, 1e-9) / max(rest, 1e-9))
        if n > 1:
            words_below = levels[-1].words.tolist()
            levels[-1] = NgramArrays(
                levels[-1].words, levels[-1].log10p,
                np.array([backoff.get(tuple(g), 0.0) for g in words_below], dtype=np.float32),
            )  # fmt: skip
        log10p = np.array([np.log10(p[g]) if p[g] else 0.0 for g in grams], dtype=np.float32)
        levels.append(NgramArrays(np.array(grams, dtype=np.int32), log10p, np.zeros(len(grams), np.float32)))
        lower = p
    return NgramModel(vocabulary, tuple(levels))


def probability(model: NgramModel, context: list[str], word: str) -> float:
    automaton = Automaton.compile(model)
    ids = {w: i for i, w in enumerate(model.vocabulary)}
    if word not in ids:
        return 0.0
    return 10 ** automaton.advance(automaton.state_after([ids.get(w, 0) for w in context]), ids[word])[0]


@pytest.mark.parametrize("orders", [(3, 3), (2, 3), (3, 1)])
def test_contexts_sum_to_one_and_held_ngrams_are_the_weighted_sum(orders):
    first = normalised_model(0, ("a", "b", "c", "d"), orders[0])
    second = normalised_model(1, ("c", "d", "e"), orders[1])
    mixed = Mixture([first, second]).at([3.0, 1.0])
    assert mixed.order == max(orders) and set(mixed.vocabulary) == {*SPECIAL_WORDS, *"abcde"}
    for order in mixed.orders:
        for gram in order.words[::5]:
            *context, word = (mixed.vocabulary[i] for i in gram)
            if word != "<s>":
                expected = 0.75 * probability(first, context, word) + 0.25 * probability(second, context, word)
                assert probability(mixed, context, word) == pytest.approx(expected, rel=1e-4)
    for context in ([], ["a"], ["c", "d"], ["e"], ["b", "e"], ["<s>"]):
        total = sum(probability(mixed, context, word) for word in mixed.vocabulary if word != "<s>")
        assert total == pytest.approx(1.0, abs=1e-3)


def test_a_model_mixed_with_itself_is_itself():
    model = normalised_model(2, ("a", "b", "c"), 3)
    mixed = Mixture([model, model]).at([1, 2])
    assert mixed.vocabulary == model.vocabulary
    for ours, theirs in zip(mixed.orders, model.orders, strict=True):
        np.testing.assert_array_equal(ours.words, theirs.words)
        np.testing.assert_allclose(ours.log10p, theirs.log10p, atol=1e-5)
        held = theirs.log10_backoff > -5  # a context that leaves nothing has no back-off to compare
        np.testing.assert_allclose(ours.log10_backoff[held], theirs.log10_backoff[held], atol=1e-3)


def test_one_look_up_serves_all_weights():
    models = [normalised_model(0, ("a", "b", "c"), 3), normalised_model(1, ("b", "d"), 2)]
    mixture = Mixture(models)
    for weights in ((0.1, 0.9), (0.5, 0.5), (8, 2)):
        ours, alone = mixture.at(weights), Mixture(models).at(weights)
        assert ours.vocabulary == alone.vocabulary
        for a, b in zip(ours.orders, alone.orders, strict=True):
            np.testing.assert_array_equal(a.log10p, b.log10p)
            np.testing.assert_array_equal(a.log10_backoff, b.log10_backoff)


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
    expected, written = Mixture(models).at((3, 1)), read_arpa(out / "model.arpa")
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


def test_a_part_that_is_replaced_since_its_weights_were_tuned_is_refused(two: list[str], tmp_path: Path) -> None:
    files = [shutil.copy(Path(name) / "model.arpa", tmp_path / f"{place}.arpa") for place, name in enumerate(two)]
    parts = find_parts([str(file) for file in files])
    for part in parts:
        part.read()
    shutil.copy(files[0], files[1])
    message = refused(lambda: mix_ngrams(parts, (1, 1), tmp_path / "mixed"), IncompatibleError)
    assert message == f"{files[1]} was replaced while it was read; run the command again"
    assert not (tmp_path / "mixed").exists()


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
    for second in (0.0, -1.0, float("nan")):
        assert "above 0" in refused(lambda second=second: mix_ngrams(parts, (1.0, second), tmp_path / "x"))
    assert "two n-gram models or more" in refused(lambda: mix_ngrams(parts[:1], (1.0,), tmp_path / "x"))
    assert "one of the models to mix" in refused(lambda: mix_ngrams(parts, (1, 1), Path(two[0])), OutputError)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("all my work")
    assert "no n-gram model" in refused(lambda: mix_ngrams(parts, (1, 1), tmp_path / "thesis"), OutputError)
    assert not (tmp_path / "x").exists()
