"""Compiled decoder layers. Beside its products most of a small step's time is torch's own overhead, some hundred calls
of Python and of small kernels a layer; a compiled layer makes one call, with a few fused loops of them.

torch's ahead-of-time compiler makes a library of a layer's program, once for a machine and an architecture, in some ten
seconds. It is kept in the cache directory and loads in milliseconds. Every layer runs it with its own weights; what a
program does not fit, prompts and batches of rows, the layers read as they did.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import transformers

from lattices.errors import IncompatibleError, InvalidDataError, OutputError, RescoreError, first_line
from lm.base.fast.compiled_layer import CompiledLayer, Run
from lm.base.fast.layer_program import Call, Signature, decoder_layers, export, quiet, signature_of, watch, weights_of
from lm.environment import versions
from lm.files import atomic_folder, sha256_of_file, write_json
from lm.keys import cache_entry, cached, file_stamp, key_of
from lm.locks import warn
from lm.records import plain, read_record

if TYPE_CHECKING:
    from lm.base.model import BaseLM

SCHEMA = "rescore.layers/3"  # changes with what a program is given, and with what of ours is traced into it
RECORD = "layers.json"
MOST_KINDS = 4  # of layers in a model
TOLERANCE = 1e-4  # share of the largest number by which a program may differ from its layer
NOT_OF_THE_MODEL = (OSError, MemoryError, OutputError)  # a full disk and the like: the next process tries again
Make = Callable[[torch.export.ExportedProgram, Path], Run]


class Layers(msgspec.Struct, frozen=True):
    """What is kept of a base LM's layers, the programs beside it.

    kinds: how layers with the program `0.pt2`, `1.pt2` ... are called.
    layers: of every layer its kind and its place in the cache.
    weights: sha256 of those with which layers and programs were compared.
    programs: sha256 of their files; checksum: of all of this, so that no damage is run.
    """

    kinds: tuple[Signature, ...]
    layers: tuple[tuple[int, int], ...]
    weights: str = ""
    programs: tuple[str, ...] = ()
    checksum: str = ""
    schema: str = SCHEMA

    def signed(self) -> Layers:
        """The same with its checksum."""
        return msgspec.structs.replace(self, checksum=key_of(plain(msgspec.structs.replace(self, checksum=""))))


class Failure(msgspec.Struct, frozen=True):
    """Why the layers of a base LM have no programs."""

    reason: str
    schema: str = SCHEMA


def compile_layers(base: BaseLM) -> None:
    """Gives the layers of a base LM, packed or not, their programs. If they are not kept on this machine, they are
    compiled, which a line says. If that can't be done, the layers stay as they are, and a line says why. What failed is
    not tried again with the same weights, compiler and version of this project; other weights may not fail."""
    name, compiler = base.identity.name, shutil.which(os.environ.get("CXX", "g++"))
    weights = base.identity.weights_sha256
    document = {
        "schema": SCHEMA, "software": [torch.__version__, transformers.__version__], "machine": _machine(),
        "config": base.identity.config_sha256, "layout": [[str(w.dtype), w.shape] for w in weights_of(base.model)],
    }  # fmt: skip
    safe_name = re.sub(r"[^\w.-]", "_", Path(name).name)
    entry = cache_entry("layers", safe_name, document)
    stamp = "" if compiler is None else " ".join(map(str, file_stamp(Path(compiler))))
    tried = {**document, "weights": weights, "compiler": stamp, "version": versions()["rescore"]}
    failed = cache_entry("layers", f"{safe_name}-failed", tried, suffix=".json")

    def read(folder: Path) -> tuple[Layers, list[Run]] | Failure | None:
        with suppress(RescoreError):
            layers = _read(folder)
            runs = [load_program(folder / f"{kind}.pt2") for kind in range(len(layers.kinds))]
            if layers.weights == weights or _fit(base, layers, runs):
                return layers, runs
        with suppress(RescoreError):
            return read_record(failed, Failure, missing="", schema=SCHEMA)
        return None

    def make(folder: Path) -> tuple[Layers, list[Run]] | Failure:
        if compiler is None:
            raise IncompatibleError("there is no C++ compiler (g++, or what CXX names)")
        warn(f"compiling the layers of {name} for decoding on this machine, this once (--compile off goes without)")
        try:
            with atomic_folder(folder) as temporary:
                layers, runs = compiled(base, temporary, compile_program)
                files = [sha256_of_file(temporary / f"{kind}.pt2") for kind in range(len(runs))]
                layers = msgspec.structs.replace(layers, weights=weights, programs=tuple(files)).signed()
                write_json(temporary / RECORD, plain(layers))
        except NOT_OF_THE_MODEL:
            raise
        except Exception as error:  # architectures fail in their own ways
            why = "" if isinstance(error, RescoreError) else f"{type(error).__name__}: "
            failure = Failure(why + first_line(error))
            write_json(failed, plain(failure))
            return failure
        return layers, runs

    def is_broken(folder: Path) -> bool:
        try:
            return folder.exists() and _read(folder).weights == weights
        except RescoreError:
            return True

    try:
        found = cached(entry, f"compiled layers of {name}", read=read, make=make, is_broken=is_broken)
        if isinstance(found, Failure):
            raise IncompatibleError(f"{found.reason} (kept: remove {failed} to have it tried again)")
        install(base, *found)
    except (RescoreError, *NOT_OF_THE_MODEL) as error:
        warn(f"{name} decodes without compiled layers: {first_line(error)}")


def compiled(base: BaseLM, folder: Path, make: Make) -> tuple[Layers, list[Run]]:
    """Programs for all layers of a base LM, each layer's checked against the layer itself.

    make: makes a program, at a path in the folder. Raises `IncompatibleError` for a model that can't be compiled.
    """
    kinds: list[tuple[Signature, Any, Run]] = []
    layers: list[tuple[int, int]] = []
    for layer, calls in watch(base):
        signature, place = signature_of(calls), calls[0].place
        shapes = [(each.dtype, each.shape) for each in (*weights_of(layer), *calls[0].buffers)]
        alike = [n for n, kind in enumerate(kinds) if kind[:2] == (signature, shapes)]
        fits = [n for n in alike if is_same(layer, calls, signature, kinds[n][2])]
        if not fits:
            if len(kinds) == MOST_KINDS:
                raise IncompatibleError(f"its layers are of more than {MOST_KINDS} kinds")
            run = make(export(layer, calls[0], signature), folder / f"{len(kinds)}.pt2")
            if not is_same(layer, calls, signature, run):
                raise IncompatibleError("the program of a layer does not compute what the layer does")
            kinds.append((signature, shapes, run))
            fits = [len(kinds) - 1]
        layers.append((fits[0], place))
    return Layers(tuple(signature for signature, _, _ in kinds), tuple(layers)), [run for _, _, run in kinds]


@torch.inference_mode()
def is_same(layer: torch.nn.Module, calls: Sequence[Call], signature: Signature, run: Run) -> bool:
    """Whether a program gives and writes in a layer's calls what the layer does. Its weights must have the shapes of
    those that the program was traced with."""
    for call in calls:
        tried = CompiledLayer(layer, call.place, signature, run)
        results: list[list[torch.Tensor]] = []
        for compute in (tried.plain, tried.compute):
            for buffer in call.buffers:
                buffer[:, :, call.cache.length :] = 0
            output = compute(*call.args, **call.kwargs)
            if output is None:
                return False
            states = output[0] if isinstance(output, tuple) else output
            results.append([states, *(buffer.clone() for buffer in call.buffers)])
        for ours, theirs in zip(*results, strict=True):
            largest = float(theirs.abs().max())
            if ours.shape != theirs.shape or not float((ours - theirs).abs().max()) <= TOLERANCE * largest:
                return False
    return True


def _fit(base: BaseLM, layers: Layers, programs: Sequence[Run]) -> bool:
    """Whether programs that were compared with layers of other weights, which may hide how layers differ (those of a
    model that is not trained yet), compute what the layers of a base LM do."""
    return all(
        is_same(layer, calls, layers.kinds[kind], programs[kind])
        for (layer, calls), (kind, _) in zip(watch(base), layers.layers, strict=True)
    )


def install(base: BaseLM, layers: Layers, programs: Sequence[Run]) -> None:
    """Gives the layers of a base LM their programs; `remove` takes them back."""
    for layer, (kind, place) in zip(decoder_layers(base.model, len(layers.layers)), layers.layers, strict=True):
        layer.forward = CompiledLayer(layer, place, layers.kinds[kind], programs[kind])


def remove(model: torch.nn.Module) -> None:
    """Takes the programs of all layers of a model back."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), CompiledLayer):
            del module.forward


