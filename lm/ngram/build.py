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
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from lattices.errors import IncompatibleError, InvalidDataError, OutputError, RescoreError, UnknownNameError
from lattices.ngrams import SENTENCE_END, NgramModel
from lm.base.own_output import OwnOutput
from lm.files import atomic_folder, sha256_of_file, write_json, writing
from lm.locks import writing_to
from lm.ngram.corpus import CorpusSource, EncodedCorpus, corpus_sources, encode_corpora
from lm.ngram.counting import BREAK, Progress, Workspace, build_table, count_full, no_progress
from lm.ngram.estimation import KATZ_CUTOFFS, check_fallback, check_thresholds, estimate
from lm.ngram.place import check_same
from lm.options import Field, Size, Utf8Errors

WORDS = "words"  # the tokenizer's name that stands for none
MAX_ORDER = 6
LEAST_MEMORY = 1 << 29
OVERHEAD = 1 << 28  # libraries, compiled code and the blocks of text in hand
COUNTING_FOLDER, ENCODED_FILE, SETTINGS_FILE, STREAM_FILE = ".counting", "encoded.json", "settings.json", "stream.i32"
ARPA_FILE, AUTOMATON_FILE, MANIFEST_FILE = "model.arpa", "automaton.bin", "manifest.json"
KIND = "n-gram model"
COUNTING_FORMAT = 1  # changes with what the files of `.counting` mean
ESTIMATORS, SMOOTHINGS = ("own", "lmplz"), ("kneser-ney", "katz")


