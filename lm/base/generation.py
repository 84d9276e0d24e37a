"""Greedy output of a base LM for many prompts: batched, grouped by length, with the hidden states on request.

Two users: the corpus of a base's own output that heads learn from, and traces. Knows nothing about heads or tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lm.base.machine import Work
from lm.base.model import BaseLM

ATTENTION_CELLS = 1 << 22  # prompt tokens squared x rows of a batch: 16 rows of 512, 1 of 2,048


@dataclass(frozen=True)
class Generated:
    """The output for one prompt.

    `index` of the prompt; `output_ids` int64 `[t]`, end-of-text included where it came; and, if asked for, `hidden`
    `[t, d]` in the base's `heads_dtype` (row i is the state that chose token i), `margins` float32 `[t]` (the highest
    logit, which greedy output follows, less the runner-up's).
    """

    index: int
    output_ids: np.ndarray
    hidden: np.ndarray | None = None
    margins: np.ndarray | None = None


def generate(
    base: BaseLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    window: int = 1024,
    with_hidden: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
    work: Work | None = None,
) -> Iterator[Generated]:
    """Yields the output of every prompt, batch by batch, in an order of its own (see `Generated.index`).

    Prompts are taken in windows of `window`; within one, those of similar length share a batch, so little is padding.
    Long ones share it with fewer others than `batch_size`: attention takes memory by the square of the length; and a
    base that can't tell padding from text shares it among equals only. Greedy
    at temperature 0; above it tokens are drawn, by random numbers that follow from the seed and the prompt alone.
    `work` counts what the base does for prompts and tokens that are yielded.
    """
    for start in range(0, len(prompts), window):
        indices = sorted(range(start, min(start + window, len(prompts))), key=lambda i: -len(prompts[i]))
        while indices:
            longest = max(1, len(prompts[indices[0]]))
            count = max(1, min(batch_size, ATTENTION_CELLS // longest**2))
            alike = sum(len(prompts[i]) == len(prompts[indices[0]]) for i in indices[:count])
            if alike < len(indices[:count]) and not base.supports_padding:
                count = alike
            rows, indices = indices[:count], indices[count:]
            yield from _generate_batch(
                base, rows, [prompts[i] for i in rows], max_new_tokens, with_hidden, temperature, seed, work
            )


@torch.inference_mode()
def _generate_batch(
    base: BaseLM,
    indices: list[int],
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    with_hidden: bool,
    temperature: float,
    seed: int,
    work: Work | None,
) -> Iterator[Generated]:
    width = max(len(prompt) for prompt in prompts)
    rows, device = len(prompts), base.device
    input_ids = torch.zeros(rows, width, dtype=torch.long, device=device)
    attended = torch.zeros(rows, width + max_new_tokens, dtype=torch.bool, device=device)
    attended[:, width:] = True
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(list(prompt), device=device)
        attended[row, width - len(prompt) : width] = True
    ragged = any(len(prompt) < width for prompt in prompts)
    positions = (attended[:, :width].long().cumsum(1) - 1).clamp(min=0)

    cache = base.new_cache(width + max_new_tokens)
    logits, hidden = base.forward(
        input_ids, cache, position_ids=positions, attention_mask=attended[:, :width] if ragged else None, last=1
    )
    cache.keep_all()
    if work:
        work.add(tokens=sum(map(len, prompts)), projected=rows, cached=0)
    positions = positions[:, -1:] + 1
    alive: list[int | None] = list(range(rows))  # batch rows of the cache, as rows of `indices`; None where finished
    tokens: list[list[int]] = [[] for _ in prompts]
    places: list[list[int]] = [[] for _ in prompts]  # batch row of each token of a prompt
    states: list[torch.Tensor] = []  # [alive, d] of each step; they stay on the device until the batch is done
    margins: list[torch.Tensor] = []  # [alive]

    draws = _draws(prompts, max_new_tokens, seed).to(device) if temperature > 0 else None  # [rows, steps]
    for step in range(max_new_tokens):
        if draws is None:
            best = logits[:, -1].argmax(-1)  # [alive]
        else:
            owners = torch.tensor([0 if row is None else row for row in alive], device=device)
            best = sampled(logits[:, -1], draws[owners, step], temperature)
        if with_hidden:
            top = logits[:, -1].topk(2, dim=-1).values.to(base.heads_dtype)
            margins.append(top[:, 0] - top[:, 1])
            states.append(hidden[:, -1].to(base.heads_dtype))
        for place, token in enumerate(best.tolist()):  # the only thing that a step waits for
            if (owner := alive[place]) is None:
                continue
            tokens[owner].append(token)
            places[owner].append(place)
            if token in base.eos_token_ids:
                alive[place] = None
        living = [place for place, row in enumerate(alive) if row is not None]
        if not living or step + 1 == max_new_tokens:
            break
        if len(living) <= 0.75 * len(alive):  # finished rows still cost their share of every forward
            chosen = torch.tensor(living, device=device)
            cache.select_rows(chosen)
            alive, best = [alive[place] for place in living], best[chosen]
            positions, attended = positions[chosen], attended[chosen]
        mask = attended[:, : width + step + 1] if ragged else None
        if mask is not None and base.supports_tree:
            mask = mask[:, None, None]  # ready for use; where layers have windows, the model adds these to a 2D mask
        logits, hidden = base.forward(best[:, None], cache, position_ids=positions, attention_mask=mask)
        cache.keep_all()
        if work:
            read = sum(len(prompts[row]) + step + 1 for row in alive if row is not None)
            work.add(tokens=len(living), projected=len(living), cached=read)
        positions = positions + 1

    states_of = [of_step.cpu().numpy() for of_step in states]
    margins_of = [of_step.float().cpu().numpy() for of_step in margins]
    for row, index in enumerate(indices):
        steps = list(enumerate(places[row]))
        yield Generated(
            index=index,
            output_ids=np.asarray(tokens[row], dtype=np.int64),
            hidden=np.stack([states_of[step][place] for step, place in steps]) if with_hidden else None,
            margins=np.stack([margins_of[step][place] for step, place in steps]) if with_hidden else None,
        )


def sampled(logits: torch.Tensor, draws: torch.Tensor, temperature: float) -> torch.Tensor:
    """Tokens int64 `[n]` drawn from softmax(logits / temperature), logits `[n, vocab]`, by draws `[n]` in [0, 1)."""
    cumulated = torch.softmax(logits.double() / temperature, dim=-1).cumsum(-1)
    whole = cumulated[:, -1:]
    places = torch.searchsorted(cumulated, draws.double()[:, None] * whole, right=True)[:, 0]
    return places.minimum((cumulated < whole).sum(-1))  # a draw that was rounded up to 1: the last that can come


def _draws(prompts: list[Sequence[int]], steps: int, seed: int) -> torch.Tensor:
    """Uniform numbers `[prompts, steps]`: a prompt has the same ones in every batch."""
    rows = [np.random.default_rng([seed, *prompt]).random(steps) for prompt in prompts]
    return torch.from_numpy(np.stack(rows))
