"""The command `rescore`: thin commands that parse, call one function of the project, and print.

Results go to stdout, progress and notices to stderr. Exit codes: 0 fine, 1 the run failed, 2 something the user can
mend, 130 interrupted. Heavy libraries are imported inside commands, so that `--help` is quick.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from lattices.errors import IncompatibleError, RescoreError

if TYPE_CHECKING:
    from lattices.lattice import Lattice
    from lm.build_ngram import NgramSummary
    from lm.score_ngram import NgramScore
    from lm.training import HeldOutAccuracy
    from rescore.evaluation import Evaluation
    from rescore.tracing import Trace

Number = TypeVar("Number", int, float)
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it

app = typer.Typer(
    help="Draft-refinement rescoring for blockwise parallel decoding: how many tokens does a step accept, how many "
    "could it, which rescorer recovers how much, at what cost.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench = typer.Typer(help="Measurements of the machine and the base LM.", rich_markup_mode=None)
app.add_typer(bench, name="bench")

Base = Annotated[str, typer.Option(help="Base LM: smollm2-135m, a model folder, a .gguf file or a hub id.")]
Heads = Annotated[str | None, typer.Option(help="Folder of block heads; default: those shipped for the base.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")]
TASK_NAMES = "squad, gsm8k, lambada, samsum, xsum, cnn_dailymail or a plug-in's"
Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", help=f"{TASK_NAMES}; may be given several times. Default: squad, or the task of --trace."),
]
Limit = Annotated[int | None, typer.Option(help="Only the first N examples.")]
Data = Annotated[str | None, typer.Option(help="JSON lines file with the task's examples.")]
NewTokens = Annotated[int, typer.Option(help="Output tokens per example, at most.")]
PromptTokens = Annotated[int | None, typer.Option(help="Cut prompts to this many tokens.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]


def main() -> None:
    """Runs the command line; the installed command `rescore` calls this."""
    # glibc returns large blocks to the system at every free; keeping them makes CPU inference up to 1.5x faster. The
    # settings are read when a process starts, so the process starts once more with them.
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ and not _only_asks_for_help():
        kept = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **kept})
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = "--debug" in sys.argv
    try:
        # Not standalone: errors and exit codes come here instead of being printed by the library.
        sys.exit(app(args=arguments or ["--help"], prog_name="rescore", standalone_mode=False))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, code = _explain(error)
        _notify(message)
        sys.exit(code)


def _only_asks_for_help() -> bool:
    return len(sys.argv) == 1 or "--help" in sys.argv or "--version" in sys.argv


def _explain(error: Exception) -> tuple[str, int]:
    """One line that says what is wrong, and the exit code."""
    if isinstance(error, RescoreError):
        message, code = str(error), 2
    elif hasattr(error, "format_message"):  # of click, which typer imports or, in later versions, brings along
        message, code = error.format_message(), 2
    else:
        message, code = f"{type(error).__name__}: {error} (--debug shows where)", 1
    return " ".join(message.split()), code


def _version(wanted: bool) -> None:
    if wanted:
        from rescore.results import versions

        print("\n".join(f"{name} {version}" for name, version in versions().items()))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print versions.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options before the command; `--debug` may stand anywhere (`main` takes it)."""


