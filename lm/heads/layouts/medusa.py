"""Medusa heads in the layouts of others, told apart by the names of their tensors.

Head i (from 0) on a state s is `x = s; for l: x = x + silu(W_l x + b_l)`, then a projection to the vocabulary without
bias: our medusa net, with weights transposed, head i being our head i + 2.

| layout | where it comes from | names |
|---|---|---|
| `medusa-1` | FasterDecoding/Medusa, the heads alone | `0.0.linear.weight`; head 0's projection, if any: `0.1.weight` |
| `medusa-2` | the same, in a whole model | with `medusa_head.` before them |
| `modelopt` | NVIDIA Model-Optimizer | with `medusa_heads.` before them |
| `tensorrt-llm` | TensorRT-LLM | `medusa_heads.0.medusa_layers.0.linear.weight`, `medusa_heads.0.lm_head.weight` |
| `vllm` | vLLM | `blocks.0.layers.0.weight`, `lm_heads.0.weight`; `token_map`, if any |

Sources: the loaders of these projects; docs/formats.md.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lattices.errors import InvalidDataError, RescoreError
from lm.base.identity import weights_sha256
from lm.files import read_json_object
from lm.heads.layouts.tensor_files import PICKLES, SAFETENSORS, TensorFiles, names_by_file
from lm.heads.nets import MEDUSA, BlockHeadsConfig
from lm.heads.projection import OwnProjection
from lm.keys import remembered_sha256

HEADS_ALONE = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
MODELS = ("model.safetensors", "pytorch_model.bin")  # whole models, and vLLM's heads; or indexes of their shards
TOKEN_MAP = "token_map"
CONFIG_FILE = "config.json"
UNNAMED = "the base of "
HEAD_COUNTS = ("medusa_num_heads", "num_medusa_heads")
LAYER_COUNTS = ("medusa_num_layers", "num_medusa_layers")


@dataclass(frozen=True)
class Layout:
    """Names of tensors, with {head}, {block}, {part} (weight or bias) and {blocks}, the number of them.

    block: of a residual block; own: of a head's projection; shared: of one for all heads, under any of these names.
    in_model: the base's tensors lie beside them.
    """

    name: str
    block: str
    own: str
    shared: tuple[str, ...] = ()
    in_model: bool = False

    def is_of_heads(self, name: str) -> bool:
        """Whether a tensor is one of the heads', by the beginning of its name."""
        if self.shared and name in (*self.shared, TOKEN_MAP):
            return True
        begins = {re.escape(each.partition("{")[0]) for each in (self.block, self.own)}
        return any(re.match(rf"{begin}\d+\.", name) for begin in begins)

    def block_of(self, name: str) -> int | None:
        """The number of a residual block in the name of a tensor; None for another tensor."""
        pattern = re.escape(self.block).replace(r"\{head\}", r"\d+").replace(r"\{block\}", r"(\d+)")
        found = re.fullmatch(pattern.replace(r"\{part\}", "(?:weight|bias)"), name)
        return int(found[1]) if found else None


MEDUSA_1 = Layout("medusa-1", "{head}.{block}.linear.{part}", "{head}.{blocks}.weight")
MEDUSA_2 = Layout(
    "medusa-2", "medusa_head.{head}.{block}.linear.{part}", "medusa_head.{head}.{blocks}.weight", in_model=True
)
MODELOPT = Layout(
    "modelopt", "medusa_heads.{head}.{block}.linear.{part}", "medusa_heads.{head}.{blocks}.weight", in_model=True
)
TENSORRT_LLM = Layout(
    "tensorrt-llm",
    "medusa_heads.{head}.medusa_layers.{block}.linear.{part}",
    "medusa_heads.{head}.lm_head.weight",
    in_model=True,
)
VLLM = Layout(
    "vllm", "blocks.{head}.layers.{block}.{part}", "lm_heads.{head}.weight", ("lm_heads.0.weight", "lm_head.weight")
)
EAGLE_HEADS = "parallel_draft_heads."


def layout_of(names: Sequence[str]) -> Layout | None:
    """The layout that has these names; None for none. Raises `InvalidDataError` for heads that read other states."""
    if any(re.match(r"medusa_heads\.\d+\.(medusa_layers|lm_head)\.", name) for name in names):
        return TENSORRT_LLM
    for layout in (MODELOPT, MEDUSA_2, MEDUSA_1):
        if any(map(layout.is_of_heads, names)):
            return layout
    if any(re.match(r"blocks\.\d+\.layers\.|lm_heads\.\d+\.", name) for name in names):
        return VLLM
    if any(name.startswith(EAGLE_HEADS) for name in names):
        raise InvalidDataError(
            f"heads called {EAGLE_HEADS}* read the states of an EAGLE draft model, not the base's; give block heads"
        )
    return None


