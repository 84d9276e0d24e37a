"""A base LM that is fine-tuned together with its heads, by low-rank adapters (LoRA) or in full; [B] section 6.

What it leaves is another base LM, with an output of its own, in a folder that `--base` takes: an adapter in peft's
layout, or a whole model as `save_pretrained` writes it, beside `tuned.json` (which base it comes from). The heads
trained with it lie in its folder `heads`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from lattices.errors import IncompatibleError, RescoreError
from lm.base.adapters import ADAPTER_FILE, TUNED_FILE, TunedFrom, peft_of_old_names
from lm.base.catalog import BUILT_IN, resolve_base
from lm.base.model import BaseLM
from lm.files import replaced_files, write_json
from lm.training.data import HeadData, Segment, body_states
from lm.training.options import FULL, LORA
from lm.training.trainer import save_model

LORA_PART = ".lora_"  # in the names of what peft adds to a model


class TunedBase:
    """The base LM's layers while they learn. Changes the model of `base` in place.

    how: LORA of every linear layer, or FULL: every weight but the embeddings, which the heads' projection shares.
    rank: of LoRA (alpha = 2 x rank, as peft's users have it).
    layers: so many of the last ones (in full, the final norm as well), so that a step costs less; None: all.

    Raises `IncompatibleError` for an architecture that can't be fine-tuned here, `RescoreError` for too many layers.
    """

    def __init__(
        self, base: BaseLM, how: str, dtype: torch.dtype, *, rank: int, layers: int | None, gradient_checkpointing: bool
    ) -> None:
        self.base, self.how, self.dtype = base, how, dtype
        self.model: Any = base.model
        if not hasattr(self.model, "base_model") or self.model.base_model is self.model:
            raise IncompatibleError(f"{base.identity.name} can't be fine-tuned here: its layers have no body apart")
        if not base.body_gives_states:
            raise IncompatibleError(f"{base.identity.name} can't be fine-tuned here: its body is not all of its layers")
        total = base.config.num_hidden_layers
        if layers is not None and layers > total:
            raise RescoreError(f"tuned_layers = {layers}, but {base.identity.name} has {total} layers")
        base.unpack()
        if how == LORA:
            self._add_adapter(rank, None if layers is None else list(range(total - layers, total)))
        else:
            body = self.model.base_model
            if layers is not None and not (hasattr(body, "layers") and hasattr(body, "norm")):
                raise IncompatibleError(f"{base.identity.name} does not name its layers as Llama does; tune them all")
            for part in [body] if layers is None else [*body.layers[total - layers :], body.norm]:
                part.requires_grad_(True)
            for embeddings in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
                embeddings.requires_grad_(False)
        _without_dropout(self.model)  # what is random must follow from seed and step, and no evaluation be random
        if gradient_checkpointing:
            self.model.train()  # transformers checkpoints in training mode only
            enable = getattr(self.model, "activation_checkpointing_enable", None)  # its newer name
            (enable or self.model.gradient_checkpointing_enable)({"use_reentrant": False})
            # transformers does this for adapters, for a way of checkpointing that is not ours: it would propagate
            # gradients down to the embeddings.
            self.model.disable_input_require_grads()
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _add_adapter(self, rank: int, layers: list[int] | None) -> None:
        name = self.base.identity.name
        if resolve_base(name).adapter is not None:
            raise IncompatibleError(
                f"{name} is an adapter itself, and one on top of it could not be loaded; tune it in full (tune: full), "
                "or begin from the base that it changes"
            )
        self.adapted = with_low_rank(self.base, rank, layers)
        local = Path(os.path.expanduser(name))
        absolute = str(local.resolve()) if local.exists() and name != BUILT_IN else name
        self.adapted.peft_config["default"].base_model_name_or_path = absolute

    def states(self, data: Sequence[HeadData], segments: Sequence[Segment]) -> torch.Tensor:
        """Final states before every target of the segments, float32 `[n, d]`, with their gradients."""
        return body_states(
            self.model, data, segments, device=self.base.device, dtype=self.dtype,
            arguments=self.base.body_arguments, prefix=self.base.prefix,
        )  # fmt: skip

    def save(self, out: Path) -> None:
        """Writes what was learned as a base LM's folder."""
        with replaced_files(out) as temporary:
            identity = self.base.identity
            tuned = TunedFrom(identity.name, identity.weights_sha256, identity.tokenizer_sha256)
            write_json(temporary / TUNED_FILE, dataclasses.asdict(tuned))
            if self.how == FULL:
                save_model(self.model, self.base, temporary)
            else:
                tensors = get_peft_model_state_dict(self.adapted, save_embedding_layers=False)
                halves = {n: value.detach().to("cpu", torch.float16).contiguous() for n, value in tensors.items()}
                save_file(halves, temporary / ADAPTER_FILE, metadata={"format": "pt"})
                self.adapted.peft_config["default"].save_pretrained(str(temporary))


def with_low_rank(base: BaseLM, rank: int, layers: list[int] | None) -> Any:
    """peft's wrapper of a base's model, in whose layers (None: all) every linear one has a low-rank change (LoRA,
    alpha = 2 x rank); only these changes learn.

    Raises `IncompatibleError` for a model without linear layers.
    """
    model: Any = base.model
    body = model.base_model.named_modules()
    linear = sorted({name.rsplit(".", 1)[-1] for name, part in body if isinstance(part, torch.nn.Linear)})
    if not linear:
        raise IncompatibleError(f"{base.identity.name} has no linear layers for LoRA; tune its layers in full")
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=linear, layers_to_transform=layers,
        task_type="SEQ_2_SEQ_LM" if base.has_encoder else "CAUSAL_LM",
    )  # fmt: skip
    # The changes go into the model's own layers; the wrapper knows the names that other readers expect.
    with peft_of_old_names():
        return get_peft_model(model, config)


def low_rank_changes(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of each weight that `with_low_rank` changes, by its name in the model as it was: up `[out, rank]`, scale in it,
    and down `[rank, in]`; the change is up @ down."""
    changes: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for part in module.active_adapters:
                up, down = (factors[part].get_parameter("weight") for factors in (module.lora_B, module.lora_A))
                changes[f"{name}.weight"] = (module.scaling[part] * up, down)
    return changes


def _without_dropout(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout"):  # kept as numbers by some architectures
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
