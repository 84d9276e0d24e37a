"""Keys: everything that an output depends on is in them, nothing that says where or by what a file was written."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_base

from lm import keys
from lm.base import catalog, identity
from lm.base.adapters import peft_of_old_names
from lm.base.catalog import identify, load_base, tokenization_of
from lm.keys import key_of, software

Change = Callable[[Path], None]


def edit(name: str, **values: Any) -> Change:
    """Sets fields of a JSON file, dotted ones in its objects."""

    def change(folder: Path) -> None:
        document = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        for path, value in values.items():
            *outer, last = path.split("__")
            place = document
            for part in outer:
                place = place[part]
            place[last] = value
        (folder / name).write_text(json.dumps(document))

    return change


BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [256], "tokens": ["<|end|>"]}},
}
FORWARD: dict[str, Change] = {
    "rope_theta": edit("config.json", rope_parameters={"rope_theta": 500.0, "rope_type": "default"}),
    "rope scaling": edit("config.json", rope_parameters={"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}),
    "norm eps": edit("config.json", rms_norm_eps=0.1),
    "activation": edit("config.json", hidden_act="gelu"),
    "context length": edit("config.json", max_position_embeddings=256),
    "end of text": edit("generation_config.json", eos_token_id=[256, 65]),
    "other generation settings": edit("generation_config.json", repetition_penalty=1.3),
}
TEXT: dict[str, Change] = {
    "normaliser": edit("tokenizer.json", normalizer={"type": "Lowercase"}),
    "pre-tokenizer": edit("tokenizer.json", pre_tokenizer__add_prefix_space=True),
    "post-processor": edit("tokenizer.json", post_processor=BOS),
    "decoder": edit("tokenizer.json", decoder={"type": "Fuse"}),
    "chat template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}"),
    "special tokens": edit("tokenizer_config.json", eos_token="A"),
    "clean-up": edit("tokenizer_config.json", clean_up_tokenization_spaces=True),
    "split of special tokens": edit("tokenizer_config.json", split_special_tokens=True),
}


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.mark.parametrize("what", FORWARD)
def test_what_the_forward_and_the_end_depend_on(folder: Path, what: str):
    before = identify(str(folder))
    FORWARD[what](folder)
    after = identify(str(folder))
    assert after == dataclasses.replace(before, config_sha256=after.config_sha256) != before
    assert load_base(str(folder), device="cpu").identity == after


@pytest.mark.parametrize("what", TEXT)
def test_what_tokenization_depends_on(folder: Path, what: str):
    before, told = identify(str(folder)), tokenization_of(str(folder))
    TEXT[what](folder)
    after = identify(str(folder))
    assert after == dataclasses.replace(before, tokenization_sha256=after.tokenization_sha256) != before
    assert tokenization_of(str(folder)) == after.tokenization_sha256 != told == before.tokenization_sha256
    assert load_base(str(folder), device="cpu").identity == after


def test_the_date_that_a_template_writes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    plain = tokenization_of(str(folder))
    monkeypatch.setattr(identity, "DATE", identity.DATE.replace(year=2000))
    assert tokenization_of(str(folder)) == plain
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}")
    of_2000 = tokenization_of(str(folder))
    monkeypatch.undo()
    assert tokenization_of(str(folder)) != of_2000


def test_what_says_nothing_about_the_numbers(folder: Path, tmp_path: Path):
    before = identify(str(folder))
    edit("config.json", transformers_version="4.0.0", _name_or_path="/elsewhere")(folder)
    edit("generation_config.json", transformers_version="4.0.0")(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    tokenizer = catalog.load_tokenizer(str(folder))
    tokenizer("a b", truncation=True, max_length=1)  # leaves its mark in the tokenizer
    moved = folder.rename(tmp_path / "moved")
    after = identify(str(moved))
    assert dataclasses.replace(after, name=before.name) == before
    assert identity.tokenization_sha256(tokenizer, moved) == before.tokenization_sha256


def test_an_adapter_s_settings(tiny_folder: Path, tmp_path: Path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with peft_of_old_names():
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    edit("adapter_config.json", base_model_name_or_path=str(tiny_folder))(tmp_path)
    before = identify(str(tmp_path))
    edit("adapter_config.json", lora_alpha=64)(tmp_path)
    after = identify(str(tmp_path))
    assert after.weights_sha256 == before.weights_sha256 and after.config_sha256 != before.config_sha256


def test_a_key_is_the_same_in_every_process_and_order():
    made_of = {"b": {"z", "y", "x"}, "a": [1, None, torch.float32]}
    again = {"a": [1, None, torch.float32], "b": {"y", "x", "z"}}
    assert key_of(made_of) == key_of(again) and len(key_of(made_of, 24)) == 24
    program = (
        "from lm.keys import key_of; import torch; print(key_of({'b': {'z', 'y', 'x'}, 'a': [1, None, torch.float32]}))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True
    )
    assert said.stdout.strip() == key_of(made_of), said.stderr
    with pytest.raises(TypeError, match="object has no place in a key"):
        key_of([object()])


def test_software_is_told_by_major_and_minor_version(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.24.1.dev0")
    assert software("transformers") == {"transformers": "5.24"} and set(software()) >= {"torch", "tokenizers"}


class TestRememberedHashes:
    def test_an_empty_or_broken_memo_is_made_again(self, cache_folder: Path, tmp_path: Path, monkeypatch):
        monkeypatch.setattr(keys, "SETTLED", -1.0)
        path = tmp_path / "file"
        path.write_bytes(b"abc")
        digest = keys.remembered_sha256(path)
        (memo,) = (cache_folder / "hashes").iterdir()
        for broken in (b"", b"abc", b"\xff" * 64, digest.encode() + b"0"):
            memo.write_bytes(broken)
            monkeypatch.setattr(keys, "_HASHES", {})
            assert keys.remembered_sha256(path) == digest and memo.read_text() == digest

    def test_a_change_within_the_times_of_a_file_is_seen(self, cache_folder: Path, tmp_path: Path):
        """Of the same length, with the old time put back, and at once: what times can't tell is not remembered."""
        path = tmp_path / "file"
        path.write_bytes(b"abc")
        first = keys.remembered_sha256(path)
        status = path.stat()
        with path.open("r+b") as stream:
            stream.write(b"xyz")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert keys.remembered_sha256(path) != first and not (cache_folder / "hashes").exists()


def test_another_seed_is_another_model(folder: Path, tmp_path: Path):
    other = identify(str(save_tiny_base(tmp_path / "other", seed=1)))
    before = identify(str(folder))
    assert other.weights_sha256 != before.weights_sha256
    assert (other.config_sha256, other.tokenization_sha256) == (before.config_sha256, before.tokenization_sha256)
