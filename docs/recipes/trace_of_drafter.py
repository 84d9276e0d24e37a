"""Writes what a drafter of yours proposes as a trace, for `rescore eval`; needs datasets and numpy, nothing of rescore.

It runs along outputs that the base LM has said already: a trace of `rescore trace --drafter none`, which holds them.

    from trace_of_drafter import write_trace

    write_trace("outputs", "drafts", propose, name="my drafter, revision 3")
"""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np

# prompt_ids and output_ids [t] to logits [t, n, vocabulary]: row i are those of the n tokens that the drafter proposes
# after the prompt and output_ids[: i + 1], the last of which is the base's own choice.
Propose = Callable[[list[int], list[int]], np.ndarray]


def write_trace(outputs: str, drafts: str, propose: Propose, *, name: str, k: int = 16) -> None:
    """Reads the folder `outputs`, writes the folder `drafts`: blocks of 1 + n tokens with k entries a slot.

    name: tells the drafter and its version; weights that are fitted for it are known again by that.
    """
    header = json.loads((Path(outputs) / "trace.json").read_text())
    h0, k0 = header["h"], header["k"]
    assert k <= k0, f"{outputs} holds the base's {k0} likeliest tokens; choose k up to that"
    for part in header["parts"]:
        rows = datasets.load_from_disk(str(Path(outputs) / part))
        made = [{**row, **drafted(row, propose, h0, k0, k)} for row in rows]
        columns = {name: [row[name] for row in made] for name in rows.column_names}
        datasets.Dataset.from_dict(columns, features=rows.features).save_to_disk(str(Path(drafts) / part))
        header["h"] = len(made[0]["token_ids"]) // (len(made[0]["output_ids"]) * k)
    header["k"] = k
    header["settings"] = {**header["settings"], "drafter": name}
    (Path(drafts) / "trace.json").write_text(json.dumps(header, indent=2))


def drafted(row: dict, propose: Propose, h0: int, k0: int, k: int) -> dict:
    """The lattices before every output token: slot 1 is the base's, as it was; then the drafter's slots."""
    t = len(row["output_ids"])
    logits = np.asarray(propose(row["prompt_ids"], row["output_ids"]), dtype=np.float64)  # [t, n, vocabulary]
    logps = logits - logits.max(axis=-1, keepdims=True)
    logps -= np.log(np.exp(logps).sum(axis=-1, keepdims=True))
    best = np.argsort(-logits, axis=-1, kind="stable")[..., :k]  # equal ones by lowest id
    own_ids = np.reshape(row["token_ids"], (t, h0, k0))[:, :1, :k]
    own_logps = np.reshape(row["logps"], (t, h0, k0))[:, :1, :k]
    own_entropies = np.reshape(row["entropies"], (t, h0))[:, :1]
    entropies = -(np.exp(logps) * np.where(np.isfinite(logps), logps, 0.0)).sum(axis=-1)
    return {
        "token_ids": np.concatenate([own_ids, best], axis=1).ravel(),
        "logps": np.concatenate([own_logps, np.take_along_axis(logps, best, axis=-1)], axis=1).ravel(),
        "entropies": np.concatenate([own_entropies, entropies], axis=1).ravel(),
    }
