"""Tensors in files of others: safetensors, or pickles (`.pt`, `.pth`, `.bin`) of nothing but tensors.

Names and shapes are known at once, values are read when they are asked for. A pickle may hold code that runs when it
is read: only tensors are let through. Int8 tensors have their scales beside them, as `lm.checkpoint` has it.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lattices.errors import InvalidDataError, first_line, unreadable
from lm.checkpoint import SCALE, from_int8
from lm.files import read_json_object

SAFETENSORS, PICKLES = ".safetensors", (".pt", ".pth", ".bin")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class TensorFiles:
    """The tensors of some files. Raises `InvalidDataError` for files that can't be used, `RescoreError` for missing
    ones.

    files: in which they are. shapes: by name, without the scales of int8 tensors.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, Path] = {}
        self._pickled: dict[str, torch.Tensor] = {}
        for file in self.files:
            for name, shape in self._look(file).items():
                if name in self.shapes:
                    raise InvalidDataError(
                        f"{name} is both in {self._where[name].name} and in {file}; get the files again"
                    )
                self.shapes[name], self._where[name] = shape, file
        self._scales = {n for n in self.shapes if n.endswith(SCALE) and n.removesuffix(SCALE) in self.shapes}
        for name in self._scales:
            del self.shapes[name]

    def _look(self, file: Path) -> dict[str, tuple[int, ...]]:
        if file.suffix != SAFETENSORS:
            tensors = read_pickle(file)
            self._pickled |= tensors
            return {name: tuple(value.shape) for name, value in tensors.items()}
        try:
            with safe_open(file, framework="pt") as stream:
                return {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
        except OSError as error:
            raise unreadable(file, error) from error
        except SafetensorError as error:
            raise InvalidDataError(f"can't read {file}: {error}; get it again") from error

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors by name, as they were before they became int8. Raises `InvalidDataError` for other types than floats
        (and whole numbers, of vectors)."""
        wanted = [each for name in names for each in (name, name + SCALE) if each in self._where]
        stored: dict[str, torch.Tensor] = {}
        for file in self.files:
            here = [name for name in wanted if self._where[name] == file]
            if file.suffix != SAFETENSORS:
                stored |= {name: self._pickled[name] for name in here}
            elif here:
                with safe_open(file, framework="pt") as stream:
                    stored |= {name: stream.get_tensor(name) for name in here}
        for name, value in stored.items():
            if value.dtype not in (*FLOATS, torch.int8) and value.ndim != 1:
                kind = str(value.dtype).removeprefix("torch.")
                raise InvalidDataError(f"{self._where[name]} has {name} as {kind}; only floats and int8 are read here")
        return from_int8(stored, self.files[0])


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that `torch.save` wrote. Raises `InvalidDataError` for anything besides tensors."""
    advice = "give a state dict of plain tensors, or safetensors"
    found = unpickled(path, advice)
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise InvalidDataError(f"{path} is no state dict, names and tensors; {advice}")
    return {str(name): value for name, value in found.items()}


def unpickled(path: Path, advice: str) -> Any:
    """What `torch.save` wrote to a file, of plain data. Raises `InvalidDataError` with `advice` for what may be code,
    and for a file that can't be read."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles in another protocol than its own
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except UnpicklingError as error:
        raise InvalidDataError(
            f"{path} holds no tensors, or more than tensors, which may be code and is not read; {advice}"
        ) from error
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise unreadable(path, error) from error
    except Exception as error:  # EOFError, RuntimeError, ...: as the broken part leads it to
        reason = f"can't read {path} ({first_line(error)})"
        raise InvalidDataError(f"{reason}; it is cut short, or torch.save did not write it: get it again") from error


def names_by_file(index: Path) -> dict[str, str]:
    """`weight_map` of an index of shards: tensor names and the files that hold them."""
    shards = read_json_object(index, missing=f"no index of shards in {index.parent}").get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
        raise InvalidDataError(f"{index} has no weight_map; get it again")
    return shards
