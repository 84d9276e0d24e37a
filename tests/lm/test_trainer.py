"""The loop that all trainings share, on a toy: resumed is the same, NaN and full memory stop, processes agree."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lm import checkpoint
from lm.training.trainer import Trainer, rate_at
from lm.training.workers import Workers

KEPT = "checkpoint.safetensors"


class StopError(Exception):
    """An interruption from outside, like a kill."""


@dataclass(frozen=True)
class Plan:
    """Options of the toy."""

    steps: int = 10
    warmup: int = 2
    learning_rate: float = 0.1
    weight_decay: float = 0.01
    evaluate_every: int = 4
    stop_at: int = 99
    goal: float = 3.0


@dataclass(frozen=True)
class Distance:
    """What the toy measures."""

    distance: float


class Toy(Trainer[Distance]):
    """Moves four numbers towards a goal, by micro-batches of noise drawn from the step's number."""

    state_fields = (*Trainer.state_fields, "seen")

    def __init__(self, plan: Plan = Plan()) -> None:
        self.plan, self.seen = plan, 0
        weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
        super().__init__({"weight": weight}, plan, torch.device("cpu"))

    @property
    def weight(self) -> torch.Tensor:
        return self.parameters["weight"]

    def _losses(self, step: int) -> Iterator[torch.Tensor]:
        noise = torch.from_numpy(np.random.default_rng(step).standard_normal((3, 4)))
        for row in noise[self.workers.rank :: self.workers.count]:
            yield ((self.weight - self.plan.goal + 0.1 * row) ** 2).sum() / 3

    def evaluate(self) -> Distance:
        return Distance(float((self.weight.detach() - self.plan.goal).norm()))

    def _settings(self) -> dict[str, Any]:
        return {"options": dataclasses.asdict(self.plan)}

    def _after_evaluation(self, measured: Distance, out: Path) -> None:
        self.seen += 1
        self.stopped = self.seen >= self.plan.stop_at

    def _save(self, out: Path) -> None:
        (out / "saved.json").write_text(json.dumps(self.weight.tolist()))


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]


def interrupted_at(stop: int):
    def interrupt(step: int, *_: object) -> None:
        if step == stop:
            raise StopError

    return interrupt


