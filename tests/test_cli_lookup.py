"""`rescore build-lookup` end to end: the table, the document, one line per mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Command, write_lines

from lm.lookup_index import open_lookup

FABLE = Path(__file__).parent / "lm" / "reference" / "fable.txt"


@pytest.fixture
def tokenizer(tiny_folder: Path) -> list[object]:
    return ["--tokenizer", tiny_folder]


def test_the_table_and_what_comes_next(rescore: Command, tokenizer: list[object], tmp_path: Path):
    run = rescore("build-lookup", FABLE, *tokenizer, "--out", tmp_path / "index")
    assert (run.code, run.err) == (0, "")
    record = open_lookup(tmp_path / "index").record
    lines = run.out.splitlines()
    assert lines[0].split() == ["lookup", "index", str(tmp_path / "index")]
    assert lines[2].split() == ["documents", f"{record.documents:,}"]
    assert lines[3].split() == ["tokens", f"{record.tokens:,}"]
    assert lines[-2].startswith("files: lookup.json (")
    assert lines[-1] == (
        f"next: rescore eval --base {tokenizer[1]} --rescorer none,lookup,corpus-lookup:{tmp_path / 'index'}"
    )


def test_the_document_and_the_default_folder(rescore: Command, tokenizer: list[object], tmp_path: Path):
    corpus = write_lines(tmp_path / "x.jsonl", [{"body": "one two\nthree"}, {"body": "four"}])
    found = rescore("build-lookup", corpus, *tokenizer, "--field", "body", "--json").document
    assert found == {
        "path": str(tmp_path / "x-lookup"), "tokenizer": str(tokenizer[1]), "documents": 2, "tokens": 17,
        "distinct_tokens": len(set("one two\nthreefour")), "longest_document": 13,
    }  # fmt: skip
    other = write_lines(corpus, [{"body": "five"}])
    rescore("build-lookup", other, *tokenizer, "--field", "body").refused("holds another index .*--out DIR")
    assert rescore("build-lookup", other, *tokenizer, "--field", "body", "--out", tmp_path / "x-lookup").code == 0


def test_the_bases_own_output_is_a_corpus(rescore: Command, tiny_folder: Path, tmp_path: Path):
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "x" * n} for n in range(1, 4)])
    options = ["--max-new-tokens", 12, "--device", "cpu", "--out", tmp_path / "index"]
    run = rescore("build-lookup", f"own:{prompts}", "--base", tiny_folder, *options)
    assert run.code == 0, run.err
    (source,) = open_lookup(tmp_path / "index").record.corpora
    assert source.kind == "own"


def test_mistakes(rescore: Command, tokenizer: list[object], tmp_path: Path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"good\nna\xefve\n")
    rescore("build-lookup", tmp_path / "empty.txt", *tokenizer).refused("there is no token in .*empty.txt")
    rescore("build-lookup", tmp_path / "latin.txt", *tokenizer).refused("line 2.*--errors replace")
    rescore("build-lookup", tmp_path / "none.txt", *tokenizer).refused("none.txt: No such file")
    rescore("build-lookup", FABLE, FABLE, *tokenizer).refused("give the index a folder: --out DIR")
    rescore("build-lookup", FABLE, "--tokenizer", tmp_path / "no-base", "--out", tmp_path / "m").refused("no-base")
    rescore("build-lookup", FABLE, *tokenizer, "--out", tmp_path).refused("no lookup index, which would be lost")
    assert not list(tmp_path.glob("*-lookup"))
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == '["empty.txt", "latin.txt"]'