class MedusaHeads:
    """Medusa heads that others wrote.

    place: their file or folder; source: its tensors; layout: which one that is, by their names.
    config: what they are, by their tensors. notices: what the user should know of them.
    Raises `InvalidDataError` for tensors that are missing, too many or of the wrong shape.
    """

    def __init__(self, place: Path, source: TensorFiles, layout: Layout) -> None:
        self.place, self.source, self.layout, self._file = place, source, layout, source.files[0]
        self._shapes = {name: shape for name, shape in source.shapes.items() if layout.is_of_heads(name)}
        if extra := sorted(source.shapes.keys() - self._shapes.keys()) if not layout.in_model else []:
            raise InvalidDataError(
                f"{self._file} holds {extra[0]} beside the heads, which has no place there; get it again"
            )
        self._heads, self._blocks = self._counted()
        beside = (place if place.is_dir() else place.parent) / CONFIG_FILE
        self._said: dict[str, Any] = read_json_object(beside, missing="") if beside.is_file() else {}
        own, vocab_size = self._projection()
        has_bias = any(name.endswith(".bias") for name in self._shapes)
        d = self._checked_size(own, has_bias)
        base_name = self._said.get("base_model_name_or_path")
        if not isinstance(base_name, str) or not base_name:
            base_name = f"{UNNAMED}{place.name}"
        self.config = BlockHeadsConfig(
            h=self._heads + 1, hidden_size=d, inner_size=d, vocab_size=vocab_size, base_name=base_name,
            tokenizer_sha256=None, architecture=MEDUSA, blocks=self._blocks, own_projection=own,
            base_weights_sha256=self._base_sha256(),
        )  # fmt: skip
        self.notices = tuple(self._disagreements(has_bias))

    @property
    def sha256(self) -> str:
        """Of the files that they are in."""
        digests = [remembered_sha256(file) for file in self.source.files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def tensors(self) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
        """As `BlockHeads.tensors` names them, in the precision they have, and the notices, with those about values."""
        config, layout, d = self.config, self.layout, self.config.hidden_size
        heads, blocks, own = config.h - 1, config.blocks, config.own_projection
        stored = self.source.read(sorted(self._shapes))
        dtype = _one_dtype([value for name, value in stored.items() if layout.block_of(name) is not None])

        def of(part: str) -> list[torch.Tensor]:
            keys = [
                layout.block.format(head=head, block=block, part=part)
                for head in range(heads)
                for block in range(blocks)
            ]
            return [stored[key].to(dtype) for key in keys if key in stored]

        def stacked(each: list[torch.Tensor], *shape: int) -> torch.Tensor:
            every = torch.stack(each) if each else torch.zeros(heads * blocks, *shape, dtype=dtype)
            return every.reshape(heads, blocks, *shape)

        tensors = {
            "block.weight": stacked([each.T for each in of("weight")], d, d),
            "block.bias": stacked(of("bias"), d),
        }
        if own is not None:
            keys = [name for name in layout.shared if name in stored][:1] if own.shared else []
            keys = keys or self._own_names()
            rows = [stored[key] for key in keys]
            if own.mapped:
                tensors["lm_head.token_map"] = token_map = self._token_map(stored[TOKEN_MAP], len(rows[0]))
                rows = [each if len(each) == own.rows else each[token_map] for each in rows]
            tensors["lm_head.weight"] = torch.stack([each.to(_one_dtype(rows)) for each in rows])
        notices = list(self.notices)
        first = tensors["block.weight"][:, :1]
        if blocks > 1 and torch.equal(tensors["block.weight"], first.expand(-1, blocks, -1, -1)):
            notices.append(
                f"the {blocks} blocks of each head in {self.place} are equal: what trained them repeats one block "
                "(FasterDecoding/Medusa does); they are read as they stand"
            )
        return tensors, tuple(notices)

    def _token_map(self, token_map: torch.Tensor, rows: int) -> torch.Tensor:
        """Raises `InvalidDataError` unless they are tokens, each once."""
        size = self.config.vocab_size or max(rows, int(token_map.max()) + 1)
        whole = not token_map.is_floating_point() and len(token_map.unique()) == len(token_map)
        if not whole or not 0 <= int(token_map.min()) <= int(token_map.max()) < size:
            raise InvalidDataError(
                f"the {TOKEN_MAP} of {self.place} is no list of different token ids below {size}; get it again"
            )
        return token_map.long()

    def _counted(self) -> tuple[int, int]:
        """How many heads there are, and blocks of each, by their numbers."""
        numbers = {int(digits[0]) for name in self._shapes if (digits := re.search(r"\d+", name))}
        of_blocks = {number for name in self._shapes if (number := self.layout.block_of(name)) is not None}
        for what, found in (("head", numbers), ("block", of_blocks)):
            if absent := sorted(set(range(len(found))) - found):
                raise InvalidDataError(
                    f"{self._file} has a {what} {max(found)}, but no {what} {absent[0]} (numbers from 0); get it again"
                )
        return len(numbers), len(of_blocks)

    def _own_names(self) -> list[str]:
        return [self.layout.own.format(head=head, blocks=self._blocks) for head in range(self._heads)]

    def _projection(self) -> tuple[OwnProjection | None, int | None]:
        """The projections of the heads, if they have some, and the tokens of the whole vocabulary, if that is known."""
        here, layout, file = self._shapes, self.layout, self._file
        each = [name for name in self._own_names() if name in here]
        one = [name for name in layout.shared if name in here]
        first = next(iter(one if layout.shared and len(each) <= 1 else each), None)
        if first is None:
            if TOKEN_MAP in here:
                raise InvalidDataError(
                    f"{file} has a {TOKEN_MAP} without a projection that it could be of; get it again"
                )
            return None, None
        rows = here[first][0] if here[first] else 0
        scale = self._said.get("logit_scale", 1.0) if layout is VLLM else 1.0
        if not isinstance(scale, int | float) or not scale > 0:
            raise InvalidDataError(f"{file.parent / CONFIG_FILE} has logit_scale {scale!r}; give a positive number")
        how: dict[str, Any] = {"shared": len(each) <= 1 and first in one, "scale": float(scale)}
        if TOKEN_MAP not in here:
            return OwnProjection(rows=rows, **how), rows
        mapped = here[TOKEN_MAP][0] if here[TOKEN_MAP] else 0
        if not 0 < mapped <= rows:
            raise InvalidDataError(f"{file} has a {TOKEN_MAP} of {mapped} tokens for {rows} rows; get it again")
        size = self._said.get("vocab_size")
        known = rows if rows > mapped else size if isinstance(size, int) and size > 0 else None
        return OwnProjection(rows=mapped, mapped=True, **how), known

    def _checked_size(self, own: OwnProjection | None, has_bias: bool) -> int:
        """The hidden size. Raises `InvalidDataError` for tensors that are missing, too many, or of the wrong shape."""
        here, layout, file = self._shapes, self.layout, self._file
        places = [(head, block) for head in range(self._heads) for block in range(self._blocks)]
        parts = ("weight", "bias") if has_bias else ("weight",)
        named = {layout.block.format(head=h, block=b, part=part): part for h, b in places for part in parts}
        projections = self._own_names() if own else []
        if own and own.shared:
            projections = [name for name in layout.shared if name in here][:1]
        sized = [shape[-1] for name, shape in here.items() if len(shape) == 2]
        d = sized[0] if sized else 0
        expected: dict[str, tuple[int, ...]] = {n: (d, d) if part == "weight" else (d,) for n, part in named.items()}
        rows = here[projections[0]][0] if projections and projections[0] in here else 0
        expected |= {name: (rows, d) for name in projections}
        if own and own.mapped:
            expected[TOKEN_MAP] = (own.rows,)
        what = f"{self._heads} heads of {self._blocks} blocks"
        for name in sorted({*expected, *here}):
            if name not in here:
                raise InvalidDataError(f"{file} lacks {name} ({what}); get it again")
            if name not in expected:
                raise InvalidDataError(f"{file} holds {name}, which {what} have no place for; get it again")
            if here[name] != expected[name]:
                shapes = f"shape {list(here[name])}, not {list(expected[name])}"
                raise InvalidDataError(f"{file} has {name} of {shapes} ({what}); get it again")
        return d

    def _base_sha256(self) -> str | None:
        """Of the weights beside the heads, in transformers' layout: what the heads were trained with."""
        source, layout, folder = self.source, self.layout, self._file.parent
        if layout not in (MEDUSA_2, MODELOPT) or self._file.suffix != SAFETENSORS:
            return None
        whole = len(source.files) > 1 or any(not layout.is_of_heads(name) for name in source.shapes)
        return weights_sha256(folder) if whole or any(folder.glob("*.index.json")) else None

    def _disagreements(self, has_bias: bool) -> list[str]:
        """What the configuration says otherwise than the tensors, which are right."""
        config, place = self._said, self.place
        parts = [config, *(p for name in ("medusa", "pretrained_config") if isinstance(p := config.get(name), dict))]
        of_vllm = self.layout is VLLM
        lines = []
        for what, count, names in (
            ("heads", self._heads, (*HEAD_COUNTS, *(("num_heads",) if of_vllm else ()))),
            ("blocks a head", self._blocks, (*LAYER_COUNTS, *(("num_hidden_layers",) if of_vllm else ()))),
        ):
            said = {name: part[name] for part in parts for name in names if name in part}
            for name, number in said.items():
                if number != count:
                    lines.append(
                        f"{CONFIG_FILE} beside the heads in {place} says {name} = {number}, and there are {count} "
                        f"{what}; what is there counts"
                    )
        if of_vllm and has_bias and not config.get("medusa_fc_bias", False):
            lines.append(
                f"{CONFIG_FILE} of the heads in {place} does not say medusa_fc_bias: vLLM would drop their biases; "
                "here they count"
            )
        return lines


def _one_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, [each.dtype for each in tensors]) if tensors else torch.float32