@app.command(name="eval")
def evaluate_command(
    task: Tasks = None,
    rescorer: Annotated[
        list[str],
        typer.Option(help="none, oracle, ngram[:PATH], context-ngram[:PATH] or a plug-in's name[:text]; several."),
    ] = ["none"],  # noqa: B006 (typer copies it)
    k: Annotated[int, typer.Option(help="Tokens of each head that are in the lattice.")] = 16,
    p: Annotated[int, typer.Option(help="Drafts that one step verifies.")] = 1,
    alpha: Annotated[
        float | None, typer.Option(help="Weight of the rescorer; default: the tuned one (rescore tune), else its own.")
    ] = None,
    h: Annotated[int | None, typer.Option(help="Use only the first h heads (block of h tokens).")] = None,
    base: Base = "smollm2-135m",
    heads: Heads = None,
    limit: Limit = None,
    mode: Annotated[str, typer.Option(help="replay (from a trace, fast) or live (decodes, measures time).")] = "replay",
    verify: Annotated[str, typer.Option(help="Live: p drafts as one prefix tree (tree) or as rows (batch).")] = "tree",
    data: Data = None,
    trace: Annotated[str | None, typer.Option(help="Replay this trace folder instead of recording one.")] = None,
    max_new_tokens: NewTokens = 64,
    max_prompt_tokens: PromptTokens = None,
    out: Annotated[Path | None, typer.Option(help="Folder for per-example lines and results.json; resumable.")] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap interval.")] = 0,
    as_json: Json = False,
) -> None:
    """Block efficiency of rescorers on tasks: what a step accepts, and what it could (oracle)."""
    from rescore.evaluation import EvalOptions, evaluate

    chosen = EvalOptions(
        tasks=tuple(task or ()), rescorers=tuple(rescorer), base=base, heads=heads, h=h, k=k, p=p, alpha=alpha,
        limit=limit, max_new_tokens=max_new_tokens, max_prompt_tokens=max_prompt_tokens, mode=mode, verify=verify,
        data=data, trace=trace, dtype=dtype, device=device, seed=seed,
    )  # fmt: skip
    with _progress() as progress:
        evaluation = evaluate(chosen, out=out, progress=progress, notify=_notify)
    _print_evaluation(evaluation, as_json)
    if evaluation.interrupted:
        kept = f"and kept in {out}: the same command goes on" if out else "(--out DIR would keep them)"
        _notify(f"interrupted; the finished examples are shown {kept}")
        raise typer.Exit(INTERRUPTED)


def _print_evaluation(evaluation: Evaluation, as_json: bool) -> None:
    from rescore.report.tables import results_table

    document = evaluation.document
    print(json.dumps(document.as_dict(), ensure_ascii=False) if as_json else results_table(document))


