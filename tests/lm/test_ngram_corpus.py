"""Corpora become one stream of word ids: what a document and a word is, and bad input named by its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import END, byte_tokenizer, files_of_at_most, refused

from lattices.errors import IncompatibleError, InvalidDataError, OutputError, RescoreError
from lm import text_files
from lm.base.identity import tokenizer_sha256
from lm.ngram.corpus import EncodedCorpus, encode_corpora, find_sources
from lm.ngram.counting import BREAK

ENDS = {2: "</s>", BREAK: "|"}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def encode(tmp_path: Path, *corpora: Path | str, **options) -> EncodedCorpus:
    return encode_corpora(find_sources(corpora), tmp_path / "stream.i32", **options)


def words(encoded: EncodedCorpus) -> str:
    """The stream as words, `</s>` at the end of documents, `|` where one was cut off."""
    return " ".join(ENDS.get(i) or encoded.vocabulary[i] for i in encoded.ids().tolist())


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Words at white space


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a b\nb  c\n", "a b </s> b c </s>"),
        (b"a b\r\nb\r\n", "a b </s> b </s>"),
        (b"\xef\xbb\xbfa b\n", "a b </s>"),
        (b"a\0b\tc \n", "a b c </s>"),
        (b"a\n\n \nb", "a </s> </s> </s> b </s>"),  # no line end at the end of the file
        ("a\u00a0b \u2028c\u0085\n".encode(), "a\u00a0b \u2028c\u0085 </s>"),  # none of lmplz's separators
        (b"one", "one </s>"),
    ],
)
def test_words_are_split_as_lmplz_does(content: bytes, expected: str, tmp_path: Path) -> None:
    assert words(encode(tmp_path, write(tmp_path / "t.txt", content))) == expected


def test_words_are_numbered_as_they_appear(tmp_path: Path) -> None:
    encoded = encode(tmp_path, write(tmp_path / "t.txt", "z a z\nm a\n"))
    assert encoded.vocabulary == ("<unk>", "<s>", "</s>", "z", "a", "m")
    assert encoded.ids().tolist() == [3, 4, 3, 2, 5, 4, 2]
    assert (encoded.documents, encoded.tokens) == (2, 5)


def test_many_words_outgrow_every_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 100_000)
    wanted = [f"word-{i}" * (1 + i % 3) for i in range(70_000)]
    encoded = encode(tmp_path, write(tmp_path / "t.txt", "\n".join(wanted * 2)))
    assert encoded.vocabulary[3:] == tuple(wanted)
    assert encoded.ids()[::2].tolist() == [*range(3, 70_003)] * 2


@pytest.mark.parametrize("word", ["<s>", "</s>", "<unk>"])
def test_special_words_are_refused(word: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.txt", f"fine\nso far {word} bad\n")
    assert f"t.txt line 2 holds {word} as a word" in refused(lambda: encode(tmp_path, path), InvalidDataError)


def test_bad_utf8_is_named_or_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "t.txt", b"good\ngood\n\xff bad\n")
    message = refused(lambda: encode(tmp_path, path), InvalidDataError)
    assert "line 3 is not UTF-8" in message and "--errors replace" in message
    assert words(encode(tmp_path, path, errors="replace")) == "good </s> good </s> \ufffd bad </s>"
    assert "strict or replace" in refused(lambda: encode(tmp_path, path, errors="ignore"), RescoreError)


def test_line_numbers_hold_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 7)
    path = write(tmp_path / "t.txt", b"a line longer than a block\nb\nc\n\nd \xc3\xa9\nx\xfe\n")
    assert "line 6 " in refused(lambda: encode(tmp_path, path), InvalidDataError)
    path = write(tmp_path / "t.txt", "a line longer than a block\nb \u00e9\n\u00e9")
    assert words(encode(tmp_path, path)) == "a line longer than a block </s> b \u00e9 </s> \u00e9 </s>"


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b" \0\r\n"])
def test_an_empty_corpus_is_refused(content: bytes, tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "t.txt", content)
    assert "no word in" in refused(lambda: encode(tmp_path, path), InvalidDataError)


# Files and folders


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    write(folder / "b.txt.gz", gzip.compress(b"b\n"))
    write(folder / "a.txt", "a\n")
    write(folder / "below" / "c.jsonl", '{"text": "c"}\n')
    write(folder / "notes.md", "not this\n")
    assert words(encode(tmp_path, folder)) == "a </s> b </s> c </s>"


def test_zstd_is_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    packed = pyarrow.compress(b"a b\n" * 3, codec="zstd", asbytes=True)
    assert words(encode(tmp_path, write(tmp_path / "t.txt.zst", packed))) == "a b </s> a b </s> a b </s>"
    path = write(tmp_path / "bad.txt.zst", b"no zstd at all")
    assert str(path) in refused(lambda: encode(tmp_path, path), RescoreError)


@pytest.mark.parametrize("content", [gzip.compress(b"a b\n" * 1000, mtime=0)[:-20], b"no gzip"])
def test_a_broken_gzip_is_refused(content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "t.txt.gz", content)
    assert "not a whole gzip file" in refused(lambda: encode(tmp_path, path), InvalidDataError)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "can't read" in refused(lambda: find_sources([tmp_path / "none.txt"]), RescoreError)
    assert "holds no .txt" in refused(lambda: find_sources([tmp_path]), RescoreError)
    assert "no corpus given" in refused(lambda: find_sources([]), RescoreError)


def test_sources_are_known_by_their_content(tmp_path: Path) -> None:
    one, two = (find_sources([write(tmp_path / "t.txt", text)])[0] for text in ("a", "b"))
    assert one.sha256 != two.sha256 and one.name == two.name


def test_a_stream_that_cant_be_written(tmp_path: Path) -> None:
    sources = find_sources([write(tmp_path / "t.txt", "a\n")])
    refused(lambda: encode_corpora(sources, tmp_path / "none" / "stream"), OutputError)


@pytest.mark.parametrize("lines", [3, 5000])
def test_a_disk_that_fills_up_with_the_last_bytes(lines: int, tmp_path: Path) -> None:
    sources = find_sources([write(tmp_path / "t.txt", "a b\n" * lines)])
    size = encode_corpora(sources, tmp_path / "stream").path.stat().st_size
    with files_of_at_most(size - 1):
        refused(lambda: encode_corpora(sources, tmp_path / "stream"), OutputError, "can't write")


# Records


def records(path: Path, *lines: object) -> Path:
    return write(path, "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def test_a_record_is_one_document(tmp_path: Path, tokenizer) -> None:
    path = records(tmp_path / "t.jsonl", {"body": "a b\nc"}, "", {"body": "d", "id": 1})
    assert words(encode(tmp_path, path, field="body")) == "a b c </s> d </s>"
    ids = encode(tmp_path, path, field="body", tokenizer=tokenizer)
    assert words(ids).split().count("</s>") == 2
    newline = tokenizer("\n")["input_ids"][0]
    assert str(newline) in words(ids).split()


def test_records_of_ids(tmp_path: Path, tokenizer) -> None:
    path = records(tmp_path / "t.jsonl", {"text": [65, 256]}, {"text": [66, 256, 256, 67]}, {"text": []})
    encoded = encode(tmp_path, path, tokenizer=tokenizer)
    assert words(encoded) == "65 </s> 66 </s> 67 </s>"  # the end-of-text token ends a document, once
    assert encoded.vocabulary[3:] == ("65", "66", "67")
    assert words(encode(tmp_path, records(tmp_path / "w.jsonl", {"text": [7, 8]}))) == "7 8 </s>"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "cut', "not valid JSON"),
        ("[1]", "not a JSON object"),
        ('{"body": "b"}', "no field 'text' (it has: body)"),
        ('{"text": 3}', "neither text nor a list of ids"),
        ('{"text": [1, true]}', "neither text nor a list of ids"),
        ('{"text": [1, 257]}', "token id 257; the tokenizer's go from 0 to 256"),
        ('{"text": [-1]}', "token id -1"),
        ('{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_record_is_named_by_its_line(line: str, said: str, tmp_path: Path, tokenizer) -> None:
    path = records(tmp_path / "t.jsonl", {"text": "good"}, line)
    message = refused(lambda: encode(tmp_path, path, tokenizer=tokenizer), InvalidDataError)
    assert "line 2" in message and said in message


# Token ids


def test_lines_are_tokenised(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path / "t.txt", "ab\r\n\n  \nba\n")
    encoded = encode(tmp_path, path, tokenizer=tokenizer)
    a, b = tokenizer("ab")["input_ids"]
    assert words(encoded) == f"{a} {b} </s> {b} {a} </s>"
    assert encoded.documents == 2


def test_surface_writes_token_strings(tmp_path: Path, tokenizer) -> None:
    tokens = tokenizer("a b", add_special_tokens=False)["input_ids"]
    encoded = encode(tmp_path, write(tmp_path / "t.txt", "a b"), tokenizer=tokenizer, surface=True)
    assert encoded.vocabulary[3:] == tuple(tokenizer.convert_ids_to_tokens(tokens)) == ("a", "\u0120", "b")


def test_token_strings_that_no_arpa_file_can_hold(tmp_path: Path) -> None:
    class Odd:
        eos_token_id = None

        def get_vocab(self) -> dict[str, int]:
            return {"a b": 0, "<s>": 1, "": 2, "c": 3}

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [list(self.get_vocab())[i] for i in ids]

    path = records(tmp_path / "t.jsonl", {"text": [0, 1, 2, 3]})
    encoded = encode(tmp_path, path, tokenizer=Odd(), surface=True)
    assert encoded.vocabulary[3:] == ("<token-0>", "<token-1>", "<token-2>", "c")


# Own output


def own_folder(folder: Path, tokenizer, *examples: dict) -> Path:
    base = {"name": "tiny", "weights_sha256": "0", "tokenizer_sha256": tokenizer_sha256(tokenizer)}
    write(folder / "settings.json", json.dumps({"base": base}))
    records(folder / "corpus.jsonl", *({"prompt": "", "chat": False, "text": "", **e} for e in examples))
    return folder


def test_own_output_stands_in_its_left_context(tmp_path: Path, tokenizer) -> None:
    end = tokenizer.convert_tokens_to_ids(END)
    folder = own_folder(
        tmp_path / "own",
        tokenizer,
        {"prompt_ids": [1, 2, 3, 4], "output_ids": [10, 11, end]},
        {"prompt_ids": [5], "output_ids": [12, 13]},  # cut off at the limit: no end there
        {"prompt_ids": [5, 6], "output_ids": []},
    )
    encoded = encode(tmp_path, folder, tokenizer=tokenizer, left_context=2)
    assert words(encoded) == "3 4 10 11 </s> 5 12 13 |"
    assert words(encode(tmp_path, folder, tokenizer=tokenizer, left_context=0)) == "10 11 </s> 12 13 |"


def test_own_output_of_another_tokenizer_is_refused(tmp_path: Path, tokenizer) -> None:
    other = byte_tokenizer()
    other.add_tokens(["more"])
    folder = own_folder(tmp_path / "own", other, {"prompt_ids": [1], "output_ids": [2]})
    assert "tokenizer of tiny" in refused(lambda: encode(tmp_path, folder, tokenizer=tokenizer), IncompatibleError)
    assert "instead of words" in refused(lambda: encode(tmp_path, folder), RescoreError)


def test_own_output_with_bad_ids_is_refused(tmp_path: Path, tokenizer) -> None:
    folder = own_folder(tmp_path / "own", tokenizer, {"prompt_ids": [1], "output_ids": [999]})
    assert "line 1 has the token id 999" in refused(
        lambda: encode(tmp_path, folder, tokenizer=tokenizer), InvalidDataError
    )


# Hub data sets


def test_a_hub_data_set_is_read_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []
    data = datasets.Dataset.from_dict({"text": ["a b", "c"], "title": ["d", "e"]})

    def load(name: str, split: str) -> object:
        asked.append((name, split))
        return data

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert words(encode(tmp_path, "hub:some/name")) == "a b </s> c </s>"
    assert words(encode(tmp_path, "hub:some/name:test:title")) == "d </s> e </s>"
    assert set(asked) == {("some/name", "train"), ("some/name", "test")}
    message = refused(lambda: encode(tmp_path, "hub:some/name::body"), InvalidDataError)
    assert "has no field 'body'; it has: text, title" in message


def test_a_hub_data_set_that_cant_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_: object, **__: object) -> SimpleNamespace:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert "can't load hub:x (no route)" in refused(lambda: find_sources(["hub:x"]), RescoreError)
