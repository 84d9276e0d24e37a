"""Decoders for the cost model: any transformers configuration, the base LM of [A] as far as it is known, small LMs.

Parameters are counted by building the model without memory for its weights, so that biases, norms and tied tables are
as the architecture has them. Nothing is downloaded but the configuration of a hub id.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError, first_line
from lm.files import SHIPPED, read_json_object
from rescore.studies.cost.model import NEURAL, Decoder, HeadsShape, LayerShape, heads_parameters

PAPER_BASE = "paper-1.5b"
PAPER_VOCABULARY, PAPER_NEURAL_HEADS = 50_257, 12  # facts of [A]
PAPER_POSITIONS = 2048  # assumed: the longest context of its cost table
PAPER_ASSUMPTION = (
    "1.5B parameters, decoder-only, h = 9, 50,257 tokens and learned positions are the paper's; 28 layers, hidden size "
    "2048 (16 heads of 128), feed-forward 8192 and 2,048 positions are assumed, since they are not public"
)
PAPER_NEURAL_ASSUMPTION = (
    "61M parameters with embeddings, 12 heads a layer and learned positions are the paper's; 3 layers, hidden size "
    "768, feed-forward 3072 and 2,048 positions are assumed"
)


def dense_decoder(
    name: str,
    *,
    layers: int,
    hidden_size: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    inner_size: int,
    gated: bool,
    vocab_size: int,
    positions: int = 0,
    assumption: str | None = None,
) -> Decoder:
    """A plain decoder: per layer query, key, value and output matrices, a feed-forward of two matrices (three if
    `gated`) and two norms; a last norm; tied tables, no biases. `positions`: rows of a table of learned positions, of
    which a token reads one."""
    attention = 2 * hidden_size * head_size * (heads + kv_heads)
    layer = attention + (3 if gated else 2) * hidden_size * inner_size + 2 * hidden_size
    projection = vocab_size * hidden_size
    read = layers * layer + hidden_size + projection
    return Decoder(
        name=name,
        parameters=read + positions * hidden_size,
        read_parameters=read,
        projection_parameters=projection,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        layers=(LayerShape(heads, kv_heads, head_size),) * layers,
        assumption=assumption,
    )


def paper_base() -> Decoder:
    """The 1.5B base LM of [A] (vocabulary, learned positions and h are its own); what is assumed is in `assumption`."""
    return dense_decoder(
        PAPER_BASE, layers=28, hidden_size=2048, heads=16, kv_heads=16, head_size=128, inner_size=8192, gated=False,
        vocab_size=PAPER_VOCABULARY, positions=PAPER_POSITIONS, assumption=PAPER_ASSUMPTION,
    )  # fmt: skip


def neural_for(base: Decoder) -> Decoder:
    """The small LM neural-61m over a base's tokens: for the base of [A] one of 61M parameters; where the shipped one
    serves the base, that (layers of the base); else what `rescore train-rescorer neural-61m --init scratch` makes.
    """
    if base.name == PAPER_BASE:
        return dense_decoder(
            NEURAL, layers=3, hidden_size=768, heads=PAPER_NEURAL_HEADS, kv_heads=PAPER_NEURAL_HEADS, head_size=64,
            inner_size=3072, gated=False, vocab_size=base.vocab_size, positions=PAPER_POSITIONS,
            assumption=PAPER_NEURAL_ASSUMPTION,
        )  # fmt: skip
    from lm.base import catalog
    from lm.neural.model import named_size

    size = named_size(NEURAL)
    if _is_served(base.name):
        config = catalog.read_model_config(base.name)
        config.get_text_config(decoder=True).num_hidden_layers = size.base_layers
        return decoder_of_config(config, name=NEURAL)
    return dense_decoder(
        NEURAL, layers=size.layers, hidden_size=size.hidden_size, heads=size.attention_heads,
        kv_heads=size.attention_heads, head_size=size.hidden_size // size.attention_heads,
        inner_size=size.intermediate_size, gated=True, vocab_size=base.vocab_size,
    )  # fmt: skip


def _is_served(name: str) -> bool:
    """Whether the rescorer neural-61m takes the base LM called `name`: the one it is shipped for, wherever its files
    lie, and those that an adapter makes of it. Nothing is fetched."""
    from lm.base import catalog
    from lm.neural.model import check_fits, find_neural

    if "/" not in name and (SHIPPED / name / NEURAL).is_dir():
        return True
    try:
        catalog.resolve_base(name, local_files_only=True)
        check_fits(find_neural(NEURAL), catalog.identify(name))
    except RescoreError:
        return False
    return True


def decoder_of(name: str, *, local_files_only: bool = False) -> Decoder:
    """The decoder of a base LM: `paper-1.5b`, a built-in name, a model folder, a GGUF file or a hub id.

    Raises `RescoreError` as `lm.base.catalog.load_base` does, and as `decoder_of_config`.
    """
    if name == PAPER_BASE:
        return paper_base()
    from lm.base import catalog

    return decoder_of_config(catalog.read_model_config(name, local_files_only=local_files_only), name=name)


def decoder_of_file(path: Path) -> Decoder:
    """The decoder of a transformers `config.json`.

    Raises `InvalidDataError` for a file that is none, and as `decoder_of_config`.
    """
    from transformers import AutoConfig

    fields = read_json_object(path, missing=f"no configuration in {path}")
    kind = fields.pop("model_type", None)
    if not isinstance(kind, str):
        raise InvalidDataError(f"{path} has no model_type; give the config.json of a transformers model")
    try:
        config = AutoConfig.for_model(kind, **fields)
    except Exception as error:  # of transformers, of huggingface_hub: as the broken field leads it to
        raise InvalidDataError(f"{path} is no configuration that transformers knows: {first_line(error)}") from error
    return decoder_of_config(config, name=str(path))


def decoder_of_config(config: Any, *, name: str) -> Decoder:
    """The decoder of a transformers configuration.

    Raises `IncompatibleError` for what this cost model says nothing about: experts, of which a call reads as many as
    its tokens choose, compressed caches, recurrent layers, models that are no causal LM (encoders such as BERT among
    them, which transformers would take for one).
    """
    import torch
    from transformers import AutoModelForCausalLM

    text = config.get_text_config(decoder=True)
    _refuse(config, text, name)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of any kind: as the configuration leads it to
        raise IncompatibleError(f"{name} is no causal LM that can be counted: {first_line(error)}") from error
    if model._is_stateful:
        raise IncompatibleError(f"{name} ({config.model_type}) has recurrent layers, whose state can't forget rejected "
                                "tokens; give a model of attention layers")  # fmt: skip
    output = model.get_output_embeddings()
    if output is None:
        raise IncompatibleError(f"{name} has no vocabulary projection; give the configuration of a causal LM")
    every = {id(parameter): parameter.numel() for parameter in model.parameters()}  # a tied table counts once
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    tables.pop(id(output.weight), None)
    total = sum(every.values())
    return Decoder(
        name=name,
        parameters=total,
        read_parameters=total - sum(tables.values()),
        projection_parameters=sum(parameter.numel() for parameter in output.parameters()),
        hidden_size=int(text.hidden_size),
        vocab_size=int(output.weight.shape[0]),
        layers=_layers(text, name),
    )


def _refuse(config: Any, text: Any, name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    # That is_decoder is false says nothing by itself: GPT-NeoX has the field and never reads it.
    encoder = config.model_type in {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}
    if getattr(config, "is_encoder_decoder", False) or (encoder and not getattr(config, "is_decoder", False)):
        raise IncompatibleError(
            f"{name} ({config.model_type}) has an encoder and is no causal LM; give a decoder-only one"
        )
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if any((getattr(text, field, None) or 0) > 1 for field in experts):
        raise IncompatibleError(
            f"{name} has experts, of which a call reads more the more tokens it verifies; give a dense model"
        )
    if getattr(text, "kv_lora_rank", None):
        raise IncompatibleError(
            f"{name} keeps a compressed cache, which is not modelled; give a model with plain keys and values"
        )
    if other := set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        raise IncompatibleError(
            f"{name} has {', '.join(sorted(other))} layers, whose state can't forget rejected tokens"
        )


def _layers(text: Any, name: str) -> tuple[LayerShape, ...]:
    try:
        heads = int(text.num_attention_heads)
        shared = 1 if getattr(text, "multi_query", False) else heads
        kv_heads = int(getattr(text, "num_key_value_heads", None) or shared)
        head_size = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
        window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
        kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
        return tuple(
            LayerShape(heads, kv_heads, head_size, window if k == "sliding_attention" else None) for k in kinds
        )
    except Exception as error:  # of any kind: a family may have names of its own, or layers of several shapes
        raise IncompatibleError(f"{name} has attention that can't be counted: {first_line(error)}") from error


def heads_of(base: Decoder, folder: Path | None, h: int) -> HeadsShape:
    """Heads 2..h: of a checkpoint folder, cut to h; without one those tuned with the base or shipped for it, else as
    [A] has them.

    Raises `RescoreError` for a folder without heads or heads of another base.
    """
    import msgspec
    import torch

    from lm.heads.block_heads import BlockHeads, known_heads, read_config
    from lm.heads.nets import SEQUENTIAL

    if (folder := folder or known_heads(base.name)) is None:
        return HeadsShape(heads_parameters(h, base.hidden_size))
    config = read_config(folder)
    if config.hidden_size != base.hidden_size:
        raise IncompatibleError(
            f"the heads in {folder} are for a hidden size of {config.hidden_size}, {base.name} has {base.hidden_size}"
        )
    if not 2 <= h <= config.h:
        raise RescoreError(
            f"h = {h}, but the heads in {folder} propose blocks of {config.h}; choose h from 2 to {config.h}"
        )
    with torch.device("meta"):
        heads = BlockHeads(msgspec.structs.replace(config, h=h))
    reads = h - 1 if config.architecture == SEQUENTIAL else 1
    return HeadsShape(sum(parameter.numel() for parameter in heads.parameters()), reads)
