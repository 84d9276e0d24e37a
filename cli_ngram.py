"""Commands for n-gram models: `build-ngram` estimates one, `mix-ngram` interpolates several, `score-ngram` scores text,
`export-fst` writes a model out."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from cli_options import (
    Device,
    Dtype,
    Json,
    notify,
    numbers,
    progress_bar,
)
from lattices.errors import RescoreError

ngram_models = typer.Typer(rich_markup_mode=None)

TEXTS = (
    "text, .jsonl, .json, .csv or .parquet (--field), .gz or .zst of those, folders of them, a folder of rescore "
    "generate-corpus (the base LM's own output, what the rescorer ngram learns from best), or hub:NAME[:SPLIT[:FIELD]] "
    "for a hub data set"
)
OWN = "own:PROMPTS for the base LM's own output for a file of prompts, generated once and kept"
OWN_TOKENS = "Output tokens for each prompt of own:PROMPTS, at most."
Field = Annotated[
    str, typer.Option(help="Field of JSON lines, tables and hub data sets with the text or the token ids.")
]
Utf8Errors = Annotated[str, typer.Option("--errors", help="Bad UTF-8: strict (refuse) or replace.")]


@ngram_models.command(name="build-ngram")
def build_ngram_command(
    corpus: Annotated[list[str], typer.Argument(help=f"One or more of: {TEXTS}; {OWN}.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the model; resumable. Default: beside the corpus, NAME-4gram for NAME.txt."),
    ] = None,
    order: Annotated[int, typer.Option(help="Length of the longest n-grams, 1 to 6.")] = 4,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Base LM whose token ids the words are, or words: split at white space. Default: --base, else "
            "smollm2-135m."
        ),
    ] = None,
    prune: Annotated[
        str, typer.Option(help="Drop n-grams that occur at most so often, by order: 0,0,1,2 or '0 0 1 2'.")
    ] = "",
    discount_fallback: Annotated[
        bool, typer.Option("--discount-fallback", help="Use discounts 0.5, 1, 1.5 where the corpus gives none.")
    ] = False,
    smoothing: Annotated[
        str, typer.Option(help="kneser-ney (modified, interpolated) or katz (prunes 0,0,1,3 unless told).")
    ] = "kneser-ney",
    max_ngrams: Annotated[
        str | None, typer.Option(help="Prune by entropy down to so many n-grams, like 500K or 100M.")
    ] = None,
    surface: Annotated[bool, typer.Option("--surface", help="Write token strings instead of ids.")] = False,
    memory: Annotated[str, typer.Option(help="Memory for the counts, like 4G; the rest goes to disk.")] = "4G",
    threads: Annotated[int | None, typer.Option(help="Threads; default: one per core.")] = None,
    errors: Utf8Errors = "strict",
    field: Field = "text",
    estimator: Annotated[str, typer.Option(help="own, or lmplz (KenLM's program, if on PATH).")] = "own",
    base: Annotated[
        str | None, typer.Option(help="Base LM that writes the output for own:PROMPTS. Default: --tokenizer.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help=OWN_TOKENS)] = 96,
    max_prompt_tokens: Annotated[int, typer.Option(help="Cut prompts of own:PROMPTS to this many tokens.")] = 384,
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Estimate an n-gram model from text: ARPA file, compiled automaton and manifest in one folder."""
    from dataclasses import asdict

    from lm.base.own_output import OwnOutput
    from lm.ngram.build import NgramOptions, build_ngram, default_folder
    from rescore.studies.tables import built_ngram_table

    folder = default_folder(corpus, order) if out is None else out
    tokenizer = tokenizer or base or "smollm2-135m"
    own = OwnOutput(
        base=base or tokenizer, max_new_tokens=max_new_tokens, max_prompt_tokens=max_prompt_tokens, dtype=dtype,
        device=device,
    )  # fmt: skip
    with progress_bar() as progress:
        summary = build_ngram(
            corpus, folder,
            NgramOptions(
                order=order, tokenizer=tokenizer, prune=numbers("--prune", prune, int) if prune else (),
                discount_fallback=(0.5, 1.0, 1.5) if discount_fallback else None, smoothing=smoothing,
                max_ngrams=None if max_ngrams is None else _size("--max-ngrams", max_ngrams, 1000), surface=surface,
                memory=_size("--memory", memory, 1024), threads=threads, errors=errors, field=field,
                estimator=estimator,
            ),
            own=own, replace=out is not None, progress=progress,
        )  # fmt: skip
    print(
        json.dumps(asdict(summary))
        if as_json
        else f"{built_ngram_table(summary).text()}\n{_next(summary.path, tokenizer)}"
    )


def _next(folder: str, tokenizer: str) -> str:
    """The command that uses a model that was built."""
    if tokenizer == "words":
        return f"next: rescore score-ngram TEXT --ngram {shlex.quote(folder)}"
    base = "" if tokenizer == "smollm2-135m" else f"--base {shlex.quote(tokenizer)} "
    return f"next: rescore eval {base}--rescorer {shlex.quote(f'ngram:{folder}')}"


