"""Tunes the weight of rescorers by replay on held-out examples: of the last groups of the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from itertools import product

from lattices.errors import RescoreError
from lm.base.catalog import choose_device
from lm.files import write_json
from lm.records import plain
from rescore.accounting import account
from rescore.replay import replay
from rescore.rescorers import load_rescorer
from rescore.runs.environment import environment
from rescore.runs.evaluation import Notify
from rescore.runs.inputs import Models, prepare
from rescore.runs.options import EvalOptions, Progress, resolve
from rescore.runs.records import Tuned
from rescore.runs.weights import check_tokenizers, coverage_notices, fit_to, tuned_path

DEFAULT_ALPHAS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
HELD_OUT = 100


def tune(
    options: EvalOptions,
    *,
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    ks: Sequence[int] = (16,),
    ps: Sequence[int] = (1, 16),
    trace_k: int | None = None,
    evaluated: Collection[str] = (),
    keep: bool = True,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> list[Tuned]:
    """Sweeps every weighted rescorer of the options on every task, and keeps the best weights for `evaluate` with alpha
    `tuned` (`keep`).

    `options.limit` examples (default `HELD_OUT`) of the last groups of the data are used, at most half of the groups
    (`rescore.groups.held_out`); `evaluated`: groups that are not tuned on while there are others; `trace_k` as for
    `evaluate`. Raises `RescoreError` for a rescorer without weight and for what `evaluate` refuses.
    """
    limit = HELD_OUT if options.limit is None else options.limit
    for alpha, k, p in product(alphas, ks, ps):
        resolve(dataclasses.replace(options, alpha=alpha, k=k, p=p))
    options = resolve(dataclasses.replace(options, alpha=None, limit=None, k=max(ks), p=tuple(ps), mode="replay"))
    swept = tuple(sorted({0.0, *alphas}))
    rescorers = {}
    for typed in options.rescorers:
        rescorer = load_rescorer(typed)
        if rescorer.alpha is None:
            raise RescoreError(f"the rescorer {typed} has no weight to tune; give one that has, like ngram")
        rescorers[typed] = rescorer
    models = Models(options)
    found = []
    for task in prepare(options, models, k=trace_k):
        task = task.held_out(limit, evaluated=evaluated)
        task.tell(notify)
        check_tokenizers(task, rescorers)
        trace = task.trace(models, progress=progress).first_heads(options.h)
        fitted = fit_to(trace, rescorers, device=choose_device(options.device))
        for line in coverage_notices(trace, fitted, options.k):
            if notify:
                notify(line)
        runs = [(typed, k, p) for typed in rescorers for k in ks for p in ps]
        for place, (typed, k, p) in enumerate(runs):
            rescorer = fitted[typed]
            efficiency = []
            for number, alpha in enumerate(swept):
                accepted = replay(trace.examples, rescorer.weighted(alpha), k=k, p=p)
                efficiency.append(account(accepted, trace.header.h).block_efficiency)
                if progress:
                    progress(f"tune {task.name}", place * len(swept) + number + 1, len(runs) * len(swept))
            best = swept[max(range(len(swept)), key=lambda i: (efficiency[i], -i))]
            groups = tuple(dict.fromkeys(task.groups))
            tuned = Tuned(
                task=task.name, rescorer=typed, k=k, p=p, alphas=swept, block_efficiency=tuple(efficiency), alpha=best,
                held_out=task.ids, held_out_groups=groups, identity=rescorer.identity,
                data_sha256=task.settings.get("data_sha256"),
            )  # fmt: skip
            if keep:
                path = tuned_path(dataclasses.replace(options, k=k), task, rescorer, p)
                write_json(path, {**plain(tuned), "settings": task.settings, **environment()})
            found.append(tuned)
    return found