@dataclass(frozen=True, kw_only=True)
class NgramOptions:
    """How an n-gram model is made of text."""

    order: Annotated[int, "Length of the longest n-grams, 1 to 6."] = 4
    tokenizer: str = "smollm2-135m"  # a base LM's name, or `words` for words at white space
    prune: Annotated[Sequence[int], "Drop n-grams that occur at most so often, by order, like 0,0,1,2."] = ()
    discount_fallback: Sequence[float] | None = None  # where the corpus gives no discounts
    smoothing: Annotated[
        Literal["kneser-ney", "katz"], "Modified and interpolated Kneser-Ney, or Katz (prunes 0,0,1,3 by default)."
    ] = "kneser-ney"
    max_ngrams: Annotated[int | None, "Prune by entropy down to so many n-grams, like 500K or 100M.", Size(1000)] = None
    surface: Annotated[bool, "Write token strings instead of ids."] = False
    memory: Annotated[int, "Memory for the counts in bytes, like 4G; the rest goes to disk.", Size(1024)] = 4 << 30
    threads: Annotated[int | None, "Threads; default: one per core."] = None
    errors: Utf8Errors = "strict"
    field: Field = "text"
    estimator: Annotated[Literal["own", "lmplz"], "lmplz: KenLM's program, if it is on PATH."] = "own"

    def checked(self) -> NgramOptions:
        """The same with a threshold for every order and all fallback discounts. Raises `RescoreError`."""
        if not 1 <= self.order <= MAX_ORDER:
            raise RescoreError(f"order {self.order} is not supported; choose 1 to {MAX_ORDER}")
        for kind, value, known in (
            ("estimator", self.estimator, ESTIMATORS), ("smoothing", self.smoothing, SMOOTHINGS)
        ):  # fmt: skip
            if value not in known:
                raise UnknownNameError(kind, value, known)
        katz = self.smoothing == "katz"
        if self.estimator == "lmplz" and (katz or self.max_ngrams is not None):
            raise RescoreError("lmplz knows Kneser-Ney and pruning by counts only; leave out smoothing and max_ngrams")
        if self.memory < LEAST_MEMORY:
            raise RescoreError(f"memory of {self.memory:,} bytes is too little; give at least {LEAST_MEMORY >> 20}M")
        for name in ("threads", "max_ngrams"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise RescoreError(f"{name} = {number}; it must be at least 1")
        fallback = self.discount_fallback
        if katz and fallback is not None:
            raise RescoreError("fallback discounts are Kneser-Ney's; leave them out with smoothing katz")
        prune = check_thresholds(self.prune or (KATZ_CUTOFFS[: self.order] if katz else ()), self.order)
        if self.estimator == "lmplz" and shutil.which("lmplz") is None:
            raise RescoreError("there is no lmplz on PATH; build it from KenLM's sources, or use --estimator own")
        return dataclasses.replace(
            self, prune=prune, discount_fallback=None if fallback is None else check_fallback(fallback)
        )


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


class _Estimated(NamedTuple):
    model: NgramModel
    discounts: tuple[tuple[float, ...], ...]
    fallback_orders: tuple[int, ...] = ()


def build_ngram(
    corpora: Sequence[Path | str],
    out: Path,
    options: NgramOptions = NgramOptions(),
    *,
    own: OwnOutput | None = None,
    replace: bool = True,
    progress: Progress | None = None,
) -> NgramSummary:
    """Estimates an n-gram model from `corpora` (see `lm.ngram.corpus`) and writes it to the folder `out`.

    A corpus may also be `own:PROMPTS`: greedy output for a file of prompts, generated as `own` says (default: by the
    base of the tokenizer) and kept in the cache directory. `replace`: whether a finished model in `out` that was made
    of other things may be replaced; it is refused with the difference if not (`IncompatibleError`).

    Raises `RescoreError` for options that make no sense, `InvalidDataError` for corpora that can't be used,
    `OutputError` where `out` can't be written or another process writes to it. `progress(stage, done, total)` is called
    now and then; an exception from it interrupts the build.
    """
    options, progress = options.checked(), progress or no_progress
    check_place(out)
    with writing_to(out, beside=True):
        tokenizer, tokenizer_hash, tokenization_hash = _load(options.tokenizer)
        own = own or OwnOutput(base=options.tokenizer)
        sources = corpus_sources(corpora, own, tokenizer_sha256=tokenizer_hash, progress=progress)
        read = {
            **{name: getattr(options, name) for name in ("order", "tokenizer", "surface", "errors", "field")},
            "tokenizer_sha256": tokenizer_hash,
            "tokenization_sha256": tokenization_hash,
            "corpora": [dataclasses.asdict(source) for source in sources],
        }
        # Where a file lay says nothing about the model; its hash does.
        corpora_read = [
            {**dataclasses.asdict(s), "name": s.name if s.kind == "hub" else Path(s.name).name} for s in sources
        ]
        estimated_by = ("smoothing", "prune", "discount_fallback", "max_ngrams", "estimator")
        made_of = json.loads(
            json.dumps({**read, "corpora": corpora_read, **{name: getattr(options, name) for name in estimated_by}})
        )
        if not replace:
            check_same(out / MANIFEST_FILE, made_of)
        work = out / COUNTING_FOLDER
        resumed = _prepare(work, {"format": COUNTING_FORMAT, **read})
        encoded = _encode(sources, work, tokenizer, options, progress)
        if corpus_sources(corpora, own, tokenizer_sha256=tokenizer_hash, progress=progress) != sources:
            shutil.rmtree(work, ignore_errors=True)  # words of other text than its settings say
            raise IncompatibleError("the corpora were replaced while they were read; run the command again")
        estimated = (_run_lmplz if options.estimator == "lmplz" else _estimate)(encoded, work, options, progress)
        summary = NgramSummary(
            str(out), options.order, tuple(map(len, estimated.model.orders)), encoded.documents, encoded.tokens,
            estimated.discounts, estimated.fallback_orders, resumed,
        )  # fmt: skip
        measured = ("documents", "tokens", "ngrams", "discounts", "fallback_orders")
        manifest = {
            **made_of, "memory": options.memory, **{name: getattr(summary, name) for name in measured}
        }  # fmt: skip
        write_model(estimated.model, out, manifest, progress=progress)
        return summary


def _estimate(encoded: EncodedCorpus, work: Path, options: NgramOptions, progress: Progress) -> _Estimated:
    room, threads = max(options.memory - OVERHEAD, 1), options.threads or os.cpu_count() or 1
    with writing(work):
        full = count_full(
            encoded.ids(), order=options.order, vocabulary_size=len(encoded.vocabulary), folder=work, memory=room,
            threads=threads, progress=progress,
        )  # fmt: skip
    workspace = Workspace(work, room // 2)  # the rest for what comes and goes
    table = build_table(full, workspace, threads=threads)
    del full
    progress("estimating", 0, 1)
    model, statistics = estimate(
        table, encoded.vocabulary, smoothing=options.smoothing, prune=options.prune,
        discount_fallback=options.discount_fallback, max_ngrams=options.max_ngrams, workspace=workspace,
    )  # fmt: skip
    progress("estimating", 1, 1)
    fallback_orders = tuple(n for n, s in enumerate(statistics, start=1) if s.fallback)
    return _Estimated(model, tuple(s.discounts for s in statistics), fallback_orders)


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


def check_place(out: Path) -> None:
    """The whole folder is replaced, so it must be new, empty or an earlier model's."""
    if out.is_file():
        raise OutputError(f"{out} is a file; the model is a folder, choose another --out")
    if not out.is_dir():
        return
    with suppress(OSError, ValueError):
        if json.loads((out / MANIFEST_FILE).read_text(encoding="utf-8")).get("kind") == KIND:
            return
    if any(path.name != COUNTING_FOLDER for path in out.iterdir()):
        raise OutputError(f"{out} holds files that are no n-gram model, which would be lost; choose another --out")


def _load(tokenizer: str) -> tuple[Any | None, str | None, str | None]:
    """The tokenizer, what its ids mean, and how it cuts text (`lm.keys`)."""
    if tokenizer == WORDS:
        return None, None, None
    from lm.base.catalog import load_tokenizer, tokenization_of, tokenizer_sha256

    loaded = load_tokenizer(tokenizer)
    return loaded, tokenizer_sha256(loaded), tokenization_of(tokenizer)


def _prepare(work: Path, settings: dict[str, Any]) -> bool:
    """An empty folder for counting, or what a run with the same settings left; returns whether it was the latter."""
    wanted = json.loads(json.dumps(settings))
    with suppress(OSError, ValueError):
        if json.loads((work / SETTINGS_FILE).read_text(encoding="utf-8")) == wanted:
            return (work / ENCODED_FILE).is_file()
    with writing(work):
        if work.is_dir():
            shutil.rmtree(work)
        work.mkdir(parents=True)
    write_json(work / SETTINGS_FILE, wanted)
    return False


def _encode(
    sources: Sequence[CorpusSource], work: Path, tokenizer: Any | None, options: NgramOptions, progress: Progress
) -> EncodedCorpus:
    """The stream of word ids: an earlier run's if it was finished."""
    stream = work / STREAM_FILE
    with suppress(OSError, ValueError, KeyError, TypeError):
        earlier = json.loads((work / ENCODED_FILE).read_text(encoding="utf-8"))
        if stream.stat().st_size == 4 * earlier.pop("length"):
            words, ids = tuple(earlier.pop("vocabulary")), tuple(earlier.pop("token_ids"))
            return EncodedCorpus(stream, words, ids, **earlier)
    try:
        encoded = encode_corpora(
            sources, stream, tokenizer=tokenizer, left_context=options.order - 1, field=options.field,
            errors=options.errors, surface=options.surface, progress=progress,
        )  # fmt: skip
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)  # a part of a stream is of no use
        with suppress(OSError):
            work.parent.rmdir()  # if there is nothing else in it
        raise
    document = {name: value for name, value in vars(encoded).items() if name != "path"}
    write_json(work / ENCODED_FILE, {"length": stream.stat().st_size // 4, **document})
    return encoded


def _run_lmplz(encoded: EncodedCorpus, work: Path, options: NgramOptions, progress: Progress) -> _Estimated:
    """What lmplz estimates from the stream. A cut document ends as any other there."""
    from lm.ngram.arpa import read_arpa

    text, arpa = work / "stream.txt", work / "lmplz.arpa"
    with writing(text):
        _write_text(encoded, text)
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
    found = re.findall(r"^\d+ \S+ D1=(\S+) D2=(\S+) D3\+=(\S+)$", done.stderr, re.MULTILINE)
    discounts = tuple((float(a), float(b), float(c)) for a, b, c in found)
    text.unlink()
    return _Estimated(read_arpa(arpa), discounts)


def _write_text(encoded: EncodedCorpus, path: Path) -> None:
    ids = encoded.ids()
    words = np.array([w + " " for w in encoded.vocabulary], dtype=object)
    words[SENTENCE_END] = "\n"
    step = 1 << 18
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for begin in range(0, len(ids), step):
            part = ids[begin : begin + step]
            stream.write("".join(words[np.where(part == BREAK, SENTENCE_END, part)]))
