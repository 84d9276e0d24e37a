"""The commands of `rescore`: each makes objects of its options, calls one function of the project, and prints.

An option is declared once (`rescore.options`): by a record's field, or a function's parameter. Results go to stdout,
progress and notices to stderr. Heavy libraries are imported inside commands: help is quick. Started by `rescore`.
"""

import functools
import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

import typer
import typer.core
import typer.main
from typer.models import CommandInfo

from lm.options import Corpora, Writer
from rescore import options as shared
from rescore.options import Option, Source, Spec, imported, with_options
from rescore.runs.inputs import DEFAULT_BASE
from rescore.terminal import INTERRUPTED, notify, progress_bar

if TYPE_CHECKING:
    from rich.console import Console

    from lm.ngram.build import NgramOptions
    from rescore.runs.inputs import Inputs
    from rescore.table import Table

NONE, ORACLE, HEADS = (Spec("none"),), (Spec("oracle"),), Spec("heads")
PLAIN_WIDTH = 160  # columns where stdout is no terminal and COLUMNS does not say
GENERATE, MEASURE, LOOK, NGRAMS, TRAIN, TASKS = "Generate", "Measure", "Look", "N-grams", "Train", "Tasks"
INPUTS = "rescore.runs.inputs:Inputs"
EXECUTION = Source("lm.executors:ExecutorOptions")
OF_TASKS = ("task", "limit", "data", "trace", "leave_out", "max_prompt_tokens")
OWN = Source("lm.base.own_output:OwnOutput", but=("batch_size", "temperature", "seed", "with_prompts"))

Body = TypeVar("Body", bound=Callable[..., None])
Asked = functools.partial[Any]  # what a command does, with the values of its options
Details = Annotated[bool, "Also quality, acceptance by position, and in live mode the times."]
Json = Annotated[bool, "Print one JSON document and no table.", "--json"]


class Group(typer.core.TyperGroup):
    """A group whose plain help lists the commands panel by panel, as the help with colours does."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, each in self.commands.items():
            panels.setdefault(getattr(each, "rich_help_panel", None) or "Commands", []).append((name, each.help or ""))
        longest = max(map(len, self.commands))
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl([(name.ljust(longest), text) for name, text in rows])


class Command(typer.core.TyperCommand):
    """A command whose options are looked up when it is asked for."""

    def __init__(self, *, callback: Any, **settings: Any) -> None:
        super().__init__(**settings)
        self._body, self._sources = callback.body, callback.sources

    @functools.cached_property
    def _looked_up(self) -> Any:
        options, run = with_options(self._body, self._sources)
        run.__signature__ = inspect.Signature([_parameter(option) for option in options])  # type: ignore[attr-defined]
        info = CommandInfo(name=self.name, callback=run)
        settings: Any = {"pretty_exceptions_short": False, "rich_markup_mode": self.rich_markup_mode}
        return typer.main.get_command_from_info(info, **settings)

    @property
    def params(self) -> Any:  # type: ignore[override]
        return self._looked_up.params

    @params.setter
    def params(self, _: Any) -> None:
        """Nothing: the library sets those of the callback, which has none."""

    def invoke(self, ctx: Any) -> Any:
        return self._looked_up.invoke(ctx)


def _parameter(option: Option) -> inspect.Parameter:
    """An option as typer has it declared. It is text that may be repeated; `rescore.options` makes values of it."""
    # In help with colours brackets are markup.
    text = option.full_help.replace("[", r"\[") if app.rich_markup_mode else option.full_help
    holds: Any = bool if option.kind is bool else str if option.is_argument and not option.collects else list[str]
    if option.is_argument:
        info: Any = typer.Argument(help=text, metavar=option.spelled[0])
    else:
        info = typer.Option(*option.spelled, help=text, metavar=None if option.kind is bool else option.label)
    default = False if option.kind is bool else option.shown_default
    annotation: Any = Annotated[holds | None, info]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def command(name: str, panel: str | None = None, group: Any = None, **sources: Source) -> Callable[[Body], Body]:
    """Makes a command of a function: its options are the parameters, and those of the `sources` of parameters."""

    def register(body: Body) -> Body:
        def callback() -> None:
            """Has no options: `Command` looks them up."""

        callback.__doc__, callback.body, callback.sources = body.__doc__, body, sources  # type: ignore[attr-defined]
        (group or app).command(name, cls=Command, rich_help_panel=panel)(callback)
        return body

    return register


app = typer.Typer(
    cls=Group,
    help="Draft-refinement rescoring for blockwise parallel decoding: how many tokens does a step accept, how many "
    "could it, which rescorer recovers how much, at what cost. Lists: with commas, or the option again.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # see `run_command`
    context_settings={"max_content_width": 120},
)
bench = typer.Typer(cls=Group, help="Measurements of the machine and the base LM.", rich_markup_mode=None)


def run_command(arguments: Sequence[str]) -> int:
    """Runs a command line, prints its result and gives its exit code; errors are the caller's."""
    app.rich_markup_mode = bench.rich_markup_mode = "rich" if sys.stdout is not None and sys.stdout.isatty() else None
    return int(app(args=list(arguments), prog_name="rescore", standalone_mode=False) or 0)