def find_medusa(place: Path) -> MedusaHeads | None:
    """The Medusa heads at a place, a folder or a file; None for a folder with none, or with our own heads.

    Only names and shapes are read. Raises `InvalidDataError` for tensors that are missing, too many or of the wrong
    shape, for a file that can't be read or holds something else, `RescoreError` for a choice that is the user's.
    """
    if place.is_file():
        if place.suffix not in (SAFETENSORS, *PICKLES):
            raise RescoreError(f"{place} is no folder of heads, nor a file like {HEADS_ALONE[0]}; give one")
        return _understood(place, TensorFiles([place]), needed=True)
    alone = [place / name for name in HEADS_ALONE if (place / name).is_file()]
    if len(alone) > 1:
        raise RescoreError(
            f"{place} has both {' and '.join(HEADS_ALONE)}, and they may differ; give one of them: --heads {alone[0]}"
        )
    ranks = sorted(place.glob("rank*.safetensors"))
    if len(ranks) > 1:
        raise InvalidDataError(
            f"{place} is cut into {len(ranks)} ranks for several GPUs; give the checkpoint of one (tp_size 1)"
        )
    if alone or ranks:
        return _understood(place, TensorFiles(alone or ranks), needed=True)
    return next((heads for name in MODELS if (heads := _in_model(place, name)) is not None), None)


