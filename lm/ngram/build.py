"""Builds an n-gram model folder from corpora: what the command `build-ngram` does.

A folder holds `model.arpa` (the model as text), `automaton.bin` (the compiled automaton) and `manifest.json` (what it
was made of), written last; the folder takes its place as a whole. While it is made, `OUT/.counting` keeps the encoded
corpus and the finished runs of n-grams, so that the same command after a kill goes on from there; with other corpora
or settings that touch the counts it starts clean.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np

from lattices.errors import IncompatibleError, InvalidDataError, OutputError, RescoreError, UnknownNameError
from lattices.ngrams import MAX_ORDER, SENTENCE_END, NgramModel
from lattices.paths import is_writable, user_path
from lm.base.own_output import OWN_PREFIX, OwnOutput, own_output
from lm.executors import LOCAL, LOCALLY, Executor, ExecutorOptions
from lm.files import atomic_folder, changed_settings, read_json_object, sha256_of_file, write_json, writing
from lm.locks import warn, writing_to
from lm.ngram.corpus import (
    HUB_PREFIX,
    CorpusSource,
    EncodedCorpus,
    check_there,
    check_unchanged,
    encode_corpora,
    find_sources,
)
from lm.ngram.counting import BREAK, Progress, Workspace, count_full, no_progress
from lm.ngram.estimation import Estimate, check_fallback, check_thresholds, estimate
from lm.ngram.tables import build_table
from lm.options import Field, Size, Utf8Errors
from lm.records import plain
from lm.text_files import name_without_endings

WORDS = "words"  # the tokenizer's name that stands for none
LEAST_MEMORY = 1 << 29
OVERHEAD = 1 << 28  # libraries, compiled code and the blocks of text in hand
COUNTING_FOLDER, ENCODED_FILE, STREAM_FILE = ".counting", "encoded.json", "stream.i32"
ARPA_FILE, AUTOMATON_FILE, MANIFEST_FILE = "model.arpa", "automaton.bin", "manifest.json"
KIND = "n-gram model"
WRITTEN_WORDS = 1 << 18  # of lmplz's text at a time
COUNTING_FORMAT = 1  # changes with what the files of `.counting` mean
Estimator = Literal["own", "lmplz"]
Smoothing = Literal["kneser-ney", "katz"]
# The options that say how a corpus is read, and those that say how a model is estimated from what was read.
READING = ("order", "tokenizer", "surface", "errors", "field")
ESTIMATING = ("smoothing", "prune", "discount_fallback", "max_ngrams", "estimator")
DISTINGUISHING = (*READING, "tokenizer_sha256", *ESTIMATING)  # what of a manifest, besides its corpora, makes a model


@dataclass(frozen=True, kw_only=True)
class NgramOptions:
    """How an n-gram model is made of text."""

    order: Annotated[int, "Length of the longest n-grams, 1 to 6."] = 4
    tokenizer: str = "smollm2-135m"  # a base LM's name, or `words` for words at white space
    prune: Annotated[Sequence[int], "Drop n-grams that occur at most so often, by order, like 0,0,1,2."] = ()
    discount_fallback: Sequence[float] | None = None  # where the corpus gives no discounts
    smoothing: Annotated[Smoothing, "Modified and interpolated Kneser-Ney, or Katz (prunes 0,0,1,3 by default)."] = (
        "kneser-ney"
    )
    max_ngrams: Annotated[int | None, "Prune by entropy down to so many n-grams, like 500K or 100M.", Size(1000)] = None
    surface: Annotated[bool, "Write token strings instead of ids."] = False
    memory: Annotated[int, "Memory for the counts in bytes, like 4G; the rest goes to disk.", Size(1024)] = 4 << 30
    threads: Annotated[int | None, "Threads; default: one per core."] = None
    errors: Utf8Errors = "strict"
    field: Field = "text"
    estimator: Annotated[Estimator, "lmplz: KenLM's program, if it is on PATH."] = "own"

    def checked(self) -> NgramOptions:
        """The same with a threshold for every order and all fallback discounts. Raises `RescoreError`."""
        if not 1 <= self.order <= MAX_ORDER:
            raise RescoreError(f"order {self.order} is not supported; choose 1 to {MAX_ORDER}")
        for name, known in (("estimator", get_args(Estimator)), ("smoothing", get_args(Smoothing))):
            if getattr(self, name) not in known:
                raise UnknownNameError(name, getattr(self, name), known)
        katz, fallback = self.smoothing == "katz", self.discount_fallback
        if self.estimator == "lmplz" and (katz or self.max_ngrams is not None):
            raise RescoreError("lmplz knows Kneser-Ney and pruning by counts only; leave out smoothing and max_ngrams")
        if self.memory < LEAST_MEMORY:
            raise RescoreError(f"memory of {self.memory:,} bytes is too little; give at least {LEAST_MEMORY >> 20}M")
        for name in ("threads", "max_ngrams"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise RescoreError(f"{name} = {number}; it must be at least 1")
        if katz and fallback is not None:
            raise RescoreError("fallback discounts are Kneser-Ney's; leave them out with smoothing katz")
        if self.estimator == "lmplz" and shutil.which("lmplz") is None:
            raise RescoreError("there is no lmplz on PATH; build it from KenLM's sources, or use --estimator own")
        prune = check_thresholds(self.prune, self.order, self.smoothing)
        return dataclasses.replace(self, prune=prune, discount_fallback=check_fallback(fallback))


@dataclass(frozen=True)
class NgramSummary:
    """What was built."""

    path: str  # the folder
    order: int
    ngrams: tuple[int, ...]  # by order
    documents: int
    tokens: int
    discounts: tuple[tuple[float, ...], ...]  # by order: Kneser-Ney's D1, D2, D3+ (Katz: factors d1 ... d5)
    fallback_orders: tuple[int, ...]  # whose discounts could not be estimated
    resumed: bool  # finished work of an earlier run was used

    def use(self, tokenizer: str) -> str:
        """The command that uses the model next, which was built with this tokenizer."""
        if tokenizer == WORDS:
            return f"rescore score-ngram TEXT --ngram {shlex.quote(self.path)}"
        base = "" if tokenizer == NgramOptions.tokenizer else f"--base {shlex.quote(tokenizer)} "
        return f"rescore eval {base}--rescorer {shlex.quote(f'ngram:{self.path}')}"


def build_ngram(
    corpora: Sequence[Path | str],
    out: Path,
    options: NgramOptions = NgramOptions(),
    *,
    own: OwnOutput | None = None,
    replace: bool = True,
    execution: ExecutorOptions = LOCALLY,
    progress: Progress | None = None,
) -> NgramSummary:
    """Estimates an n-gram model from `corpora` (see `lm.ngram.corpus`) and writes it to the folder `out`.

    A corpus may also be `own:PROMPTS`: greedy output for a file of prompts, generated as `own` says (default: by the
    base of the tokenizer) and kept in the cache directory. `replace`: whether a finished model in `out` that was made
    of other things may be replaced; it is refused with the difference if not (`IncompatibleError`). `execution`: who
    counts.

    Raises `RescoreError` for options that make no sense, `InvalidDataError` for corpora that can't be used,
    `OutputError` where `out` can't be written or another process writes to it. `progress(stage, done, total)` is called
    now and then; an exception from it interrupts the build.
    """
    options, progress = options.checked(), progress or no_progress
    execution.check()
    if options.estimator == "lmplz" and execution.executor != LOCAL:
        raise RescoreError("lmplz counts by itself, here; drop --executor, or --estimator lmplz")
    check_place(out)
    check_there(corpora)
    with writing_to(out, beside=True):
        tokenizer, tokenizer_hash, tokenization_hash = _load(options.tokenizer)
        settings = own or OwnOutput(base=options.tokenizer)
        generate = partial(own_output, settings=settings, tokenizer_sha256=tokenizer_hash, progress=progress)
        sources = find_sources(corpora, generate=generate)
        reading = {
            **{name: getattr(options, name) for name in READING},
            "tokenizer_sha256": tokenizer_hash,
            "tokenization_sha256": tokenization_hash,
            "corpora": sources,
        }
        estimating = {name: getattr(options, name) for name in ESTIMATING}
        manifest = plain({**reading, "corpora": [source.without_place() for source in sources], **estimating})
        if (out / MANIFEST_FILE).is_file():
            check_earlier(out, _changed_since(out / MANIFEST_FILE, manifest), what="model", replace=replace)
        work = out / COUNTING_FOLDER
        counted = plain({"format": COUNTING_FORMAT, **reading})
        earlier = _read_encoded(work, counted)
        encoded = earlier or _encode(sources, work, tokenizer, options, counted, progress)
        if options.estimator == "lmplz":
            estimated = _run_lmplz(encoded, work, options, progress)
        else:
            with execution.started() as executor:
                estimated = _estimate(encoded, work, options, executor, progress)
        summary = NgramSummary(
            str(out), options.order, tuple(map(len, estimated.model.orders)), encoded.documents, encoded.tokens,
            estimated.discounts, estimated.fallback_orders, earlier is not None,
        )  # fmt: skip
        measured = ("documents", "tokens", "ngrams", "discounts", "fallback_orders")
        manifest |= {"memory": options.memory, **{name: getattr(summary, name) for name in measured}}
        write_model(estimated.model, out, manifest, progress=progress)
        return summary


def _estimate(
    encoded: EncodedCorpus, work: Path, options: NgramOptions, executor: Executor, progress: Progress
) -> Estimate:
    room, threads = max(options.memory - OVERHEAD, 1), options.threads or os.cpu_count() or 1
    with writing(work):
        full = count_full(
            encoded.ids(), order=options.order, vocabulary_size=len(encoded.vocabulary), folder=work, memory=room,
            threads=max(threads, executor.workers), executor=executor, progress=progress,
        )  # fmt: skip
    workspace = Workspace(work, room // 2)  # the rest for what comes and goes
    table = build_table(full, workspace, threads=threads)
    del full
    progress("estimating", 0, 1)
    estimated = estimate(
        table, encoded.vocabulary, smoothing=options.smoothing, prune=options.prune,
        discount_fallback=options.discount_fallback, max_ngrams=options.max_ngrams, workspace=workspace,
    )  # fmt: skip
    progress("estimating", 1, 1)
    return estimated


def write_model(model: NgramModel, out: Path, manifest: dict[str, Any], *, progress: Progress = no_progress) -> None:
    """Writes a model's folder as a whole; `manifest` is what else it says of itself. Raises `OutputError`."""
    from lattices.automaton import Automaton
    from lm.ngram.arpa import write_arpa

    with atomic_folder(out) as temporary:
        progress("writing", 0, 2)
        write_arpa(model, temporary / ARPA_FILE)
        progress("writing", 1, 2)
        Automaton.compile(model).save(temporary / AUTOMATON_FILE)
        identity = {"kind": KIND, "version": importlib.metadata.version("rescore")}
        files = {name: sha256_of_file(temporary / name) for name in (ARPA_FILE, AUTOMATON_FILE)}
        write_json(temporary / MANIFEST_FILE, {**identity, **manifest, "files": files})
        progress("writing", 2, 2)