def _version(asked: bool) -> None:
    if asked:
        versions = imported("lm.environment:versions")()
        print("\n".join(f"{name} {version}" for name, version in versions.items()))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print versions.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options before the command; `--debug` may stand anywhere (`rescore.__main__` takes it)."""


def _show(tables: "Table | Sequence[Table]") -> None:
    """Prints tables: with lines and colours on a terminal, else as plain text."""
    from rescore.table import Table, for_terminal, joined

    each = [tables] if isinstance(tables, Table) else tables
    _console().print(for_terminal(each)) if sys.stdout.isatty() else print(joined(each))


def _console() -> "Console":
    from rich.console import Console

    colours: Any = None if os.environ.get("NO_COLOR") else "auto"
    return Console(highlight=False, markup=False, emoji=False, color_system=colours)


def _print_json(document: Any) -> None:
    from lm.records import plain

    print(json.dumps(plain(document), ensure_ascii=False))


def _done(call: Callable[..., Any], *given: Any, **more: Any) -> Any:
    """What a call gives that shows how far it is."""
    with progress_bar() as progress:
        return call(*given, **more, progress=progress)


def _tell(lines: Iterable[str]) -> None:
    for line in lines:
        notify(line)


def _interrupted(line: str) -> NoReturn:
    notify(f"interrupted; {line}")
    raise typer.Exit(INTERRUPTED)


def _result(result: Any, tables: str, as_json: bool, **more: Any) -> None:
    """Prints what a function gave: what it has to say besides, and its JSON document or what the function at the place
    `tables` makes of it."""
    _tell(getattr(result, "notices", ()))
    if as_json:
        return _print_json(result.as_dict() if hasattr(result, "as_dict") else result)
    _show(imported(tables)(result, **more))


@command("generate", GENERATE, asked=Source("rescore.generation.generating:answers", but=OF_TASKS))
def generate_command(
    asked: Asked,
    max_new_tokens: Annotated[int | None, "Tokens of an output, at most. Default: 256, or its context."] = None,
    stats: Annotated[bool, "Say on stderr how fast each was, and where the time went."] = False,
    as_json: Annotated[bool, "Print a JSON document for each prompt, with statistics.", "--json"] = False,
) -> None:
    """Generate text, the base's own, in fewer steps: for a prompt, or all of a file in turn."""
    from rescore.generation.generating import write_piece

    try:
        for number, answer in enumerate(asked(stream=None if as_json else write_piece), start=1):
            _print_json(answer.as_dict()) if as_json else print()
            sys.stdout.flush()
            _tell([f"prompt {number}: {answer.output.line()}"] if stats else [])
    except KeyboardInterrupt:
        print(end="" if as_json else "\n", flush=True)
        _interrupted("what was printed so far is all")


