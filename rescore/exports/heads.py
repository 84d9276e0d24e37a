"""Block heads in the layouts that others serve: read in any layout that `lm.heads.layouts` knows, checked, written.

| to | what is written |
|---|---|
| `rescore` | `model.safetensors` and `config.json` as `rescore train-heads` writes them |
| `medusa-vllm` | what vLLM's `"method": "medusa"` loads |
| `medusa-tgi` | `medusa_lm_head.safetensors` for text-generation-inference |
| `medusa-original` | `medusa_lm_head.pt`, the file that FasterDecoding/Medusa opens, with a projection for each head |
| `vllm-plugin` | what `rescore.exports.vllm_heads` serves in vLLM: any architecture, and a rescorer's choice |

Weights keep their precision and every bit (int8 ones become the float32 that they stand for); what a layout can't hold
is refused. Sources: the loaders of these projects; docs/formats.md has their names of tensors.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch

from lattices.errors import IncompatibleError, RescoreError
from lattices.paths import user_path
from lm.base.catalog import load_projection
from lm.base.model import BaseLM
from lm.base.probe import Scaling
from lm.checkpoint import CONFIG_FILE, WEIGHTS_FILE, write_checkpoint, write_tensors
from lm.files import atomic_file, write_json
from lm.heads.block_heads import check_fit, read_config, read_tensors
from lm.heads.layouts.medusa import HEADS_ALONE, MEDUSA_1, TOKEN_MAP, VLLM, Layout, is_unnamed
from lm.heads.nets import MEDUSA, SEQUENTIAL, BlockHeadsConfig
from lm.records import plain
from rescore.checks import check_k
from rescore.options import Spec

To = Literal["rescore", "medusa-vllm", "medusa-tgi", "medusa-original", "vllm-plugin"]
TGI, ORIGINAL = "medusa-tgi", "medusa-original"
ENGINES = {"medusa-vllm": "vLLM", TGI: "text-generation-inference", ORIGINAL: "FasterDecoding/Medusa"}
CHOOSING = ("ngram", "learned-bigram")  # without the text before, which vLLM does not tell
PLUGIN = "RescoreHeads"  # the architecture's name in vLLM
BASE_ROWS = "base.weight"
TGI_FILE, ORIGINAL_FILE = HEADS_ALONE
ORIGINAL_HEADS = 5  # that its loader makes of any checkpoint of heads alone

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ConvertedHeads:
    """What was written. notices: what the user should know of it."""

    out: Path
    to: str
    config: BlockHeadsConfig
    use: str  # the next command
    notices: list[str] = field(default_factory=list)

    def line(self) -> str:
        """For the terminal."""
        return f"{self.out}: heads 2 to {self.config.h} for {self.to}; {self.use}"


def convert_heads(
    heads: Annotated[Path, "Folder of heads, or a file of others' heads.", "IN"],
    out: Annotated[Path, "New folder for them.", "OUT"],
    *,
    to: Annotated[To, "Layout to write."],
    base: Annotated[str | None, "Base LM that they are for; needed where its vocabulary projection is written."] = None,
    rescorer: Annotated[
        Spec | None, "With vllm-plugin: what chooses the draft, ngram[:PATH] or learned-bigram[:PATH]."
    ] = None,
    k: Annotated[int, "With --rescorer: tokens of each head that it chooses among."] = 16,
) -> ConvertedHeads:
    """Writes heads, ours or others', in another layout into a new folder.

    Raises `IncompatibleError` for heads that the layout can't hold exactly or that are not the base's, `OutputError`
    where `out` can't be written, and as `load_heads` does.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise RescoreError(
            f"{out} is there already, and what it holds could be taken for these heads; give a new folder"
        )
    if rescorer is not None and to != "vllm-plugin":
        raise RescoreError(f"--rescorer {rescorer} chooses drafts with --to vllm-plugin only; drop it")
    config = read_config(heads)
    tensors, notices = read_tensors(heads, config)
    of_base = load_projection(base) if base is not None else None
    if of_base is not None:
        if of_base.has_encoder and to != "rescore":
            raise IncompatibleError(
                f"{of_base.identity.name} has an encoder, and --to {to} is for heads of causal LMs; give --to rescore"
            )
        check_fit(config, heads, of_base.identity)
        config, tensors = _for_base(config, tensors, of_base)
    if to == "rescore":
        write_checkpoint(out, tensors, config, dtype=None)
        use = f"rescore eval --heads {shlex.quote(str(out))} --base {_told_base(config)}"
    elif to == "vllm-plugin":
        use = _write_plugin(out, config, tensors, _needed(of_base, to), rescorer, k)
    else:
        _check_medusa(config, tensors, to)
        write = {"medusa-vllm": _write_vllm, TGI: _write_tgi, ORIGINAL: _write_original}[to]
        use = write(out, config, tensors, of_base)
    said = list(notices)
    if to == ORIGINAL and config.h - 1 < ORIGINAL_HEADS:
        said.append(
            f"FasterDecoding/Medusa makes {ORIGINAL_HEADS} heads whatever {CONFIG_FILE} says, and leaves those beyond "
            f"these {config.h - 1} random; its own trees use the first 4"
        )
    if to == "medusa-vllm" and config.own_projection and config.own_projection.mapped:
        said.append("vLLM 0.29 does not load a token_map unless it is patched")
    return ConvertedHeads(out, to, config, use, said)