@ngram_models.command(name="mix-ngram")
def mix_ngram_command(
    model: Annotated[
        list[str], typer.Argument(help="Two or more: folders of build-ngram, ARPA files, shipped (the shipped model).")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the mixture, a model like those of build-ngram.")],
    weights: Annotated[
        str | None, typer.Option(help="Comma-separated weights, one for each model, like 0.7,0.3.")
    ] = None,
    tune: Annotated[
        Path | None, typer.Option(help="Trace folder: find the weights by block efficiency on its last examples.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Tune: held-out examples, at most half of the trace.")] = 40,
    k: Annotated[int, typer.Option(help="Tune: tokens of each head that are in the lattice.")] = 16,
    alpha: Annotated[float, typer.Option(help="Tune: weight of the rescorer.")] = 0.5,
    as_json: Json = False,
) -> None:
    """Interpolate n-gram models into one: p = the weighted sum of theirs, with weights given or tuned by replay."""
    from dataclasses import asdict

    from lm.ngram.mix import find_parts, mix_ngrams
    from rescore.studies.tables import mixture_table, mixture_tuning_table

    if len(model) < 2:
        raise RescoreError("a mixture is made of two n-gram models or more, and one is given")
    if (weights is None) == (tune is None):
        raise RescoreError("give the weights of the mixture (--weights 0.7,0.3) or a trace to tune them on (--tune)")
    parts, tuned = find_parts(model), None
    with progress_bar() as progress:
        if tune is not None:
            from rescore.studies.ngram_mixing import tune_mixture

            tuned = tune_mixture(parts, tune, limit=limit, k=k, alpha=alpha, progress=progress)
        chosen = tuned.weights if tuned else numbers("--weights", weights or "", float)
        mixed = mix_ngrams(parts, chosen, out, tuned=asdict(tuned) if tuned else None, progress=progress)
    if abs(sum(chosen) - 1.0) > 1e-6:
        notify(f"the weights add up to {sum(chosen):g}; they are scaled to 1")
    if as_json:
        print(json.dumps({**asdict(mixed), "tuned": asdict(tuned) if tuned else None}))
        return
    if tuned:
        print(mixture_tuning_table(tuned).text() + "\n")
    print(mixture_table(mixed).text())


@ngram_models.command(name="score-ngram")
def score_ngram_command(
    text: Annotated[str, typer.Argument(help=f"One of: {TEXTS}.")],
    ngram: Annotated[Path, typer.Option(help="Folder of build-ngram, ARPA file or KenLM binary.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="As in build-ngram; default: the model's (words for files without a manifest).")
    ] = None,
    errors: Utf8Errors = "strict",
    field: Field = "text",
    as_json: Json = False,
) -> None:
    """Perplexity of a text under an n-gram model, with the counts of unknown words."""
    from lm.ngram.score import score_file
    from rescore.studies.tables import ngram_score_table

    with progress_bar() as progress:
        score = score_file(text, ngram, tokenizer=tokenizer, errors=errors, field=field, progress=progress)
    if score.unknown_share > 0.9:
        notify(f"{ngram} does not know {score.unknown_share:.0%} of the words; is this the right --tokenizer?")
    print(json.dumps(score.as_dict()) if as_json else ngram_score_table(score, text).text())


@ngram_models.command(name="export-fst")
def export_fst_command(
    ngram: Annotated[Path, typer.Option(help="Folder of build-ngram, automaton or ARPA file.")],
    out: Annotated[Path, typer.Option(help="Folder for the text files.")],
    trace: Annotated[Path | None, typer.Option(help="Trace folder to take a lattice from.")] = None,
    example: Annotated[str | None, typer.Option(help="Id of the trace's example; default: the first.")] = None,
    position: Annotated[int, typer.Option(help="Output token before which the lattice stands, from 0.")] = 0,
    k: Annotated[int, typer.Option(help="Tokens of each head that are in the lattice.")] = 16,
    alpha: Annotated[float, typer.Option(help="Weight of the n-gram model.")] = 1.0,
    phi: Annotated[
        bool, typer.Option("--phi", help="Give back-off arcs a label of their own, for phi matchers; else epsilon.")
    ] = False,
) -> None:
    """Write an n-gram automaton and one lattice of a trace, with their exact composition, as OpenFst text."""
    from rescore.exports.openfst import export_openfst
    from rescore.studies.tables import file_sizes

    written = export_openfst(ngram, out, trace=trace, example=example, position=position, k=k, alpha=alpha, phi=phi)
    print(f"{out}: {file_sizes(written)}")


def _size(option: str, text: str, thousand: int) -> int:
    """A number like 500K, 1.5M or 4G of an option; `thousand` is what K stands for."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kmgt]?)b?", text.strip().lower())
    if not match:
        raise RescoreError(f"{option} {text}: give a number, with K, M, G or T behind it if it is large, like 4G")
    return int(float(match[1]) * thousand ** " kmgt".index(match[2] or " "))