@command("eval", MEASURE, inputs=Source(INPUTS), accepting=Source("rescore.acceptance.options:Acceptance"))
def eval_command(
    *,
    task: shared.Tasks = (),
    rescorer: shared.Rescorers = NONE,
    drafter: shared.Drafters = (),
    draft_vocabulary: shared.DraftVocabularies = (),
    k: Annotated[shared.Ks, "Tokens of each head that are in the lattice. Default: 16."] = (),
    p: Annotated[shared.Ps, "Drafts that one step verifies; 1,16 runs both. Default: 1."] = (),
    nodes: shared.Nodes = None,
    alpha: shared.Alpha = None,
    inputs: "Inputs",
    mode: Annotated[Literal["replay", "live"], "From a trace, fast; or decoding, which measures time."] = "replay",
    verify: shared.Verify = "tree",
    accepting: Any = None,
    peer: shared.Peers = (),
    costs: shared.CostsFile = None,
    out: Annotated[Path | None, "Folder for per-example lines and results.json; resumable."] = None,
    seed: shared.BootstrapSeed = 0,
    details: Details = False,
    as_json: Json = False,
) -> None:
    """Block efficiency of rescorers on tasks: what a step accepts, and what it could (oracle)."""
    _check(task, inputs)
    from rescore.runs.evaluation import evaluate
    from rescore.runs.recording import open_recordings
    from rescore.runs.run import runs_of
    from rescore.studies.draft_vocabulary import VocabularySweep
    from rescore.studies.until_divergence import until_divergence

    asked = runs_of(rescorer, ks=k, ps=p, alpha=alpha, drafters=drafter, nodes=nodes)
    runs = (sweep := VocabularySweep.of(asked, draft_vocabulary)).runs
    needed: dict[str, Any] = {"k": max(run.k for run in runs), "heads_needed": any(run.needs_heads for run in runs)}
    rule = accepting.rule() if accepting else None
    how: dict[str, Any] = {"costs": costs, "peers": peer, "seed": seed, "out": out, **({"rule": rule} if rule else {})}
    recordings = open_recordings(task, inputs, **needed)
    if mode == "replay" and rule is not None and rule.lossy:
        found = _done(until_divergence, recordings, runs, verify=verify, details=details, **how)
        return _result(found, "rescore.studies.until_divergence:until_divergence_table", as_json)
    evaluation = _done(evaluate, recordings, runs, live=mode == "live", verify=verify, notify=notify, **how)
    _print_json(evaluation.document) if as_json else _show(sweep.tables(evaluation, details=details, seed=seed))
    if evaluation.interrupted:
        kept = f"and kept in {out}: the same command goes on" if out else "(--out DIR would keep them)"
        _interrupted(f"the finished examples are shown {kept}" if evaluation.results else "none was finished yet")


def _check(tasks: Sequence[str], inputs: "Inputs") -> None:
    """Reports a mistake before the heavy libraries are loaded; a given trace's name may be any."""
    from rescore.tasks import load_task

    inputs.check()
    for name in tasks if inputs.trace is None else ():
        load_task(name)


@command("oracle", MEASURE, inputs=Source(INPUTS, but=("compile",)))
def oracle_command(
    *,
    task: shared.Tasks = (),
    drafter: shared.Drafters = (),
    k: shared.Ks = (1, 2, 4, 8, 16),
    inputs: "Inputs",
    details: Details = False,
    as_json: Json = False,
) -> None:
    """Oracle block efficiency by k: the same as rescore eval --rescorer oracle --k 1,2,4,8,16."""
    eval_command(task=task, rescorer=ORACLE, drafter=drafter, k=k, inputs=inputs, details=details, as_json=as_json)


