"""Draft vocabularies: counts of every kind of corpus, those recovered from n-gram models, and files that are none."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import byte_tokenizer, refused, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from lattices.errors import IncompatibleError, InvalidDataError
from lm import draft_vocabulary as module
from lm.base.corpus import CORPUS_FILE, SETTINGS_FILE
from lm.base.identity import tokenizer_sha256
from lm.base.own_output import OwnOutput
from lm.draft_vocabulary import (
    DraftVocabulary,
    DraftVocabularySummary,
    build_draft_vocabulary,
    find_draft_vocabulary,
    read_draft_vocabulary,
)
from lm.ngram.arpa import read_arpa
from lm.ngram.build import NgramOptions, build_ngram
from lm.ngram.recover import counts_of_tokens, word_counts

END_OF_TEXT = 256  # the tiny base's


def build(out: Path, tiny_folder: Path, *corpora: Path | str, **options) -> DraftVocabularySummary:
    given = {"tokenizer": str(tiny_folder), "own": OwnOutput(), **options}
    return build_draft_vocabulary(corpus=[str(each) for each in corpora], out=out, **given)


def counts_in(path: Path) -> dict[int, int]:
    found = read_draft_vocabulary(path)
    return dict(zip(found.token_ids, found.counts, strict=True))


def own_folder(folder: Path, outputs: list[list[int]], prompt: list[int]) -> Path:
    folder.mkdir()
    base = {"name": "tiny", "weights_sha256": "", "tokenizer_sha256": tokenizer_sha256(byte_tokenizer())}
    (folder / SETTINGS_FILE).write_text(json.dumps({"base": base}))
    write_lines(folder / CORPUS_FILE, [{"prompt_ids": prompt, "output_ids": output} for output in outputs])
    return folder


def ids(text: str) -> list[int]:
    return byte_tokenizer()(text)["input_ids"]


class TestCounts:
    def test_of_text_and_rows_with_their_ends(self, tiny_folder: Path, tmp_path: Path):
        text = tmp_path / "a.txt"
        text.write_text("abba\n\ncab\n")
        rows = write_lines(tmp_path / "b.jsonl", [{"said": "a\nb"}, {"said": [3, 3, END_OF_TEXT]}])
        summary = build(tmp_path / "v.json", tiny_folder, text, rows, field="said")
        expected = Counter([*ids("abbacab"), *ids("a\nb"), 3, 3, *[END_OF_TEXT] * 4])
        assert counts_in(tmp_path / "v.json") == expected
        assert (summary.tokens, summary.distinct_tokens) == (sum(expected.values()), len(expected))
        assert summary.coverage == {len(expected): 1.0}
        found = read_draft_vocabulary(tmp_path / "v.json")
        assert [each.name for each in found.corpora] == ["a.txt", "b.jsonl"] and found.vocab_size == 257
        assert found.tokenizer_sha256 == tokenizer_sha256(byte_tokenizer())

    def test_own_output_ends_where_the_base_ended_it_and_prompts_do_not_count(self, tiny_folder: Path, tmp_path: Path):
        own = own_folder(tmp_path / "own", [[1, 2, END_OF_TEXT], [2, 3]], prompt=[9, 9, 9, 9])
        build(tmp_path / "v.json", tiny_folder, own)
        assert counts_in(tmp_path / "v.json") == {1: 1, 2: 2, 3: 1, END_OF_TEXT: 1}

    def test_the_most_frequent_come_first_then_the_lowest_ids_then_what_was_not_there(
        self, tiny_folder: Path, tmp_path: Path
    ):
        rows = write_lines(tmp_path / "x.jsonl", [{"text": [7, 5, 9, 9, 5, 200]}])
        build(tmp_path / "v.json", tiny_folder, rows)
        found = read_draft_vocabulary(tmp_path / "v.json")
        assert found.token_ids == [5, 9, 7, 200, END_OF_TEXT] and found.counts == [2, 2, 1, 1, 1]
        ranked = found.ranked(257)
        assert ranked[:8].tolist() == [5, 9, 7, 200, END_OF_TEXT, 0, 1, 2]
        assert sorted(ranked.tolist()) == list(range(257))

    def test_prompts_are_answered_by_the_base(self, tiny_folder: Path, tmp_path: Path):
        prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "x" * n} for n in range(1, 4)])
        own = OwnOutput(max_new_tokens=12, dtype="float64", device="cpu")
        summary = build(tmp_path / "v.json", tiny_folder, f"own:{prompts}", own=own)
        assert 0 < summary.tokens <= 36
        assert read_draft_vocabulary(tmp_path / "v.json").corpora[0].kind == "own"


class TestRecovered:
    @pytest.mark.parametrize("order", [2, 3, 4])
    def test_an_n_gram_model_gives_the_counts_of_its_corpus(self, order: int, tiny_folder: Path, tmp_path: Path):
        rng = np.random.default_rng(order)
        text = (rng.zipf(1.3, size=12_000) % 60).tolist()
        cuts = np.cumsum(rng.integers(5, 40, size=400))
        outputs = [[*part.tolist(), *[END_OF_TEXT][: place % 2]] for place, part in enumerate(np.split(text, cuts))]
        own = own_folder(tmp_path / "own", [each for each in outputs if each], prompt=[70, 71, 72, 73])
        options = NgramOptions(order=order, tokenizer=str(tiny_folder), discount_fallback=(0.5, 1.0, 1.5))
        build_ngram([own], tmp_path / "ngram", options)
        build(tmp_path / "a.json", tiny_folder, own)
        build(tmp_path / "b.json", tiny_folder, tmp_path / "ngram")
        assert counts_in(tmp_path / "a.json") == counts_in(tmp_path / "b.json")
        (source,) = read_draft_vocabulary(tmp_path / "b.json").corpora
        assert (source.kind, source.name) == ("ngram", "ngram")

    @settings(deadline=None, derandomize=True, max_examples=20)
    @given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12), min_size=2, max_size=12))
    def test_words_after_the_first_ones_of_a_document(self, tmp_path_factory, documents: list[list[int]]):
        folder = tmp_path_factory.mktemp("words")
        corpus = folder / "x.txt"
        corpus.write_text("".join(" ".join(map(str, each)) + "\n" for each in documents))
        options = NgramOptions(order=3, tokenizer="words", discount_fallback=(0.6, 1.1, 1.4))
        summary = build_ngram([corpus], folder / "ngram", options)
        model = read_arpa(folder / "ngram" / "model.arpa")
        found = word_counts(model, summary.discounts[-1])
        later = Counter(word for each in documents for word in [*map(str, each), "</s>"][2:])
        assert found is not None
        assert {w: n for w, n in zip(model.vocabulary, found.tolist(), strict=True) if n} == later

    def test_the_shipped_one_is_made_of_the_shipped_n_gram_model(self):
        shipped = find_draft_vocabulary("", tokenizer_sha256=None, base="any")
        counts, _, manifest = counts_of_tokens(module.SHIPPED / "smollm2-135m" / "ngram")
        counts[2] += counts[-1]  # its end-of-text
        assert counts[shipped.token_ids].tolist() == shipped.counts and shipped.tokens == 382_422
        assert shipped.tokenizer_sha256 == manifest.tokenizer_sha256

    def test_models_whose_counts_are_not_in_them(self, tiny_folder: Path, tmp_path: Path):
        corpus = write_lines(tmp_path / "x.jsonl", [{"text": [1, 2, 3, 1, 2, 4, n % 9, n % 5]} for n in range(40)])
        tokens = {"tokenizer": str(tiny_folder), "discount_fallback": (0.6, 1.1, 1.4)}
        for options, told in (
            ({"order": 3, "prune": (0, 0, 2)}, "can't be recovered (is it pruned"),
            ({"order": 3, "discount_fallback": (0.5, 1.0, 1.5)}, "are its discounts given?)"),
            ({"order": 2, "smoothing": "katz", "discount_fallback": None}, "Kneser-Ney models of order 2 and more"),
            ({"order": 1}, "Kneser-Ney models of order 2 and more"),
            ({"order": 2, "surface": True}, "no token ids"),
        ):
            build_ngram([corpus], tmp_path / "ngram", NgramOptions(**{**tokens, **options}))
            message = refused(lambda: build(tmp_path / "v.json", tiny_folder, tmp_path / "ngram"), InvalidDataError)
            assert told in message, message


class TestRefused:
    @pytest.fixture
    def file(self, tiny_folder: Path, tmp_path: Path) -> Path:
        rows = write_lines(tmp_path / "x.jsonl", [{"text": [7, 5, 9, 9, 5, 200]}])
        build(tmp_path / "v.json", tiny_folder, rows)
        return tmp_path / "v.json"

    @pytest.mark.parametrize(
        "change",
        [
            {"counts": [2, 2, 1, 1]}, {"counts": [1, 2, 1, 1, 1]}, {"tokens": 8}, {"token_ids": [5, 5, 7, 200, 256]},
            {"token_ids": [5, 9, 7, 200, 257]}, {"token_ids": [], "counts": [], "tokens": 0},
        ],
    )  # fmt: skip
    def test_a_file_that_holds_no_ranking(self, file: Path, change: dict[str, object]):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        refused(lambda: read_draft_vocabulary(file), InvalidDataError, "no ranking of tokens", "build it again")

    def test_broken_files(self, file: Path, tmp_path: Path):
        text = file.read_text()
        refused(lambda: read_draft_vocabulary(tmp_path / "none.json"), "no draft vocabulary in", "can't read none.json")
        for broken, told in (
            (text[:50], "not valid JSON"),
            (text.replace("[5, 9", "[-5, 9"), "token_ids"),
            (text.replace('"vocab_size"', '"size"'), "size"),
            (text.replace('"vocab_size"', '"\\ud800"'), "surrogates not allowed"),
            (text.replace("draft-vocabulary/1", "draft-vocabulary/9"), "this version reads"),
        ):
            file.write_text(broken)
            refused(lambda: read_draft_vocabulary(file), InvalidDataError, told)

    def test_another_tokenizer(self, file: Path, tmp_path: Path, tiny_folder: Path):
        refused(
            lambda: find_draft_vocabulary(str(file), tokenizer_sha256="x", base="other"),
            IncompatibleError, f"the draft vocabulary {file} is of the tokenizer of", "other has another",
        )  # fmt: skip
        refused(lambda: find_draft_vocabulary("", tokenizer_sha256="x", base="other"), "no draft vocabulary is shipped")
        ngram = module.SHIPPED / "smollm2-135m" / "ngram"
        refused(lambda: build(tmp_path / "w.json", tiny_folder, ngram), IncompatibleError, "of other tokens than")
        assert not (tmp_path / "w.json").exists()

    def test_corpora_replaced_meanwhile(self, file: Path, tmp_path: Path, tiny_folder: Path, monkeypatch):
        monkeypatch.setattr("lm.ngram.corpus._is_unchanged", lambda source: False)
        refused(lambda: build(file, tiny_folder, tmp_path / "x.jsonl"), IncompatibleError, "were replaced")
        assert isinstance(read_draft_vocabulary(file), DraftVocabulary), "what was there stays"