def medusa_of_model(folder: Path) -> MedusaHeads | None:
    """The Medusa heads in a base LM's own folder, whose weights are safetensors; None without any."""
    heads = _in_model(folder, MODELS[0])
    return heads if heads is not None and heads.layout in (MEDUSA_2, MODELOPT) else None


def _in_model(folder: Path, name: str) -> MedusaHeads | None:
    """What is in a model's file, or in its shards if they hold heads."""
    file, index = folder / name, folder / f"{name}.index.json"
    if index.is_file():
        shards = names_by_file(index)
        if (layout := layout_of(list(shards))) is None:
            return None
        files = sorted({shard for tensor, shard in shards.items() if layout.is_of_heads(tensor)})
        return _understood(folder, TensorFiles([folder / shard for shard in files]))
    if not file.is_file():
        return None
    try:
        source = TensorFiles([file])
    except InvalidDataError:
        if file.suffix == SAFETENSORS:  # whoever reads it as a model or as our own heads says what is wrong
            return None
        raise
    return _understood(folder, source)


def _understood(place: Path, source: TensorFiles, *, needed: bool = False) -> MedusaHeads | None:
    """What the tensors are; None if they are none of the heads' (`needed`: an error)."""
    names = sorted(source.shapes)
    layout = layout_of(names)
    if layout is None:
        if needed:
            first = f"its first tensor is {names[0]}" if names else "it is empty"
            raise InvalidDataError(
                f"{source.files[0]} holds no heads in a layout that is known here ({first}); see docs/formats.md"
            )
        return None
    return MedusaHeads(place, source, layout)


def is_unnamed(config: BlockHeadsConfig) -> bool:
    """Whether the heads, of others, did not say the name of their base."""
    return config.base_name.startswith(UNNAMED)
