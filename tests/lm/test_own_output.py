"""`own:PROMPTS` as a corpus: generated once, gone on with after a kill, refused before any work."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import save_tiny_base, write_lines

import lm.base.catalog
import lm.base.corpus
from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lm.base.corpus import GenerationOptions, generate_corpus, read_prompts
from lm.base.own_output import OwnOutput
from lm.ngram.build import NgramOptions, build_ngram

FALLBACK = (0.5, 1.0, 1.5)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "prompts.jsonl", [{"prompt": "x" * n} for n in range(1, 7)])


@pytest.fixture
def own(tiny_folder: Path) -> OwnOutput:
    return OwnOutput(base=str(tiny_folder), max_new_tokens=12, dtype="float64", device="cpu")


def build(corpus: object, out: Path, own: OwnOutput, **options):
    progress = options.pop("progress", None)
    chosen = NgramOptions(**{"order": 2, "tokenizer": own.base, "discount_fallback": FALLBACK, **options})
    return build_ngram([str(corpus)], out, chosen, own=own, progress=progress)


def folders(cache: Path) -> list[Path]:
    return sorted((cache / "own-output").iterdir()) if (cache / "own-output").is_dir() else []


def no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm.base.catalog, "load_base", lambda *_, **__: pytest.fail("the base LM was loaded"))


def test_it_is_what_generate_corpus_and_build_ngram_give(prompts, own, tiny_base, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    summary = build(f"own:{prompts}", tmp_path / "a", own, progress=lambda *what: seen.append(what))
    generate_corpus(
        tiny_base, read_prompts(prompts, default_chat=True), tmp_path / "own", GenerationOptions(max_new_tokens=12)
    )
    assert build(tmp_path / "own", tmp_path / "b", own).ngrams == summary.ngrams
    assert (tmp_path / "a" / "model.arpa").read_bytes() == (tmp_path / "b" / "model.arpa").read_bytes()
    assert ("generate prompts.jsonl", 6, 6) in seen
    (source,) = json.loads((tmp_path / "a" / "manifest.json").read_text())["corpora"]
    assert source["kind"] == "own" and source["name"].startswith("prompts-")


def test_it_is_generated_once_for_each_setting(prompts, own, cache_folder: Path, tmp_path: Path, monkeypatch) -> None:
    build(f"own:{prompts}", tmp_path / "a", own)
    (kept,) = folders(cache_folder)
    assert sorted(p.name for p in kept.iterdir()) == ["corpus.jsonl", "manifest.json", "settings.json"]
    with monkeypatch.context() as patched:
        no_base(patched)
        build(f"own:{prompts}", tmp_path / "b", own, order=3)
    build(f"own:{prompts}", tmp_path / "c", dataclasses.replace(own, max_new_tokens=5))
    build(f"own:{prompts}", tmp_path / "d", dataclasses.replace(own, dtype="float32"))
    prompts.write_text(prompts.read_text() + '{"prompt": "more"}\n')
    build(f"own:{prompts}", tmp_path / "e", own)
    assert len(folders(cache_folder)) == 4


def test_a_killed_generation_goes_on(prompts, own, cache_folder: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, _total: int) -> None:
        if stage.startswith("generate") and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(f"own:{prompts}", tmp_path / "a", own, progress=stop)
    (kept,) = folders(cache_folder)
    assert not (kept / "manifest.json").exists() and (kept / "corpus.jsonl").read_text().count("\n") == 4
    seen: list[int] = []
    build(
        f"own:{prompts}", tmp_path / "a", own,
        progress=lambda stage, done, _: seen.append(done) if stage.startswith("generate") else None,
    )  # fmt: skip
    assert seen == [5, 6] and folders(cache_folder) == [kept]


def test_it_goes_with_other_corpora(prompts, own, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("some text\n")
    together = build_ngram(
        [tmp_path / "x.txt", f"own:{prompts}"], tmp_path / "a",
        NgramOptions(order=2, tokenizer=own.base, discount_fallback=FALLBACK), own=own,
    )  # fmt: skip
    assert together.documents == 7
    kinds = [s["kind"] for s in json.loads((tmp_path / "a" / "manifest.json").read_text())["corpora"]]
    assert kinds == ["text", "own"]


def test_mistakes_are_told_before_anything_is_generated(prompts, own, tmp_path: Path, monkeypatch) -> None:
    no_base(monkeypatch)
    other = save_tiny_base(tmp_path / "other")
    document = json.loads((other / "tokenizer.json").read_text())
    a, b = sorted(document["model"]["vocab"])[:2]
    vocabulary = document["model"]["vocab"]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(document))
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    corpora = [str(tmp_path / "none.txt"), f"own:{prompts}"]
    for call, kind, said in (
        (lambda out: build(f"own:{tmp_path / 'none'}", out, own), RescoreError, "can't read .*none"),
        (lambda out: build(f"own:{empty}", out, own), InvalidDataError, "holds no prompts"),
        (lambda out: build(f"own:{prompts}", out, own, tokenizer=str(other)), IncompatibleError, "choose --tokenizer"),
        (lambda out: build(f"own:{prompts}", out, own, tokenizer="words"), RescoreError, "not by words"),
        (
            lambda out: build(f"own:{prompts}", out, dataclasses.replace(own, max_new_tokens=0)),
            RescoreError,
            "at least 1",
        ),
        (
            lambda out: build_ngram(corpora, out, NgramOptions(tokenizer=own.base), own=own),
            RescoreError,
            "can't read .*none.txt",
        ),
        (lambda out: build(f"own:{prompts}", out, dataclasses.replace(own, base="nonsense")), RescoreError, "nonsense"),
    ):
        with pytest.raises(kind, match=said) as caught:
            call(tmp_path / "model")
        assert "\n" not in str(caught.value) and not (tmp_path / "model").exists()


def test_a_base_that_is_replaced_before_it_is_read_is_not_kept_under_the_old_key(
    prompts, own, cache_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    other, load = save_tiny_base(tmp_path / "other", seed=1), lm.base.catalog.load_base
    monkeypatch.setattr(lm.base.catalog, "load_base", lambda name, **options: load(str(other), **options))
    with pytest.raises(IncompatibleError, match="were replaced while they were read"):
        build(f"own:{prompts}", tmp_path / "a", own)
    assert not [path for folder in folders(cache_folder) for path in folder.rglob("corpus.jsonl")]
