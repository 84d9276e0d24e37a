"""Keys of what is kept: a hash of everything that it follows from, made in one way for every cache.

What is kept in the cache directory is used only under a key of all that its content depends on, so that no number
depends on what an earlier command left there. To that belong the libraries that compute it (`software`): another minor
version may read a model, cut text or round in another way, and a cache is then made again. A folder that the user gave
(`--out`) is no cache: it goes on with what it began with, or says what has changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from lm.chat_templates import DATE, uses_date
from lm.files import sha256_of_file

# Of a configuration or a tokenizer: where it was read from and by what, which says nothing about what it does.
VOLATILE = frozenset({
    "_name_or_path", "name_or_path", "transformers_version", "tokenizers_version", "_commit_hash", "_from_model_config",
    "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset", "attn_implementation",
    "is_local", "local_files_only", "vocab_file", "merges_file", "tokenizer_file", "backend", "tokenizer_object",
    "dtype", "torch_dtype",  # a model is loaded in the precision asked for, which is named apart
})  # fmt: skip
TOKENIZER_STATE = (
    "_add_bos_token", "_add_eos_token", "add_prefix_space", "chat_template", "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", "split_special_tokens",
)  # fmt: skip
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5")


def key_of(made_of: Any, length: int = 64) -> str:
    """The first `length` hex digits of the sha256 of a document of JSON values, records, sets and dtypes.

    The order of names in an object does not matter. Raises `TypeError` for anything else: a value that is told by its
    address in memory would be another one in every process.
    """
    text = json.dumps(made_of, sort_keys=True, ensure_ascii=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _plain(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return msgspec.structs.asdict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if type(value).__name__ in ("AddedToken", "dtype"):
        return str(value) if type(value).__name__ == "dtype" else repr(value)
    if isinstance(value, type):
        return value.__name__
    raise TypeError(f"{type(value).__name__} has no place in a key")


def software(*libraries: str) -> dict[str, str]:
    """Major and minor versions of the libraries (default: those that run a model and cut its text)."""
    wanted = libraries or ("torch", "transformers", "tokenizers")
    return {name: ".".join(importlib.metadata.version(name).split(".")[:2]) for name in wanted}


def config_sha256(config: Any, folder: Path, adapter: Path | None = None) -> str:
    """sha256 of all that a model's forward and the end of its output depend on, its weights apart.

    `config`: as transformers resolved it; `folder`: of the model, whose `generation_config.json` says what ends a text
    (and an index, which file holds which weights); `adapter`: the folder of its adapter, whose settings say how much it
    changes.
    """
    beside = [_json_of(folder / name) for name in ("generation_config.json", "model.safetensors.index.json")]
    changes = _json_of(adapter / "adapter_config.json") if adapter else None
    # What differs from the architecture's defaults: a later version's new fields make no other model.
    return key_of([type(config).__name__, _settled(config.to_diff_dict()), _settled(beside), _settled(changes)])


def tokenization_sha256(tokenizer: Any, folder: Path) -> str:
    """sha256 of all that makes token ids of a text and a text of them: normaliser, pre-tokenizer, merges, what is added
    before and behind, special tokens, chat template. (`lm.base.catalog.tokenizer_sha256` says what a token id
    means.)"""
    state: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        **{name: _settled(getattr(tokenizer, name, None)) for name in TOKENIZER_STATE},
    }
    if uses_date(getattr(tokenizer, "chat_template", None)):
        state["date"] = DATE.isoformat()  # earlier versions had the day's
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        whole = json.loads(backend.to_str())
        for name in ("version", "truncation", "padding"):  # the last two are of the call before
            whole.pop(name, None)
        return key_of({**state, "backend": whole})
    # Others keep what they do in files of many kinds: all of the folder's but the weights.
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix not in WEIGHTS)
    return key_of({**state, "files": {path.name: sha256_of_file(path) for path in files}})


def _json_of(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _settled(value: Any) -> Any:
    """A value without what is volatile in it, at any depth; names as JSON has them."""
    if isinstance(value, Mapping):
        return {str(name): _settled(entry) for name, entry in value.items() if name not in VOLATILE}
    if isinstance(value, (list, tuple)):
        return [_settled(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_settled(entry) for entry in value), key=str)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value) if type(value).__module__ == "torch" else type(value).__name__
