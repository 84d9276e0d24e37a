"""Adapters: low-rank changes of a base LM's weights, in a folder of peft's layout, which stands for the changed base.

`adapter_config.json` names the base LM, `adapter_model.safetensors` holds the changes; `tuned.json`, where
`rescore train-heads` made it, says which weights they are changes of, and the folder `heads` the heads for them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lm.files import read_json_object
from lm.records import read_record

ADAPTER_CONFIG, ADAPTER_FILE, TUNED_FILE = "adapter_config.json", "adapter_model.safetensors", "tuned.json"


@dataclass(frozen=True)
class TunedFrom:
    """`tuned.json`: the base LM that an adapter belongs to."""

    base_name: str
    base_weights_sha256: str
    tokenizer_sha256: str


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def base_of_adapter(folder: Path) -> str:
    """The base LM that an adapter in a folder was made for, by name. Raises `InvalidDataError` if it does not say."""
    path = folder / ADAPTER_CONFIG
    fields = read_json_object(path, missing=f"no adapter in {folder}")
    if fields.get("peft_type") != "LORA":
        raise InvalidDataError(f"{path} is of the type {fields.get('peft_type')!r}; only LORA adapters are read here")
    name = fields.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InvalidDataError(f"{path} does not name its base LM (base_model_name_or_path); fill it in")
    return name


def check_base(folder: Path, name: str, weights_sha256: str) -> None:
    """Raises `IncompatibleError` if an adapter that says which weights it belongs to was made for others."""
    path = folder / TUNED_FILE
    if not path.is_file():
        return
    trained_on = read_record(path, TunedFrom, missing=f"no {path}").base_weights_sha256
    if trained_on != weights_sha256:
        raise IncompatibleError(
            f"the adapter in {folder} was trained on other weights of {name} (sha256 {trained_on[:12]}..., "
            f"here {weights_sha256[:12]}...); train it again"
        )


def merged(model: Any, folder: Path, *, cut: bool = False) -> Any:
    """The model with an adapter's changes in its weights.

    `cut`: the model has only its first layers, and takes what the adapter has for these. Raises `RescoreError` if
    there are no weights, `InvalidDataError` if they do not fit.
    """
    from peft import PeftModel, get_peft_model_state_dict  # takes a second

    if not (folder / ADAPTER_FILE).is_file():
        raise RescoreError(f"no {ADAPTER_FILE} in {folder}; get or train the adapter again")
    with safe_open(folder / ADAPTER_FILE, framework="pt") as stream:
        names = set(stream.keys())
    if cut:  # what changes one of the layers that are there, or no layer
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        numbers = {name: re.search(r"\.layers\.(\d+)\.", name) for name in names}
        names = {name for name, number in numbers.items() if number is None or int(number[1]) < layers}
        if not names:
            return model
    dtype = model.dtype
    whole = model.float() if dtype in (torch.float16, torch.bfloat16) else model
    with peft_of_old_names():
        adapted = PeftModel.from_pretrained(whole, folder)
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))  # else it asks the hub
    if differs := sorted(names ^ expected):  # peft would only warn
        raise InvalidDataError(f"{folder / ADAPTER_FILE} does not fit its base LM: {differs[0]} (of {len(differs)})")
    return adapted.merge_and_unload().to(dtype)


@contextmanager
def peft_of_old_names() -> Iterator[None]:
    """Where peft (0.21) asks a model for what transformers (5.24) has renamed, which can't be mended here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