@command("tune", MEASURE, inputs=Source(INPUTS, but=("limit", "compile")))
def tune_command(
    *,
    rescorer: Annotated[Sequence[Spec], "A rescorer with a weight, like ngram; several. Or joint, alone."],
    task: shared.Tasks = (),
    alphas: shared.Alphas = (),
    k: shared.Ks = (16,),
    p: Annotated[shared.Ps, "Drafts that one step verifies; each has its own weight. Not of joint."] = (1, 16),
    held_out: Annotated[int, "Examples to tune on, of the last sources of the data; at most half of them."] = 100,
    out: Annotated[Path | None, "Folder for the weights of joint, which are fitted on all tasks together."] = None,
    drafter: shared.Drafters = (),
    without: Annotated[Sequence[str], "Features of joint to leave out: heads, text, recency, ngram ..."] = (),
    inputs: "Inputs",
    as_json: Json = False,
) -> None:
    """Tune a rescorer's weight (alpha) by replay on held-out examples, for `rescore eval --alpha tuned`."""
    _check(task, inputs)
    from rescore.runs.recording import open_recordings
    from rescore.runs.run import runs_of
    from rescore.runs.tables import tuning_table
    from rescore.runs.tuning import DEFAULT_ALPHAS, fit_joint, fitted_spec, is_joint, tune

    joint = is_joint(rescorer, out, without, alphas)
    heads_needed = any(run.needs_heads for run in runs_of(rescorer, drafters=drafter))
    recordings = open_recordings(task, inputs, k=max(k), heads_needed=heads_needed)
    how: dict[str, Any] = {"held_out": held_out, "notify": notify, "drafters": drafter}
    if joint:
        fit = _done(fit_joint, recordings, out, rescorer[0], without=without, k=max(k), **how)
        _result(fit, "rescore.runs.tables:joint_fit_table", as_json)
        among = f" --drafter {','.join(drafter)}" if drafter else ""
        return notify(f"written: rescore eval --rescorer {fitted_spec(rescorer[0], out)}{among} uses these weights")
    sweeps = _done(tune, recordings, rescorer, alphas=alphas or DEFAULT_ALPHAS, ks=k, ps=p, **how)
    _print_json(sweeps) if as_json else _show(tuning_table(sweeps))
    notify("kept on this machine: rescore eval --alpha tuned with the same options uses these weights")


@command("trace", MEASURE, inputs=Source(INPUTS, but=("trace", "h", "compile")), execution=EXECUTION)
def trace_command(
    *,
    out: Annotated[Path, "Folder for the trace; resumable."],
    task: shared.Task = "squad",
    k: Annotated[int, "Lattice entries kept per head."] = 32,
    drafter: Annotated[Spec, "Whose lattices: heads, draft-model:, eagle:, hydra:, mtp, a plug-in's; or none."] = HEADS,
    inputs: "Inputs",
    execution: Any,
) -> None:
    """Record a trace: greedy output and lattices of a task, for replay with `rescore eval --trace`."""
    _check((task,), inputs)
    from rescore.runs.recording import record_task

    record = functools.partial(record_task, k=k, execution=execution, notify=notify)
    print(f"{out}: {_done(record, replace(inputs, task=task), drafter, out).line()}")


@command("import-trace", MEASURE, asked=Source("rescore.imports.importing:import_trace"))
def import_trace_command(asked: Asked) -> None:
    """Make a trace of what another program stored: hidden states, or a log of drafts and the outputs."""
    print(f"{asked.keywords['out']}: {_done(asked, notify=notify).line()}")


@command("build-tree", MEASURE, asked=Source("rescore.studies.tree_building:build_tree"))
def build_tree_command(asked: Asked, as_json: Json = False) -> None:
    """Make the tree for --rescorer medusa-tree whose tokens were right most often in traces."""
    _result(asked(), "rescore.studies.tree_building:tree_table", as_json)


@command("suite", MEASURE, plan=Source("rescore.suites.plan:read_plan"), execution=EXECUTION)
def suite_command(
    plan: Asked, execution: Any, out: Annotated[Path, "Folder for its results; resumable."], as_json: Json = False
) -> None:
    """Run a whole table, tasks x rescorers x k, from one YAML file; goes on where it was stopped."""
    from rescore.suites.run import run_suite
    from rescore.suites.tables import suite_tables

    suite = _done(run_suite, plan(), out, source=plan.keywords["path"].name, execution=execution, notify=notify)
    if as_json:
        _print_json(suite.document)
    else:
        _show(suite_tables(suite.document.results)) if suite.document.results else print("no finished examples")
    if suite.interrupted:
        _interrupted(f"the finished examples are kept in {out}: the same command goes on")


