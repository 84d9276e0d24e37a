"""Commands that measure the machine and the base LM: `bench verify-curve`, `bench block-length`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cli_options import Base, Device, Dtype, Heads, progress_bar

bench = typer.Typer(help="Measurements of the machine and the base LM.", rich_markup_mode=None)
Cached = Annotated[int, typer.Option(help="Tokens in the cache.")]
Repeats = Annotated[int, typer.Option(help="Timed calls of each size; the median counts.")]
JsonLine = Annotated[bool, typer.Option("--json", help="Print the JSON line only, without the table.")]


@bench.command(name="verify-curve")
def verify_curve_command(
    base: Base = "smollm2-135m",
    cached: Cached = 256,
    repeats: Repeats = 7,
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: JsonLine = False,
) -> None:
    """Time of one forward of 1 to 144 tokens on a cache, with the memory bandwidth reached."""
    from lm.base.catalog import load_base
    from rescore.studies.tables import verify_curve_table
    from rescore.studies.verify_curve import verify_curve

    curve = verify_curve(load_base(base, dtype=dtype, device=device), cached=cached, repeats=repeats)
    if not as_json:
        print(verify_curve_table(curve).text())
    print(json.dumps(curve.as_dict()))


@bench.command(name="block-length")
def block_length_command(
    trace: Annotated[Path, typer.Option(help="Trace folder (rescore trace) of the base LM and its heads.")],
    base: Base = "smollm2-135m",
    heads: Heads = None,
    rescorer: Annotated[str, typer.Option(help="Which drafts: none, ngram, context-ngram ... (one a step).")] = "none",
    alpha: Annotated[
        float | None, typer.Option(help="The rescorer's weight. Default: its own, not a tuned one.")
    ] = None,
    k: Annotated[int, typer.Option(help="Tokens of each head in a lattice.")] = 16,
    limit: Annotated[int, typer.Option(help="Only the first N examples of the trace.")] = 20,
    cached: Cached = 256,
    repeats: Repeats = 7,
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: JsonLine = False,
) -> None:
    """Which block length pays here: acceptance from a trace against what verify, heads and rescoring cost."""
    from lattices.errors import IncompatibleError, RescoreError
    from lm.base.catalog import load_base
    from lm.heads.block_heads import heads_folder, heads_sha256, load_heads
    from rescore.rescorers import load_rescorer
    from rescore.runs.weights import fit_to
    from rescore.studies.block_length import block_lengths
    from rescore.studies.tables import block_length_table
    from rescore.tracing import read_trace

    chosen = load_rescorer(rescorer)
    if alpha is not None:
        if chosen.alpha is None:
            raise RescoreError(f"{rescorer} has no weight; drop --alpha")
        chosen = chosen.weighted(alpha)
    if limit < 1:
        raise RescoreError(f"--limit {limit}; at least one example must be replayed")
    recorded = read_trace(trace).first_examples(limit)
    model = load_base(base, dtype=dtype, device=device)
    folder = heads_folder(heads, model.identity)
    if recorded.header.settings.get("heads_sha256") not in (None, heads_sha256(folder)):
        raise IncompatibleError(f"{trace} was recorded with other heads than those in {folder}; give its own: --heads")
    block_heads = load_heads(model, heads)
    fitted = fit_to(recorded, {rescorer: chosen}, device=str(model.device), shared=model)[rescorer]
    with progress_bar() as progress:
        found = block_lengths(
            model, block_heads, recorded, fitted, name=rescorer, k=k, cached=cached, repeats=repeats,
            progress=lambda done, total: progress("block lengths", done, total),
        )  # fmt: skip
    if not as_json:
        print(block_length_table(found).text())
    print(json.dumps(found.as_dict()))
