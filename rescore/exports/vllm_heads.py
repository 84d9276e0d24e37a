"""Block heads in vLLM, as a model of its method `medusa`: any architecture, and an n-gram or bigram's choice of the
draft. `rescore convert-heads --to vllm-plugin` writes what it serves; installing rescore beside vLLM registers it
(entry point `vllm.general_plugins`).

vLLM's proposer gives the target's final hidden states alone and takes the arg-max of the logits of each head. Head 1's
token is not told; under greedy sampling it is the arg-max of the base's projection, which lies beside the heads.
Whatever is proposed, the target verifies it. Written against the interface of `vllm/v1/spec_decode/medusa.py`
(055e47c) and `vllm/model_executor/models/medusa.py` (01dbb08); it has not run in vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lattices.errors import RescoreError
from lm.base.model import BaseIdentity
from lm.base.probe import Scaling
from lm.heads.block_heads import BlockHeads, lattice_of
from lm.heads.nets import BlockHeadsConfig
from lm.records import convert_record
from rescore.exports.heads import BASE_ROWS, PLUGIN
from rescore.rescorers import load_rescorer
from rescore.rescorers.base import Context, Target


def register() -> None:
    """Tells vLLM of the model; vLLM calls it in each of its processes."""
    from vllm import ModelRegistry  # type: ignore[import-not-found]

    ModelRegistry.register_model(PLUGIN, f"{__name__}:{PLUGIN}")


class RescoreHeads(nn.Module):
    """The model. Raises `RescoreError` for more speculative tokens than there are heads."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        ours = config.rescore
        self.config = config
        where = {"where": "config.json is not of heads for vLLM", "advice": "rescore convert-heads --to vllm-plugin"}
        heads = convert_record(ours["config"], BlockHeadsConfig, **where)
        if not 1 <= config.num_heads < heads.h:
            raise RescoreError(
                f"num_speculative_tokens is {config.num_heads}, and these heads draft {heads.h - 1} tokens; give fewer"
            )
        self.heads = BlockHeads(heads).requires_grad_(False)
        self.rows = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size), requires_grad=False)
        self.scaling = Scaling(**ours["scaling"])
        self.k = ours["k"]
        self.rescorer = None
        if ours["rescorer"] is not None:
            target = Target.of(BaseIdentity(**ours["base"]), config.vocab_size, ours["eos_token_ids"])
            self.rescorer = load_rescorer(ours["rescorer"]).fit(target)

    def forward(self, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        """The states `[n, d]`, for `compute_logits`: heads may need head 1's token, which follows from its logits."""
        return [hidden_states]

    def compute_logits(self, hidden_states: list[torch.Tensor]) -> list[torch.Tensor]:
        """Logits `[n, vocab]` of each head from head 2 on; with a rescorer its draft's tokens have the highest."""
        (hidden,) = hidden_states
        count = self.config.num_heads
        if not len(hidden):
            return [hidden.new_zeros(0, len(self.rows)) for _ in range(count)]
        base: Any = SimpleNamespace(output_embeddings=SimpleNamespace(weight=self.rows), project=self._project)
        (whole,) = self.heads.slots(base, hidden, self._project(hidden))
        logits = whole.logits[:, : count + 1]
        if self.rescorer is not None:
            contexts = [Context(()) for _ in hidden]  # the text before is not told
            drafts = self.rescorer.draft(lattice_of(logits, self.k), contexts, 1)[:, 0, 1:]
            chosen = torch.from_numpy(drafts).to(logits.device, torch.int64)[..., None]
            logits = logits.clone()
            logits[:, 1:].scatter_(-1, chosen, torch.inf)
        return list(logits[:, 1:].unbind(1))

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.scaling(functional.linear(hidden.to(self.rows.dtype), self.rows))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Takes the tensors of the checkpoint; gives the names of the parameters that they fill."""
        given = dict(weights)
        self.rows.data.copy_(given.pop(BASE_ROWS))
        like = self.heads.tensors()
        self.heads.take({name: value.to(like[name].device, like[name].dtype) for name, value in given.items()})
        self.heads.requires_grad_(False)
        return {name for name, _ in self.named_parameters()}
