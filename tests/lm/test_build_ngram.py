"""Building a model folder: whole or not there, gone on with after a kill, never at the cost of other files."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import refused

from lattices.automaton import Automaton
from lattices.errors import IncompatibleError, InvalidDataError, OutputError
from lm.files import sha256_of_file
from lm.ngram import build as module
from lm.ngram import counting
from lm.ngram.arpa import read_arpa
from lm.ngram.build import NgramOptions, build_ngram
from lm.ngram.load import load_ngram
from lm.ngram.mix import find_parts
from lm.ngram.score import score_file

REFERENCE = Path(__file__).parent / "reference"
TEXT = REFERENCE / "fable.txt"
FALLBACK = (0.5, 1.0, 1.5)


class StopError(Exception):
    """An interruption from outside."""


def build(out: Path, *corpora: Path, **options):
    told = {name: options.pop(name) for name in ("replace", "progress") if name in options}
    chosen = NgramOptions(**{"tokenizer": "words", "order": 3, "threads": 1, **options})
    return build_ngram(corpora or [TEXT], out, chosen, **told)


def test_a_folder_with_all_that_was_made(tmp_path: Path) -> None:
    out = tmp_path / "model"
    summary = build(out, prune=(0, 0, 1))
    assert sorted(os.listdir(out)) == ["automaton.bin", "manifest.json", "model.arpa"]
    model = read_arpa(out / "model.arpa")
    assert tuple(map(len, model.orders)) == summary.ngrams
    expected = read_arpa(REFERENCE / "fable-3-prune-0-0-1.arpa.gz")
    assert model.vocabulary[:3] == expected.vocabulary[:3] and set(model.vocabulary) == set(expected.vocabulary)
    place = {word: i for i, word in enumerate(model.vocabulary)}
    for ours, theirs in zip(model.orders, expected.orders, strict=True):
        renamed = np.array([place[w] for w in expected.vocabulary])[theirs.words]
        at = np.lexsort(renamed.T[::-1])
        np.testing.assert_array_equal(ours.words, renamed[at])
        np.testing.assert_allclose(ours.log10p, theirs.log10p[at], atol=1e-5)
        np.testing.assert_allclose(ours.log10_backoff, theirs.log10_backoff[at], atol=1e-5)
    assert Automaton.load(out / "automaton.bin") is not None
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["tokens"] == summary.tokens == 224
    assert manifest["ngrams"] == list(summary.ngrams)
    assert manifest["prune"] == [0, 0, 1]
    assert len(manifest["corpora"][0]["sha256"]) == 64
    assert np.shape(manifest["discounts"]) == (3, 3)
    assert {"version", "tokenizer_sha256", "smoothing", "order"} <= manifest.keys()
    assert manifest["files"] == {name: sha256_of_file(out / name) for name in ("model.arpa", "automaton.bin")}


@pytest.mark.parametrize("name", ["model.arpa", "automaton.bin"])
def test_a_folder_of_two_models_is_none(tmp_path: Path, name: str) -> None:
    """One of its files is replaced: rescoring reads the automaton, mixing the ARPA file."""
    out, other = tmp_path / "model", tmp_path / "other"
    build(out)
    build(other, order=2)
    assert load_ngram(out).order == 3
    find_parts([str(out), str(other)])
    shutil.copy(other / name, out / name)
    for use in (lambda: load_ngram(out), lambda: score_file(TEXT, out), lambda: find_parts([str(out), str(other)])):
        said = refused(use, InvalidDataError)
        assert f"{out / name} was replaced" in said and "build the model again, or give the file itself" in said
    assert load_ngram(out / name).order == 2
    (out / name).unlink()  # a folder may do without one of them
    assert load_ngram(out).order == 3 if name == "model.arpa" else find_parts([str(out), str(other)])


def test_a_folder_that_names_no_files_is_read(tmp_path: Path) -> None:
    out = tmp_path / "model"
    build(out)
    manifest = json.loads((out / "manifest.json").read_text())
    for files in (None, {}):
        (out / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
        assert load_ngram(out).order == 3
    (out / "manifest.json").write_text(json.dumps({**manifest, "files": "none"}))
    assert "manifest.json: Expected `object" in refused(lambda: load_ngram(out), InvalidDataError)
    del manifest["files"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert load_ngram(out).order == 3 and len(find_parts([str(out)] * 2)) == 2


def test_an_arpa_file_that_changes_while_it_is_read_is_kept_under_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, order in (("one", 2), ("two", 3)):
        build(tmp_path / name, order=order)
    arpa = tmp_path / "x.arpa"
    shutil.copy(tmp_path / "one" / "model.arpa", arpa)

    def replacing(path: Path) -> object:
        shutil.copy(tmp_path / "two" / "model.arpa", path)
        return read_arpa(path)

    with monkeypatch.context() as patched:
        patched.setattr("lm.ngram.arpa.read_arpa", replacing)
        assert "changed while it was read" in refused(lambda: load_ngram(arpa))
    shutil.copy(tmp_path / "one" / "model.arpa", arpa)
    assert load_ngram(arpa).order == 2


def test_tokens_of_a_base(tmp_path: Path, tiny_folder: Path) -> None:
    out = tmp_path / "model"
    summary = build(out, tokenizer=str(tiny_folder), discount_fallback=FALLBACK)
    words = read_arpa(out / "model.arpa").vocabulary[3:]
    assert all(0 <= int(w) < 257 for w in words)
    assert summary.documents == sum(bool(line.strip()) for line in TEXT.read_text().split("\n"))
    assert len(json.loads((out / "manifest.json").read_text())["tokenizer_sha256"]) == 64
    build(out, tokenizer=str(tiny_folder), discount_fallback=FALLBACK, surface=True)
    assert "a" in read_arpa(out / "model.arpa").vocabulary


def test_one_line_is_enough_where_it_can_be(tmp_path: Path) -> None:
    line = tmp_path / "one.txt"
    line.write_text("just one line")
    summary = build(tmp_path / "model", line, discount_fallback=FALLBACK)
    assert summary.ngrams == (6, 4, 3) and summary.fallback_orders == (1, 2, 3)
    assert "--discount-fallback" in refused(lambda: build(tmp_path / "other", line), InvalidDataError)
    build(tmp_path / "katz", line, smoothing="katz")


def test_a_killed_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "LEAST_CHUNK", 50)
    monkeypatch.setattr(module, "LEAST_MEMORY", 1)
    build(tmp_path / "whole", memory=4000)

    def stop(stage: str, done: int, _total: int) -> None:
        if stage == "counting" and done >= 100:
            raise StopError

    out = tmp_path / "model"
    with pytest.raises(StopError):
        build(out, memory=4000, progress=stop)
    assert os.listdir(out) == [".counting"]

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the text was read again")

    monkeypatch.setattr(module, "encode_corpora", never)
    summary = build(out, memory=4000)
    assert summary.resumed
    assert (out / "model.arpa").read_bytes() == (tmp_path / "whole" / "model.arpa").read_bytes()
    assert not (out / ".counting").exists()


def test_counts_are_used_again_when_only_the_smoothing_changes(tmp_path: Path) -> None:
    out = tmp_path / "model"
    refused(lambda: build(out, order=5), InvalidDataError)  # no discounts
    assert build(out, order=5, discount_fallback=FALLBACK).resumed


def test_other_settings_or_text_start_clean(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "model"
    text.write_text(TEXT.read_text())
    refused(lambda: build(out, text, order=5), InvalidDataError)
    assert not build(out, text, order=3).resumed
    refused(lambda: build(out, text, order=5), InvalidDataError)
    text.write_text("other words\n")
    summary = build(out, text, order=5, discount_fallback=FALLBACK)
    assert not summary.resumed and summary.tokens == 2


def test_an_interrupted_reading_leaves_nothing(tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise StopError

    with pytest.raises(StopError):
        build(tmp_path / "model", progress=stop)
    assert not (tmp_path / "model").exists()


def test_an_earlier_model_stays_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model"
    build(out)
    before = (out / "model.arpa").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("lm.ngram.arpa.write_arpa", full)
        assert "No space left" in refused(lambda: build(out, prune=(1,)), OutputError)
    assert (out / "model.arpa").read_bytes() == before
    build(out, prune=(1,))
    assert (out / "model.arpa").read_bytes() != before


def test_a_folder_of_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all my work")
    assert "no n-gram model" in refused(lambda: build(tmp_path), OutputError)
    assert "is a file" in refused(lambda: build(tmp_path / "thesis.tex"), OutputError)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"order": 7}, "choose 1 to 6"),
        ({"order": 0}, "choose 1 to 6"),
        ({"estimator": "srilm"}, "known: lmplz, own"),
        ({"smoothing": "kats"}, "did you mean katz"),
        ({"memory": 1000}, "512M"),
        ({"threads": 0}, "at least 1"),
        ({"max_ngrams": 0}, "at least 1"),
        ({"prune": (1, 0)}, "nor fall"),
        ({"smoothing": "katz", "discount_fallback": FALLBACK}, "Kneser-Ney's"),
        ({"tokenizer": "no-such-model"}, "unknown model"),
        ({"estimator": "lmplz", "smoothing": "katz"}, "lmplz knows"),
    ],
)
def test_settings_that_make_no_sense(options, said: str, tmp_path: Path) -> None:
    assert said in refused(lambda: build(tmp_path / "model", **options))
    assert not (tmp_path / "model").exists()


def test_no_lmplz_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no lmplz on PATH" in refused(lambda: build(tmp_path / "model", estimator="lmplz"))


@pytest.mark.skipif(shutil.which("lmplz") is None, reason="no lmplz on PATH")
def test_lmplz_estimates_the_same_from_the_same_stream(tmp_path: Path) -> None:
    ours = build(tmp_path / "ours", memory=1 << 29)
    theirs = build(tmp_path / "theirs", estimator="lmplz", memory=1 << 29)
    assert ours.ngrams == theirs.ngrams
    np.testing.assert_allclose(ours.discounts, theirs.discounts, rtol=1e-4)
    a, b = (read_arpa(tmp_path / name / "model.arpa") for name in ("ours", "theirs"))
    scores = [
        {tuple(m.vocabulary[i] for i in w): p for w, p in zip(m.orders[-1].words, m.orders[-1].log10p, strict=True)}
        for m in (a, b)
    ]
    assert scores[0].keys() == scores[1].keys()
    for words, p in scores[0].items():
        assert p == pytest.approx(scores[1][words], abs=1e-5)
    line = tmp_path / "one.txt"
    line.write_text("just one line\n")
    message = refused(lambda: build(tmp_path / "one", line, estimator="lmplz", memory=1 << 29), InvalidDataError)
    assert "iscount" in message


def test_a_corpus_that_is_replaced_while_it_is_read_makes_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, out, encode = tmp_path / "text.txt", tmp_path / "model", module._encode
    text = TEXT.read_text()
    corpus.write_text(text)

    def replaced(*arguments: object) -> object:
        corpus.write_text(f"{text}and more\n")
        return encode(*arguments)

    options = NgramOptions(order=2, tokenizer="words", discount_fallback=(0.5, 1.0, 1.5))
    with monkeypatch.context() as patched:
        patched.setattr(module, "_encode", replaced)
        with pytest.raises(IncompatibleError, match="the corpora were replaced while they were read"):
            build_ngram([str(corpus)], out, options)
    assert not (out / "manifest.json").exists()
    corpus.write_text(text)
    assert not build_ngram([str(corpus)], out, options).resumed


def test_a_corpus_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it has not just been written."""
    corpus, hashed = tmp_path / "text.txt", []

    def noted(path: Path) -> str:
        hashed.append(path)
        return sha256_of_file(path)

    monkeypatch.setenv("RESCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lm.keys.SETTLED", -1.0)
    monkeypatch.setattr("lm.keys.sha256_of_file", noted)
    corpus.write_text(TEXT.read_text())
    build(tmp_path / "model", corpus)
    assert hashed == [corpus]


def test_a_model_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def denied(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "model.arpa").write_text("any")
    monkeypatch.setattr(Path, "open", denied)
    refused(lambda: load_ngram(tmp_path / "model.arpa"), f"can't read {tmp_path / 'model.arpa'}", "Permission denied")
