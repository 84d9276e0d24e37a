"""What the cost model is asked about: a base LM, heads and verify mode by hand, or those of a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lattices.errors import IncompatibleError, RescoreError
from lattices.paths import user_path
from lm.base.catalog import BUILT_IN, identify
from rescore.runs.evaluated import Evaluation
from rescore.runs.records import Result
from rescore.studies.cost.decoders import decoder_of, decoder_of_file, heads_of
from rescore.studies.cost.model import DEFAULT_H, VERIFY, Decoder, HeadsShape, block_efficiencies

SHAPE = ("hidden_size", "vocab_size")  # all that a run says of the shape of its base LM


@dataclass(frozen=True)
class CostInputs:
    """Arguments of `rescore.studies.cost.model.cost_table` that belong together."""

    base: Decoder
    h: int
    heads: HeadsShape
    verify: str
    block_efficiency: dict[str, float]


def cost_inputs(
    *,
    base: str | None = None,
    config: Path | None = None,
    heads: Path | None = None,
    h: int | None = None,
    verify: str | None = None,
    block_efficiency: Mapping[str, float] | None = None,
) -> CostInputs:
    """Inputs by hand: `base` by name or the `config` file of one, a folder of `heads`, block efficiency by method.

    Raises `RescoreError` as `decoder_of` and `heads_of` do.
    """
    _check_one(base, config)
    decoder = decoder_of_file(config) if config else decoder_of(base or BUILT_IN)
    h = DEFAULT_H if h is None else h
    return CostInputs(decoder, h, heads_of(decoder, heads, h), verify or VERIFY[0], dict(block_efficiency or {}))


def cost_inputs_of_run(
    run: Evaluation,
    task: str | None = None,
    *,
    base: str | None = None,
    config: Path | None = None,
    heads: Path | None = None,
    h: int | None = None,
    verify: str | None = None,
    block_efficiency: Mapping[str, float] | None = None,
    local_files_only: bool = False,
) -> CostInputs:
    """Inputs as a task of a run has them (default: its only task): base LM, heads, h and the block efficiencies of its
    results; `verify` as it was decoded live.

    `base`, `config` and `heads` say where they lie now; `verify` may be another, and `block_efficiency` is added.
    Raises `RescoreError` for what is not the run's, or can't be told from it, and as `cost_inputs` does.
    """
    _check_one(base, config)
    if task is None and len(run.tasks) > 1:
        raise RescoreError(f"{run.folder} has several tasks; give one with --task: {', '.join(run.tasks)}")
    if task is not None and task not in run.tasks:
        raise RescoreError(f"{run.folder} has no task {task}; give one of {', '.join(run.tasks)}")
    task = task or run.tasks[0]
    results = [result for result in run.results if result.task == task]
    held = results[0].h
    if h is not None and h != held:
        raise IncompatibleError(f"--h {h}, but {run.folder} decoded blocks of {held}; drop --h")
    settings = run.config.traces[task]
    decoder, name = _base_of(run, settings, base, config, local_files_only)
    return CostInputs(
        decoder, held, heads_of(decoder, _heads_of(run, settings, heads, run.config.inputs[task].heads, name), held),
        verify or _verify_of(run, results), block_efficiencies(results, task) | dict(block_efficiency or {}),
    )  # fmt: skip


def _check_one(base: str | None, config: Path | None) -> None:
    if base is not None and config is not None:
        raise RescoreError("give --base or --config, not both")


def _base_of(
    run: Evaluation, settings: Mapping[str, Any], base: str | None, config: Path | None, local_files_only: bool
) -> tuple[Decoder, str | None]:
    """The base LM of a run and its name; `base` and `config` are checked against what the run says of it."""
    recorded = settings.get("base") or {}
    name = recorded.get("name")
    if config is not None:
        decoder = decoder_of_file(config)
        for field in SHAPE:
            if recorded.get(field) not in (None, getattr(decoder, field)):
                raise IncompatibleError(
                    f"{config} has {field} {getattr(decoder, field)}, the base LM of {run.folder} {recorded[field]}; "
                    "drop it"
                )
        return decoder, name
    chosen = base or name
    if chosen is None:
        raise RescoreError(f"{run.folder} does not say what its base LM is; give it: --base or --config")
    decoder = decoder_of(chosen, local_files_only=local_files_only)
    if name not in (None, chosen) and decoder.assumption:
        raise IncompatibleError(f"--base {base}, but {run.folder} was decoded with {name}; drop --base")
    try:
        same = recorded.get("weights_sha256") in (None, identify(chosen).weights_sha256)
    except RescoreError:  # only its configuration is on this machine: its shape is all that can be compared
        same = all(recorded.get(field) in (None, getattr(decoder, field)) for field in SHAPE)
    if not same:
        raise IncompatibleError(
            f"{chosen} is not the base LM that {run.folder} was decoded with ({name}); give its own: --base"
        )
    return decoder, chosen


def _heads_of(
    run: Evaluation, settings: Mapping[str, Any], heads: Path | None, named: str | None, name: str | None
) -> Path | None:
    """The folder of a run's heads (`named` so by the run); None where nothing says which they are."""
    from lm.heads.block_heads import heads_sha256, known_heads

    folder = heads or (user_path(named) if named else None) or (known_heads(name) if name else None)
    if (wanted := settings.get("heads_sha256")) is None:
        return folder
    if folder is None:
        raise RescoreError(f"{run.folder} does not say where its heads lie; give their folder: --heads")
    if heads_sha256(folder) != wanted:
        raise IncompatibleError(f"the heads in {folder} are not those of {run.folder}; give its own: --heads")
    return folder


def _verify_of(run: Evaluation, results: Sequence[Result]) -> str:
    """As several drafts were verified live; as the options have it where none were; a tree in a replay."""
    used = [result.latency.verify for result in results if result.latency and result.p > 1]
    return str((used or [run.config.verify])[0]) if run.config.mode == "live" else VERIFY[0]