# Where a model goes


def folder_beside(corpora: Sequence[Path | str], ending: str, *, what: str = "model") -> Path:
    """The folder NAME and `ending` beside a corpus NAME.txt, NAME.jsonl.gz ... or a folder NAME.

    Raises `RescoreError` for a corpus that is no file or folder here and for several, `OutputError` where nothing can
    be written beside it; each asks for --out.
    """
    if len(corpora) != 1:
        raise RescoreError(f"several corpora have no place of their own; give the {what} a folder: --out DIR")
    corpus = corpora[0]
    if isinstance(corpus, str) and corpus.startswith((HUB_PREFIX, OWN_PREFIX)):
        raise RescoreError(f"{corpus} has no place of its own; give the {what} a folder: --out DIR")
    path = user_path(corpus, "the corpus")
    if not path.exists():
        raise RescoreError(f"can't read {path}: No such file or directory; check its name, or give another")
    path = path.absolute() if path.name not in ("", "..") else path.resolve()  # "." and ".." have no name
    if not is_writable(path.parent):
        raise OutputError(f"can't write beside {corpus}; give the {what} a folder elsewhere: --out DIR")
    folder = path.with_name(f"{path.name if path.is_dir() else name_without_endings(path)}{ending}")
    here = Path.cwd()
    return folder.relative_to(here) if not Path(corpus).is_absolute() and folder.is_relative_to(here) else folder


