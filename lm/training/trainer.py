"""The loop of every training (schedule, checkpoints, resume, log, a stop before NaN), and what those on text share.

A subclass says what is trained, the losses of a step's micro-batches and how it is measured. Everything random must
follow from (seed, step): then an interrupted and resumed training is the same training, and so is one of several
processes (`lm.training.workers`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lattices.paths import encodable
from lm.base.catalog import quiet
from lm.base.machine import enough_memory
from lm.base.model import BaseLM
from lm.checkpoint import write_tensors
from lm.files import (
    append_json_line,
    atomic_file,
    changed_settings,
    open_appending,
    read_json_lines,
    write_json,
    writing,
)
from lm.locks import writing_to
from lm.training.data import HeadData, check_apart, chosen_share, segments_of, until
from lm.training.losses import VocabularySubset, choose_precision, frozen_projection
from lm.training.options import Schedule, TextOptions
from lm.training.workers import start_workers

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CHECKPOINT_FILE, LOG_FILE, TRAINING_FILE = "checkpoint.safetensors", "training_log.jsonl", "training.json"
RESULT_FILES = ("config.json", "adapter_config.json", "model.safetensors", "adapter_model.safetensors")


Measured = TypeVar("Measured", bound="DataclassInstance")  # what `evaluate` gives


class Trainer(ABC, Generic[Measured]):
    """One training. `train` runs it; `evaluate` measures what there is so far."""

    memory_option = "--positions"  # of the command; less of it needs less memory
    state_fields: tuple[str, ...] = ("step", "stopped")  # attributes that a checkpoint keeps (JSON)
    begins_trained = False  # whether it is worth knowing how good it is before step 1

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        schedule: Schedule,
        device: torch.device,
        *,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        """`rates`: for parameters whose learning rate is not the schedule's, its ratio to that."""
        self.parameters, self.schedule, self.device = dict(parameters), schedule, device
        by_rate: dict[float, list[torch.nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            by_rate.setdefault((rates or {}).get(name, 1.0), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "rate": rate} for rate, group in by_rate.items()],
            lr=schedule.learning_rate, weight_decay=schedule.weight_decay, betas=(0.9, 0.98),
        )  # fmt: skip
        self.workers = start_workers(device)
        self.step = 0
        self.stopped = False  # before the last step, because held-out text got worse

    @abstractmethod
    def _losses(self, step: int) -> Iterator[torch.Tensor]:
        """The losses of this process's micro-batches of a step; over all processes they add up to the step's loss."""

    @abstractmethod
    def evaluate(self) -> Measured:
        """What was learned, on held-out text."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Everything that the result depends on: a checkpoint with other settings is refused."""

    @abstractmethod
    def _save(self, out: Path) -> None:
        """Writes what was trained."""

    def _after_evaluation(self, measured: Measured, out: Path) -> None:
        """Called after each evaluation, before the checkpoint; may set `stopped`."""

    def train(
        self,
        out: Path,
        *,
        progress: Callable[[int, int, float], None] | None = None,
        evaluated: Callable[[int, int, Measured], None] | None = None,
    ) -> Measured:
        """Trains to the last step, writing checkpoints, the log and at the end the result to `out`.

        progress: is called after every step with its number, that of all steps, and the loss.
        evaluated: is called after every evaluation with the same numbers and what was measured; what was trained before
            is measured before the first step, too. An exception from one of the two interrupts the training.

        Goes on from a checkpoint in `out`. Ctrl-C of a single process takes effect after its step and leaves a
        checkpoint; a second one at once. Raises `IncompatibleError` (with the difference) for a checkpoint of other
        options or data, `OutputError` for a second training in one folder, `RescoreError` for a loss or gradient that
        is not a number; the last good checkpoint is kept.
        """
        self._check_place(encodable(out, "--out"))
        # The first process of a training writes for all. A place that can't be written to shows now, not at the first
        # checkpoint.
        with writing_to(out) if self.workers.is_first else nullcontext():
            if (out / CHECKPOINT_FILE).is_file():
                self._read_checkpoint(out / CHECKPOINT_FILE, out)
            if self.workers.is_first:
                self._cut_log(out / LOG_FILE)
            if self.workers.sum(self.step, self.device) != self.workers.count * self.step:
                raise RescoreError(
                    f"the processes found different checkpoints in {out}; give them a folder they all see"
                )
            with _held_back_interrupt(alone=self.workers.count == 1) as interrupted:
                return self._train(out, interrupted, progress, evaluated)

    def _train(
        self,
        out: Path,
        interrupted: Callable[[], bool],
        progress: Callable[[int, int, float], None] | None,
        evaluated: Callable[[int, int, Measured], None] | None,
    ) -> Measured:
        schedule = self.schedule
        measured: Measured | None = None
        advice = f"{out} keeps the last checkpoint; a smaller {self.memory_option} needs less"
        if self.step == 0 and self.begins_trained:
            with enough_memory(f"a smaller {self.memory_option} needs less", at="the evaluation before step 1"):
                measured = self.evaluate()
            if self.workers.is_first:
                self._log(out, measured)
            if evaluated:
                evaluated(0, schedule.steps, measured)
        while self.step < schedule.steps and not self.stopped:
            for group in self.optimizer.param_groups:
                group["lr"] = schedule.learning_rate * group["rate"] * rate_at(self.step, schedule)
            with enough_memory(advice, at=f"step {self.step + 1}"):
                value = self._step(out)
            self.step += 1
            if progress:
                progress(self.step, schedule.steps, value)
            if self.step % schedule.evaluate_every == 0 or self.step == schedule.steps:
                self._check_weights(out)
                with enough_memory(advice, at=f"the evaluation after step {self.step}"):
                    measured = self.evaluate()
                self._after_evaluation(measured, out)
                self.stopped = self.workers.sum(self.stopped, self.device) > 0  # all together
                if self.workers.is_first:
                    self._log(out, measured, loss=value)
                    self._checkpoint(out)
                if evaluated:
                    evaluated(self.step, schedule.steps, measured)
            elif interrupted():
                self._check_weights(out)
                self._checkpoint(out)
            if interrupted():
                raise KeyboardInterrupt
        self.workers.wait()
        if self._finish(out) or measured is None:
            with enough_memory(advice, at="the last evaluation"):
                measured = self.evaluate()
        if self.workers.is_first:
            self._save(out)
            record = {**self._settings(), "step": self.step, "held_out": dataclasses.asdict(measured)}
            write_json(out / TRAINING_FILE, record)
        self.workers.wait()
        return measured

    def _check_place(self, out: Path) -> None:
        """Raises `RescoreError` for a folder whose files a training would replace by its own."""
        if any((out / name).is_file() for name in (CHECKPOINT_FILE, LOG_FILE)):
            return
        if others := [name for name in RESULT_FILES if (out / name).exists()]:
            raise RescoreError(f"{out} holds something else than this training ({others[0]}); use another --out")

    def _finish(self, out: Path) -> bool:
        """Called after the last step, before the result is saved; whether that is other than what was measured last."""
        return False

    def _step(self, out: Path) -> float:
        """One step of the optimiser; its loss."""
        value = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for loss in self._losses(self.step):
            value += float(loss.detach())
            loss.backward()  # type: ignore[no-untyped-call]
        self.workers.sum_gradients(self.parameters.values())
        value = self.workers.sum(value, self.device)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0))
        if not math.isfinite(value + norm):
            raise self._diverged(f"the loss is {value} and its gradient {norm} at step {self.step + 1}", out)
        self.optimizer.step()
        return value

    def _check_weights(self, out: Path) -> None:
        # The gradient was finite, but what the last update made of the weights may not be.
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters.values()):
            raise self._diverged(f"the weights are not finite after step {self.step}", out)

    def _diverged(self, what: str, out: Path) -> RescoreError:
        advice = "begin again with a lower learning rate and another --out"
        return RescoreError(f"{what}; {out} keeps its last checkpoint; {advice}")

    def _log(self, out: Path, measured: Measured, **more: float) -> None:
        with writing(out), open_appending(out / LOG_FILE) as stream:
            append_json_line(stream, {"step": self.step, **more, **dataclasses.asdict(measured)})

    def _checkpoint(self, out: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for name, value in self.parameters.items():
            tensors[f"weights.{name}"] = value
            tensors |= {f"{key}.{name}": self.optimizer.state[value][key] for key in ("exp_avg", "exp_avg_sq")}
        state = {**{name: getattr(self, name) for name in self.state_fields}, **self._settings()}
        write_tensors(out / CHECKPOINT_FILE, tensors, metadata={"state": json.dumps(state)})

    def _cut_log(self, path: Path) -> None:
        """Takes off the evaluations after the checkpoint (a kill between the two left them): they come again."""
        if not path.is_file():
            return
        records = [record for _, record in read_json_lines(path, torn_tail=True)]
        # Without a checkpoint all of them come again, that of step 0 too.
        before = [record for record in records if self.step and record.get("step", 0) <= self.step]
        if len(before) < len(records):
            with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
                for record in before:
                    append_json_line(stream, record)

    def _read_checkpoint(self, path: Path, out: Path) -> None:
        settings = json.loads(json.dumps(self._settings()))
        parts = ("weights", "exp_avg", "exp_avg_sq")
        try:
            with safe_open(path, framework="pt", device=str(self.device)) as stream:
                state = json.loads((stream.metadata() or {})["state"])
                if changed := changed_settings(state, settings):
                    raise IncompatibleError(
                        f"{out} holds a training with other settings ({'; '.join(changed)}); use another --out"
                    )
                fields = {name: state[name] for name in self.state_fields}
                tensors = {f"{p}.{n}": stream.get_tensor(f"{p}.{n}") for n in self.parameters for p in parts}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InvalidDataError(f"can't read the checkpoint {path}; remove it to begin again ({error})") from error
        for name, value in fields.items():
            setattr(self, name, value)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weights.{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": tensors[f"exp_avg.{name}"],
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
                }


Options = TypeVar("Options", bound=TextOptions)


class TextTrainer(Trainer[Measured], Generic[Measured, Options]):
    """A training on segments of text.

    options: with the precision that `auto` stands for here; `dtype` is that precision.
    segments: to learn from; held_out: to measure on.
    subset: of the vocabulary, which the loss is over.
    projection: of the base, `[vocab, d]`.
    """

    learner = "heads"  # who learns, in errors
    least_targets = 1  # of a segment
    measured_targets = 8192

    options: Options

    def __init__(
        self, base: BaseLM, data: Sequence[HeadData], options: Options, *, held_out: HeadData | None = None
    ) -> None:
        """`held_out`: text of another origin to measure on, instead of a share of `data`."""
        options.check()
        self.dtype = choose_precision(options.precision, base.device)
        # What `auto` stands for depends on the machine; the record and a resumed run need the precision itself.
        self.options = dataclasses.replace(options, precision=str(self.dtype).removeprefix("torch."))  # type: ignore[arg-type]
        self.base, self.data, self.measured_on = base, list(data), held_out
        check_apart(self.data)
        self.segments = segments_of(self.data, least=self.least_targets)
        if len(self.segments) < 2:
            raise InvalidDataError(
                f"the corpus has fewer than two segments of text; {self.learner} need more to learn from"
            )
        if held_out is None:
            shares = chosen_share(len(self.segments), options.held_out, options.seed)
            measured, self.segments = ([self.segments[i] for i in share] for share in shares)
        elif held_out.sha256 in {d.sha256 for d in data}:
            raise RescoreError(f"{held_out.source} can't be both trained on and held out")
        else:
            self.data.append(held_out)
            measured = segments_of([held_out], least=self.least_targets)
            measured = [segment._replace(place=len(data)) for segment in measured]
            if not measured:
                raise InvalidDataError(f"{held_out.source} has no text that {self.learner} can be measured on")
        self.held_out = until(self.measured_targets, measured)
        self.subset = VocabularySubset(
            [d.targets for d in data], base.vocab_size, options.vocabulary, options.negatives
        )
        self.projection = frozen_projection(base, self.dtype)
        torch.manual_seed(options.seed)
        parameters = self._new_parameters()
        super().__init__(parameters, self.options, base.device, rates=self._rates(parameters))

    @abstractmethod
    def _new_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Makes what is trained; what of it learns, by name."""

    def _rates(self, names: Iterable[str]) -> dict[str, float]:
        """Learning rates that are not the schedule's, as `Trainer` takes them."""
        return {}

    def _settings(self) -> dict[str, Any]:
        sources = [{"source": each.source, "sha256": each.sha256, "tokens": len(each)} for each in self.data]
        measured_on = None if self.measured_on is None else sources.pop()
        return {
            "options": dataclasses.asdict(self.options),
            "base": dataclasses.asdict(self.base.identity),
            "data": sources,
            "measured_on": measured_on,
        }


@contextmanager
def _held_back_interrupt(*, alone: bool) -> Iterator[Callable[[], bool]]:
    """Whether there was a Ctrl-C, instead of a `KeyboardInterrupt` in the middle of a step; the second one is one."""
    pressed = False

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    # Only the main thread hears signals; several processes have to stop together, which their launcher sees to.
    if not alone or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def rate_at(step: int, schedule: Schedule) -> float:
    """Share of the learning rate at a step: linear warm-up, then cosine to zero."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    share = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))


def save_model(model: Any, base: BaseLM, folder: Path) -> None:
    """Writes a model folder as transformers reads it, with the tokenizer of a base LM."""
    with quiet():
        model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
