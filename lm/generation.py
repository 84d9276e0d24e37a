"""Greedy output of a base LM for many prompts: batched, grouped by length, with the hidden states on request.

Two users: the corpus of a base's own output that heads learn from, and traces. Knows nothing about heads or tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lm.base import BaseLM


@dataclass(frozen=True)
class Greedy:
    """The greedy output for one prompt.

    `index` of the prompt; `output_ids` int64 `[t]`, end-of-text included where it came; and, if asked for, `hidden`
    float32 `[t, d]` (row i is the state that chose token i), `margins` float32 `[t]` (logit of the chosen token less
    the runner-up's).
    """

    index: int
    output_ids: np.ndarray
    hidden: np.ndarray | None = None
    margins: np.ndarray | None = None


def generate_greedy(
    base: BaseLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    window: int = 1024,
    with_hidden: bool = False,
) -> Iterator[Greedy]:
    """Yields the greedy output of every prompt, batch by batch, in an order of its own (see `Greedy.index`).

    Prompts are taken in windows of `window`; within one, those of similar length share a batch, so little is padding.
    """
    for start in range(0, len(prompts), window):
        indices = sorted(range(start, min(start + window, len(prompts))), key=lambda i: -len(prompts[i]))
        for first in range(0, len(indices), batch_size):
            rows = indices[first : first + batch_size]
            yield from _generate_batch(base, rows, [prompts[i] for i in rows], max_new_tokens, with_hidden)


@torch.inference_mode()
def _generate_batch(
    base: BaseLM, indices: list[int], prompts: list[Sequence[int]], max_new_tokens: int, with_hidden: bool
) -> Iterator[Greedy]:
    width = max(len(prompt) for prompt in prompts)
    rows, device = len(prompts), base.device
    input_ids = torch.zeros(rows, width, dtype=torch.long, device=device)
    attended = torch.zeros(rows, width + max_new_tokens, dtype=torch.bool, device=device)
    attended[:, width:] = True
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(list(prompt), device=device)
        attended[row, width - len(prompt) : width] = True
    ragged = not bool(attended.all())
    positions = (attended[:, :width].long().cumsum(1) - 1).clamp(min=0)
    eos = torch.tensor(sorted(base.eos_token_ids) or [-1], device=device)

    cache = base.new_cache(width + max_new_tokens)
    logits, hidden = base.forward(
        input_ids, cache, position_ids=positions, attention_mask=attended[:, :width] if ragged else None, last=1
    )
    cache.keep_all()
    positions = positions[:, -1:] + 1
    alive = torch.arange(rows, device=device)  # batch rows of the cache, as rows of `indices`
    tokens: list[list[int]] = [[] for _ in prompts]
    states: list[list[np.ndarray]] = [[] for _ in prompts]
    margins: list[list[float]] = [[] for _ in prompts]

    for step in range(max_new_tokens):
        best = logits[:, -1].argmax(-1)  # [alive]
        if with_hidden:
            top = logits[:, -1].topk(2, dim=-1).values
            margin = (top[:, 0] - top[:, 1]).float().cpu().numpy()
            state = hidden[:, -1].float().cpu().numpy()
        for place, (row, token) in enumerate(zip(alive.tolist(), best.tolist(), strict=True)):
            if row < 0:
                continue
            tokens[row].append(token)
            if with_hidden:
                states[row].append(state[place])
                margins[row].append(float(margin[place]))
        alive[torch.isin(best, eos)] = -1
        living = int((alive >= 0).sum())
        if living == 0 or step + 1 == max_new_tokens:
            break
        if living <= 0.75 * len(alive):  # finished rows still cost their share of every forward
            chosen = (alive >= 0).nonzero()[:, 0]
            cache.select_rows(chosen)
            alive, best = alive[chosen], best[chosen]
            positions, attended = positions[chosen], attended[chosen]
        mask = attended[:, : width + step + 1] if ragged else None
        if mask is not None and base.supports_tree:
            mask = mask[:, None, None]  # ready for use; where layers have windows, the model adds these to a 2D mask
        logits, hidden = base.forward(best[:, None], cache, position_ids=positions, attention_mask=mask)
        cache.keep_all()
        positions = positions + 1

    for row, index in enumerate(indices):
        yield Greedy(
            index=index,
            output_ids=np.asarray(tokens[row], dtype=np.int64),
            hidden=np.stack(states[row]) if with_hidden else None,
            margins=np.asarray(margins[row], dtype=np.float32) if with_hidden else None,
        )
