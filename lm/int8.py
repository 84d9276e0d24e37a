"""Weights on disk at a byte each: int8 with one float32 scale per row (the last axis), as `NAME` and `NAME.scale`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from lattices.errors import InvalidDataError

SCALE = ".scale"
LARGEST = 127.0


def to_int8(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices and stacks of matrices or vectors as int8 beside their scales, single vectors as float32."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().float().cpu()
        if value.ndim < 2:
            stored[name] = value.contiguous()
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
