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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lattices.errors import InvalidDataError, OutputError, RescoreError, UnknownNameError
from lattices.ngrams import SENTENCE_END, NgramModel
from lm.base.own_output import OwnOutput, corpus_sources
from lm.files import atomic_folder, sha256_of_file, write_json, writing
from lm.locks import writing_to
from lm.ngram.corpus import CorpusSource, EncodedCorpus, encode_corpora
from lm.ngram.counting import BREAK, Workspace, build_table, count_full
from lm.ngram.estimation import KATZ_CUTOFFS, check_fallback, check_thresholds, estimate
from lm.ngram.place import check_same

WORDS = "words"  # the tokenizer's name that stands for none
MAX_ORDER = 6
LEAST_MEMORY = 1 << 29
OVERHEAD = 1 << 28  # libraries, compiled code and the blocks of text in hand
COUNTING_FOLDER, ENCODED_FILE, SETTINGS_FILE, STREAM_FILE = ".counting", "encoded.json", "settings.json", "stream.i32"
ARPA_FILE, AUTOMATON_FILE, MANIFEST_FILE = "model.arpa", "automaton.bin", "manifest.json"
KIND = "n-gram model"
COUNTING_FORMAT = 1  # changes with what the files of `.counting` mean
ESTIMATORS, SMOOTHINGS = ("own", "lmplz"), ("kneser-ney", "katz")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class NgramSummary:
    """What was built in the folder `path`.

    `ngrams[n - 1]` n-grams of order n from `tokens` words in `documents`. `discounts[n - 1]` are Kneser-Ney's D1, D2,
    D3+ (Katz: factors d1 ... d5); orders in `fallback_orders` could not have theirs estimated. `resumed` tells that
    finished work of an earlier run was used.
    """

    path: str
    order: int
    ngrams: tuple[int, ...]
    documents: int
    tokens: int
    discounts: tuple[tuple[float, ...], ...]
    fallback_orders: tuple[int, ...]
    resumed: bool