def check_place(out: Path) -> None:
    """The whole folder is replaced, so it must be new, empty or an earlier model's."""
    if out.is_file():
        raise OutputError(f"{out} is a file; the model is a folder, choose another --out")
    if not out.is_dir() or is_model_folder(out):
        return
    if any(path.name != COUNTING_FOLDER for path in out.iterdir()):
        raise OutputError(f"{out} holds files that are no n-gram model, which would be lost; choose another --out")


def is_model_folder(folder: Path) -> bool:
    """Whether the manifest in a folder says that an n-gram model was built there."""
    with suppress(OSError, ValueError, AttributeError):
        return bool(json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8")).get("kind") == KIND)
    return False


def check_earlier(out: Path, changed: Sequence[str], *, what: str, replace: bool) -> None:
    """Says that what is finished in `out` is made again if nothing has changed since. Raises `IncompatibleError` with
    the difference if it was made of other things, unless that may be replaced."""
    if not changed:
        warn(f"{out} holds this {what} already; it is made again")
    elif not replace:
        raise IncompatibleError(
            f"{out} holds another {what} ({'; '.join(changed)}); remove it, or give this one --out DIR"
        )


def _changed_since(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """In what the model of the manifest at `path` was made of other things."""
    earlier = read_json_object(path, missing=f"no n-gram model in {path.parent}", advice="give another --out")
    before, now = (
        {name: made.get(name) for name in DISTINGUISHING}
        | {"corpora": {c.get("name"): str(c.get("sha256"))[:12] for c in made.get("corpora") or () if c}}
        for made in (earlier, manifest)
    )
    return changed_settings(before, now)


# Reading


def _load(tokenizer: str) -> tuple[Any | None, str | None, str | None]:
    """The tokenizer, what its ids mean, and how it cuts text (`lm.keys`)."""
    if tokenizer == WORDS:
        return None, None, None
    from lm.base.catalog import load_tokenizer, tokenization_of
    from lm.base.identity import tokenizer_sha256

    loaded = load_tokenizer(tokenizer)
    return loaded, tokenizer_sha256(loaded), tokenization_of(tokenizer)


def _read_encoded(work: Path, settings: dict[str, Any]) -> EncodedCorpus | None:
    """The stream of word ids that an earlier run with the same settings finished."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        earlier = json.loads((work / ENCODED_FILE).read_text(encoding="utf-8"))
        stream = work / STREAM_FILE
        if earlier.pop("settings") == settings and stream.stat().st_size == 4 * earlier.pop("length"):
            return EncodedCorpus(stream, tuple(earlier.pop("vocabulary")), **earlier)
    return None


def _encode(
    sources: Sequence[CorpusSource], work: Path, tokenizer: Any | None, options: NgramOptions,
    settings: dict[str, Any], progress: Progress,
) -> EncodedCorpus:  # fmt: skip
    """The stream of word ids, in a folder that held nothing else before."""
    stream = work / STREAM_FILE
    with writing(work):
        if work.is_dir():
            shutil.rmtree(work)
        work.mkdir(parents=True)
    try:
        encoded = encode_corpora(
            sources, stream, tokenizer=tokenizer, left_context=options.order - 1, field=options.field,
            errors=options.errors, surface=options.surface, progress=progress,
        )  # fmt: skip
        check_unchanged(sources)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)  # a part of a stream is of no use
        with suppress(OSError):
            work.parent.rmdir()  # if there is nothing else in it
        raise
    document = {name: value for name, value in vars(encoded).items() if name != "path"}
    write_json(work / ENCODED_FILE, {"settings": settings, "length": stream.stat().st_size // 4, **document})
    return encoded


# lmplz


def _run_lmplz(encoded: EncodedCorpus, work: Path, options: NgramOptions, progress: Progress) -> Estimate:
    """What lmplz estimates from the stream. A cut document ends as any other there."""
    from lm.ngram.arpa import read_arpa

    text, arpa = work / "stream.txt", work / "lmplz.arpa"
    ids, words = encoded.ids(), np.array([word + " " for word in encoded.vocabulary], dtype=object)
    words[SENTENCE_END] = "\n"
    with writing(text), text.open("w", encoding="utf-8", newline="\n") as stream:
        for begin in range(0, len(ids), WRITTEN_WORDS):
            part = ids[begin : begin + WRITTEN_WORDS]
            stream.write("".join(words[np.where(part == BREAK, SENTENCE_END, part)]))
    arguments = ["--order", str(options.order), "--memory", f"{options.memory}b"]
    arguments += ["--temp_prefix", f"{work.resolve()}{os.sep}", "--vocab_estimate", str(len(encoded.vocabulary))]
    arguments += ["--text", str(text), "--arpa", str(arpa), "--prune", *map(str, options.prune)]
    if options.discount_fallback is not None:
        arguments += ["--discount_fallback", *map(str, options.discount_fallback)]
    progress("estimating", 0, 1)
    done = subprocess.run(["lmplz", *arguments], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(("=", "-", "*"))]
        reason = next((line for line in lines if "iscount" in line or "rror" in line), (lines or ["no message"])[-1])
        raise InvalidDataError(f"lmplz failed: {reason.strip()}")
    discounts = re.findall(r"^\d+ \S+ D1=(\S+) D2=(\S+) D3\+=(\S+)$", done.stderr, re.MULTILINE)
    text.unlink()
    return Estimate(read_arpa(arpa), tuple(tuple(map(float, of_order)) for of_order in discounts), ())