def compile_program(exported: torch.export.ExportedProgram, path: Path) -> Run:
    """Has torch's ahead-of-time compiler make a library of a program, for this machine."""
    from torch._inductor import aoti_compile_and_package  # takes a second
    from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir

    options = {
        "cpp.threads": 1,  # its loops are small; the products have threads of their own
        "cpp.vec_isa_ok": True,  # what the processor says of itself is not tried out: that would take longer
        "compile_threads": 1,
        "aot_inductor.precompile_headers": False,  # they would be kept in a folder of torch's own
    }
    try:
        with quiet(), tempfile.TemporaryDirectory() as scratch, temporary_cache_dir(scratch):
            aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)
    except NOT_OF_THE_MODEL:
        raise
    except Exception as error:
        raise IncompatibleError(f"the compiler failed ({type(error).__name__}: {first_line(error)})") from error
    return load_program(path)


def load_program(path: Path) -> Run:
    """A program that was compiled. Raises `InvalidDataError` for a broken file."""
    from torch._inductor import aoti_load_package

    try:
        with quiet():
            run: Run = aoti_load_package(str(path)).loader.boxed_run
    except Exception as error:
        raise InvalidDataError(f"{path} can't be loaded ({first_line(error)})") from error
    return run


def _machine() -> list[str]:
    """What a compiled program depends on, of the processor."""
    processor = ""
    if sys.platform == "linux":
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
        lines = [line for line in first.splitlines() if line.startswith(("model name", "flags", "Features"))]
        processor = "\n".join(lines)
    kind = torch.backends.cpu.get_cpu_capability()
    return [platform.system(), platform.machine(), platform.processor(), kind, processor]


def _read(folder: Path) -> Layers:
    """The record of a folder. Raises `InvalidDataError` where it or a program is not what was written."""
    layers = read_record(folder / RECORD, Layers, missing=f"no layers in {folder}", schema=SCHEMA)
    try:
        programs = [sha256_of_file(folder / f"{kind}.pt2") for kind in range(len(layers.kinds))]
    except OSError as error:
        raise InvalidDataError(f"{folder} lacks a program ({error.strerror})") from error
    if layers != layers.signed() or programs != list(layers.programs):
        raise InvalidDataError(f"{folder} does not hold what was written to it")
    return layers
