"""Compares n-gram models by the corpus and order they are made of: trained, tuned and evaluated by one call.

Every model is built once and kept in the cache directory, keyed by its corpus and settings. Alpha is tuned for each
model and p on examples of the task's last groups, the comparison is made on the first ones; no group is in both.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lattices.errors import IncompatibleError, RescoreError
from lm.base.own_output import OwnOutput
from lm.files import cache_directory, read_json_object
from lm.keys import key_of
from lm.locks import making, tell
from lm.ngram.build import ARPA_FILE, COUNTING_FORMAT, MANIFEST_FILE, MAX_ORDER, NgramOptions, build_ngram
from lm.ngram.corpus import corpus_sources
from lm.ngram.estimation import ESTIMATION
from lm.ngram.load import COMPILATION, SHIPPED_NGRAM, load_ngram
from lm.ngram.mix import SHIPPED
from rescore.accounting import Accounting, Gain, account, paired_gain
from rescore.groups import count_groups
from rescore.replay import replay
from rescore.rescorers.ngram import Ngram
from rescore.rescorers.unrescored import Unrescored
from rescore.runs.evaluation import Notify
from rescore.runs.inputs import Models, TaskInput, prepare
from rescore.runs.options import EvalOptions, Progress, resolve
from rescore.runs.tuning import DEFAULT_ALPHAS
from rescore.runs.weights import coverage_notices, target_of
from rescore.tracing import Trace

HELD_OUT = 40
FALLBACK = (0.5, 1.0, 1.5)  # discounts, where a corpus is too small to give its own
CORPUS = re.compile(r"(?P<name>[^=:/\s]+)(:(?P<field>[^=:/\s]+))?=(?P<source>.+)")


@dataclass(frozen=True)
class NgramCorpus:
    """A corpus to compare: what it is called, what `build_ngram` takes (or `shipped`: the model shipped for the base),
    and the field of its JSON lines."""

    name: str
    source: str
    field: str = "text"


@dataclass(frozen=True)
class UnrescoredDrafts:
    """Block efficiency of the heads alone at one p, with its 95 % interval (None for few groups)."""

    p: int
    block_efficiency: float
    block_efficiency_ci95: tuple[float, float] | None


@dataclass(frozen=True)
class ComparedNgram:
    """One model at one p: `ngrams` of all orders from `tokens` of the corpus; `path`: its folder, for `ngram:PATH`.

    `alpha` was tuned; `gain` of block efficiency over the unrescored drafts at the same p, with its paired interval.
    """

    corpus: str
    source: str
    tokens: int
    ngrams: int
    order: int
    p: int
    alpha: float
    block_efficiency: float
    block_efficiency_ci95: tuple[float, float] | None
    gain: float
    gain_ci95: tuple[float, float] | None
    path: str


@dataclass(frozen=True)
class NgramComparison:
    """What `compare_ngrams` found, on the `examples` (ids; of so many `groups`), with alpha tuned on `held_out`
    (ids)."""

    task: str
    k: int
    examples: tuple[str, ...]
    groups: int
    held_out: tuple[str, ...]
    unrescored: tuple[UnrescoredDrafts, ...]
    ngrams: tuple[ComparedNgram, ...]


@dataclass(frozen=True)
class _Model:
    corpus: NgramCorpus
    path: Path
    order: int
    tokens: int
    ngrams: int


def read_corpus(text: str) -> NgramCorpus:
    """The corpus that `NAME=SOURCE` or `NAME:FIELD=SOURCE` stands for. Raises `RescoreError` for anything else."""
    if not (match := CORPUS.fullmatch(text)):
        raise RescoreError(f"--corpus {text}: give NAME=SOURCE, or NAME:FIELD=SOURCE for a field of JSON lines")
    return NgramCorpus(match["name"], match["source"], match["field"] or "text")


def compare_ngrams(
    options: EvalOptions,
    corpora: Sequence[NgramCorpus],
    *,
    orders: Sequence[int] = (2, 4),
    held_out: int | None = None,
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    own: OwnOutput | None = None,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> NgramComparison:
    """Trains a model of every corpus and order, tunes its alpha for every p of the options, and evaluates it.

    `options`: one task; `limit` examples are evaluated, from the first on (None: all but those held out), `held_out` of
    the last groups are tuned on (None: `HELD_OUT`, at most half of all); rescorers and alpha of the options do not
    matter. The corpus `shipped` is the shipped model, in its one order. `own` says how output for `own:PROMPTS` is
    generated (default: by the base of the options). Raises `RescoreError` for what `build_ngram` and `evaluate` refuse,
    and for examples that would be both tuned and evaluated on.
    """
    _check(corpora, orders)
    for alpha in alphas:
        resolve(dataclasses.replace(options, alpha=alpha))
    options = resolve(dataclasses.replace(options, alpha=None, rescorers=("none",), mode="replay"))
    if len(options.tasks) > 1:
        raise RescoreError("n-gram models are compared on one task at a time; give one --task")
    models = Models(options)
    (task,) = prepare(dataclasses.replace(options, limit=None), models)
    evaluated, tuned_on = _split(task, options.limit, held_out)
    task.tell(notify)
    tokenizer = _tokenizer_sha256(options.base)
    if task.given and target_of(task.given).tokenizer_sha256 not in (None, tokenizer):
        raise IncompatibleError(
            f"{options.trace} was recorded with another tokenizer than {options.base}'s; give --base"
        )
    own = own or OwnOutput(base=options.base, dtype=options.dtype, device=options.device)
    trained = [
        model for corpus in corpora for model in _train(corpus, orders, options.base, tokenizer, own, progress)
    ]  # fmt: skip
    trace = evaluated.trace(models, progress=progress).first_heads(options.h)
    held = tuned_on.trace(models, progress=progress).first_heads(options.h)

    groups = evaluated.groups
    plain = {p: replay(trace.examples, Unrescored(), k=options.k, p=p) for p in options.ps}
    found: list[ComparedNgram] = []
    told: set[NgramCorpus] = set()
    for model in trained:
        rescorer = Ngram(str(model.path)).fit(target_of(trace))
        if notify and model.corpus not in told:
            told.add(model.corpus)
            for line in coverage_notices(trace, {model.corpus.name: rescorer}, options.k):
                notify(line)
        for p in options.ps:
            if progress:
                progress("tune and evaluate", len(found), len(trained) * len(options.ps))
            alpha = best_alpha(held, rescorer, alphas, k=options.k, p=p)
            accepted = replay(trace.examples, rescorer.weighted(alpha), k=options.k, p=p)
            accounting = account(accepted, trace.header.h, groups=groups, seed=options.seed)
            gain = paired_gain(accepted, plain[p], groups=groups, seed=options.seed)
            found.append(_compared(model, p, alpha, accounting, gain))
    unrescored = []
    for p, accepted in plain.items():
        accounting = account(accepted, trace.header.h, groups=groups, seed=options.seed)
        unrescored.append(UnrescoredDrafts(p, accounting.block_efficiency, accounting.block_efficiency_ci95))
    return NgramComparison(
        task.name, options.k, evaluated.ids, count_groups(groups), tuned_on.ids, tuple(unrescored), tuple(found)
    )


def best_alpha(trace: Trace, rescorer: Ngram, alphas: Sequence[float], *, k: int, p: int) -> float:
    """The weight of the best block efficiency on a trace, 0 among them; the smallest of equals."""

    def efficiency(alpha: float) -> float:
        return account(replay(trace.examples, rescorer.weighted(alpha), k=k, p=p), trace.header.h).block_efficiency

    return max(sorted({0.0, *alphas}), key=efficiency)


def _check(corpora: Sequence[NgramCorpus], orders: Sequence[int]) -> None:
    if not corpora:
        raise RescoreError("no corpus to compare; give --corpus NAME=SOURCE once or more")
    names = [corpus.name for corpus in corpora]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RescoreError(f"two corpora are called {twice[0]}; give each a name of its own")
    for order in orders:
        if not 1 <= order <= MAX_ORDER:
            raise RescoreError(f"order {order} is not supported; choose 1 to {MAX_ORDER}")


def _split(task: TaskInput, limit: int | None, held_out: int | None) -> tuple[TaskInput, TaskInput]:
    """The first `limit` examples and `held_out` of the last groups; no group is in both."""
    total = len(task.ids)
    if total < 2:
        raise RescoreError("one example to evaluate and one to tune alpha on are needed; give more data")
    if held_out is not None and held_out < 1:
        raise RescoreError(f"--held-out {held_out}; at least one example is needed to tune alpha on")
    last = held_out or min(HELD_OUT, total // 2)
    tuned_on = task.held_out(last, evaluated=set(task.groups[: limit or 1]))
    apart = [place for place, group in enumerate(task.groups) if group not in tuned_on.groups]
    first = len(apart) if limit is None else limit
    if first < 1 or first > len(apart) or (held_out is not None and len(tuned_on.ids) < held_out):
        raise RescoreError(
            f"{max(first, 1)} examples to evaluate (of other sources) and {last} held out are more than the {total} "
            "there are; lower --limit or --held-out"
        )
    return task.of(apart[:first]), tuned_on


def _tokenizer_sha256(base: str) -> str:
    from lm.base.catalog import load_tokenizer
    from lm.base.identity import tokenizer_sha256

    return tokenizer_sha256(load_tokenizer(base))


def _train(
    corpus: NgramCorpus, orders: Sequence[int], base: str, tokenizer: str, own: OwnOutput, progress: Progress | None
) -> list[_Model]:
    """The models of a corpus by order, from the cache as far as they are there."""
    from lm.base.catalog import tokenization_of

    if corpus.source == SHIPPED:
        return [_described(corpus, SHIPPED_NGRAM)]
    sources = corpus_sources([corpus.source], own, tokenizer_sha256=tokenizer, progress=progress)
    tokenization = tokenization_of(base)
    read: list[dict[str, Any]] = [dataclasses.asdict(source) for source in sources]
    found = []
    for order in dict.fromkeys(orders):
        made_of = {
            "format": [COUNTING_FORMAT, ESTIMATION, COMPILATION],
            "corpora": [{"kind": s["kind"], "sha256": s["sha256"], "size": s["size"]} for s in read],
            "field": corpus.field,
            "tokenizer_sha256": tokenizer,
            "tokenization_sha256": tokenization,
            "order": order,
            "discount_fallback": FALLBACK,
        }
        folder = cache_directory() / "compared-ngrams" / f"{order}-gram-{key_of(made_of, 24)}"
        if not _is_whole(folder):
            with making(folder, f"the {order}-gram model of {corpus.name}"):
                if not _is_whole(folder):
                    if (folder / MANIFEST_FILE).exists():
                        tell(f"the cached {order}-gram model of {corpus.name} is broken; it is made again")
                        shutil.rmtree(folder, ignore_errors=True)
                    build_ngram(
                        [corpus.source], folder,
                        NgramOptions(order=order, tokenizer=base, discount_fallback=FALLBACK, field=corpus.field),
                        own=own, progress=progress,
                    )  # fmt: skip
        found.append(_described(corpus, folder))
    return found


def _is_whole(folder: Path) -> bool:
    """Whether a model is there, and can be used."""
    try:
        load_ngram(folder)
        return (folder / ARPA_FILE).is_file() and bool(_described(NgramCorpus("", ""), folder).tokens)
    except (RescoreError, KeyError, TypeError):
        return False


def _described(corpus: NgramCorpus, folder: Path) -> _Model:
    manifest = read_json_object(folder / MANIFEST_FILE, missing=f"no n-gram model in {folder}")
    return _Model(corpus, folder, manifest["order"], manifest["tokens"], sum(manifest["ngrams"]))


def _compared(model: _Model, p: int, alpha: float, accounting: Accounting, gain: Gain) -> ComparedNgram:
    return ComparedNgram(
        corpus=model.corpus.name,
        source=model.corpus.source,
        tokens=model.tokens,
        ngrams=model.ngrams,
        order=model.order,
        p=p,
        alpha=alpha,
        block_efficiency=accounting.block_efficiency,
        block_efficiency_ci95=accounting.block_efficiency_ci95,
        gain=gain.gain,
        gain_ci95=gain.gain_ci95,
        path=str(model.path),
    )
