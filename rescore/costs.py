"""What a decoding step costs on one machine: the forward by tokens and context, and the heads.

Measured by `rescore bench costs` and kept in the cache; `joint:nodes=auto` drafts by it. All times are milliseconds.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch

from lattices.errors import RescoreError
from lattices.paths import user_path
from lm.files import write_json
from lm.keys import cache_entry
from lm.records import Count, Number, plain, read_record

if TYPE_CHECKING:
    from lm.base.model import BaseIdentity, BaseLM
    from lm.heads.block_heads import BlockHeads
    from rescore.runs.inputs import Inputs

SCHEMA = "rescore.costs/1"
CONTEXTS = (64, 256, 640)  # cached tokens
NODES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
ADVICE = "measure them: rescore bench costs"


class Costs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A cost table.

    base, dtype, device, machine, threads: what it was measured with.
    contexts: cached tokens; nodes: tokens of a forward; verify_ms `[contexts][nodes]`: medians.
    heads_ms: from a state to the lattice of all heads (None: the base has none).
    """

    base: str
    dtype: str
    device: str
    machine: str
    threads: Count
    contexts: list[Count]
    nodes: list[Count]
    verify_ms: list[list[Number]]
    heads_ms: Number | None
    schema: str = SCHEMA

    def curve(self, context: int, most: int) -> np.ndarray:
        """Of forwards of 1 to `most` tokens on so many cached ones, float64 `[most]`: between the measured sizes and
        contexts straight lines, beyond them the last ones' slopes; a larger forward never costs less."""
        sizes = np.arange(1, most + 1)
        each = np.array([_line(sizes, self.nodes, row) for row in self.verify_ms])  # [contexts, most]
        at = np.array([_line(np.array([context]), self.contexts, column)[0] for column in each.T])
        return np.maximum.accumulate(np.maximum(at, 1e-3))


def _line(at: np.ndarray, xs: Sequence[int], ys: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.interp(at, xs, ys)
    if len(xs) > 1:
        slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
        values = np.where(at > xs[-1], ys[-1] + slope * (at - xs[-1]), values)
    return np.asarray(values, dtype=np.float64)


def measure_costs(
    base: BaseLM,
    heads: BlockHeads | None,
    *,
    contexts: Sequence[int] = CONTEXTS,
    nodes: Sequence[int] = NODES,
    k: int = 16,
    repeats: int = 7,
) -> Costs:
    """Measures them with the weights laid out as decoding has them. Raises `RescoreError` for contexts that do not
    fit."""
    from rescore.studies.verify_curve import heads_milliseconds, verify_curve

    curves = [verify_curve(base, cached=cached, repeats=repeats, sizes=nodes) for cached in sorted(set(contexts))]
    return Costs(
        base=base.identity.name,
        dtype=base.identity.dtype,
        device=str(base.device),
        machine=platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
        contexts=[curve.cached for curve in curves],
        nodes=list(nodes),
        verify_ms=[curve.milliseconds for curve in curves],
        heads_ms=heads_milliseconds(base, heads, k, repeats) if heads else None,
    )


def costs_of(inputs: Inputs, out: Path | None, *, contexts: Sequence[int], repeats: int) -> Costs:
    """Measures the costs of a base and its heads, as they are named, and keeps them on this machine.

    out: a file for them, too. Raises as `load_base`, `measure_costs` and `keep_costs`.
    """
    from lm.base.catalog import load_base
    from lm.heads.block_heads import known_heads, load_heads

    base = load_base(inputs.base, dtype=inputs.dtype, device=inputs.device)
    has_heads = inputs.heads is not None or known_heads(base.identity.name) is not None
    costs = measure_costs(
        base, load_heads(base, inputs.heads) if has_heads else None, contexts=contexts, repeats=repeats
    )
    for place in (None, out) if out else (None,):
        keep_costs(costs, base.identity, place)
    return costs


def keep_costs(costs: Costs, identity: BaseIdentity, out: Path | None = None) -> Path:
    """Writes a table where `load_costs` finds it for this base on this machine, or into a file. Raises
    `OutputError`."""
    path = out or _place(identity, costs.device)
    write_json(path, plain(costs))
    return path


def load_costs(path: str = "", *, identity: BaseIdentity | None = None, device: str = "cpu") -> Costs:
    """The table in a file, else the one that was measured on this machine for a base.

    Raises `RescoreError` if there is none, `InvalidDataError` for a broken file.
    """
    if path:
        place, missing = user_path(path, "costs"), f"no costs in {path}; {ADVICE} --out FILE"
    elif identity is not None:
        place = _place(identity, device)
        missing = f"no costs of {identity.name} are measured on this machine; run: rescore bench costs"
    else:
        raise RescoreError(f"the trace does not name its base LM, whose costs are needed; {ADVICE}, and give the file")
    costs = read_record(place, Costs, missing=missing, advice=ADVICE, schema=SCHEMA)
    shape = {len(row) for row in costs.verify_ms}
    if len(costs.verify_ms) != len(costs.contexts) or shape != {len(costs.nodes)} or not costs.nodes:
        raise RescoreError(f"{place} has other sizes than it says; {ADVICE}")
    return costs


def _place(identity: BaseIdentity, device: str) -> Path:
    machine = [platform.processor(), platform.machine(), torch.get_num_threads(), torch.__version__, device]
    if device.startswith("cuda"):
        machine.append(torch.cuda.get_device_name(device))
    of = {
        "schema": SCHEMA,
        "machine": machine,
        "base": [identity.weights_sha256, identity.dtype, identity.config_sha256],
    }
    return cache_entry("costs", identity.name, of, suffix=".json")
