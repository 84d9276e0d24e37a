"""The rows of a trace: what the base LM says of examples, and the lattices of its states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lattices.lattice import Lattice, concatenated, put_first, side_by_side
from rescore.tasks.base import Example

if TYPE_CHECKING:
    from lm.base.model import BaseLM
    from lm.heads.block_heads import BlockHeads
    from lm.heads.projection import DraftProjection

BATCH_SIZE = 16  # prompts that are continued side by side
LATTICE_ROWS = 16  # positions whose full-vocabulary logits are alive at a time


def rows_of(
    base: BaseLM,
    heads: BlockHeads | None,
    examples: Sequence[Example],
    *,
    chat: bool,
    max_new_tokens: int,
    max_prompt_tokens: int | None,
    k: int,
    batch_size: int = BATCH_SIZE,
    each: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """The rows of a part; `each` is called after every example. Arguments as of `record_trace`.

    They stand in the order of the data, so that a trace cut to its first examples is what --limit would record.
    """
    from lm.base.generation import generate

    prompts = [base.encode_prompt(e.prompt, chat=chat, max_tokens=max_prompt_tokens) for e in examples]
    rows: dict[int, dict[str, Any]] = {}
    for greedy in generate(base, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size):
        rows[greedy.index] = row_of_states(
            base, heads, examples[greedy.index], prompts[greedy.index], greedy.output_ids, hidden=greedy.hidden,
            margins=greedy.margins, k=k,
        )  # fmt: skip
        each()
    return [rows[place] for place in range(len(examples))]


def row_of_states(
    base: BaseLM,
    heads: BlockHeads | None,
    example: Example,
    prompt_ids: Sequence[int],
    output_ids: np.ndarray,
    *,
    hidden: np.ndarray,
    margins: np.ndarray,
    k: int,
) -> dict[str, Any]:
    """The row of an example, of the final hidden states `[t, d]` that its output tokens `[t]` were chosen from, and the
    margins `[t]` with which they were."""
    lattice, entropies = lattices_along(base, heads, hidden, output_ids, k)
    return {
        "id": example.id,
        "prompt": example.prompt,
        "references": list(example.references),
        "output": base.decode_text(output_ids.tolist()),
        "prompt_ids": np.asarray(prompt_ids, dtype=np.int32),
        "output_ids": output_ids.astype(np.int32),
        "token_ids": lattice.token_ids.ravel(),
        "logps": lattice.logps.ravel(),
        "entropies": entropies.ravel(),
        "margins": margins,
        "group": example.group,
    }


def lattices_along(
    base: BaseLM,
    heads: BlockHeads | None,
    hidden: np.ndarray,
    output_ids: np.ndarray,
    k: int,
    projection: DraftProjection | None = None,
) -> tuple[Lattice, np.ndarray]:
    """The lattices `[t, h, k]` before every token of an output and their entropies `[t, h]`, from the states `[t, d]`
    that chose these tokens; arguments as for `BlockHeads.slots`."""
    import torch

    from lm.heads.block_heads import Slots, entropies_of

    lattices, entropies = [], []
    with torch.inference_mode():
        for start in range(0, len(output_ids), LATTICE_ROWS):
            states = torch.tensor(hidden[start : start + LATTICE_ROWS], device=base.device, dtype=base.dtype)
            chosen = torch.tensor(output_ids[start : start + LATTICE_ROWS], device=base.device, dtype=torch.int64)
            first = base.project(states)
            how: dict[str, Any] = {"tokens": chosen, "projection": projection}
            slots = heads.slots(base, states, first, **how) if heads else [Slots(first[:, None])]
            lattices.append(side_by_side([each.lattice(k) for each in slots]))
            entropies.append(np.concatenate([entropies_of(each.logits) for each in slots], axis=1))
    whole = concatenated(lattices)
    # The projection of one state and of many differ in the last bits; the token that was really chosen stays.
    put_first(whole.token_ids[:, 0], whole.logps[:, 0], output_ids)
    return whole, np.concatenate(entropies)
