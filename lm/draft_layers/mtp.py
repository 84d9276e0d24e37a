"""Multi-token prediction layers that a base LM brings with it, as DeepSeek-V3 and GLM-4.5 have them.

They lie after the base's own layers in its files, `model.layers.N.*` for a base of N layers, and transformers leaves
them out when it loads the base. One such layer is read: it takes the next token and the base's final state, and is fed
its own states from the second token of a chain on. The block inside is the base's own kind of layer, of transformers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers.modeling_layers import MtpLayer

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError, first_line
from lm.base.cache import TreeCache
from lm.base.catalog import resolve_base
from lm.base.model import BaseIdentity, BaseLM
from lm.base.states import FINAL, check_layers, decoder_layers
from lm.draft_layers.net import DraftNet, NetSource
from lm.files import FETCH
from lm.heads.layouts.tensor_files import TensorFiles, names_by_file

INDEX = "model.safetensors.index.json"
OF_LAYER = re.compile(r"(.*\blayers\.(\d+)\.)eh_proj\.weight")
EMBEDDINGS, HEAD, NORM = "embed_tokens.weight", "shared_head.head.weight", "shared_head.norm.weight"
BESIDE = {"enorm.weight": "enorm.weight", "hnorm.weight": "hnorm.weight", "eh_proj.weight": "eh_proj.weight",
          NORM: "post_norm.weight"}  # fmt: skip
BLOCK, EXPERTS = "mtp_block.", "mlp.experts."
IN_SINGLE = "e_score_correction_bias"  # choices among experts turn on its last digits


class MtpSource(NetSource):
    """The MTP layer in the files of a folder; None: in the base's own, of which `beside` says where they lie.

    Raises `RescoreError` if there is none, `IncompatibleError` for several.
    """

    def __init__(self, folder: Path | None, name: str) -> None:
        self.name = name
        if folder is None:
            return
        files = _files(folder)
        self.tensors = TensorFiles(files)
        found = sorted({(int(m[2]), m[1]) for each in self.tensors.shapes if (m := OF_LAYER.fullmatch(each))})
        if not found:
            raise RescoreError(
                f"no MTP layer in {folder}: no tensor is called model.layers.N.eh_proj.weight; "
                "give the folder of a base that has one, as DeepSeek-V3 and GLM-4.5 do, or another drafter"
            )
        if len(found) > 1:
            raise IncompatibleError(f"{folder} has {len(found)} MTP layers, and only a single one is read here")
        ((self.place, self.prefix),) = found
        shape = self.tensors.shapes[f"{self.prefix}eh_proj.weight"]
        if len(shape) != 2 or shape[1] != 2 * shape[0]:
            raise InvalidDataError(f"{folder}: {self.prefix}eh_proj.weight has shape {list(shape)}, not [d, 2 d]")
        self.hidden_size = shape[0]
        self._identify(files)

    def beside(self, base: BaseIdentity) -> MtpSource:
        """The layer in the files of this base."""
        folder = Path(resolve_base(base.name).folder)
        return MtpSource(folder, f"the MTP layer of {base.name}")

    def layers(self, base: BaseLM) -> tuple[int, ...]:
        count = len(decoder_layers(base))
        if self.place != count:
            raise IncompatibleError(
                f"{self.name} comes after {self.place} layers, and {base.identity.name} has {count}; give the MTP "
                "layer of this base"
            )
        return (FINAL,)

    def load(self, base: BaseLM) -> DraftNet:
        check_layers(base, self.layers(base))
        return Mtp(self, base)


class Mtp(DraftNet):
    """The layer with which a model was trained to predict one token more."""

    layers = (FINAL,)

    def __init__(self, source: MtpSource, base: BaseLM) -> None:
        self.base = base
        self._decoder: Any = base.model.get_decoder()
        with torch.device("meta"):
            self._layer: Any = _layer(source, base)
        self.config = self._layer.config
        names = {name.removeprefix(source.prefix) for name in source.tensors.shapes if name.startswith(source.prefix)}
        expected = _expected(self._layer.state_dict())
        shapes = {name: source.tensors.shapes[source.prefix + name] for name in names}
        for name in sorted(names | expected.keys()):
            due = expected.get(name, (base.vocab_size, base.hidden_size) if name in (EMBEDDINGS, HEAD) else None)
            if shapes.get(name) != due:
                has = list(shapes[name]) if name in shapes else "missing"
                raise InvalidDataError(
                    f"{source.name} is no layer of {base.identity.name}: {source.prefix}{name} is {has}, due is "
                    f"{'no such tensor' if due is None else list(due)}"
                )
        stored = source.tensors.read([source.prefix + name for name in sorted(names)])
        tensors = {name: self._placed(name, stored[source.prefix + name]) for name in names}
        # Most files have copies of the base's own here.
        self._embeddings = self._own(tensors.pop(EMBEDDINGS, None), base.model.get_input_embeddings().weight)
        self._head = self._own(tensors.pop(HEAD, None), base.output_embeddings.weight)
        self._layer.load_state_dict(_merged(tensors), assign=True)
        self._layer.eval().requires_grad_(False)

    def _placed(self, name: str, value: torch.Tensor) -> torch.Tensor:
        dtype = torch.float32 if name.endswith(IN_SINGLE) and self.base.is_half else self.base.dtype
        return value.to(self.base.device, dtype)

    def _own(self, tensor: torch.Tensor | None, of_base: Any) -> torch.Tensor | None:
        """The tensor where it is not the base's."""
        return None if tensor is None or torch.equal(tensor, of_base) else tensor

    def forward(
        self, tokens: torch.Tensor, states: torch.Tensor, cache: TreeCache, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        own = self._embeddings
        embedded = self.base.model.get_input_embeddings()(tokens) if own is None else functional.embedding(tokens, own)
        positions = positions + 1  # of the token, not of the state before it
        turned = self._decoder.rotary_emb(embedded, position_ids=positions)
        after: torch.Tensor = self._layer(
            embedded, states, position_embeddings=turned, attention_mask=mask, position_ids=positions, cache=cache
        )
        return after

    @torch.inference_mode()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        if self._head is None:
            return self.base.project(states)
        return self.base.scaling(functional.linear(states, self._head, self.base.output_embeddings.bias))


def _layer(source: MtpSource, base: BaseLM) -> MtpLayer:
    """An empty layer of the base's kind."""
    count = getattr(base.config, "num_mtp_layers", None)
    if not count or hasattr(base.config, "chain_hidden_post_norm"):
        raise IncompatibleError(
            f"{source.name}: no MTP layer is known of {base.identity.name} ({base.config.model_type}) as DeepSeek-V3 "
            "and GLM-4.5 have it (num_nextn_predict_layers in its configuration)"
        )
    try:
        config = base.model.config.get_mtp_config()
        last = decoder_layers(base)[-1]
        norm = next(type(module) for name, module in last.named_modules() if "norm" in name)
        return MtpLayer(config, type(last), norm, 0)
    except Exception as error:  # architectures fail in their own ways
        raise IncompatibleError(
            f"{source.name}: no MTP layer can be made for {base.identity.name} ({first_line(error)})"
        ) from error


def _expected(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The tensors of a file for a layer with this state: experts one by one, gates and ups apart."""
    expected: dict[str, tuple[int, ...]] = {}
    beside = {ours: theirs for theirs, ours in BESIDE.items()}
    for name, value in state.items():
        inside = name.removeprefix(BLOCK)
        if inside.startswith(EXPERTS) and value.ndim == 3:
            n, rows, columns = value.shape
            gated = inside.endswith("gate_up_proj")
            for part in ("gate_proj", "up_proj") if gated else ("down_proj",):
                expected |= {f"{EXPERTS}{i}.{part}.weight": (rows // 2 if gated else rows, columns) for i in range(n)}
        else:
            expected[beside.get(name, inside)] = tuple(value.shape)
    return expected


def _merged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of a layer from the tensors of a file."""
    state = {BESIDE.get(name, BLOCK + name): value for name, value in tensors.items()}
    experts = {name for name in state if name.startswith(f"{BLOCK}{EXPERTS}")}
    if not experts:
        return state
    count = 1 + max(int(name.removeprefix(f"{BLOCK}{EXPERTS}").partition(".")[0]) for name in experts)
    stacks = {
        part: torch.stack([state.pop(f"{BLOCK}{EXPERTS}{i}.{part}_proj.weight") for i in range(count)])
        for part in ("gate", "up", "down")
    }
    state[f"{BLOCK}{EXPERTS}gate_up_proj"] = torch.cat([stacks["gate"], stacks["up"]], dim=1)
    state[f"{BLOCK}{EXPERTS}down_proj"] = stacks["down"]
    return state


def _files(folder: Path) -> list[Path]:
    """The files in which an MTP layer may be: all, or those that the index of shards says."""
    if (index := folder / INDEX).is_file():
        shards = names_by_file(index)
        places = [m[1] for name in shards if (m := OF_LAYER.fullmatch(name))]
        return [folder / file for file in sorted({f for n, f in shards.items() if n.startswith(tuple(places))})]
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise RescoreError(f"no MTP layer in {folder}: it has no *.safetensors or *.bin; {FETCH}")
    return files