def _needed(base: BaseLM | None, to: str) -> BaseLM:
    if base is None:
        raise RescoreError(f"--to {to} writes the base's vocabulary projection beside these heads; give --base")
    if base.output_embeddings.bias is not None:
        raise IncompatibleError(
            f"the vocabulary projection of {base.identity.name} has a bias, which --to {to} has no place for"
        )
    return base


def _for_base(config: BlockHeadsConfig, tensors: Tensors, base: BaseLM) -> tuple[BlockHeadsConfig, Tensors]:
    """The heads as those of a base; projections that are the base's, bit for bit, are left out."""
    identity, own = base.identity, config.own_projection
    config = msgspec.structs.replace(
        config, base_name=identity.name, tokenizer_sha256=identity.tokenizer_sha256, vocab_size=identity.vocab_size
    )
    rows = tensors.get("lm_head.weight")
    plain_base = base.scaling == Scaling() and base.output_embeddings.bias is None
    if own is None or rows is None or own.mapped or own.scale != 1.0 or not plain_base or not config.blocks:
        return config, tensors  # without a block the projection is all of them
    weight = base.output_embeddings.weight
    if not all(torch.equal(each.to(weight.dtype), weight) for each in rows):
        return config, tensors
    kept = {name: value for name, value in tensors.items() if not name.startswith("lm_head.")}
    return msgspec.structs.replace(config, own_projection=None), kept


def _check_medusa(config: BlockHeadsConfig, tensors: Tensors, to: str) -> None:
    """Raises `IncompatibleError` for what a layout of Medusa can't hold exactly."""
    engine, own = ENGINES[to], config.own_projection
    reason, advice = "", "; --to vllm-plugin serves them in vLLM"
    if config.architecture == SEQUENTIAL:
        reason = "sequential heads see the tokens drafted before their own"
    elif config.architecture != MEDUSA:
        reason = f"{config.architecture} heads have a second matrix each, for which Medusa's blocks have no place"
    elif config.token_size:
        reason = f"they see the token that head 1 chose (token_size {config.token_size})"
    elif to == TGI and config.blocks != 1 and not own:
        reason = f"they have {config.blocks} blocks a head, not 1, and no projections of their own"
        advice = "; --to medusa-vllm holds them"
    elif to == ORIGINAL and config.blocks > 1 and not _repeats(tensors["block.weight"], tensors["block.bias"]):
        reason, advice = "it repeats one block, and these have several", "; --to medusa-vllm holds them"
    elif to in (TGI, ORIGINAL) and own and (own.mapped or own.scale != 1.0):
        reason, advice = "it knows no token map and no scale of logits", "; --to medusa-vllm holds them"
    if reason:
        raise IncompatibleError(f"{engine} can't hold these heads: {reason}{advice}")


