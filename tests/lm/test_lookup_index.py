"""Lookup indexes on disk: what is in the folder, and whatever is wrong with one in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import byte_tokenizer, files_of_at_most, refused, save_tiny_base, write_lines
from filelock import FileLock

from lattices.errors import IncompatibleError, InvalidDataError, OutputError
from lattices.joined.corpus_index import END, join_documents
from lm import lookup_index as module
from lm.base.catalog import identify
from lm.base.corpus import CORPUS_FILE, SETTINGS_FILE
from lm.base.identity import tokenizer_sha256
from lm.files import sha256_of_file
from lm.locks import LOCK_FILE
from lm.lookup_index import LookupOptions, build_lookup, open_lookup
from lm.ngram.build import folder_beside

FABLE = Path(__file__).parent / "reference" / "fable.txt"
END_OF_TEXT = 256  # the tiny base's


@pytest.fixture
def index(tiny_folder: Path, tmp_path: Path) -> Path:
    """An index of three lines."""
    return build(tmp_path / "index", write(tmp_path / "corpus.txt", "the cat sat\nthe cat ran\n\nx\n"), tiny_folder)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def build(out: Path, corpus: Path | str, tokenizer: Path, **options) -> Path:
    build_lookup([corpus], out, LookupOptions(tokenizer=str(tokenizer)), **options)
    return out


def ids(text: str) -> list[int]:
    return byte_tokenizer()(text)["input_ids"]


def change_record(index: Path, **fields) -> None:
    record = json.loads((index / "lookup.json").read_text())
    (index / "lookup.json").write_text(json.dumps(record | fields))


def test_a_folder_with_all_that_was_made(index: Path, tiny_folder: Path) -> None:
    assert sorted(path.name for path in index.iterdir()) == ["lookup.json", "suffixes.npy", "tokens.npy"]
    documents = [ids("the cat sat"), ids("the cat ran"), ids("x")]
    assert np.load(index / "tokens.npy").tolist() == join_documents(documents).tolist()
    record = json.loads((index / "lookup.json").read_text())
    assert record["schema"] == "rescore.lookup/1"
    assert (record["documents"], record["tokens"], record["vocab_size"]) == (3, 23, 257)
    assert record["largest_token_id"] == max(map(max, documents))
    assert record["tokenizer"] == str(tiny_folder) and record["tokenizer_sha256"] == tokenizer_sha256(byte_tokenizer())
    corpus = index.parent / "corpus.txt"
    assert record["corpora"] == [
        {"kind": "text", "name": "corpus.txt", "sha256": sha256_of_file(corpus), "size": corpus.stat().st_size}
    ]
    for name in ("tokens.npy", "suffixes.npy"):
        file = index / name
        assert record["files"][name] == {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}


def test_what_is_opened_says_what_followed(index: Path) -> None:
    opened = open_lookup(index, tokenizer_sha256=tokenizer_sha256(byte_tokenizer()), vocab_size=257)
    assert all(isinstance(a.base, np.memmap) for a in (opened.corpus.token_ids, opened.corpus.suffixes))  # not read
    assert (len(opened.corpus), opened.corpus.documents) == (opened.record.tokens, opened.record.documents)
    tokens, _, matched = opened.corpus.continuations(ids("a cat"), count=2, length=4)
    assert (tokens.tolist(), matched) == ([ids(" ran"), ids(" sat")], 4)


def test_the_same_corpus_gives_the_same_index(index: Path, tiny_folder: Path, tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.txt.jsonl", json.dumps({"text": "the cat sat"}) + "\n")
    again = build(tmp_path / "again", tmp_path / "corpus.txt", tiny_folder)
    other = build(tmp_path / "other", corpus, tiny_folder)
    assert open_lookup(again).identity == open_lookup(index).identity != open_lookup(other).identity


def test_rows_may_hold_ids_and_line_ends(tiny_folder: Path, tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "x.jsonl", [{"text": "a\nb"}, {"text": [1, 2, END_OF_TEXT, 3]}, {"text": ""}])
    tokens = np.load(build(tmp_path / "index", rows, tiny_folder) / "tokens.npy")
    assert tokens.tolist() == [*ids("a\nb"), END, 1, 2, END, 3, END]


def test_own_output_goes_on_from_its_prompt_to_its_end(tiny_folder: Path, tmp_path: Path) -> None:
    """What the base finished ends with its end-of-text token, as it may be proposed; what was cut off does not."""
    own = tmp_path / "own"
    own.mkdir()
    base = {"name": "tiny", "weights_sha256": "", "tokenizer_sha256": tokenizer_sha256(byte_tokenizer())}
    write(own / SETTINGS_FILE, json.dumps({"base": base}))
    prompt = list(range(30, 60))
    outputs = [[1, 2, END_OF_TEXT], [3, 4]]
    write_lines(own / CORPUS_FILE, [{"prompt_ids": prompt, "output_ids": output} for output in outputs])
    index = build(tmp_path / "index", own, tiny_folder)
    left = prompt[-15:]
    assert np.load(index / "tokens.npy").tolist() == [*left, 1, 2, END_OF_TEXT, END, *left, 3, 4, END]
    opened = open_lookup(index)
    assert opened.corpus.continuations([*prompt, 1], count=1, length=3)[2] == 16
    assert opened.record.documents == 2 and opened.record.tokens == 2 * 15 + 5


def test_many_batches_and_sources(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "empty.txt").touch()
    for name in "ba":
        write(folder / f"{name}.txt", "".join(f"{name}{n}\n" for n in range(100)))
    monkeypatch.setattr("lm.ngram.corpus.BATCH", 50)
    expected = [ids(f"{name}{n}") for name in "ab" for n in range(100)]
    index = build(tmp_path / "index", folder, tiny_folder)
    assert np.load(index / "tokens.npy").tolist() == join_documents(expected).tolist()


# What can't be built


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_corpus(text: str, tiny_folder: Path, tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.txt", text)
    refused(lambda: build(tmp_path / "index", corpus, tiny_folder), InvalidDataError, "no token in", "corpus.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.txt"]


def test_a_corpus_in_which_nothing_follows_anything(tiny_folder: Path, tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.txt", "a\nb\n")
    refused(lambda: build(tmp_path / "index", corpus, tiny_folder), InvalidDataError, "nothing follows")


def test_other_files_are_not_replaced(tiny_folder: Path, tmp_path: Path) -> None:
    mine = write(tmp_path / "thesis.txt", "the only copy")
    refused(lambda: build(tmp_path, FABLE, tiny_folder), OutputError, "no lookup index", "choose another --out")
    refused(lambda: build(mine, FABLE, tiny_folder), OutputError, "is a file")
    assert mine.read_text() == "the only copy"


def test_an_index_of_other_things_is_replaced_only_if_asked(index: Path, tiny_folder: Path, tmp_path: Path) -> None:
    identity = open_lookup(index).identity
    message = refused(lambda: build(index, FABLE, tiny_folder, replace=False), IncompatibleError, "another index")
    assert "fable.txt" in message and "corpus.txt" in message
    build(index, tmp_path / "corpus.txt", tiny_folder, replace=False)  # the same
    assert open_lookup(index).identity == identity
    build(index, FABLE, tiny_folder)
    assert open_lookup(index).record.corpora[0].name == "fable.txt"


def test_a_broken_index_is_replaced_only_if_asked(index: Path, tiny_folder: Path) -> None:
    write(index / "lookup.json", "{")
    refused(lambda: build(index, FABLE, tiny_folder, replace=False), InvalidDataError, "not valid JSON")
    build(index, FABLE, tiny_folder)
    assert open_lookup(index).record.tokens


def test_a_failed_build_keeps_the_index_before(index: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = open_lookup(index).identity

    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "build_suffix_array", stop)
    with pytest.raises(KeyboardInterrupt):
        build(index, FABLE, tiny_folder)
    assert open_lookup(index).identity == identity
    assert sorted(path.name for path in index.parent.iterdir()) == ["corpus.txt", "index"]


def test_a_second_writer(tiny_folder: Path, tmp_path: Path) -> None:
    with FileLock(tmp_path / f".index{LOCK_FILE}"):
        refused(
            lambda: build(tmp_path / "index", FABLE, tiny_folder), OutputError, "another rescore process is writing"
        )


def test_a_full_disk(index: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """What numpy would say nothing of: the last bytes of a file are missing."""
    identity = open_lookup(index).identity
    sizes = sorted(file.stat().st_size for file in build(tmp_path / "whole", FABLE, tiny_folder).glob("*.npy"))
    for size in (sizes[0] - 1, sizes[1] - 1):
        with files_of_at_most(size):
            refused(lambda: build(index, FABLE, tiny_folder), OutputError, f"can't write {index}")
        assert open_lookup(index).identity == identity


def test_a_corpus_replaced_meanwhile(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm.ngram.corpus._is_unchanged", lambda source: False)
    refused(lambda: build(tmp_path / "index", FABLE, tiny_folder), IncompatibleError, "were replaced")


def test_default_folders(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.jsonl.gz", "")
    assert folder_beside([corpus], "-lookup") == tmp_path / "corpus-lookup"
    assert folder_beside([tmp_path], "-lookup") == tmp_path.with_name(f"{tmp_path.name}-lookup")
    for corpora in ([corpus, tmp_path], ["own:prompts.jsonl"]):
        refused(
            lambda corpora=corpora: folder_beside(corpora, "-lookup", what="index"),
            "give the index a folder: --out DIR",
        )


# What can't be opened


def test_another_tokenizer(index: Path, tmp_path: Path) -> None:
    other = "f" * 64
    refused(
        lambda: open_lookup(index, tokenizer_sha256=other, base="gpt2"), IncompatibleError, "the tokenizer of ",
        tokenizer_sha256(byte_tokenizer())[:12], "gpt2 has another", other[:12], "build-lookup --tokenizer BASE",
    )  # fmt: skip


def test_tokens_beyond_the_vocabulary(index: Path) -> None:
    largest = open_lookup(index).record.largest_token_id
    open_lookup(index, vocab_size=largest + 1)
    refused(lambda: open_lookup(index, vocab_size=largest), IncompatibleError, f"holds the token id {largest}")


@pytest.mark.parametrize("name", ["tokens.npy", "suffixes.npy"])
def test_a_file_that_was_cut_short(index: Path, name: str) -> None:
    content = (index / name).read_bytes()
    for size in (0, 10, len(content) - 4):
        (index / name).write_bytes(content[:size])
        refused(lambda: open_lookup(index), InvalidDataError, name, f"has {size} bytes where", "build it again")


@pytest.mark.parametrize("name", ["tokens.npy", "suffixes.npy"])
def test_a_file_with_a_flipped_byte(index: Path, name: str) -> None:
    content = bytearray((index / name).read_bytes())
    content[-4] ^= 1
    (index / name).write_bytes(content)
    refused(lambda: open_lookup(index), InvalidDataError, name, "was changed after it was written", "build it again")


@pytest.mark.parametrize("name", ["tokens.npy", "suffixes.npy"])
def test_a_file_that_is_gone(index: Path, name: str) -> None:
    (index / name).unlink()
    refused(lambda: open_lookup(index), f"can't read {index / name}")


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((2, 2), dtype=np.int32), np.array([None])])
def test_a_file_of_another_kind_with_its_hash(index: Path, array: np.ndarray) -> None:
    np.save(index / "tokens.npy", array)
    files = json.loads((index / "lookup.json").read_text())["files"]
    path = index / "tokens.npy"
    change_record(index, files=files | {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}})
    refused(lambda: open_lookup(index), InvalidDataError, "no array of a lookup index")


def test_a_folder_that_is_no_index(index: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        refused(lambda folder=folder: open_lookup(folder), f"no lookup index in {folder}", "build-lookup")
    refused(lambda: open_lookup(""), "the lookup index is empty; give a path")
    shutil.rmtree(index)
    refused(lambda: open_lookup(write(index, "x")), f"no lookup index in {index}")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"schema": "rescore.lookup/2"}, "has schema 'rescore.lookup/2'"),
        ({"tokens": 0}, "is of an empty corpus"),
        ({"tokens": 22}, "does not hold what its lookup.json says"),
        ({"documents": 2}, "does not hold what its lookup.json says"),
        ({"tokens": -1}, "`tokens`"),
        ({"tokens": "many"}, "`tokens`"),
        ({"files": {}}, "says nothing of tokens.npy"),
    ],
)
def test_a_record_that_was_changed(index: Path, fields: dict[str, object], expected: str) -> None:
    change_record(index, **fields)
    refused(lambda: open_lookup(index), InvalidDataError, expected)


def test_any_base_with_the_tokenizer_may_use_it(index: Path, tmp_path: Path) -> None:
    identity = identify(str(save_tiny_base(tmp_path / "another", seed=3)), dtype="float32")
    assert open_lookup(index, tokenizer_sha256=identity.tokenizer_sha256)