def build_ngram(
    corpora: Sequence[Path | str],
    out: Path,
    *,
    order: int = 4,
    tokenizer: str = "smollm2-135m",
    prune: Sequence[int] = (),
    discount_fallback: Sequence[float] | None = None,
    smoothing: str = "kneser-ney",
    max_ngrams: int | None = None,
    surface: bool = False,
    memory: int = 4 << 30,
    threads: int | None = None,
    errors: str = "strict",
    field: str = "text",
    estimator: str = "own",
    own: OwnOutput | None = None,
    replace: bool = True,
    progress: Progress | None = None,
) -> NgramSummary:
    """Estimates an n-gram model from `corpora` (see `lm.ngram.corpus`) and writes it to the folder `out`.

    A corpus may also be `own:PROMPTS`: greedy output for a file of prompts, generated as `own` says (default: by the
    base of the tokenizer) and kept in the cache directory.

    `tokenizer` is the name of a base LM, or `words` for words at white space. `prune`, `discount_fallback`, `smoothing`
    and `max_ngrams` as in `lm.ngram.estimation.estimate`. `memory` (bytes) bounds the arrays in memory; larger ones are
    mapped from files. `estimator="lmplz"` has KenLM's program do the estimation on the same stream of words.
    `replace`: whether a finished model in `out` that was made of other things may be replaced; it is refused with the
    difference if not (`IncompatibleError`).
    Raises `RescoreError` for settings that make no sense, `InvalidDataError` for corpora that can't be used,
    `OutputError` where `out` can't be written or another process writes to it. `progress(stage, done, total)` is called
    now and then; an exception from it interrupts the build.
    """
    if not 1 <= order <= MAX_ORDER:
        raise RescoreError(f"order {order} is not supported; choose 1 to {MAX_ORDER}")
    for kind, value, known in (("estimator", estimator, ESTIMATORS), ("smoothing", smoothing, SMOOTHINGS)):
        if value not in known:
            raise UnknownNameError(kind, value, known)
    if estimator == "lmplz" and (smoothing != "kneser-ney" or max_ngrams is not None):
        raise RescoreError("lmplz knows Kneser-Ney and pruning by counts only; leave smoothing and max_ngrams alone")
    if memory < LEAST_MEMORY:
        raise RescoreError(f"memory of {memory:,} bytes is too little; give at least {LEAST_MEMORY >> 20}M")
    if threads is not None and threads < 1:
        raise RescoreError(f"threads = {threads}; it must be at least 1")
    if max_ngrams is not None and max_ngrams < 1:
        raise RescoreError(f"max_ngrams = {max_ngrams}; it must be at least 1")
    if smoothing == "katz" and discount_fallback is not None:
        raise RescoreError("fallback discounts are Kneser-Ney's; leave them out with smoothing katz")
    thresholds = check_thresholds(prune if prune or smoothing != "katz" else KATZ_CUTOFFS[:order], order)
    fallback = None if discount_fallback is None else check_fallback(discount_fallback)
    program = _find_lmplz() if estimator == "lmplz" else None
    check_place(out)
    with writing_to(out, beside=True):
        loaded, tokenizer_hash, tokenization_hash = _load(tokenizer)
        sources = corpus_sources(
            corpora, own or OwnOutput(base=tokenizer), tokenizer_sha256=tokenizer_hash, progress=progress
        )
        corpora_read = [dataclasses.asdict(source) for source in sources]
        settings: dict[str, Any] = {
            "format": COUNTING_FORMAT,
            "order": order,
            "tokenizer": tokenizer,
            "tokenizer_sha256": tokenizer_hash,
            "tokenization_sha256": tokenization_hash,
            "surface": surface,
            "errors": errors,
            "field": field,
            "corpora": corpora_read,
        }
        made_of = {
            **{k: v for k, v in settings.items() if k != "format"},
            # Where a file lay says nothing about the model; its hash does.
            "corpora": [{**source, "name": _without_folder(source)} for source in corpora_read],
            "smoothing": smoothing,
            "prune": list(thresholds),
            "discount_fallback": None if fallback is None else list(fallback),
            "max_ngrams": max_ngrams,
            "estimator": estimator,
        }
        if not replace:
            check_same(out / MANIFEST_FILE, made_of)
        work = out / COUNTING_FOLDER
        resumed = _prepare(work, settings)
        encoded = _encode(
            sources,
            work,
            loaded,
            left_context=order - 1,
            field=field,
            errors=errors,
            surface=surface,
            progress=progress,
        )
        if program:
            model, discounts = _run_lmplz(program, encoded, work, order, thresholds, fallback, memory)
            fallback_orders: tuple[int, ...] = ()
        else:
            room = max(memory - OVERHEAD, 1)
            with writing(work):
                full = count_full(
                    encoded.ids(), order=order, vocabulary_size=len(encoded.vocabulary), folder=work, memory=room,
                    threads=threads or os.cpu_count() or 1, progress=progress,
                )  # fmt: skip
            workspace = Workspace(work, room // 2)  # the rest for what comes and goes
            table = build_table(full, workspace, threads=threads or os.cpu_count() or 1)
            del full
            if progress:
                progress("estimating", 0, 1)
            result = estimate(
                table, encoded.vocabulary, smoothing=smoothing, prune=thresholds, discount_fallback=fallback,
                max_ngrams=max_ngrams, workspace=workspace,
            )  # fmt: skip
            if progress:
                progress("estimating", 1, 1)
            del table
            model = result.model
            discounts = tuple(s.discounts for s in result.statistics)
            fallback_orders = tuple(n for n, s in enumerate(result.statistics, start=1) if s.fallback)
        summary = NgramSummary(
            path=str(out),
            order=order,
            ngrams=tuple(map(len, model.orders)),
            documents=encoded.documents,
            tokens=encoded.tokens,
            discounts=discounts,
            fallback_orders=fallback_orders,
            resumed=resumed,
        )
        manifest = {
            "kind": KIND,
            "version": importlib.metadata.version("rescore"),
            **made_of,
            "memory": memory,
            "documents": summary.documents,
            "tokens": summary.tokens,
            "ngrams": summary.ngrams,
            "discounts": summary.discounts,
            "fallback_orders": summary.fallback_orders,
        }
        write_model(model, out, manifest, progress=progress)
        return summary


def _without_folder(source: dict[str, Any]) -> str:
    name: str = source["name"]
    return name if source["kind"] == "hub" else Path(name).name


def write_model(model: NgramModel, out: Path, manifest: dict[str, Any], *, progress: Progress | None = None) -> None:
    """Writes a model's folder as a whole. Raises `OutputError`."""
    from lattices.automaton import Automaton
    from lm.ngram.arpa import write_arpa

    with atomic_folder(out) as temporary:
        if progress:
            progress("writing", 0, 2)
        write_arpa(model, temporary / ARPA_FILE)
        if progress:
            progress("writing", 1, 2)
        Automaton.compile(model).save(temporary / AUTOMATON_FILE)
        files = {name: sha256_of_file(temporary / name) for name in (ARPA_FILE, AUTOMATON_FILE)}
        write_json(temporary / MANIFEST_FILE, {**manifest, "files": files})
        if progress:
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


def _encode(sources: Sequence[CorpusSource], work: Path, tokenizer: Any | None, **options: Any) -> EncodedCorpus:
    """The stream of word ids: an earlier run's if it was finished."""
    stream = work / STREAM_FILE
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((work / ENCODED_FILE).read_text(encoding="utf-8"))
        if stream.stat().st_size == 4 * found["length"]:
            return EncodedCorpus(
                stream, tuple(found["vocabulary"]), tuple(found["token_ids"]), found["documents"], found["tokens"]
            )
    try:
        encoded = encode_corpora(sources, stream, tokenizer=tokenizer, **options)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)  # a part of a stream is of no use
        with suppress(OSError):
            work.parent.rmdir()  # if there is nothing else in it
        raise
    document = {
        "length": stream.stat().st_size // 4,
        "vocabulary": encoded.vocabulary,
        "token_ids": encoded.token_ids,
        "documents": encoded.documents,
        "tokens": encoded.tokens,
    }
    write_json(work / ENCODED_FILE, document)
    return encoded


