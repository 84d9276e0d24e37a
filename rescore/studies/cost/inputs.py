"""What the cost model is asked about: a base LM, heads and verify mode by hand, or those of a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lattices.errors import IncompatibleError, RescoreError
from lattices.paths import user_path
from rescore.checks import VERIFY_MODES
from rescore.runs.evaluated import Evaluation
from rescore.runs.inputs import Inputs
from rescore.runs.records import Result
from rescore.studies.cost.decoders import decoder_of, decoder_of_file, heads_of, neural_for
from rescore.studies.cost.model import (
    CONTEXTS,
    DEFAULT_H,
    CostTable,
    Decoder,
    HeadsShape,
    block_efficiencies,
    cost_table,
)
from rescore.suites.files import run_of_task

SHAPE = ("hidden_size", "vocab_size")  # all that a run says of the shape of its base LM


@dataclass(frozen=True)
class CostInputs:
    """What the costs of decoding are of, as `rescore.studies.cost.model.cost_table` takes it."""

    base: Decoder
    h: int
    heads: HeadsShape
    verify: str
    block_efficiency: dict[str, float]

    def table(self, dtype: str, contexts: Sequence[int] = CONTEXTS) -> CostTable:
        """The costs in a precision, neural-61m being what serves the base."""
        return cost_table(
            self.base, h=self.h, heads=self.heads, neural=neural_for(self.base), dtype=dtype,
            block_efficiency=self.block_efficiency, verify=self.verify, contexts=contexts,
        )  # fmt: skip


def cost_tables(
    *,
    base: Annotated[
        str | None,
        "Base LM: smollm2-135m, a model folder, a .gguf file, a hub id, or paper-1.5b (the paper's base LM, layers and "
        "widths assumed). Default: that of --results, else smollm2-135m.",
    ] = None,
    config: Annotated[Path | None, "config.json of a transformers model, instead of --base."] = None,
    heads: Annotated[
        Path | None,
        "Folder of block heads. Default: those of --results, of a tuned base or shipped for the base, else as the "
        "paper has them.",
    ] = None,
    h: Annotated[int | None, "Tokens of a block. Default: as in --results, else 9."] = None,
    results: Annotated[
        Path | None, "Folder of rescore eval or suite --out: its base LM, heads, h and block efficiencies."
    ] = None,
    task: Annotated[str | None, "Task of --results. Default: the only one."] = None,
    block_efficiency: Annotated[
        Mapping[str, float],
        "Of a method, several: unrescored, 4-gram, neural-61m, '16-best 0-gram', '16-best 4-gram'.",
        "<METHOD=NUMBER>",
    ] = {},
    contexts: Annotated[Sequence[int], "Tokens in the cache.", "--cached"] = CONTEXTS,
    dtype: Annotated[Sequence[Literal["float16", "bfloat16", "float32"]], "Precision of the weights."] = (
        "float16",
        "float32",
    ),
    verify: Annotated[
        Literal["tree", "batch"] | None,
        "p drafts as one prefix tree, or as rows of a batch. Default: as live --results had it, else tree.",
    ] = None,
) -> list[CostTable]:
    """The costs in each precision, of inputs by hand or as a task of a run has them."""
    if task is not None and results is None:
        raise RescoreError("--task is a task of --results; give their folder, or drop --task")
    run = run_of_task(results, task, h=h) if results else None
    inputs = cost_inputs(
        run, task, base=base, config=config, heads=heads, h=h, verify=verify, block_efficiency=block_efficiency
    )
    return [inputs.table(precision, contexts) for precision in dtype]


def cost_inputs(
    run: Evaluation | None = None,
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
    """Inputs by hand: `base` by name or the `config` file of one, a folder of `heads`, block efficiency by method.

    Or as a task of a run has them (default: its only task): base LM, heads, h and the block efficiencies of its
    results, `verify` as it was decoded live; `base`, `config` and `heads` then say where they lie now, `verify` may be
    another, and `block_efficiency` is added. Raises `RescoreError` as `decoder_of` and `heads_of` do, and for what is
    not the run's, or can't be told from it.
    """
    if base is not None and config is not None:
        raise RescoreError("give --base or --config, not both")
    known = dict(block_efficiency or {})
    if run is None:
        decoder = decoder_of_file(config) if config else decoder_of(base or Inputs.base)
        h = DEFAULT_H if h is None else h
        return CostInputs(decoder, h, heads_of(decoder, heads, h), verify or VERIFY_MODES[0], known)
    if task is None and len(run.tasks) > 1:
        raise RescoreError(f"{run.folder} has several tasks; give one with --task: {', '.join(run.tasks)}")
    if task is not None and task not in run.tasks:
        raise RescoreError(f"{run.folder} has no task {task}; give one of {', '.join(run.tasks)}")
    task = task or run.tasks[0]
    results = [result for result in run.results if result.task == task]
    decoded_h = results[0].h
    if decoded_h < 2:
        raise RescoreError(f"{run.folder} was decoded without block heads, whose drafts are what the costs are of")
    if h not in (None, decoded_h):
        raise IncompatibleError(f"--h {h}, but {run.folder} decoded blocks of {decoded_h}; drop --h")
    decoder, name = _base_of(run, task, base, config, local_files_only)
    shape = heads_of(decoder, _heads_of(run, task, heads, name), decoded_h)
    verify = verify or _verify_of(run, results)
    return CostInputs(decoder, decoded_h, shape, verify, block_efficiencies(results, task) | known)


def _base_of(
    run: Evaluation, task: str, base: str | None, config: Path | None, local_files_only: bool
) -> tuple[Decoder, str | None]:
    """The base LM of a run and its name; `base` and `config` are checked against what the run says of it."""
    recorded = run.config.base(task)
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
    if not isinstance(chosen, str):
        raise RescoreError(f"{run.folder} does not say what its base LM is; give it: --base or --config")
    decoder = decoder_of(chosen, local_files_only=local_files_only)
    if name not in (None, chosen) and decoder.assumption:
        raise IncompatibleError(f"--base {base}, but {run.folder} was decoded with {name}; drop --base")
    from lm.base.catalog import identify

    try:
        same = recorded.get("weights_sha256") in (None, identify(chosen).weights_sha256)
    except RescoreError:  # only its configuration is on this machine: its shape is all that can be compared
        same = all(recorded.get(field) in (None, getattr(decoder, field)) for field in SHAPE)
    if not same:
        raise IncompatibleError(
            f"{chosen} is not the base LM that {run.folder} was decoded with ({name}); give its own: --base"
        )
    return decoder, chosen


def _heads_of(run: Evaluation, task: str, heads: Path | None, base: str | None) -> Path | None:
    from lm.heads.block_heads import heads_sha256, known_heads

    given = run.config.inputs[task].heads
    folder = heads or (user_path(given) if given else None) or (known_heads(base) if base else None)
    if (recorded := run.config.traces[task].get("heads_sha256")) is None:
        return folder
    if folder is None:
        raise RescoreError(f"{run.folder} does not say where its heads lie; give their folder: --heads")
    if heads_sha256(folder) != recorded:
        raise IncompatibleError(f"the heads in {folder} are not those of {run.folder}; give its own: --heads")
    return folder


def _verify_of(run: Evaluation, results: Sequence[Result]) -> str:
    """As several drafts were verified live; as the options have it where none were; a tree in a replay."""
    used = [result.latency.verify for result in results if result.latency and result.p > 1]
    return str((used or [run.config.verify])[0]) if run.config.mode == "live" else VERIFY_MODES[0]