@command("analyse", LOOK, asked=Source("rescore.studies.analysis.collect:analyse_folders"))
def analyse_command(asked: Asked, as_json: Json = False) -> None:
    """Analyse traces or finished runs: repetition, entropy and h_max, oracle, wins and losses, ranks, calibration."""
    _result(asked(), "rescore.studies.analysis.text:findings_tables", as_json)


@command("compare", LOOK, asked=Source("rescore.studies.comparison:compare_folders"))
def compare_command(asked: Asked, as_json: Json = False) -> None:
    """Compare two results by example: difference in block efficiency with its paired interval, won, tied, lost."""
    _result(asked(), "rescore.studies.tables:comparison_table", as_json)


@command("inspect", LOOK, asked=Source("rescore.reports.inspection:inspect_example"))
def inspect_command(asked: Asked, as_json: Json = False) -> None:
    """Show one example block by block: the lattice, each rescorer's draft, what was accepted, what the base wanted."""
    from rescore.reports.inspection_view import inspection_lines

    inspection = asked()
    _tell(inspection.notices)
    if as_json:
        return _print_json(inspection.as_dict())
    console = _console()
    width = console.width if console.is_terminal else shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns
    for text in inspection_lines(inspection, width=width):
        console.print(text, soft_wrap=True) if console.is_terminal else print(text.plain)


@command("cost", LOOK, asked=Source("rescore.studies.cost.inputs:cost_tables"))
def cost_command(asked: Asked, as_json: Json = False) -> None:
    """Cost model: weights and KV cache read and FLOPs per decoded token, by method and context."""
    costs, table = asked(), imported("rescore.studies.tables:cost_table")
    _print_json([each.as_dict() for each in costs]) if as_json else _show([table(each) for each in costs])


@command("report", LOOK, asked=Source("rescore.reports.page:report"))
def report_command(asked: Asked, as_json: Json = False) -> None:
    """Make one HTML page of results: tables, charts and a lattice explorer; works from disk, without network."""
    written = _done(asked)
    _tell(written.missing)
    _print_json(written.as_dict()) if as_json else print(written.lines())


@command("export", LOOK, asked=Source("rescore.exports.result:export"))
def export_command(asked: Asked) -> None:
    """Give a result to another program: what makes an engine accept as much, or the file that a benchmark reads."""
    exported = asked()
    _tell(exported.notices)
    print(exported.out or exported)


@command("build-ngram", NGRAMS, options=Source("lm.ngram.build:NgramOptions"), own=OWN, execution=EXECUTION)
def build_ngram_command(
    corpus: Corpora,
    options: "NgramOptions",
    own: Any,
    execution: Any,
    out: Annotated[Path | None, "Folder; resumable. Default: beside the corpus, NAME-4gram for NAME.txt."] = None,
    tokenizer: Annotated[
        str | None,
        "Base LM whose token ids the words are, or words: split at white space. Default: --base, else smollm2-135m.",
    ] = None,
    discount_fallback: Annotated[bool, "Use discounts 0.5, 1, 1.5 where the corpus gives none."] = False,
    base: Writer = None,
    as_json: Json = False,
) -> None:
    """Estimate an n-gram model from text: ARPA file, compiled automaton and manifest in one folder."""
    from lm.ngram.build import build_ngram, folder_beside

    folder = folder_beside(corpus, f"-{options.order}gram") if out is None else out
    tokenizer = tokenizer or base or DEFAULT_BASE
    own = replace(own, base=base or tokenizer)
    options = replace(options, tokenizer=tokenizer, discount_fallback=(0.5, 1.0, 1.5) if discount_fallback else None)
    summary = _done(build_ngram, corpus, folder, options, own=own, replace=out is not None, execution=execution)
    _result(summary, "rescore.studies.tables:built_ngram_table", as_json)
    None if as_json else print(f"next: {summary.use(tokenizer)}")


