"""Commands that look into traces and results: `analyse` (repetition, entropy, oracle, outcomes, ranks, calibration ...)
and `cost` (what a decoded token costs by method)."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cli_options import FirstHeads, Json, numbers, parts
from lattices.errors import RescoreError

analysing = typer.Typer(rich_markup_mode=None)


@analysing.command(name="analyse")
def analyse_command(
    trace: Annotated[list[Path] | None, typer.Option(help="Trace folder; several for h_max over tasks.")] = None,
    results: Annotated[
        list[Path] | None, typer.Option(help="Folder of rescore eval --out; several for one table of all.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="Analyses of the trace, comma-separated: repetition, entropy, oracle, p_curve, ranks, acceptance, "
            "calibration. Default: all."
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="With --results: A=B, the gain of rescorer A over B, paired by example; several."),
    ] = None,
    h: FirstHeads = None,
    k: Annotated[int | None, typer.Option(help="With --trace: entries per head of p-best drafts. Default: 16.")] = None,
    limit: Annotated[int | None, typer.Option(help="With --trace: only the first N examples.")] = None,
    bins: Annotated[int | None, typer.Option(help="With --trace: bins of the calibration. Default: 15.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap intervals.")] = 0,
    as_json: Json = False,
) -> None:
    """Analyse traces or finished runs: repetition, entropy and h_max, oracle, wins and losses, ranks, calibration."""
    from rescore.studies.analysis import ANALYSES
    from rescore.studies.analysis.collect import analyse_folders
    from rescore.studies.analysis.text import findings_tables
    from rescore.table import joined

    if bool(trace) == bool(results):
        raise RescoreError("give trace folders (--trace) or folders of rescore eval (--results)")
    pairs = []
    for text in against or ():
        rescorer, _, other = text.partition("=")
        if not rescorer or not other:
            raise RescoreError(f"--against {text}: give two rescorers of the results, like ngram:own=ngram")
        pairs.append((rescorer, other))
    names = tuple(parts(only)) if only is not None else ANALYSES
    found = analyse_folders(
        traces=trace or (),
        results=results or (),
        only=names,
        against=pairs,
        h=h,
        k=k,
        limit=limit,
        bins=bins,
        seed=seed,
    )
    print(json.dumps(found.as_dict(), ensure_ascii=False) if as_json else joined(findings_tables(found)))


@analysing.command(name="cost")
def cost_command(
    base: Annotated[
        str | None,
        typer.Option(
            help="Base LM: smollm2-135m, a model folder, a .gguf file, a hub id, or paper-1.5b (the paper's base LM, "
            "layers and widths assumed). Default: that of --results, else smollm2-135m."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="config.json of a transformers model, instead of --base.")] = None,
    heads: Annotated[
        Path | None,
        typer.Option(
            help="Folder of block heads. Default: those of --results, of a tuned base or shipped for the base, else as "
            "the paper has them."
        ),
    ] = None,
    h: Annotated[int | None, typer.Option(help="Tokens of a block. Default: as in --results, else 9.")] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="Folder of rescore eval or suite --out: its base LM, heads, h and block efficiencies."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Task of --results. Default: the only one.")] = None,
    block_efficiency: Annotated[
        list[str] | None,
        typer.Option(
            help="METHOD=NUMBER, several: unrescored, 4-gram, neural-61m, '16-best 0-gram', '16-best 4-gram'."
        ),
    ] = None,
    contexts: Annotated[str, typer.Option(help="Comma-separated tokens in the cache.")] = "128,512,1024,2048",
    dtype: Annotated[str, typer.Option(help="Comma-separated: float16, bfloat16, float32.")] = "float16,float32",
    verify: Annotated[
        str | None,
        typer.Option(
            help="p drafts as one prefix tree (tree) or as rows (batch). Default: as live --results had it, else tree."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Cost model: weights and KV cache read and FLOPs per decoded token, by method and context."""
    from rescore.runs.evaluated import run_of_task
    from rescore.studies import tables as study_tables
    from rescore.studies.cost.decoders import neural_for
    from rescore.studies.cost.inputs import cost_inputs, cost_inputs_of_run
    from rescore.studies.cost.model import cost_table
    from rescore.table import joined

    efficiencies = {}
    for text in block_efficiency or ():
        method, _, value = text.rpartition("=")
        if not method:
            raise RescoreError(f"--block-efficiency {text}: give a method and a number, like 4-gram=1.5")
        efficiencies[method] = numbers("--block-efficiency", value, float)[0]
    asked = partial(cost_inputs_of_run, run_of_task(results, task, h=h), task) if results else cost_inputs
    found = asked(base=base, config=config, heads=heads, h=h, verify=verify, block_efficiency=efficiencies)
    tables = [
        cost_table(
            found.base, h=found.h, heads=found.heads, neural=neural_for(found.base), dtype=precision,
            block_efficiency=found.block_efficiency, verify=found.verify,
            contexts=numbers("--contexts", contexts, int),
        )
        for precision in parts(dtype)
    ]  # fmt: skip
    print(json.dumps([t.as_dict() for t in tables]) if as_json else joined(map(study_tables.cost_table, tables)))
