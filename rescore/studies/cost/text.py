"""The cost model as plain text for the terminal."""

from __future__ import annotations

from rescore.report.tables import table
from rescore.studies.cost.model import CostTable, Decoder, MethodCost


def cost_text(found: CostTable) -> str:
    """Per decoded token and method at every context: weights and cache read, FLOPs, and their change."""
    way = f"h = {found.h}, drafts verified as a {found.verify}"
    heads = f"heads 2..{found.h}: {found.heads.parameters:,} parameters"
    if found.heads.projection_reads > 1:
        heads += f", the vocabulary projection read {found.heads.projection_reads} times"
    lines = [f"{found.dtype}, {way}; {heads}", _shape(found.base)]
    if found.neural:
        lines.append(_shape(found.neural))
    header = ["method", "p", "context", "block eff.", "weights GB", "", "KV MB", "", "GFLOPs", ""]
    body = table(header, [_row(cost) for cost in found.costs])
    note = (
        "per decoded token, and the change against autoregressive decoding; methods whose block efficiency is not\n"
        "known show a whole step (=)."
    )
    return "\n".join(lines) + "\n\n" + body + "\n" + note


def _shape(decoder: Decoder) -> str:
    line = f"{decoder.name}: {decoder.parameters:,} parameters, {len(decoder.layers)} layers"
    return f"{line} (ASSUMED: {decoder.assumption})" if decoder.assumption else line


def _row(c: MethodCost) -> list[str]:
    row = [c.method, str(c.p), str(c.context), "-" if c.block_efficiency is None else f"{c.block_efficiency:.3f}"]
    for token, step, change, unit, digits in (
        (c.weight_bytes, c.step_weight_bytes, c.weight_bytes_change, 1e9, 3),
        (c.kv_bytes, c.step_kv_bytes, c.kv_bytes_change, 1e6, 2),
        (c.flops, c.step_flops, c.flops_change, 1e9, 2),
    ):
        value = step if token is None else token
        row += [f"{value / unit:.{digits}f}", "=" if change is None else f"{change:+.1%}"]
    return row