@command("build-lookup", NGRAMS, options=Source("lm.lookup_index:LookupOptions"), own=OWN)
def build_lookup_command(
    corpus: Corpora,
    options: Any,
    own: Any,
    out: Annotated[Path | None, "Folder. Default: beside the corpus, NAME-lookup for NAME.txt."] = None,
    tokenizer: Annotated[str | None, "Base LM whose token ids are indexed. Default: --base, else smollm2-135m."] = None,
    base: Writer = None,
    as_json: Json = False,
) -> None:
    """Index a corpus, so that continuations of the last tokens are looked up in it: a static suffix array."""
    from lm.lookup_index import build_lookup
    from lm.ngram.build import folder_beside

    folder = folder_beside(corpus, "-lookup", what="index") if out is None else out
    tokenizer = tokenizer or base or DEFAULT_BASE
    own, options = replace(own, base=base or tokenizer), replace(options, tokenizer=tokenizer)
    summary = _done(build_lookup, corpus, folder, options, own=own, replace=out is not None)
    _result(summary, "rescore.studies.tables:built_lookup_table", as_json)
    None if as_json else print(f"next: {summary.use()}")


@command("build-draft-vocabulary", NGRAMS, asked=Source("lm.draft_vocabulary:build_draft_vocabulary", but=OWN.but))
def build_draft_vocabulary_command(asked: Asked, as_json: Json = False) -> None:
    """Rank a base's tokens by their counts in text, so that its heads draft from the most frequent ones."""
    _result(_done(asked), "rescore.studies.tables:draft_vocabulary_table", as_json)


@command("mix-ngram", NGRAMS, asked=Source("rescore.studies.ngram_mixing:mix_models"))
def mix_ngram_command(asked: Asked, as_json: Json = False) -> None:
    """Interpolate n-gram models into one: p = the weighted sum of theirs, with weights given or tuned by replay."""
    _result(_done(asked), "rescore.studies.tables:mixing_tables", as_json)


@command("score-ngram", NGRAMS, asked=Source("lm.ngram.score:score_file"))
def score_ngram_command(asked: Asked, as_json: Json = False) -> None:
    """Perplexity of a text under an n-gram model, with the counts of unknown words."""
    score, given = _done(asked), asked.keywords
    if score.unknown_share > 0.9:
        notify(f"{given['ngram']} does not know {score.unknown_share:.0%} of the words; is this the right --tokenizer?")
    _result(score, "rescore.studies.tables:ngram_score_table", as_json, text=given["text"])


@command("export-fst", NGRAMS, asked=Source("rescore.exports.openfst:export_openfst"))
def export_fst_command(asked: Asked) -> None:
    """Write an n-gram automaton and one lattice of a trace, with their exact composition, as OpenFst text."""
    print(f"{asked.keywords['out']}: {imported('rescore.studies.tables:file_sizes')(asked())}")


@command("generate-corpus", TRAIN, asked=Source("lm.base.corpus:write_own_corpus"))
def generate_corpus_command(asked: Asked) -> None:
    """Write the base LM's own output for many prompts: what block heads and rescorers learn from."""
    print(_done(asked))


@command("train-heads", TRAIN, asked=Source("lm.training.run:train_heads"))
def train_heads_command(asked: Asked) -> None:
    """Train block heads, on a frozen base LM or together with it. Several GPUs: torchrun --no-python rescore ..."""
    if (accuracy := _done(asked, notify=notify)) is not None:
        _show(imported("rescore.studies.tables:accuracy_table")(accuracy))
        text, options, out = (asked.keywords[name] for name in ("text", "options", "out"))
        use = f"--base {text.base} --heads {out}" if options.tune == "none" else f"--base {out}"
        print(f"{out}: heads 2 to {options.h}; rescore eval {use}")


@command("convert-heads", TRAIN, asked=Source("rescore.exports.heads:convert_heads"))
def convert_heads_command(asked: Asked) -> None:
    """Write block heads, ours or Medusa heads of others, in a layout that another program serves, or in ours."""
    _tell((converted := asked()).notices)
    print(converted.line())


