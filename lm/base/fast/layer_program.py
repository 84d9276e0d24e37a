"""What a decoder layer computes, as a program of tensors: one for all layers of a kind, however much they read.

A layer is watched in a few forwards of the whole model: what it is called with, and which part of the cache it writes
to (`Signature`). Then `torch.export` traces one call of it. Its weights, its part of the cache and the length of that
are inputs of the program, and whatever changed from one call that was watched to the other is a size that may change.
So no family of models needs anything of its own here.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo

from lattices.errors import IncompatibleError, first_line
from lm.base.cache import KVCache
from lm.base.fast.packed import product_of, products_in

if TYPE_CHECKING:
    from lm.base.model import BaseLM

MOST_TOKENS = 64  # of a forward that a program takes; larger ones gain nothing
LEAST_CACHED = 2  # positions of the cache of a call that a program takes: a trace tells 0 and 1 from all other sizes
CAPACITY = 40  # positions of the cache of calls that are watched
# Tokens and cached positions of the calls that are watched. The first one is traced.
CALLS = ((5, 11), (7, 19), (1, 11))


Path = tuple[int | str, ...]  # the place of an argument or its name, then where in it something is


class Input(msgspec.Struct, frozen=True):
    """One of the tensors that a layer is called with.

    sizes: those that are always the same; None for others.
    is_mask: what is seen, and None in its place in a call with one token means all.
    """

    path: Path
    dtype: str
    sizes: tuple[int | None, ...]
    is_mask: bool


class Signature(msgspec.Struct, frozen=True):
    """How a layer is called: what its program must be given, and what it takes for granted.

    states: which of the inputs are the states `[1, n, d]` that the layer changes.
    cache: where that is among the arguments.
    constants: all that is neither cache nor tensor.
    nones: of a layer whose output is a tuple: so many None come after the tensor.
    """

    inputs: tuple[Input, ...]
    states: int
    cache: Path
    constants: tuple[tuple[Path, bool | int | float | str | None], ...]
    nones: int | None


@dataclass(frozen=True)
class Call:
    """A call that was watched, with the cache as the call found it but for what it wrote."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    cache: KVCache
    place: int

    @property
    def buffers(self) -> tuple[torch.Tensor, ...]:
        """The keys and values of the layer, with room for more."""
        layer: Any = self.cache.layers[self.place]
        buffers: tuple[torch.Tensor, ...] = layer.buffers
        return buffers


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch's compilers warn of, log and print, which is for their authors."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    with warnings.catch_warnings(action="ignore"), redirect_stdout(nowhere), redirect_stderr(nowhere):
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


@torch.inference_mode()
def watch(base: BaseLM) -> list[tuple[torch.nn.Module, list[Call]]]:
    """The decoder layers of a base LM, each with its calls in forwards of the sizes `CALLS`. Raises
    `IncompatibleError` where they can't be told, or one does not write once to one part of the cache."""
    calls: list[tuple[torch.nn.Module, list[Call]]] = []
    for n, length in CALLS:
        ids = (torch.arange(length + n, device=base.device) * 7919 % base.vocab_size)[None]
        cache = base.new_cache(CAPACITY)
        base.forward(ids[:, :length], cache, last=1)
        cache.keep(range(length))
        calls = calls or [(layer, []) for layer in decoder_layers(base.model, len(cache.layers))]
        _watch(base, ids[:, length:], cache, calls)
    return calls


def decoder_layers(model: torch.nn.Module, number: int) -> list[torch.nn.Module]:
    """The decoder layers of a model, so many. Raises `IncompatibleError` where they can't be told."""
    lists = [each for each in model.modules() if isinstance(each, torch.nn.ModuleList) and len(each) == number]
    if not lists:
        raise IncompatibleError("its layers are in no list")
    return list(lists[0])  # of others with as many modules (experts), the layers' is the outermost