def _find_lmplz() -> str:
    program = shutil.which("lmplz")
    if program is None:
        raise RescoreError("there is no lmplz on PATH; build it from KenLM's sources, or use --estimator own")
    return program


def _run_lmplz(
    program: str,
    encoded: EncodedCorpus,
    work: Path,
    order: int,
    thresholds: Sequence[int],
    fallback: Sequence[float] | None,
    memory: int,
) -> tuple[NgramModel, tuple[tuple[float, ...], ...]]:
    """The model that lmplz estimates from the stream, and its discounts. A cut document ends as any other there."""
    from lm.ngram.arpa import read_arpa

    text, arpa = work / "stream.txt", work / "lmplz.arpa"
    with writing(text):
        _write_text(encoded, text)
    arguments = ["--order", str(order), "--memory", f"{memory}b", "--temp_prefix", f"{work.resolve()}{os.sep}"]
    arguments += ["--vocab_estimate", str(len(encoded.vocabulary))]
    arguments += ["--text", str(text), "--arpa", str(arpa), "--prune", *map(str, thresholds)]
    if fallback is not None:
        arguments += ["--discount_fallback", *map(str, fallback)]
    done = subprocess.run([program, *arguments], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(("=", "-", "*"))]
        reason = next((line for line in lines if "iscount" in line or "rror" in line), (lines or ["no message"])[-1])
        raise InvalidDataError(f"lmplz failed: {reason.strip()}")
    found = re.findall(r"^\d+ \S+ D1=(\S+) D2=(\S+) D3\+=(\S+)$", done.stderr, re.MULTILINE)
    discounts = tuple((float(a), float(b), float(c)) for a, b, c in found)
    text.unlink()
    return read_arpa(arpa), discounts


def _write_text(encoded: EncodedCorpus, path: Path) -> None:
    ids = encoded.ids()
    words = np.array([w + " " for w in encoded.vocabulary], dtype=object)
    words[SENTENCE_END] = "\n"
    step = 1 << 18
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for begin in range(0, len(ids), step):
            part = ids[begin : begin + step]
            stream.write("".join(words[np.where(part == BREAK, SENTENCE_END, part)]))