@command("train-rescorer", TRAIN, asked=Source("lm.training.run:train_rescorer"))
def train_rescorer_command(
    size: Annotated[str, "neural-32m, neural-61m or neural-94m.", "SIZE"],
    asked: Asked,
    base: Annotated[str, "Base LM it is to rescore for.", "--tokenizer", "--base"] = DEFAULT_BASE,
) -> None:
    """Train a small neural LM that rescores drafts. Several GPUs: torchrun --no-python rescore ..."""
    if (measured := _done(asked, notify=notify)) is not None:
        print(f"{asked.keywords['out']}: {measured.line()}")


@command("train-bigram", TRAIN, asked=Source("lm.training.run:train_bigram"))
def train_bigram_command(asked: Asked) -> None:
    """Train a learned bigram on the heads' lattices of a corpus."""
    if (measured := _done(asked)) is not None:
        print(f"{asked.keywords['out']}: {measured.line()}")


@command("tasks", TASKS, asked=Source("rescore.tasks.listing:list_tasks"))
def tasks_command(asked: Asked, as_json: Json = False) -> None:
    """List the tasks: what they ask, what they are scored by, where their data come from."""
    from rescore.tasks.listing import tasks_table

    facts = asked()
    if as_json:
        _print_json(facts)
    elif asked.keywords["names"]:
        print("\n\n".join(each.in_full() for each in facts))
    else:
        _show(tasks_table(facts))


@command("perplexity", TASKS, asked=Source("rescore.studies.perplexity:perplexity_of_task"))
def perplexity_command(asked: Asked, as_json: Json = False) -> None:
    """Perplexity of the base LM on a task's passages, by a window that moves on with a stride."""
    found, given = _done(asked), asked.keywords
    _tell([found.notice] if found.notice else [])
    _print_json(found) if as_json else print(found.line(given["base"], given["dtype"]))


@command("overlap", TASKS, asked=Source("rescore.studies.overlap:find_overlap"))
def overlap_command(
    asked: Asked,
    out: Annotated[Path | None, "Write the list for --leave-out (ids and digests, no text)."] = None,
    as_json: Json = False,
) -> None:
    """Find examples that share runs of 13 words (prompt or references) with training corpora."""
    from rescore.tasks.leave_out import write_leave_out

    overlap = _done(asked)
    if out is not None:
        about = f"Examples that share {overlap.n} words in a row with {', '.join(overlap.corpora)}"
        write_leave_out(overlap, out, about=about)
    _result(overlap, "rescore.studies.overlap:overlap_table", as_json)


@command("verify-curve", group=bench, inputs=Source(INPUTS, only=("base", "dtype", "device", "compile")))
def verify_curve_command(
    inputs: "Inputs", cached: shared.Cached = 256, repeats: shared.Repeats = 7, as_json: Json = False
) -> None:
    """Time of one forward of 1 to 144 tokens on a cache, as decoding has it, with the memory bandwidth reached."""
    curve = imported("rescore.costs.measuring:verify_curve_of")(inputs, cached=cached, repeats=repeats)
    _result(curve, "rescore.studies.tables:verify_curve_table", as_json)


@command("costs", group=bench, asked=Source("rescore.costs.measuring:costs_of", but=(*OF_TASKS, "max_new_tokens")))
def costs_command(asked: Asked, as_json: Json = False) -> None:
    """Measure what a step costs here, by tokens and context, with heads and rescorers: for `rescore eval --costs`."""
    _result(_done(asked), "rescore.studies.tables:costs_tables", as_json)


@command("block-length", group=bench, asked=Source("rescore.studies.block_length:block_lengths_of_trace"))
def block_length_command(asked: Asked, as_json: Json = False) -> None:
    """Which block length pays here: acceptance from a trace against what verify, heads and rescoring cost."""
    _result(_done(asked), "rescore.studies.tables:block_length_table", as_json)


app.add_typer(bench, name="bench", rich_help_panel="Bench")
