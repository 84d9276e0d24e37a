"""The weights of `joint` on disk: one JSON file for each set of drafters that weights were fitted for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from lattices.errors import IncompatibleError, RescoreError
from lattices.joined import candidates as features
from lattices.joined.candidates import BOTH, CLASSES, WEIGHTS
from lattices.joined.sources import KINDS
from lm.files import SHIPPED, write_json
from lm.ngram.load import SHIPPED_NGRAM
from lm.records import Count, Number, plain, read_record
from rescore.rescorers.base import Target
from rescore.rescorers.ngram import Ngram

SCHEMA = "rescore.joint/2"
MATCHED = (
    features.HEAD, features.LACKS, features.TOP, features.TEXT, features.NGRAM, features.PAIR, features.OTHER,
)  # fmt: skip
# What can be left out when weights are fitted, to see what it brings: places of the weights.
FEATURES = {
    "heads": range(features.HEAD, features.TEXT),
    "argmax": range(features.TOP, features.TOP + BOTH),
    "text": range(features.TEXT, features.TEXT + BOTH),
    "ngram": range(features.NGRAM, features.NGRAM + BOTH),
    "bigram": range(features.PAIR, features.PAIR + BOTH),
    "recency": range(features.RECENT, features.RECENT + CLASSES),
    "counts": range(features.COUNTED, features.ALONE + CLASSES),
    "agreement": range(features.AGREE, features.AGREE + 2),
    "chains": range(features.CHAINED, features.CHAIN_LACKS + 2 * KINDS),
    # The second weights of all features.
    "matches": [feature + place for feature in MATCHED for place in range(features.SLOTS, BOTH)],
}


class JointFit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fitted weights, and how well their probabilities hold.

    drafters: what they are for (`Drafter.source`); k: lattice entries of a slot.
    ngram, bigram: hashes of the n-gram model and of the learned bigram (empty: none).
    weights: as `lattices.joined.candidates` has them; without: features that were left out.
    examples, groups, prefixes: what they were fitted on.
    log_loss: nats a prefix, of weights that were fitted on the other half of the groups; likewise the rest
        (None: there is one group only).
    calibration_error: expected calibration error of the candidates' probabilities (Guo et al. 2017).
    counts, confidences, accuracies: by bin of the reliability diagram (None where a bin is empty).
    """

    drafters: list[str]
    ngram: str
    bigram: str
    k: Count
    weights: Annotated[list[Number], msgspec.Meta(min_length=WEIGHTS, max_length=WEIGHTS)]
    without: list[str] = []
    examples: Count
    groups: Count
    prefixes: Count
    log_loss: Number | None
    calibration_error: Number | None
    counts: list[Count]
    confidences: list[Number | None]
    accuracies: list[Number | None]
    schema: str = SCHEMA


def write_weights(folder: Path, fit: JointFit) -> Path:
    """Writes fitted weights beside those for other drafters. Raises `OutputError`."""
    path = folder / f"{'+'.join(sorted(source.replace(' ', '-') for source in fit.drafters))}.json"
    write_json(path, plain(fit))
    return path


def _advice(ngram: Ngram, base: str = "BASE") -> str:
    """How weights are fitted, and used, with this n-gram model."""
    model = "" if ngram.path == SHIPPED_NGRAM else f"ngram={ngram.path}"
    asked, used = (f"joint:{model}", f"joint:DIR,{model}") if model else ("joint", "joint:DIR")
    return (
        f"fit some: rescore tune --base {base} --rescorer {asked} --out DIR, with the same --heads, --drafter, "
        f"--task and --data, then --rescorer {used}"
    )


def read_fits(folder: Path, ngram: Ngram) -> list[JointFit]:
    """All fits with an n-gram model in a folder.

    Raises `RescoreError` if there are none, `InvalidDataError` for a broken file, `IncompatibleError` if all are of
    other n-gram models.
    """
    paths, advice = sorted(folder.glob("*.json")), _advice(ngram)
    if not paths:
        raise RescoreError(f"no weights of joint in {folder}; {advice}")
    fits = [read_record(path, JointFit, missing=f"no {path}", advice=advice, schema=SCHEMA) for path in paths]
    if not (with_it := [fit for fit in fits if fit.ngram == ngram.model.sha256]):
        raise IncompatibleError(
            f"{paths[0]} was fitted with another n-gram model than {ngram.path}; name that one, "
            f"joint:{folder},ngram=..., or {advice}"
        )
    return with_it


def read_weights(folder: Path, sources: Sequence[str], ngram: Ngram, bigram: str) -> np.ndarray:
    """The weights for these drafters, float64 `[WEIGHTS]`.

    bigram: hash of the learned bigram (empty: none).
    Raises as `read_fits`, and `IncompatibleError` for weights for other drafters, or with another learned bigram.
    """
    fits = read_fits(folder, ngram)
    for fit in fits:
        if sorted(fit.drafters) == sorted(sources):
            if fit.bigram != bigram:
                told = "another learned bigram, or with none" if bigram else "a learned bigram, and there is none"
                raise IncompatibleError(f"the weights of joint in {folder} were fitted with {told}; {_advice(ngram)}")
            return np.array(fit.weights, dtype=np.float64)
    fitted = " or ".join("+".join(fit.drafters) for fit in fits)
    raise IncompatibleError(
        f"the weights of joint in {folder} were fitted for the drafters {fitted}, not for {'+'.join(sources)}; "
        + _advice(ngram)
    )


def shipped_weights(target: Target, ngram: Ngram) -> Path:
    """The folder of the weights for a base. Raises `RescoreError` if none are shipped."""
    name = target.base.name if target.base else ""
    folder = SHIPPED / name / "joint"
    if not name or not folder.is_dir():
        raise RescoreError(
            f"no weights of joint are shipped for {name or 'a base that the trace does not name'}; "
            + _advice(ngram, name or "BASE")
        )
    return folder
