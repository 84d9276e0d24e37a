"""Hydra's heads (Ankner et al. 2024): each reads the base's state and the embeddings of all tokens drafted so far.

Of the published kinds the `mlp` heads are read. There is no attention: what a `DraftNet` calls the state after a token
is here the base's state with the embeddings of the chain behind it, and its width says which head comes next.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lm.base.cache import TreeCache
from lm.base.model import BaseLM
from lm.base.states import FINAL, check_layers, decoder_layers
from lm.checkpoint import CONFIG_FILE
from lm.draft_layers.net import DraftNet, NetSource
from lm.files import FETCH, read_json_object
from lm.heads.layouts.tensor_files import TensorFiles

FILES = ("hydra_lm_head.safetensors", "hydra_lm_head.pt", "model.safetensors")
NAME = re.compile(r"hydra_mlp\.(\d+)\.(\d+)\.linear\.weight")
EMBEDDINGS = "input_embed_fn.weight"


class HydraSource(NetSource):
    """The checkpoint in a folder: `config.json` and `hydra_lm_head.pt`.

    heads: tokens that it drafts. Raises `RescoreError` if there is none, `InvalidDataError` for tensors that are
    missing, too many or of other shapes, `IncompatibleError` for heads of other kinds.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.folder = name, folder
        fields = read_json_object(folder / CONFIG_FILE, missing=f"no Hydra heads in {folder}", advice=FETCH)
        kind = fields.get("hydra_head_arch", "mlp")
        if kind != "mlp" or fields.get("grounded_heads") is False:
            what = f"hydra_head_arch is {kind}" if kind != "mlp" else "grounded_heads is false"
            raise IncompatibleError(f"{folder} has Hydra heads of a kind that is not read here: {what}; give mlp heads")
        self.offset = fields.get("hidden_state_offset", 0)
        if type(self.offset) is not int or self.offset < 0:
            raise InvalidDataError(f"{folder / CONFIG_FILE}: hidden_state_offset is no number of layers; get it again")
        file = next((path for each in FILES if (path := folder / each).is_file()), None)
        if file is None:
            raise RescoreError(f"no Hydra heads in {folder}: it has no {' or '.join(FILES)}; {FETCH}")
        self.tensors = TensorFiles([file])
        shapes = self.tensors.shapes
        places = {(int(m[1]), int(m[2])) for each in shapes if (m := NAME.fullmatch(each))}
        self.heads = 1 + max((head for head, _ in places), default=-1)
        self.blocks = 1 + max((block for _, block in places), default=-1)
        first = shapes.get("hydra_lm_head.0.weight", ())
        if not places or len(first) != 2:
            raise InvalidDataError(
                f"{file} has no Hydra mlp heads: hydra_mlp.0.0.linear.weight, hydra_lm_head.0.weight; {FETCH}"
            )
        self.vocab_size, self.hidden_size = first
        v, d = first
        expected: dict[str, tuple[int, ...]] = {EMBEDDINGS: (v, d)} if EMBEDDINGS in shapes else {}
        for head in range(self.heads):
            linears = {f"hydra_mlp.{head}.{block}.linear": d for block in range(self.blocks)}
            linears[f"hydra_mlp.{head}.0.linear"] = linears[f"hydra_mlp.{head}.0.res_connection"] = (head + 2) * d
            for linear, width in linears.items():
                expected |= {f"{linear}.weight": (d, width), f"{linear}.bias": (d,)}
            expected |= {f"hydra_lm_head.{head}.weight": (v, d), f"hydra_lm_head.{head}.bias": (v,)}
        for each in sorted(shapes.keys() | expected.keys()):
            has, due = (list(side[each]) if each in side else "missing" for side in (shapes, expected))
            if has != due:
                raise InvalidDataError(
                    f"{file} holds no whole Hydra mlp heads: {each} is {has}, due is "
                    f"{'no such tensor' if due == 'missing' else due}"
                )
        self._identify([file], self.offset)

    def layers(self, base: BaseLM) -> tuple[int, ...]:
        if not self.offset:
            return (FINAL,)
        count = len(decoder_layers(base))
        if self.offset > count:
            raise IncompatibleError(
                f"{self.name} reads states {self.offset} layers before the last, and {base.identity.name} has {count}"
            )
        return (count - self.offset,)

    def load(self, base: BaseLM) -> DraftNet:
        layers = self.layers(base)
        check_layers(base, layers)
        return Hydra(self, base, layers)


class Hydra(DraftNet):
    """Hydra's heads, each of which reads the token before."""

    def __init__(self, source: HydraSource, base: BaseLM, layers: tuple[int, ...]) -> None:
        self.base, self.layers, self.config = base, layers, base.model.config
        self._size, self._blocks = base.hidden_size, source.blocks
        stored = source.tensors.read(source.tensors.shapes)
        self._tensors = {name: value.to(base.device, base.dtype) for name, value in stored.items()}
        shared: Any = base.model.get_input_embeddings().weight
        self._embeddings = self._tensors.pop(EMBEDDINGS, shared)
        if self._embeddings.shape[1] != self._size:
            raise IncompatibleError(f"{source.name} needs embeddings as wide as the states of {base.identity.name}")

    def forward(
        self, tokens: torch.Tensor, states: torch.Tensor, cache: TreeCache, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        return torch.cat([states, functional.embedding(tokens, self._embeddings)], dim=-1)

    @torch.inference_mode()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        head = states.shape[-1] // self._size - 2
        first = f"hydra_mlp.{head}.0"
        read = self._linear(states, f"{first}.res_connection") + functional.silu(
            self._linear(states, f"{first}.linear")
        )
        for block in range(1, self._blocks):
            read = read + functional.silu(self._linear(read, f"hydra_mlp.{head}.{block}.linear"))
        return self._linear(read, f"hydra_lm_head.{head}")

    def _linear(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(rows, self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"])
