"""What a base LM is, as hashes: for keys of caches, and for checks of what belongs together.

A model comes as files in a folder, or in memory. Neither where it lies nor what wrote it says anything of what it does.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lattices.errors import InvalidDataError
from lm.files import sha256_of_file
from lm.keys import key_of, remembered_sha256

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
# The one day on which chat templates that write today's date are read: what Llama's own write where there is no clock.
DATE = datetime.datetime(2024, 7, 26)
CLOCK = "strftime_now"
# What of `strftime` does not follow from the machine; anything else stays as it stands in the template.
DIRECTIVES = (*"aAbBcdDeFGHIjmMpSTuUVwWxXyY", "-d", "-m", "-H", "-I", "-M", "-S", "-j", "-y")


def weights_sha256(folder: Path) -> str:
    """sha256 over the weight files of a model folder. Raises `InvalidDataError` if none is a safetensors file."""
    # A training's checkpoints beside the model are no part of it.
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files and any(folder.glob("*.bin")):
        raise InvalidDataError(
            f"{folder} has its weights as .bin only, and only safetensors are read here; load the model with "
            f"transformers and write it with save_pretrained"
        )
    if not files:
        raise InvalidDataError(f"{folder} has no weight files (*.safetensors); get the model's folder again")
    return hashlib.sha256("".join(map(remembered_sha256, files)).encode()).hexdigest()


def tensors_sha256(model: PreTrainedModel) -> str:
    """sha256 over the weights of a model in memory: name, dtype, shape and bytes of each tensor, by name.

    Never that of a folder's weight files, even if they hold the same numbers.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        # As bytes, because numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def config_sha256(config: Any, folder: Path, adapter: Path | None = None) -> str:
    """sha256 of all that a model's forward and the end of its output depend on, its weights apart.

    config: as transformers resolved it.
    folder: of the model; its `generation_config.json` says what ends a text, an index which file holds which weights.
    adapter: the folder of its adapter, whose settings say how much it changes.
    """
    beside = [_json_of(folder / name) for name in ("generation_config.json", "model.safetensors.index.json")]
    changes = _json_of(adapter / "adapter_config.json") if adapter else None
    # What differs from the architecture's defaults: a later version's new fields make no other model.
    return key_of([type(config).__name__, _settled(config.to_diff_dict()), _settled(beside), _settled(changes)])


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over the (token, id) pairs of a tokenizer: what a token id means."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(pairs, ensure_ascii=True).encode()).hexdigest()


def tokenization_sha256(tokenizer: Any, folder: Path) -> str:
    """sha256 of all that makes token ids of a text and a text of them: normaliser, pre-tokenizer, merges, what is added
    before and after, special tokens, chat template."""
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


def uses_date(template: Any) -> bool:
    """Whether a tokenizer's chat template (text, several by name, or None) asks for the date."""
    return CLOCK in str(template)


def with_fixed_date(template: str) -> str:
    """A chat template for which it is always `DATE`, 0 o'clock, so that a prompt is the same on every day.

    transformers gives every template the function `strftime_now` and takes none in its place, so a macro of that name
    comes before the template.
    """

    def date(directive: str) -> str:
        if directive.startswith("-"):  # a number without zeros before it; not known everywhere
            return str(int(DATE.strftime(f"%{directive[1]}")))
        return DATE.strftime(f"%{directive}")

    replaced = "".join(f"|replace('%{name}', '{date(name)}')" for name in DIRECTIVES)
    # The line end after it is taken off by transformers' `trim_blocks`, so that the template's own stays.
    return f"{{%- macro {CLOCK}(format) -%}}{{{{ format{replaced} }}}}{{%- endmacro %}}\n{template}"


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