def _repeats(*stacks: torch.Tensor) -> bool:
    return all(torch.equal(stack, stack[:, :1].expand_as(stack)) for stack in stacks)


def _named(layout: Layout, tensors: Tensors, *, has_bias: bool) -> Tensors:
    """The residual blocks under a layout's names."""
    parts = {"weight": tensors["block.weight"].transpose(-1, -2)}
    if has_bias:
        parts["bias"] = tensors["block.bias"]
    return {
        layout.block.format(head=head, block=block, part=part): value[head, block]
        for part, value in parts.items()
        for head in range(len(value))
        for block in range(value.shape[1])
    }


def _write_vllm(out: Path, config: BlockHeadsConfig, tensors: Tensors, base: BaseLM | None) -> str:
    own, heads = config.own_projection, config.h - 1
    has_bias = bool(tensors["block.bias"].count_nonzero())
    named = _named(VLLM, tensors, has_bias=has_bias)
    scale = own.scale if own else 1.0
    if own is None:
        of_base = _needed(base, "medusa-vllm")
        scaling = of_base.scaling
        if scaling.cap is not None:
            raise IncompatibleError(f"{of_base.identity.name} caps its logits, for which vLLM's Medusa has no place")
        scale = (scaling.factor or 1.0) / (scaling.divisor or 1.0)
        named[VLLM.shared[0]] = narrowed(of_base.output_embeddings.weight)
    else:
        rows = tensors["lm_head.weight"]
        named |= {VLLM.own.format(head=head): rows[head] for head in range(len(rows))}
        if own.mapped:
            named[TOKEN_MAP] = tensors["lm_head.token_map"]
    if config.vocab_size is None:
        raise RescoreError("these heads do not say how many tokens the whole vocabulary has; give --base")
    write_tensors(out / WEIGHTS_FILE, named)
    write_json(
        out / CONFIG_FILE,
        {
            "architectures": ["MedusaModel"], "model_type": "medusa", "hidden_size": config.hidden_size,
            "num_heads": heads, "num_hidden_layers": config.blocks, "vocab_size": config.vocab_size,
            "truncated_vocab_size": own.rows if own else config.vocab_size,
            "original_lm_head": own is None or own.shared, "medusa_fc_bias": has_bias, "logit_scale": scale,
            "torch_dtype": _dtype_name(tensors), **_beside_base(config),
        },
    )  # fmt: skip
    return _vllm_command(out, config)


def _vllm_command(out: Path, config: BlockHeadsConfig) -> str:
    settings = {"method": "medusa", "model": str(out), "num_speculative_tokens": config.h - 1}
    told = shlex.quote(json.dumps(settings, separators=(",", ":"), ensure_ascii=False))
    return f"vllm serve {_told_base(config)} --speculative-config {told}"


def _told_base(config: BlockHeadsConfig) -> str:
    return "MODEL" if is_unnamed(config) else shlex.quote(config.base_name)


def _beside_base(config: BlockHeadsConfig) -> dict[str, str]:
    """The name of the base for a configuration, by which its reader finds it from any folder."""
    if is_unnamed(config):
        return {}
    folder = Path(config.base_name).expanduser()
    return {"base_model_name_or_path": str(folder.resolve()) if folder.is_dir() else config.base_name}


def _write_tgi(out: Path, config: BlockHeadsConfig, tensors: Tensors, base: BaseLM | None) -> str:
    own = config.own_projection is not None  # else version 2, which takes the base's
    write_json(out / CONFIG_FILE, _config_alone(config, TGI) | ({} if own else {"version": "2"}))
    rows = _projections(config, tensors["lm_head.weight"]) if own else {}
    write_tensors(out / TGI_FILE, _named(MEDUSA_1, tensors, has_bias=True) | rows)
    return f"text-generation-launcher --model-id {shlex.quote(str(out))}"


