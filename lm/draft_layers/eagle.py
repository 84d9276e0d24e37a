"""EAGLE checkpoints: one layer of attention over (next token, state of the base) (Li et al. 2024, 2025).

Which version a folder holds is told by its tensors. EAGLE-1 and -2 (which differ in the tree that is drafted, not in
the network) begin from the base's final states and end in its vocabulary projection; EAGLE-3 begins from the states
before three layers and has a projection of its own, often to a part of the vocabulary (`d2t`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError, first_line
from lm.base.cache import TreeCache
from lm.base.fast.packed import can_pack, pack
from lm.base.model import BaseLM
from lm.base.states import FINAL, check_layers, decoder_layers
from lm.checkpoint import CONFIG_FILE
from lm.draft_layers.net import DraftNet, NetSource
from lm.files import FETCH, read_json_object
from lm.heads.layouts.tensor_files import TensorFiles

LAYER, MIDLAYER = "layers.0.", "midlayer."  # one layer's two names
PROJECTIONS = tuple(f"{LAYER}self_attn.{name}_proj" for name in "qkv")
AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"
OTHER_OPTIONS = ("norm_output", "fc_norm", "norm_before_residual", "norm_before_fc")  # they change the arithmetic
FILES = ("model.safetensors", "pytorch_model.bin")
Shapes = dict[str, tuple[int, ...]]


class EagleSource(NetSource):
    """The checkpoint in a folder: `config.json` of a Llama of one layer, and `model.safetensors` or
    `pytorch_model.bin`.

    third: whether it is of EAGLE-3. drafted: tokens that it has logits of; None: all of the base's.
    Raises `RescoreError` if there is none, `InvalidDataError` for tensors that are missing, too many or of other shapes
    than the configuration says, `IncompatibleError` for later kinds.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.folder = name, folder
        fields = read_json_object(folder / CONFIG_FILE, missing=f"no EAGLE checkpoint in {folder}", advice=FETCH)
        self.config = _llama_config(fields, folder / CONFIG_FILE)
        if other := [option for option in OTHER_OPTIONS if fields.get(option)]:
            raise IncompatibleError(f"{folder} is of a kind of EAGLE that is not read here: its {other[0]} is set")
        file = next((path for each in FILES if (path := folder / each).is_file()), None)
        if file is None:
            raise RescoreError(f"no EAGLE checkpoint in {folder}: it has no {' or '.join(FILES)}; {FETCH}")
        self.file, self.tensors = file, TensorFiles([file])
        self._names = {name.replace(MIDLAYER, LAYER): name for name in self.tensors.shapes}
        shapes = {name: self.tensors.shapes[stored] for name, stored in self._names.items()}
        self.third = f"{LAYER}hidden_norm.weight" in shapes
        self.hidden_size = self._hidden_size(fields, shapes)
        if "embed_tokens.weight" in shapes and len(shapes["embed_tokens.weight"]) == 2:
            self.vocab_size = shapes["embed_tokens.weight"][0]
        _check_shapes(file, shapes, *self._expected(shapes))
        self.drafted = shapes["lm_head.weight"][0] if self.third else None
        self._aux = fields.get(AUX_LAYERS) if self.third else None
        if self._aux is not None and not (
            isinstance(self._aux, list) and len(self._aux) == 3 and all(type(each) is int for each in self._aux)
        ):
            raise InvalidDataError(f"{folder / CONFIG_FILE}: {AUX_LAYERS} are not three layers; get it again")
        self._identify([file], fields)

    def _hidden_size(self, fields: dict[str, Any], shapes: Shapes) -> int:
        """Of the base."""
        if not self.third:
            return int(self.config.hidden_size)
        said = fields.get("target_hidden_size")
        joined = shapes.get("fc.weight", (0, 0))
        return said if isinstance(said, int) else joined[-1] // 3

    def _expected(self, shapes: Shapes) -> tuple[Shapes, Shapes]:
        """The tensors that must be there, and those that may be."""
        config, d = self.config, int(self.config.hidden_size)
        size: Any = config.head_dim
        heads, kv = (int(count * size) for count in (config.num_attention_heads, config.num_key_value_heads))
        inner, vocabulary = int(config.intermediate_size), self.vocab_size or int(config.vocab_size)
        width = 2 * d if self.third else d
        needed: Shapes = {
            **{f"{name}.weight": (rows, width) for name, rows in zip(PROJECTIONS, (heads, kv, kv), strict=True)},
            f"{LAYER}self_attn.o_proj.weight": (d, heads),
            f"{LAYER}mlp.gate_proj.weight": (inner, d),
            f"{LAYER}mlp.up_proj.weight": (inner, d),
            f"{LAYER}mlp.down_proj.weight": (d, inner),
            f"{LAYER}post_attention_layernorm.weight": (d,),
        }
        optional: Shapes = {f"{name}.bias": (rows,) for name, rows in zip(PROJECTIONS, (heads, kv, kv), strict=True)}
        optional["embed_tokens.weight"] = (vocabulary, d)
        if not self.third:
            return {**needed, "fc.weight": (d, 2 * d)}, {**optional, "fc.bias": (d,)}
        assert self.hidden_size is not None
        drafted = shapes.get("lm_head.weight", (0, 0))[0]
        needed |= {
            f"{LAYER}input_layernorm.weight": (d,), f"{LAYER}hidden_norm.weight": (d,), "norm.weight": (d,),
            "fc.weight": (d, 3 * self.hidden_size), "lm_head.weight": (drafted, d),
        }  # fmt: skip
        if "d2t" in shapes or drafted != vocabulary:
            needed["d2t"] = (drafted,)
        return needed, {**optional, "t2d": (vocabulary,)}

    def layers(self, base: BaseLM) -> tuple[int, ...]:
        if not self.third:
            return (FINAL,)
        count = len(decoder_layers(base))
        layers = tuple(self._aux) if self._aux is not None else (2, count // 2, count - 3)
        if list(layers) != sorted(set(layers)):
            raise IncompatibleError(
                f"{self.name} reads the states before layers {', '.join(map(str, layers))} of {base.identity.name}, "
                f"which has {count} layers: too few for EAGLE-3; give a checkpoint of this base"
            )
        return layers

    def load(self, base: BaseLM) -> DraftNet:
        layers = self.layers(base)
        check_layers(base, layers)
        names = [name for name in self._names if name != "t2d"]
        stored = self.tensors.read([self._names[name] for name in names])
        tensors = {name: stored[self._names[name]] for name in names}
        return Eagle(self, base, layers, tensors)


class Eagle(DraftNet):
    """The layers of EAGLE-1 and EAGLE-3. tensors: as `EagleSource` has checked them."""

    def __init__(
        self, source: EagleSource, base: BaseLM, layers: tuple[int, ...], tensors: dict[str, torch.Tensor]
    ) -> None:
        self.base, self.layers, self.config = base, layers, source.config
        self._third = source.third
        d = int(self.config.hidden_size)
        mapped = tensors.pop("d2t", None)
        if mapped is not None:
            self.token_ids = _token_ids(mapped, base.vocab_size, source.file).to(base.device)
        placed = {name: value.to(base.device, base.dtype) for name, value in tensors.items()}
        shared: Any = base.model.get_input_embeddings().weight
        self._embeddings: torch.Tensor = placed.pop("embed_tokens.weight", shared)
        if self._embeddings.shape[1] != d:
            raise IncompatibleError(
                f"{source.name} has no embeddings of its own and {d} numbers a state, and {base.identity.name} has "
                f"embeddings of {self._embeddings.shape[1]}; give a checkpoint of this base"
            )
        with torch.device("meta"):
            self._net: Any = _net(self.config, placed, d, third=self._third)
        self._net.load_state_dict(placed, assign=True)
        self._net.eval().requires_grad_(False)
        if can_pack(self._net):
            pack(self._net)
        self._rotary = LlamaRotaryEmbedding(self.config).to(base.device)

    @torch.inference_mode()
    def begun(self, states: torch.Tensor) -> torch.Tensor:
        begun: torch.Tensor = self._net["fc"](states) if self._third else states
        return begun

    def forward(
        self, tokens: torch.Tensor, states: torch.Tensor, cache: TreeCache, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        layer = self._net["layers"][0]
        embedded = functional.embedding(tokens, self._embeddings)
        if self._third:
            inputs = torch.cat([layer["input_layernorm"](embedded), layer["hidden_norm"](states)], dim=-1)
        else:
            inputs = states = self._net["fc"](torch.cat([embedded, states], dim=-1))
        turned = self._rotary(states, position_ids=positions)
        attended, _ = layer["self_attn"](inputs, position_embeddings=turned, attention_mask=mask, cache=cache)
        states = states + attended
        after: torch.Tensor = states + layer["mlp"](layer["post_attention_layernorm"](states))
        return after

    @torch.inference_mode()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        if not self._third:
            return self.base.project(states)
        logits: torch.Tensor = self._net["lm_head"](self._net["norm"](states))
        return logits


def _net(config: LlamaConfig, tensors: dict[str, torch.Tensor], d: int, *, third: bool) -> nn.ModuleDict:
    """The modules that these tensors are of, by the names of EAGLE's files."""
    attention = LlamaAttention(config, 0)
    for each in PROJECTIONS:
        name = each.rpartition(".")[2]
        rows, columns = tensors[f"{each}.weight"].shape
        setattr(attention, name, nn.Linear(columns, rows, bias=f"{each}.bias" in tensors))
    norms = ["post_attention_layernorm", *(["input_layernorm", "hidden_norm"] if third else [])]
    layer = nn.ModuleDict({name: LlamaRMSNorm(d, eps=config.rms_norm_eps) for name in norms})
    layer["self_attn"], layer["mlp"] = attention, LlamaMLP(config)
    joined = tensors["fc.weight"].shape[1]
    net = nn.ModuleDict({"fc": nn.Linear(joined, d, bias="fc.bias" in tensors), "layers": nn.ModuleList([layer])})
    if third:
        net["norm"] = LlamaRMSNorm(d, eps=config.rms_norm_eps)
        net["lm_head"] = nn.Linear(d, len(tensors["lm_head.weight"]), bias=False)
    return net


def _llama_config(fields: dict[str, Any], path: Path) -> LlamaConfig:
    """The configuration of the one layer."""
    try:
        named = {name: value for name, value in fields.items() if name not in ("model_type", "architectures")}
        config = LlamaConfig(**{**named, "attention_bias": False, "mlp_bias": False, "num_hidden_layers": 1})
        config.head_dim = int(config.head_dim or config.hidden_size // config.num_attention_heads)
        config._attn_implementation = "sdpa"
        LlamaRotaryEmbedding(config)
    except Exception as error:  # whatever a configuration of another kind leads it to
        raise InvalidDataError(
            f"{path} is no configuration of a Llama layer ({first_line(error)}); get it again"
        ) from error
    return config


def _check_shapes(file: Path, shapes: Shapes, needed: Shapes, optional: Shapes) -> None:
    """Raises `InvalidDataError` for the first tensor that is missing, too many, or of another shape."""
    for name in sorted(shapes.keys() | needed.keys()):
        due = needed.get(name, optional.get(name))
        if name not in shapes:
            raise InvalidDataError(f"{file} is no whole EAGLE checkpoint: {name} is missing; get it again")
        if due is None:
            raise InvalidDataError(f"{file} has a tensor that no EAGLE checkpoint read here has: {name}")
        if shapes[name] != due:
            raise InvalidDataError(
                f"{file} does not fit its {CONFIG_FILE}: {name} has shape {list(shapes[name])}, not {list(due)}"
            )


def _token_ids(mapped: torch.Tensor, vocab_size: int, file: Path) -> torch.Tensor:
    """The base's token ids of a draft vocabulary, from what is to be added to each of its own."""
    ids = torch.arange(len(mapped)) + mapped.long()
    if mapped.is_floating_point() or len(ids) == 0 or ids.min() < 0 or ids.max() >= vocab_size:
        raise InvalidDataError(f"{file}: d2t names tokens that the base's {vocab_size} do not have; get it again")
    if len(ids.unique()) < len(ids):
        raise InvalidDataError(f"{file}: d2t names a token twice; get it again")
    return ids
