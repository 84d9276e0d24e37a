"""Checkpoints: folders with `model.safetensors` and `config.json`, read and written in one way for all that is trained.

Weights are float16 or int8 on disk. Int8 is a byte each with one float32 scale per row (the last axis), as `NAME` and
`NAME.scale`; single vectors are float32 then. A configuration is a msgspec `Struct`: types are checked as it is read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from lattices.errors import InvalidDataError, RescoreError
from lm.files import atomic_file, read_json_object, write_json
from lm.records import convert_record, plain

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
SCALE = ".scale"
LARGEST = 127.0


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the configurations of all checkpoints have in common: no other fields than those of their class."""


C = TypeVar("C", bound=msgspec.Struct)


def read_config(folder: Path, kind: type[C], *, what: str, missing: str, advice: str = "get or make it again") -> C:
    """The configuration in a checkpoint's folder; `what` names it in errors, which end with `advice`.

    Raises `RescoreError` that begins with `missing` if there is none, `InvalidDataError` if it is broken.
    """
    path = folder / CONFIG_FILE
    fields = read_json_object(path, missing=missing, advice=advice)
    return convert_record(fields, kind, where=f"{path} is not {what}", advice=advice)


def write_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Config, *, dtype: torch.dtype | None = torch.float16
) -> None:
    """Writes the weights (`dtype` None: as they are) and then the configuration, each whole or not at all. Raises
    `OutputError`."""
    if dtype == torch.int8:
        tensors = to_int8(tensors)
    elif dtype is not None:
        tensors = {
            name: value.to("cpu", dtype) if value.is_floating_point() else value for name, value in tensors.items()
        }
    write_tensors(folder / WEIGHTS_FILE, tensors)
    write_json(folder / CONFIG_FILE, plain(config))


def read_weights(folder: Path, *, missing: str, what: str = "it") -> dict[str, torch.Tensor]:
    """The weights in a checkpoint's folder, as they were before they became int8.

    Raises `RescoreError` that begins with `missing` if there are none, `InvalidDataError` if they are broken; `what` is
    to be trained again then.
    """
    path = folder / WEIGHTS_FILE
    try:
        return from_int8(load_file(path), path)
    except OSError as error:
        raise RescoreError(f"{missing}: can't read {path.name} ({error.strerror or error})") from error
    except SafetensorError as error:
        raise InvalidDataError(f"can't read {path}: {error}; get or train {what} again") from error


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """Writes tensors as safetensors, whole or not at all."""
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_file(path) as temporary:
        temporary.write_bytes(to_bytes(stored, metadata=metadata))


def check_shapes(
    folder: Path, shapes: Mapping[str, Collection[int]], expected: Mapping[str, Collection[int]], of: str
) -> None:
    """Raises `InvalidDataError` for the first tensor that is missing, too many, or of another shape than `of` says."""
    for name in sorted(shapes.keys() | expected.keys()):
        has, needs = (list(side[name]) if name in side else "none" for side in (shapes, expected))
        if has != needs:
            raise InvalidDataError(
                f"{folder / WEIGHTS_FILE} does not fit its {of}: {name} has shape {has}, not {needs}"
            )


def to_int8(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices and stacks of matrices or vectors as int8 beside their scales, single vectors as float32; whole numbers
    as they are."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            stored[name] = tensor
            continue
        value = tensor.detach().float().cpu()
        if value.ndim < 2:
            stored[name] = value
            continue
        scale = value.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / LARGEST
        stored[name] = (value / scale).round().to(torch.int8)
        stored[name + SCALE] = scale
    return stored


def from_int8(stored: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """What `to_int8` was given, rounded; other tensors as they are. Raises `InvalidDataError` (of `path`) for a scale
    that is missing or does not fit."""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in stored.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in stored:
            continue
        scale = stored.get(name + SCALE)
        fits = scale is not None and scale.shape == (*value.shape[:-1], 1)
        if (value.dtype == torch.int8) != (scale is not None) or (scale is not None and not fits):
            raise InvalidDataError(f"{path} has no scale that fits {name}; get or train it again")
        tensors[name] = value if scale is None else value.float() * scale
    return tensors