@pytest.mark.parametrize("stop", range(1, 11))
def test_an_interrupted_training_is_the_same_training(tmp_path, stop):
    expected = Toy().train(tmp_path / "whole")
    with pytest.raises(StopError):
        Toy().train(tmp_path / "parts", progress=interrupted_at(stop))
    losses: list[tuple[int, int, float]] = []
    again = Toy()
    assert again.train(tmp_path / "parts", progress=lambda *now: losses.append(now)) == expected
    assert [step for step, *_ in losses] == list(range((stop - 1) // 4 * 4 + 1, 11))
    assert again.seen == 3
    for name in ("saved.json", "training.json", "training_log.jsonl", KEPT):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_what_it_writes(tmp_path):
    seen = []
    found = Toy().train(tmp_path, evaluated=lambda *now: seen.append(now))
    assert [step for step, *_ in seen] == [4, 8, 10] and seen[-1] == (10, 10, found)
    assert sorted(p.name for p in tmp_path.iterdir()) == [KEPT, "saved.json", "training.json", "training_log.jsonl"]
    assert [sorted(record) for record in log_of(tmp_path)] == [["distance", "loss", "step"]] * 3
    document = json.loads((tmp_path / "training.json").read_text())
    assert document == {"options": dataclasses.asdict(Plan()), "step": 10, "held_out": {"distance": found.distance}}


def test_it_learns(tmp_path):
    losses = []
    Toy(Plan(steps=60)).train(tmp_path, progress=lambda _step, _steps, loss: losses.append(loss))
    assert losses[-1] < 0.1 * losses[0]


def test_micro_batches_add_up_to_the_steps_loss(tmp_path):
    """And the logged loss is the step's, before its update."""
    losses = []
    Toy(Plan(steps=1)).train(tmp_path, progress=lambda _step, _steps, loss: losses.append(loss))
    noise = np.random.default_rng(0).standard_normal((3, 4))
    assert losses == [pytest.approx(((-3 + 0.1 * noise) ** 2).sum() / 3)]
    assert log_of(tmp_path)[0]["loss"] == losses[0]


def test_it_stops_early_where_the_training_says_so(tmp_path):
    steps = []
    found = Toy(Plan(stop_at=2)).train(tmp_path, progress=lambda step, *_: steps.append(step))
    assert steps == list(range(1, 9))
    assert json.loads((tmp_path / "training.json").read_text())["step"] == 8
    again = Toy(Plan(stop_at=2)).train(tmp_path, progress=lambda *_: pytest.fail("trained"))
    assert again == found


@pytest.mark.parametrize("stop", [1, 3, 5, 8, 10])
def test_ctrl_c_leaves_a_checkpoint_of_its_step(tmp_path, stop):
    Toy().train(tmp_path / "whole")
    before, seen = signal.getsignal(signal.SIGINT), []

    def press(step: int, *_: object) -> None:
        seen.append(step)
        if step == stop:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Toy().train(tmp_path / "parts", progress=press)
    assert signal.getsignal(signal.SIGINT) is before and seen == list(range(1, stop + 1))
    Toy().train(tmp_path / "parts", progress=lambda step, *_: seen.append(step))
    assert seen == list(range(1, 11))
    kept, whole = (load_file(tmp_path / name / KEPT) for name in ("parts", "whole"))
    assert kept.keys() == whole.keys() and all(torch.equal(kept[name], whole[name]) for name in kept)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path, monkeypatch):
    losses = Toy._losses

    def pressed_twice(self, step: int) -> Iterator[torch.Tensor]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the step went on")
        yield

    monkeypatch.setattr(
        Toy, "_losses", lambda self, step: pressed_twice(self, step) if step == 4 else losses(self, step)
    )
    with pytest.raises(KeyboardInterrupt):
        Toy().train(tmp_path)
    assert not (tmp_path / "training.json").exists()


class TestLog:
    def test_a_kill_between_log_and_checkpoint_leaves_no_second_line(self, tmp_path, monkeypatch):
        Toy().train(tmp_path / "whole")
        checkpoint = Toy._checkpoint

        def killed(self, out: Path) -> None:
            if self.step == 8:
                raise StopError
            checkpoint(self, out)

        monkeypatch.setattr(Toy, "_checkpoint", killed)
        with pytest.raises(StopError):
            Toy().train(tmp_path / "parts")
        assert [record["step"] for record in log_of(tmp_path / "parts")] == [4, 8]
        monkeypatch.undo()
        Toy().train(tmp_path / "parts")
        assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")

    def test_the_same_before_the_first_checkpoint(self, tmp_path):
        (tmp_path / "training_log.jsonl").write_text('{"step": 4, "loss": 1.0}\n{"ste')
        Toy().train(tmp_path)
        assert [record["step"] for record in log_of(tmp_path)] == [4, 8, 10]

    def test_a_torn_line_is_cut_off(self, tmp_path):
        with pytest.raises(StopError):
            Toy().train(tmp_path, progress=interrupted_at(5))
        with (tmp_path / "training_log.jsonl").open("a") as stream:
            stream.write('{"step": 8, "lo')
        Toy().train(tmp_path)
        assert [record["step"] for record in log_of(tmp_path)] == [4, 8, 10]


class TestTrouble:
    def test_other_settings_are_shown(self, tmp_path):
        Toy().train(tmp_path)
        with pytest.raises(IncompatibleError) as caught:
            Toy(Plan(steps=20, goal=1.0)).train(tmp_path)
        assert "(options.steps: 10 -> 20; options.goal: 3.0 -> 1.0); use another --out" in str(caught.value)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("what", ["loss", "gradient"])
    def test_numbers_that_are_none_stop_it_with_the_checkpoint_kept(self, tmp_path, monkeypatch, bad, what):
        Toy().train(tmp_path / "whole")
        losses = Toy._losses

        def broken(self, step: int) -> Iterator[torch.Tensor]:
            for loss in losses(self, step):
                if step == 5 and what == "gradient":
                    loss.register_hook(lambda gradient: gradient * bad)
                yield loss * bad if step == 5 and what == "loss" else loss

        monkeypatch.setattr(Toy, "_losses", broken)
        with pytest.raises(RescoreError, match=r"at step 6; .* keeps its last checkpoint; .* lower learning rate"):
            Toy().train(tmp_path / "parts")
        kept = load_file(tmp_path / "parts" / KEPT)
        assert all(value.isfinite().all() for value in kept.values())
        monkeypatch.undo()
        steps = []
        Toy().train(tmp_path / "parts", progress=lambda step, *_: steps.append(step))
        assert steps == list(range(5, 11))
        assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")

    def test_weights_that_are_no_numbers_stop_it_with_the_checkpoint_kept(self, tmp_path, monkeypatch):
        toy = Toy()
        step = toy.optimizer.step

        def broken() -> None:
            step()
            if toy.step == 9:
                with torch.no_grad():
                    next(iter(toy.parameters.values())).fill_(math.inf)

        monkeypatch.setattr(toy.optimizer, "step", broken)
        with pytest.raises(RescoreError, match=r"weights are not finite after step \d+; .* keeps its last checkpoint"):
            toy.train(tmp_path)
        assert all(value.isfinite().all() for value in load_file(tmp_path / KEPT).values())

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "adapter_config.json"])
    def test_the_folder_of_a_model_is_not_overwritten(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"theirs")
        with pytest.raises(RescoreError, match=f"holds something else than this training .{name}.; use another --out"):
            Toy().train(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def test_out_of_memory_names_the_option(self, tmp_path, monkeypatch):
        losses = Toy._losses

        def full(self, step: int) -> Iterator[torch.Tensor]:
            if step == 6:
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
            yield from losses(self, step)

        monkeypatch.setattr(Toy, "_losses", full)
        monkeypatch.setattr(Toy, "memory_option", "--pieces")
        with pytest.raises(RescoreError, match=r"out of memory at step 7; .* a smaller --pieces needs less") as caught:
            Toy().train(tmp_path)
        assert "\n" not in str(caught.value) and (tmp_path / KEPT).is_file()

    @pytest.mark.parametrize("keep", [0, 20, -1])
    def test_a_broken_checkpoint(self, tmp_path, keep):
        Toy().train(tmp_path)
        (tmp_path / KEPT).write_bytes((tmp_path / KEPT).read_bytes()[:keep])
        with pytest.raises(InvalidDataError, match="remove it to begin again"):
            Toy().train(tmp_path)

    @pytest.mark.parametrize("lacking", ["stopped", "step", "weights.weight", "exp_avg.weight"])
    def test_a_checkpoint_that_lacks_something(self, tmp_path, monkeypatch, lacking):
        """As one of an earlier version may."""
        to_bytes = checkpoint.to_bytes

        def without(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
            state = {k: v for k, v in json.loads(metadata["state"]).items() if k != lacking}
            return to_bytes({k: v for k, v in tensors.items() if k != lacking}, metadata={"state": json.dumps(state)})

        monkeypatch.setattr(checkpoint, "to_bytes", without)
        Toy().train(tmp_path)
        with pytest.raises(InvalidDataError, match="remove it to begin again"):
            Toy().train(tmp_path)

    def test_processes_that_see_different_folders(self, tmp_path, monkeypatch):
        toy = Toy()
        toy.workers = Workers(0, 2)
        monkeypatch.setattr(Workers, "sum", lambda _self, value, _device: value + 4)  # the other one found step 4
        with pytest.raises(RescoreError, match=r"the processes found different checkpoints .* a folder they all see"):
            toy.train(tmp_path)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(Workers, "sum", lambda _self, value, _device: 2 * value)
    monkeypatch.setattr(Workers, "sum_gradients", lambda *_: None)
    monkeypatch.setattr(Workers, "wait", lambda *_: None)
    second = Toy()
    second.workers = Workers(1, 2)
    second.train(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [rate_at(step, Plan(steps=110, warmup=10)) for step in range(111)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5) and rates[110] == pytest.approx(0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert [rate_at(step, Plan(steps=2, warmup=0)) for step in range(2)] == [1.0, pytest.approx(0.5)]
