"""Random Medusa heads in the layouts of others, and what they compute, written down apart from the project's code."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Names = Callable[[int, int, str], str]


@dataclass(frozen=True)
class Theirs:
    """weights[i][l] `[d, d]`, biases[i][l] `[d]` or none, projections[i] `[V, d]`: one each, one, or none."""

    weights: list[list[torch.Tensor]]
    biases: list[list[torch.Tensor]] | None
    projections: list[torch.Tensor]
    token_map: torch.Tensor | None = None

    def logits(self, states: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """What each head says after states `[n, d]`, `[n, heads, V]`; `base` `[V, d]` where there is no projection."""
        said = []
        for head, weights in enumerate(self.weights):
            x = states
            for layer, weight in enumerate(weights):
                inner = x @ weight.double().T
                if self.biases is not None:
                    inner = inner + self.biases[head][layer].double()
                x = x + inner * torch.sigmoid(inner)
            rows = self.projections[min(head, len(self.projections) - 1)].double() if self.projections else base
            said.append(x @ rows.T)
        every = torch.stack(said, dim=1)
        if self.token_map is None:
            return every
        whole = torch.full((*every.shape[:2], len(base)), -torch.inf, dtype=every.dtype)
        whole[:, :, self.token_map] = every
        return whole


def made(
    *, heads: int = 3, layers: int = 1, d: int = 32, vocabulary: int = 257, projections: int | None = None,
    bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> Theirs:  # fmt: skip
    """Random ones; `projections`: how many (None: one a head)."""
    random = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=random) * 0.3).to(dtype)

    return Theirs(
        [[some(d, d) for _ in range(layers)] for _ in range(heads)],
        [[some(d) for _ in range(layers)] for _ in range(heads)] if bias else None,
        [some(vocabulary, d) for _ in range(heads if projections is None else projections)],
    )


def mapped(theirs: Theirs, token_ids: list[int]) -> Theirs:
    """The same with a truncated vocabulary."""
    token_map = torch.tensor(token_ids)
    return replace(theirs, projections=[rows[token_map].clone() for rows in theirs.projections], token_map=token_map)


def tensors_of(theirs: Theirs, block: str, own: str) -> dict[str, torch.Tensor]:
    """Their state dict: names of a block's part and of a projection, with %h, %l, %p and %n (the number of blocks)."""
    named: dict[str, torch.Tensor] = {}
    layers = len(theirs.weights[0])
    for head in range(len(theirs.weights)):
        for layer in range(layers):
            name = block.replace("%h", str(head)).replace("%l", str(layer))
            named[name.replace("%p", "weight")] = theirs.weights[head][layer]
            if theirs.biases is not None:
                named[name.replace("%p", "bias")] = theirs.biases[head][layer]
    for head, rows in enumerate(theirs.projections):
        named[own.replace("%h", str(head)).replace("%n", str(layers))] = rows
    if theirs.token_map is not None:
        named["token_map"] = theirs.token_map
    return named


NUMBERED = ("%h.%l.linear.%p", "%h.%n.weight")
LAYOUTS: dict[str, tuple[str, str]] = {
    "medusa-1": NUMBERED,
    "medusa-2": ("medusa_head.%h.%l.linear.%p", "medusa_head.%h.%n.weight"),
    "vllm": ("blocks.%h.layers.%l.%p", "lm_heads.%h.weight"),
    "modelopt": ("medusa_heads.%h.%l.linear.%p", "medusa_heads.%h.%n.weight"),
    "tensorrt-llm": ("medusa_heads.%h.medusa_layers.%l.linear.%p", "medusa_heads.%h.lm_head.weight"),
}
FILES = {
    "medusa-1": "medusa_lm_head.safetensors",
    "medusa-2": "model.safetensors",
    "vllm": "model.safetensors",
    "modelopt": "model.safetensors",
    "tensorrt-llm": "rank0.safetensors",
}


def write(
    folder: Path, theirs: Theirs, layout: str = "medusa-1", *, file: str | None = None, config: Any = None,
    beside: dict[str, torch.Tensor] | None = None,
) -> Path:  # fmt: skip
    """A folder with them; `beside`: tensors of the base in the same file."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors_of(theirs, *LAYOUTS[layout]) | (beside or {})
    path = folder / (file or FILES[layout])
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def changed(path: Path, **changes: torch.Tensor | None) -> None:
    """Replaces tensors of a safetensors file, or takes them out; names with dots for double underscores."""
    tensors = load_file(path)
    for name, value in changes.items():
        name = name.replace("__", ".").removeprefix("at.")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path)
