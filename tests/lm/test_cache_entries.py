"""What lies in the cache directory and in training folders: made again where it is broken or of something else, with
one line that says so; never written to by two processes at once."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import write_lines
from test_catalog import write_gguf
from test_keys import BOS, edit

import lm.base.catalog
import lm.ngram.build
from lattices.errors import InvalidDataError, OutputError
from lm.base.catalog import identify, load_base
from lm.base.corpus import GenerationOptions, Prompt, generate_corpus
from lm.base.own_output import OwnOutput, own_output
from lm.locks import writing_to
from lm.ngram.build import NgramOptions, build_ngram
from lm.ngram.load import load_ngram
from lm.ngram.mix import find_parts, mix_ngrams
from lm.training.data import read_head_data

TEXT = "the cat sat on the mat and so did the dog. " * 40


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Another byte in the middle of a file of the same length."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@contextmanager
def busy(folder: Path, *, beside: bool = False) -> Iterator[None]:
    """Another process (here a thread, whose locks are its own) writes to a folder."""
    begun, end = threading.Event(), threading.Event()

    def hold() -> None:
        with writing_to(folder, beside=beside):
            begun.set()
            end.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert begun.wait(60)
    try:
        yield
    finally:
        end.set()
        thread.join()


class TestConvertedModels:
    @pytest.mark.parametrize("change", [cut, flip, Path.unlink, lambda path: path.write_bytes(b"")])
    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "source.json"])
    def test_a_broken_copy_is_converted_again(
        self, name: str, change: Callable[[Path], None], tmp_path: Path, cache_folder: Path, caplog
    ):
        if name == "source.json" and change is flip:
            pytest.skip("a byte of its white space tells nothing")
        path = str(write_gguf(tmp_path / "tiny.gguf"))
        before = load_base(path).identity
        (folder,) = (cache_folder / "models").iterdir()
        change(folder / name)
        assert load_base(path).identity == before
        (line,) = caplog.messages
        assert line == f"the converted copy of tiny.gguf in {folder} is broken; it is made again"
        assert identify(path) == before and len(caplog.messages) == 1

    def test_another_library_converts_anew(self, tmp_path: Path, cache_folder: Path, monkeypatch):
        path = str(write_gguf(tmp_path / "tiny.gguf"))
        identify(path)
        monkeypatch.setattr(lm.base.catalog, "software", lambda *names: dict.fromkeys(names, "9.9"))
        identify(path)
        assert len(list((cache_folder / "models").iterdir())) == 2

    def test_two_at_once_convert_once(self, tmp_path: Path, cache_folder: Path, monkeypatch):
        """Threads, whose locks are as apart as those of processes."""
        path, convert, calls = write_gguf(tmp_path / "tiny.gguf"), lm.base.catalog._convert, []

        def slowly(*given: Path) -> Path:
            calls.append(given)
            time.sleep(0.3)
            return convert(*given)

        monkeypatch.setattr(lm.base.catalog, "_convert", slowly)
        threads = [threading.Thread(target=lm.base.catalog.resolve_base, args=(str(path),)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(calls) == 1 == len(list((cache_folder / "models").iterdir()))


class TestOwnOutput:
    @pytest.fixture
    def prompts(self, tmp_path: Path) -> Path:
        return write_lines(tmp_path / "prompts.jsonl", [{"prompt": "x" * n} for n in range(1, 5)])

    @pytest.fixture
    def base(self, tiny_folder: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(tiny_folder, tmp_path / "base"))

    def make(self, prompts: Path, base: Path) -> Path:
        settings = OwnOutput(base=str(base), max_new_tokens=8, dtype="float64", device="cpu")
        return own_output(prompts, settings, tokenizer_sha256=identify(str(base)).tokenizer_sha256)

    @pytest.mark.parametrize("name", ["corpus.jsonl", "manifest.json", "settings.json"])
    @pytest.mark.parametrize("change", [cut, lambda path: path.write_bytes(b"")])
    def test_a_broken_one_is_made_again(self, name, change, prompts, base, caplog):
        folder = self.make(prompts, base)
        before = (folder / "corpus.jsonl").read_bytes()
        change(folder / name)
        assert self.make(prompts, base) == folder and (folder / "corpus.jsonl").read_bytes() == before
        (line,) = caplog.messages
        assert line == f"the output for prompts.jsonl in {folder} is broken; it is made again"

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("generation_config.json", {"eos_token_id": [256, 65]}),
            ("config.json", {"rms_norm_eps": 1.0}),
            ("tokenizer.json", {"post_processor": BOS}),
            ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}),
        ],
    )
    def test_a_changed_base_is_asked_anew(self, prompts, base, name, change):
        before = self.make(prompts, base)
        edit(name, **change)(base)
        assert self.make(prompts, base) != before

    def test_a_prompt_that_is_there_twice_is_refused(self, tiny_base, prompts, tmp_path: Path):
        """What two processes in one folder left: the states are in another order than the lines."""
        out = tmp_path / "own"
        generate_corpus(tiny_base, [Prompt("abc", True), Prompt("d", False)], out, GenerationOptions(max_new_tokens=4))
        lines = (out / "corpus.jsonl").read_text()
        (out / "corpus.jsonl").write_text(lines + lines)
        (out / "hidden.f16").write_bytes((out / "hidden.f16").read_bytes() * 2)
        for read in (
            lambda: read_head_data(tiny_base, out, tmp_path / "cache"),
            lambda: generate_corpus(tiny_base, [Prompt("abc", True)], out, GenerationOptions(max_new_tokens=4)),
            lambda: build_ngram([out], tmp_path / "ngram", NgramOptions(order=2, tokenizer=tiny_base.identity.name)),
        ):
            with pytest.raises(InvalidDataError, match="line 3 has a prompt that is there already: two processes"):
                read()


class TestStates:
    @pytest.mark.parametrize("name", ["shard-00000.f16", "segments.npz"])
    def test_broken_ones_are_made_again(self, name: str, tiny_base, tmp_path: Path, caplog):
        (tmp_path / "text.txt").write_text(TEXT)
        before = read_head_data(tiny_base, tmp_path / "text.txt", tmp_path / "out")
        states = np.array(before.states[0 : len(before)])
        (folder,) = (tmp_path / "out").iterdir()
        cut(folder / name)
        after = read_head_data(tiny_base, tmp_path / "text.txt", tmp_path / "out")
        assert (after.targets == before.targets).all() and (after.ends == before.ends).all()
        np.testing.assert_array_equal(after.states[0 : len(after)], states)
        (line,) = caplog.messages
        assert "made again" in line
        read_head_data(tiny_base, tmp_path / "text.txt", tmp_path / "out")
        assert len(caplog.messages) == 1

    def test_a_changed_base_has_others(self, tiny_folder: Path, tmp_path: Path):
        base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
        (tmp_path / "text.txt").write_text(TEXT)
        found = []
        for change in ({}, {"rms_norm_eps": 1.0}):
            edit("config.json", **change)(base)
            found.append(read_head_data(load_base(str(base), device="cpu"), tmp_path / "text.txt", tmp_path / "out"))
        assert not np.array_equal(found[0].states[0:20], found[1].states[0:20])


class TestNgrams:
    @pytest.fixture
    def arpa(self, tmp_path: Path) -> Path:
        (tmp_path / "text.txt").write_text(TEXT)
        build_ngram(
            [tmp_path / "text.txt"],
            tmp_path / "model",
            NgramOptions(order=2, tokenizer="words", discount_fallback=(0.5, 1, 1.5)),
        )
        return tmp_path / "model" / "model.arpa"

    @pytest.mark.parametrize("change", [cut, flip, lambda path: path.write_bytes(b"")])
    def test_a_broken_automaton_is_compiled_again(self, arpa: Path, change, cache_folder: Path, caplog):
        load_ngram(arpa)
        (file,) = (cache_folder / "ngrams").glob("*.bin")
        before = file.read_bytes()
        change(file)
        load_ngram(arpa)
        assert caplog.messages == [f"the automaton of model.arpa in {file} is broken; it is made again"]
        assert file.read_bytes() == before

    def test_counts_of_another_tokenizer_are_not_gone_on_with(self, tiny_folder: Path, tmp_path: Path, monkeypatch):
        """Interrupted after the text was encoded; then the normaliser changes what the text is."""
        base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
        (tmp_path / "text.txt").write_text(TEXT.title())
        options = NgramOptions(order=2, tokenizer=str(base), discount_fallback=(0.5, 1, 1.5))

        def stop(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(lm.ngram.build, "count_full", stop)
            with pytest.raises(KeyboardInterrupt):
                build_ngram([tmp_path / "text.txt"], tmp_path / "model", options)
        edit("tokenizer.json", normalizer={"type": "Lowercase"})(base)
        assert not build_ngram([tmp_path / "text.txt"], tmp_path / "model", options).resumed
        build_ngram([tmp_path / "text.txt"], tmp_path / "fresh", options)
        assert (tmp_path / "model/model.arpa").read_bytes() == (tmp_path / "fresh/model.arpa").read_bytes()


class TestFoldersOfTheUser:
    """A second process is refused, before it changes anything."""

    def test_a_corpus(self, tiny_base, tmp_path: Path):
        with busy(tmp_path / "own"), pytest.raises(OutputError, match="another rescore process is writing to"):
            generate_corpus(tiny_base, [Prompt("abc", True)], tmp_path / "own")
        assert not (tmp_path / "own").exists()

    def test_n_gram_models(self, tmp_path: Path):
        (tmp_path / "text.txt").write_text(TEXT)
        options = NgramOptions(order=2, tokenizer="words", discount_fallback=(0.5, 1, 1.5))
        build_ngram([tmp_path / "text.txt"], tmp_path / "a", options)
        build_ngram([tmp_path / "text.txt"], tmp_path / "b", options)
        with busy(tmp_path / "c", beside=True):
            for make in (
                lambda: build_ngram([tmp_path / "text.txt"], tmp_path / "c", options),
                lambda: mix_ngrams(find_parts([str(tmp_path / "a"), str(tmp_path / "b")]), [1, 1], tmp_path / "c"),
            ):
                with pytest.raises(OutputError, match="another rescore process is writing to"):
                    make()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "text.txt"]

    def test_states_of_a_training(self, tiny_base, tmp_path: Path):
        (tmp_path / "text.txt").write_text(TEXT)
        with busy(tmp_path / "out"), pytest.raises(OutputError, match="another rescore process is writing to"):
            read_head_data(tiny_base, tmp_path / "text.txt", tmp_path / "out")

    def test_what_is_whole_is_read_meanwhile(self, tiny_base, tmp_path: Path):
        (tmp_path / "text.txt").write_text(TEXT)
        read_head_data(tiny_base, tmp_path / "text.txt", tmp_path / "out")
        with busy(tmp_path / "out"):
            assert len(read_head_data(tiny_base, tmp_path / "text.txt", tmp_path / "out"))


def test_identities_of_older_files_have_no_hashes_of_the_rest(tiny_base):
    fields = dataclasses.asdict(tiny_base.identity)
    older = {name: value for name, value in fields.items() if not name.startswith(("config", "tokeniza"))}
    found = type(tiny_base.identity)(**json.loads(json.dumps(older)))
    assert found.config_sha256 == found.tokenization_sha256 == ""