@app.command()
def oracle(
    task: Tasks = None,
    k: Annotated[str, typer.Option(help="Comma-separated k.")] = "1,2,4,8,16",
    h: Annotated[int | None, typer.Option(help="Use only the first h heads.")] = None,
    base: Base = "smollm2-135m",
    heads: Heads = None,
    limit: Limit = None,
    data: Data = None,
    trace: Annotated[str | None, typer.Option(help="Replay this trace folder instead of recording one.")] = None,
    max_new_tokens: NewTokens = 64,
    max_prompt_tokens: PromptTokens = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Oracle block efficiency by k: what a perfect choice from the top k of every head would reach."""
    from rescore.evaluation import EvalOptions, oracle_by_k

    ks = _numbers("--k", k, int)
    chosen = EvalOptions(
        tasks=tuple(task or ()), base=base, heads=heads, h=h, limit=limit, data=data, trace=trace, k=max(ks),
        max_new_tokens=max_new_tokens, max_prompt_tokens=max_prompt_tokens, dtype=dtype, device=device,
    )  # fmt: skip
    with _progress() as progress:
        evaluation = oracle_by_k(chosen, ks, progress=progress, notify=_notify)
    _print_evaluation(evaluation, as_json)


@app.command(name="tune")
def tune_command(
    rescorer: Annotated[list[str], typer.Option(help="A rescorer with a weight, like ngram; several.")],
    task: Tasks = None,
    alphas: Annotated[
        str | None, typer.Option(help="Comma-separated weights; 0 is always among them. Default: nine from 0.1 to 5.")
    ] = None,
    k: Annotated[str, typer.Option(help="Comma-separated k.")] = "16",
    p: Annotated[str, typer.Option(help="Comma-separated p.")] = "1,16",
    h: Annotated[int | None, typer.Option(help="Use only the first h heads.")] = None,
    base: Base = "smollm2-135m",
    heads: Heads = None,
    limit: Annotated[int, typer.Option(help="Held-out examples, from the end of the data; at most half of it.")] = 100,
    data: Data = None,
    trace: Annotated[str | None, typer.Option(help="Replay this trace folder instead of recording one.")] = None,
    max_new_tokens: NewTokens = 64,
    max_prompt_tokens: PromptTokens = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Tune a rescorer's weight (alpha) by replay on held-out examples; `rescore eval` uses what it finds."""
    from dataclasses import asdict

    from rescore.evaluation import EvalOptions
    from rescore.report.tables import tuning_table
    from rescore.tuning import DEFAULT_ALPHAS, tune

    chosen = EvalOptions(
        tasks=tuple(task or ()), rescorers=tuple(rescorer), base=base, heads=heads, h=h, limit=limit, data=data,
        trace=trace, max_new_tokens=max_new_tokens, max_prompt_tokens=max_prompt_tokens, dtype=dtype, device=device,
    )  # fmt: skip
    with _progress() as progress:
        found = tune(
            chosen, alphas=_numbers("--alphas", alphas, float) if alphas else DEFAULT_ALPHAS,
            ks=_numbers("--k", k, int), ps=_numbers("--p", p, int), progress=progress, notify=_notify,
        )  # fmt: skip
    print(json.dumps([asdict(tuned) for tuned in found]) if as_json else tuning_table(found))


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Comma-separated numbers of an option."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise RescoreError(f"{option} {text}: give {what} with commas between them, like 1,2,4") from None


@app.command(name="trace")
def trace_command(
    out: Annotated[Path, typer.Option(help="Folder for the trace; resumable.")],
    task: Annotated[str, typer.Option(help=f"{TASK_NAMES}.")] = "squad",
    base: Base = "smollm2-135m",
    heads: Heads = None,
    k: Annotated[int, typer.Option(help="Lattice entries kept per head.")] = 32,
    limit: Limit = None,
    data: Data = None,
    max_new_tokens: NewTokens = 64,
    max_prompt_tokens: PromptTokens = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Record a trace: greedy output and lattices of a task, for replay with `rescore eval --trace`."""
    from rescore.evaluation import EvalOptions, trace_task

    chosen = EvalOptions(
        tasks=(task,), base=base, heads=heads, k=k, limit=limit, data=data, max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens, dtype=dtype, device=device,
    )  # fmt: skip
    with _progress() as progress:
        trace = trace_task(chosen, out, progress=progress, notify=_notify)
    positions = sum(len(example.output_ids) for example in trace.examples)
    print(f"{out}: {len(trace.examples)} examples, {positions} positions, h = {trace.header.h}, K = {trace.header.k}")


@app.command(name="generate-corpus")
def generate_corpus_command(
    prompts: Annotated[Path, typer.Option(help='JSON lines {"prompt", "chat"} or text, a prompt a line.')],
    out: Annotated[Path, typer.Option(help="Folder for the corpus; resumable.")],
    base: Base = "smollm2-135m",
    max_new_tokens: NewTokens = 96,
    max_prompt_tokens: Annotated[int, typer.Option(help="Cut prompts to this many tokens.")] = 384,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded side by side.")] = 64,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Write the base LM's own greedy output for many prompts: what block heads learn from best."""
    from lm.catalog import load_base
    from lm.corpus import generate_corpus, read_prompts

    model = load_base(base, dtype=dtype, device=device)
    chosen = read_prompts(prompts, default_chat=model.is_chat)
    with _progress() as progress:
        summary = generate_corpus(
            model, chosen, out, max_new_tokens=max_new_tokens, max_prompt_tokens=max_prompt_tokens,
            batch_size=batch_size, progress=lambda done, total: progress("generate", done, total),
        )  # fmt: skip
    print(f"{summary.path}: {summary.examples} examples ({summary.made} new), {summary.output_tokens} output tokens")


@app.command(name="train-heads")
def train_heads_command(
    corpus: Annotated[list[Path], typer.Option(help="Folder of generate-corpus, .jsonl of pairs, or text; several.")],
    out: Annotated[Path, typer.Option(help="Folder for the heads; resumable.")],
    base: Base = "smollm2-135m",
    h: Annotated[int, typer.Option(help="Block length: h - 1 heads are trained.")] = 9,
    inner_size: Annotated[int, typer.Option(help="Hidden layer of each head.")] = 560,
    token_size: Annotated[int, typer.Option(help="Width in which heads see head 1's token; 0: not at all.")] = 128,
    initial: Annotated[
        Path | None, typer.Option(help="Folder of heads to start from instead of untrained ones.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 2000,
    positions: Annotated[int, typer.Option(help="Positions per step.")] = 2048,
    heads_per_step: Annotated[int, typer.Option(help="Heads trained per step, drawn anew each time.")] = 4,
    vocabulary: Annotated[int, typer.Option(help="Most frequent tokens in the loss; 0: all.")] = 8192,
    soft: Annotated[float, typer.Option(help="Share of the base's own distribution in the target, 0 to 1.")] = 0.5,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate (AdamW, cosine).")] = 1e-3,
    evaluate_every: Annotated[int, typer.Option(help="Steps between checkpoints with held-out accuracy.")] = 200,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens taken of each text corpus, at most.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Device = "auto",
) -> None:
    """Train block heads on a frozen base LM."""
    from lm.catalog import load_base
    from lm.head_data import read_head_data
    from lm.training import HeadTrainer, TrainingOptions

    model = load_base(base, device=device)
    chosen = TrainingOptions(
        h=h, inner_size=inner_size, token_size=token_size, steps=steps, positions=positions,
        heads_per_step=heads_per_step, vocabulary=vocabulary or None, soft=soft, learning_rate=learning_rate,
        evaluate_every=evaluate_every, seed=seed,
    )  # fmt: skip
    with _progress() as progress:
        data = [
            read_head_data(
                model, path, out, max_tokens=max_tokens,
                progress=lambda done, total: progress("hidden states", done, total),
            )
            for path in corpus
        ]  # fmt: skip
        held_out = ""

        def evaluated(step: int, total: int, accuracy: HeldOutAccuracy) -> None:
            nonlocal held_out
            held_out = f", accepted {accuracy.accepted:.3f} (best of top 16: {accuracy.accepted_16:.3f})"
            if not sys.stderr.isatty():  # no bar to show it
                _notify(f"step {step} of {total}{held_out}")

        accuracy = HeadTrainer(model, data, chosen, initial=initial).train(
            out,
            progress=lambda step, total, loss: progress(f"train, loss {loss:.3f}{held_out}", step, total),
            evaluated=evaluated,
        )
    from rescore.report.tables import accuracy_table

    print(accuracy_table(accuracy))


TEXTS = (
    "text, .jsonl (--field), .gz or .zst of those, folders of them, a folder of rescore generate-corpus (the base LM's "
    "own output, what the rescorer ngram learns from best), or hub:NAME[:SPLIT[:FIELD]] for a hub data set"
)
Field = Annotated[str, typer.Option(help="Field of JSON lines and hub data sets with the text or the token ids.")]
Utf8Errors = Annotated[str, typer.Option("--errors", help="Bad UTF-8: strict (refuse) or replace.")]


@app.command(name="build-ngram")
def build_ngram_command(
    corpus: Annotated[list[str], typer.Argument(help=f"One or more of: {TEXTS}.")],
    out: Annotated[Path, typer.Option(help="Folder for the model; resumable.")],
    order: Annotated[int, typer.Option(help="Length of the longest n-grams, 1 to 6.")] = 4,
    tokenizer: Annotated[
        str, typer.Option(help="Base LM whose token ids the words are (as --base), or words: split at white space.")
    ] = "smollm2-135m",
    prune: Annotated[str, typer.Option(help="Drop n-grams that occur at most so often, by order, like 0,0,1,2.")] = "",
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
    as_json: Json = False,
) -> None:
    """Estimate an n-gram model from text: ARPA file, compiled automaton and manifest in one folder."""
    from dataclasses import asdict

    from lm.build_ngram import build_ngram

    with _progress() as progress:
        summary = build_ngram(
            corpus, out, order=order, tokenizer=tokenizer, prune=_numbers("--prune", prune, int) if prune else (),
            discount_fallback=(0.5, 1.0, 1.5) if discount_fallback else None, smoothing=smoothing,
            max_ngrams=None if max_ngrams is None else _size("--max-ngrams", max_ngrams, 1000), surface=surface,
            memory=_size("--memory", memory, 1024), threads=threads, errors=errors, field=field, estimator=estimator,
            progress=progress,
        )  # fmt: skip
    print(json.dumps(asdict(summary)) if as_json else _built_table(summary))


def _built_table(built: NgramSummary) -> str:
    from rescore.report.tables import table

    width = max(map(len, built.discounts))
    names = ["D1", "D2", "D3+"] if width == 3 else [f"d{i + 1}" for i in range(width)]  # Kneser-Ney or Katz
    origins = ["fallback" if n in built.fallback_orders else "corpus" for n in range(1, built.order + 1)]
    rows = []
    for n, (count, found, origin) in enumerate(zip(built.ngrams, built.discounts, origins, strict=True), start=1):
        shown = [f"{discount:.4f}" for discount in found] + ["-"] * (width - len(found))
        rows.append([str(n), f"{count:,}", *shown, origin])
    lines = [
        f"{built.path}: {sum(built.ngrams):,} n-grams from {built.tokens:,} tokens in {built.documents:,} documents",
        "",
        table(["order", "n-grams", *names, "from"], rows),
        "",
        f"files: {_file_sizes(sorted(Path(built.path).iterdir()))}",
    ]
    return "\n".join(lines)


@app.command(name="score-ngram")
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
    from lm.score_ngram import score_file

    with _progress() as progress:
        score = score_file(text, ngram, tokenizer=tokenizer, errors=errors, field=field, progress=progress)
    if score.unknown_share > 0.9:
        _notify(f"{ngram} does not know {score.unknown_share:.0%} of the words; is this the right --tokenizer?")
    print(json.dumps(score.as_dict()) if as_json else _score_table(score, text))


def _file_sizes(paths: Sequence[Path]) -> str:
    sizes = [(path.name, path.stat().st_size) for path in paths]
    return ", ".join(f"{name} ({size / 1e6:.1f} MB)" if size > 1e5 else f"{name} ({size:,} B)" for name, size in sizes)


def _score_table(score: NgramScore, text: str) -> str:
    from rescore.report.tables import table

    rows = [
        ["documents", f"{score.sentences:,}"],
        ["tokens, ends of documents included", f"{score.tokens:,}"],
        ["unknown tokens", f"{score.unknown:,} ({score.unknown_share:.2%})"],
        ["log10 probability", f"{score.log10p:.2f}"],
        ["perplexity", f"{score.perplexity:.2f}"],
        ["perplexity without unknown tokens", f"{score.perplexity_known:.2f}"],
    ]
    rows += [[f"scored by {n}-grams", f"{count:,}"] for n, count in enumerate(score.hits or (), start=1)]
    return table(["text", text], rows)


@app.command(name="export-fst")
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
    from lattices import openfst
    from lattices.automaton import Automaton
    from lm.files import atomic_file
    from lm.ngram import load_ngram
    from rescore.weights import target_of

    found = load_ngram(ngram)
    if not isinstance(automaton := found.model, Automaton):
        raise RescoreError(f"{ngram} is a KenLM binary, which can't be written out; give its ARPA file")
    start, files = automaton.start, dict[str, Iterable[str]]()
    if trace is not None:
        traced, lattice, before = _traced_lattice(trace, example, position, k)
        header, base = traced.header, target_of(traced)
        if found.tokenizer_sha256 and base.tokenizer_sha256 not in (None, found.tokenizer_sha256):
            raise IncompatibleError(f"{ngram} was made for another tokenizer than the base LM's of {trace}")
        words = found.words_of_tokens(header.vocab_size, header.eos_token_ids)
        start = automaton.state_after(words[before[len(before) - min(len(before), automaton.order - 1) :]].tolist())
        files["lattice.txt"] = [openfst.lattice_text(lattice, words)]
        files["composition.txt"] = [openfst.composition_text(lattice, words, automaton, start, weight=alpha)]
        files["tokens.syms"] = openfst.token_symbols(header.vocab_size)
    label = openfst.phi_label_of(automaton) if phi else None
    files["automaton.txt"] = openfst.automaton_text(automaton, weight=alpha, start=start, phi_label=label)
    files["words.syms"] = openfst.word_symbols(automaton, phi_label=label)
    for name, blocks in files.items():
        with atomic_file(out / name) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(blocks)
    print(f"{out}: {_file_sizes([out / name for name in files])}")


def _traced_lattice(trace: Path, example: str | None, position: int, k: int) -> tuple[Trace, Lattice, list[int]]:
    """The trace, the lattice `[h, k]` at a position of an example, and the token ids before it."""
    from lattices.errors import UnknownNameError
    from rescore.checks import check_held_k
    from rescore.tracing import load_trace

    loaded = load_trace(trace)
    chosen = [e for e in loaded.examples if example in (None, e.id)]
    if not chosen:
        raise UnknownNameError("example", str(example), [e.id for e in loaded.examples])
    first = chosen[0]
    last = len(first.output_ids) - 1
    if not 0 <= position <= last:
        raise RescoreError(f"--position {position}: the example {first.id} has the positions 0 to {last}")
    check_held_k(loaded.header.k, k)
    before = [*first.prompt_ids.tolist(), *first.output_ids[:position].tolist()]
    return loaded, first.lattice[position].top(k), before


def _size(option: str, text: str, thousand: int) -> int:
    """A number like 500K, 1.5M or 4G of an option; `thousand` is what K stands for."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kmgt]?)b?", text.strip().lower())
    if not match:
        raise RescoreError(f"{option} {text}: give a number, with K, M, G or T behind it if it is large, like 4G")
    return int(float(match[1]) * thousand ** " kmgt".index(match[2] or " "))


@bench.command(name="verify-curve")
def verify_curve_command(
    base: Base = "smollm2-135m",
    cached: Annotated[int, typer.Option(help="Tokens in the cache.")] = 256,
    repeats: Annotated[int, typer.Option(help="Timed calls of each size; the median counts.")] = 7,
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON line only, without the table.")] = False,
) -> None:
    """Time of one forward of 1 to 144 tokens on a cache, with the memory bandwidth reached."""
    from lm.catalog import load_base
    from rescore.benchmarks import verify_curve
    from rescore.report.tables import verify_curve_table

    curve = verify_curve(load_base(base, dtype=dtype, device=device), cached=cached, repeats=repeats)
    if not as_json:
        print(verify_curve_table(curve))
    print(json.dumps(curve.as_dict()))


def _notify(line: str) -> None:
    """A line for the user, on stderr."""
    print(f"rescore: {line}", file=sys.stderr)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, silent where stderr is no terminal; Ctrl-C that ends the command is told there too."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns: list[Any] = [
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    ]  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(description: str, done: int, total: int) -> None:
            key = description.split(",")[0]
            if key not in tasks:
                tasks[key] = bar.add_task(description, total=total)
            bar.update(tasks[key], description=description, completed=done, total=total)

        try:
            yield show
        except KeyboardInterrupt:
            _notify("interrupted; what is finished is kept, the same command goes on")
            raise typer.Exit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