def _write_original(out: Path, config: BlockHeadsConfig, tensors: Tensors, base: BaseLM | None) -> str:
    """With a projection for every head: where one is not there, one of its loaders leaves it random."""
    if config.own_projection is None:
        of_base = _needed(base, ORIGINAL)
        if of_base.scaling != Scaling():
            name = of_base.identity.name
            raise IncompatibleError(f"{name} scales its logits, for which FasterDecoding/Medusa has no place")
        rows = narrowed(of_base.output_embeddings.weight)[None]
    else:
        rows = tensors["lm_head.weight"]
    write_json(out / CONFIG_FILE, _config_alone(config, ORIGINAL))
    named = _named(MEDUSA_1, tensors, has_bias=True) | _projections(config, rows)
    with atomic_file(out / ORIGINAL_FILE) as temporary:
        torch.save({name: value.detach().cpu().clone() for name, value in named.items()}, temporary)
    return f"python -m medusa.inference.cli --model {shlex.quote(str(out))}"


def _config_alone(config: BlockHeadsConfig, to: str) -> dict[str, Any]:
    """Of heads without their base, which these programs find by its name there."""
    if is_unnamed(config):
        raise RescoreError(f"--to {to} writes the name of the base, and these heads do not say it; give --base")
    return _beside_base(config) | {"medusa_num_heads": config.h - 1, "medusa_num_layers": config.blocks}


def _projections(config: BlockHeadsConfig, rows: torch.Tensor) -> Tensors:
    """One for each head, of one for each or one for all."""
    return {
        MEDUSA_1.own.format(head=head, blocks=config.blocks): rows[head if len(rows) > 1 else 0].clone()
        for head in range(config.h - 1)
    }


def _write_plugin(
    out: Path, config: BlockHeadsConfig, tensors: Tensors, base: BaseLM, rescorer: Spec | None, k: int
) -> str:
    from rescore.rescorers import load_rescorer
    from rescore.rescorers.base import Target

    identity = base.identity
    if rescorer is not None:
        if rescorer.partition(":")[0] not in CHOOSING:
            raise RescoreError(f"--rescorer {rescorer}: vLLM tells the heads no text; give {' or '.join(CHOOSING)}")
        check_k(k, identity.vocab_size)
        name, _, path = rescorer.partition(":")
        rescorer = Spec(f"{name}:{user_path(path, '--rescorer').resolve()}" if path else name)
        load_rescorer(rescorer).fit(Target.of(identity, identity.vocab_size, base.eos_token_ids))
    write_tensors(out / WEIGHTS_FILE, {**tensors, BASE_ROWS: narrowed(base.output_embeddings.weight)})
    write_json(
        out / CONFIG_FILE,
        {
            # What vLLM's own class of these configurations reads; `num_heads` follows num_speculative_tokens.
            "architectures": [PLUGIN], "model_type": "medusa", "hidden_size": config.hidden_size,
            "num_heads": config.h - 1, "num_hidden_layers": 1, "vocab_size": identity.vocab_size,
            "truncated_vocab_size": identity.vocab_size, "torch_dtype": _dtype_name(tensors),
            "rescore": {
                "config": plain(config), "scaling": dataclasses.asdict(base.scaling), "rescorer": rescorer, "k": k,
                "base": dataclasses.asdict(identity), "eos_token_ids": sorted(base.eos_token_ids),
            },
        },
    )  # fmt: skip
    return _vllm_command(out, config)


def narrowed(weight: torch.Tensor) -> torch.Tensor:
    """The same numbers in 16 bits, if they are all there: what a base was read from."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal((short := weight.to(dtype)).to(weight.dtype), weight):
            return short
    return weight


def _dtype_name(tensors: Tensors) -> str:
    first: Any = next(value for value in tensors.values() if value.is_floating_point())
    return str(first.dtype).removeprefix("torch.")
