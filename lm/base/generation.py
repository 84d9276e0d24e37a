"""Greedy output of a base LM for many prompts: batched, grouped by length, with the hidden states that chose it.

Two users: the corpus of a base's own output that heads learn from, and traces. Knows nothing about heads or tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lm.base.machine import Work
from lm.base.model import BaseLM
from lm.pages import trim_heap

WINDOW = 1024  # prompts that are sorted by length together
ATTENTION_CELLS = 1 << 22  # prompt tokens squared x rows of a batch: 16 rows of 512, 1 of 2,048


@dataclass(frozen=True)
class Generated:
    """The output for one prompt."""

    index: int  # of the prompt
    output_ids: np.ndarray  # int64 [t], end-of-text included where it came
    # [t, d] in the base's `heads_dtype`; row i is the state that chose token i. `with_prompts`: before them those after
    # each token of the prompt but the last.
    hidden: np.ndarray
    margins: np.ndarray  # float32 [t], the highest logit, which greedy output follows, less the next one


def generate(
    base: BaseLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    with_prompts: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
    work: Work | None = None,
) -> Iterator[Generated]:
    """Yields the output of every prompt, batch by batch, in an order of its own (see `Generated.index`).

    Prompts are taken in windows; within one, those of similar length share a batch, so little is padding.
    Long ones share it with fewer others than `batch_size`: attention takes memory by the square of the length. A base
    that takes padding for text reads prompts of one length only together.

    with_prompts: with the states over the prompts, where there is no encoder.
    temperature: 0 is greedy; above it tokens are drawn, by random numbers that follow from the seed and the prompt.
    work: counts what the base does for prompts and tokens that are yielded.
    """
    for rows in batches_of(base, prompts, batch_size):
        batch = _Batch(base, [prompts[i] for i in rows], max_new_tokens, work)
        draws = _draws(batch.prompts, max_new_tokens, seed) if temperature > 0 else None  # [rows, steps]
        yield from batch.generate(rows, draws, temperature, with_prompts=with_prompts)
        trim_heap()  # batches have many sizes, and what one leaves does not fit the next: the process would grow


def batches_of(base: BaseLM, prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Which prompts `generate` decodes side by side: one batch alone is decoded the same."""
    for start in range(0, len(prompts), WINDOW):
        indices = sorted(range(start, min(start + WINDOW, len(prompts))), key=lambda i: -len(prompts[i]))
        while indices:
            longest = max(1, len(prompts[indices[0]]))
            count = max(1, min(batch_size, ATTENTION_CELLS // longest**2))
            alike = sum(len(prompts[i]) == len(prompts[indices[0]]) for i in indices[:count])
            if alike < len(indices[:count]) and not base.supports_padding:
                count = alike
            rows, indices = indices[:count], indices[count:]
            yield rows


class _Batch:
    """Prompts that are read and continued together.

    `alive[place]` is the prompt in a row of the cache, None where its output has ended; such rows are dropped once they
    are many, so that a prompt's tokens come from `places[prompt]`, the row at each step.
    """

    def __init__(self, base: BaseLM, prompts: list[Sequence[int]], max_new_tokens: int, work: Work | None) -> None:
        self.base, self.prompts, self.max_new_tokens, self.work = base, prompts, max_new_tokens, work
        self.before = [base.prefix(prompt) for prompt in prompts]
        self.width, rows = max(map(len, self.before)), len(prompts)
        self.input_ids = torch.zeros(rows, self.width, dtype=torch.long, device=base.device)
        self.attended = torch.ones(rows, self.width + max_new_tokens, dtype=torch.bool, device=base.device)
        for row, before in enumerate(self.before):
            start = self.width - len(before)
            self.input_ids[row, start:] = torch.tensor(before, device=base.device)
            self.attended[row, :start] = False
        self.ragged = any(len(before) < self.width for before in self.before)
        self.alive: list[int | None] = list(range(rows))
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.places: list[list[int]] = [[] for _ in prompts]

    @torch.inference_mode()
    def generate(
        self, indices: list[int], draws: torch.Tensor | None, temperature: float, *, with_prompts: bool
    ) -> Iterator[Generated]:
        base = self.base
        logits, hidden = self._read_prompts(whole=with_prompts)
        over_prompts = hidden[:, :-1].to(base.heads_dtype).cpu().numpy() if with_prompts else None
        states: list[torch.Tensor] = []  # [alive, d] of each step; they stay on the device until the batch is done
        margins: list[torch.Tensor] = []  # [alive]
        for step in range(self.max_new_tokens):
            if draws is None:
                best = logits[:, -1].argmax(-1)  # [alive]
            else:
                best = sampled(
                    logits[:, -1], draws[[row or 0 for row in self.alive], step].to(base.device), temperature
                )
            top = logits[:, -1].topk(2, dim=-1).values.to(base.heads_dtype)
            margins.append(top[:, 0] - top[:, 1])
            states.append(hidden[:, -1].to(base.heads_dtype))
            self._take(best.tolist())  # the only thing that a step waits for
            if step + 1 == self.max_new_tokens or not any(row is not None for row in self.alive):
                break
            logits, hidden = self._read(best, step)
        states_of = [of_step.cpu().numpy() for of_step in states]
        margins_of = [of_step.float().cpu().numpy() for of_step in margins]
        for row, index in enumerate(indices):
            steps = list(enumerate(self.places[row]))
            chosen_by = [states_of[step][place] for step, place in steps]
            if over_prompts is not None:
                chosen_by = [*over_prompts[row, self.width - len(self.before[row]) :], *chosen_by]
            yield Generated(
                index=index,
                output_ids=np.asarray(self.tokens[row], dtype=np.int64),
                hidden=np.stack(chosen_by),
                margins=np.stack([margins_of[step][place] for step, place in steps]),
            )

    def _read_prompts(self, *, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[rows, 1, vocab]` and states `[rows, 1, d]` after the prompts, states over them `[rows, n, d]` if
        `whole`."""
        mask = self.attended[:, : self.width]
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        self.cache = self.base.new_cache(self.width + self.max_new_tokens)
        self.cache.source = self.base.encoded(self.prompts)
        logits, hidden = self.base.forward(
            self.input_ids, self.cache, position_ids=positions, attention_mask=mask if self.ragged else None,
            last=0 if whole else 1, projects=not whole,
        )  # fmt: skip
        if whole:  # not the logits of all
            logits = self.base.project(hidden[:, -1:])
        self.cache.keep_all()
        if self.work:
            self.work.add(tokens=sum(map(len, self.before)), projected=len(self.prompts), cached=0)
        self.positions = positions[:, -1:]
        return logits, hidden

    def _take(self, tokens: list[int]) -> None:
        for place, token in enumerate(tokens):
            if (row := self.alive[place]) is not None:
                self.tokens[row].append(token)
                self.places[row].append(place)
                if token in self.base.eos_token_ids:
                    self.alive[place] = None

    def _read(self, best: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and states after a step's tokens `[alive]`."""
        living = [place for place, row in enumerate(self.alive) if row is not None]
        if len(living) <= 0.75 * len(self.alive):  # finished rows still cost their share of every forward
            chosen = torch.tensor(living, device=self.base.device)
            self.cache.select_rows(chosen)
            self.alive, best = [self.alive[place] for place in living], best[chosen]
            self.positions, self.attended = self.positions[chosen], self.attended[chosen]
        self.positions = self.positions + 1
        mask = self.attended[:, : self.width + step + 1] if self.ragged else None
        if mask is not None and self.base.supports_tree:
            mask = mask[:, None, None]  # ready for use; where layers have windows, the model adds these to a 2D mask
        read = self.base.forward(best[:, None], self.cache, position_ids=self.positions, attention_mask=mask)
        self.cache.keep_all()
        if self.work:
            cached = sum(len(self.before[row]) + step + 1 for row in self.alive if row is not None)
            self.work.add(tokens=len(living), projected=len(living), cached=cached)
        return read


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