def _watch(
    base: BaseLM, ids: torch.Tensor, cache: KVCache, calls: Sequence[tuple[torch.nn.Module, list[Call]]]
) -> None:
    written: list[int] = []
    begun: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    update = cache.update

    def note_write(keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        written.append(layer_idx)
        return update(keys, values, layer_idx, *args, **kwargs)

    def note_begin(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        written.clear()
        begun.append((args, kwargs))

    def note_end(layer: torch.nn.Module, _: tuple[Any, ...], output: Any) -> None:
        if len(written) != 1:
            raise IncompatibleError("a layer does not keep keys and values once")
        known[layer].append(Call(*begun.pop(), output, cache, written[0]))

    known, before = dict(calls), len(calls[0][1])
    handles = [each.register_forward_pre_hook(note_begin, with_kwargs=True) for each in known]
    handles += [each.register_forward_hook(note_end) for each in known]
    vars(cache)["update"] = note_write
    try:
        base.forward(ids, cache)
    finally:
        del cache.update
        for handle in handles:
            handle.remove()
    if any(len(found) != before + 1 for found in known.values()):
        raise IncompatibleError("its forward does not call every layer once")


def signature_of(calls: Sequence[Call]) -> Signature:
    """The signature of a layer by its calls of the sizes `CALLS`. Raises `IncompatibleError` where they differ."""
    leaves = [_leaves(call) for call in calls]
    if any(each.keys() != leaves[0].keys() for each in leaves) or len({call.place for call in calls}) != 1:
        raise IncompatibleError("its layers are called in several ways")
    inputs, constants, caches = [], [], []
    for path, first in leaves[0].items():
        others = [each[path] for each in leaves[1:]]
        if isinstance(first, torch.Tensor):
            inputs.append(_input(path, first, *others))
        elif isinstance(first, KVCache):
            caches.append(path)
        elif isinstance(first, bool | int | float | str | None) and all(first == each for each in others):
            constants.append((path, first))
        else:
            raise IncompatibleError(f"its layers are given {type(first).__name__} as {path[-1]}")
    outputs = [call.output if isinstance(call.output, tuple) else (call.output,) for call in calls]
    alike = all(isinstance(o[0], torch.Tensor) and all(each is None for each in o[1:]) for o in outputs)
    if len(caches) != 1 or not alike:
        raise IncompatibleError("its layers take or give more than their states and the cache")
    nones = len(outputs[0]) - 1 if isinstance(calls[0].output, tuple) else None
    given = [[leaf[each.path] for leaf in leaves] for each in inputs]
    states = [place for place, each in enumerate(given) if _are_like(each, [output[0] for output in outputs])]
    if not states:
        raise IncompatibleError("its layers change the size of their states")
    return Signature(tuple(inputs), states[0], caches[0], tuple(constants), nones)


def _are_like(tensors: Sequence[Any], others: Sequence[torch.Tensor]) -> bool:
    pairs = zip(tensors, others, strict=True)
    return all(a is not None and a.dtype == b.dtype and a.shape == b.shape and a.ndim == 3 for a, b in pairs)


def _leaves(call: Call) -> dict[Path, Any]:
    """The arguments of a call, and what is in them, by path."""
    found, _ = pytree.tree_flatten_with_path((call.args, call.kwargs))
    steps = [([getattr(key, "key", getattr(key, "idx", str(key))) for key in path[1:]], leaf) for path, leaf in found]
    return {tuple(step): leaf for step, leaf in steps}


def _input(path: Path, first: torch.Tensor, second: Any, single: Any) -> Input:
    is_mask = single is None
    if not isinstance(second, torch.Tensor) or not (is_mask or isinstance(single, torch.Tensor)):
        raise IncompatibleError(f"its layers are given {path[-1]} in several ways")
    if is_mask and (first.dtype != torch.bool or first.ndim != 4):
        raise IncompatibleError(f"its layers have no {path[-1]} for one token")
    sizes = zip(first.shape, second.shape, strict=True)
    dtype = str(first.dtype).removeprefix("torch.")
    return Input(path, dtype, tuple(a if a == b else None for a, b in sizes), is_mask)


class _Slots:
    """Stands for the cache while a layer is traced: its keys and values of `capacity` positions, `length` settled."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        self.buffers, self.length = (keys, values), length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.length + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            torch._check(self.length <= buffer.shape[2])
            torch._check(end <= buffer.shape[2])  # so that no slice is shorter than it says
            buffer[:, :, self.length : end] = new
        keys, values = (buffer[:, :, :end] for buffer in self.buffers)
        return keys, values

    def get_seq_length(self, *args: object) -> int:
        return self.length


class _Traced(torch.nn.Module):
    """A layer as a function of tensors."""

    def __init__(self, layer: torch.nn.Module, call: Call, signature: Signature) -> None:
        super().__init__()
        self._layer, self._signature = (layer,), signature  # in a tuple: no part of this module
        leaves, self._tree = pytree.tree_flatten((call.args, call.kwargs))
        self._paths, self._leaves = list(_leaves(call)), leaves

    def forward(
        self,
        past: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tensors: list[torch.Tensor],
        weights: list[torch.Tensor],
    ) -> torch.Tensor:
        given: dict[Path, Any] = dict(zip((each.path for each in self._signature.inputs), tensors, strict=True))
        given[self._signature.cache] = _Slots(keys, values, past.shape[0])
        leaves = [given.get(path, leaf) for path, leaf in zip(self._paths, self._leaves, strict=True)]
        args, kwargs = pytree.tree_unflatten(leaves, self._tree)
        (layer,) = self._layer
        with _given_weights(layer, weights) as named:
            output = torch.func.functional_call(layer, named, args, kwargs)
        states: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return states


def weights_of(layer: torch.nn.Module) -> list[torch.Tensor]:
    """The tensors of a layer, in the order in which its program takes them."""
    products = products_in(layer)
    own = [each for product in products for each in (product.packed, product.bias) if each is not None]
    return [each.detach() for each in (*own, *_named(layer).values())]


def _named(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers but for those of packed products."""
    packed = {id(each) for each in layer.modules() if product_of(each) is not None}
    return {
        f"{name}.{part}".removeprefix("."): tensor
        for name, module in layer.named_modules() if id(module) not in packed
        for part, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }  # fmt: skip


@contextmanager
def _given_weights(layer: torch.nn.Module, weights: Sequence[torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The weights of a layer by name, while its packed products have those that are given in place of their own."""
    products = products_in(layer)
    own = [(product.packed, product.bias) for product in products]
    rest = iter(weights)
    try:
        for product in products:
            product.packed, product.bias = next(rest), None if product.bias is None else next(rest)
        yield dict(zip(_named(layer), rest, strict=True))
    finally:
        for product, (packed, bias) in zip(products, own, strict=True):
            product.packed, product.bias = packed, bias


@torch.no_grad()
def export(layer: torch.nn.Module, call: Call, signature: Signature) -> torch.export.ExportedProgram:
    """The program of a layer, traced from a call, for any number of tokens, cached positions and capacity.

    It takes a tensor of the length of the cache, keys, values, the list of `signature.inputs` and that of
    `weights_of(layer)`, and gives the layer's states. Raises `IncompatibleError` for what can't be traced.
    """
    leaves, changes = _leaves(call), torch.export.Dim.DYNAMIC
    buffers = [torch.zeros(each.shape, dtype=each.dtype) for each in call.buffers]
    tensors = [leaves[each.path].clone() for each in signature.inputs]
    # Packed weights lie in a layout of their own; for a program they are numbers that it hands on.
    weights = [torch.empty(each.shape, dtype=each.dtype) for each in weights_of(layer)]
    shapes: Any = (
        {0: changes}, {2: changes}, {2: changes},
        [{place: changes for place, size in enumerate(each.sizes) if size is None} for each in signature.inputs],
        [{} for _ in weights],
    )  # fmt: skip
    try:
        with quiet():
            exported = torch.export.export(
                _Traced(layer, call, signature), (torch.zeros(call.cache.length), *buffers, tensors, weights),
                dynamic_shapes=shapes, strict=False,
            )  # fmt: skip
    except Exception as error:
        raise IncompatibleError(f"a layer can't be traced ({type(error).__name__}: {first_line(error)})") from error
    if exported.constants:
        raise IncompatibleError("a layer has numbers that are no weights")
    _check_sizes(exported, signature)
    return exported


def _check_sizes(exported: torch.export.ExportedProgram, signature: Signature) -> None:
    """Raises `IncompatibleError` where the layer asked how long something is: the program has one of both answers, for
    the sizes of which that is right, and nothing tells when it is run for others."""
    given = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"]
    past, tokens = given[0].shape[0], given[3 + signature.states].shape[1]
    ranges = exported.range_constraints
    begins = [int(ranges[size.node.expr].lower) for size in (past, tokens)]  # one token is compared apart
    if any(each.upper is not int_oo for each in ranges.values()) or max(begins) > LEAST_CACHED:
        raise IncompatibleError("a layer computes otherwise where the text is longer")
