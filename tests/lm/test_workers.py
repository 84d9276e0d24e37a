"""Two processes, as torchrun starts them, do together what one does alone."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file, save_file

from lattices.errors import RescoreError
from lm.base.catalog import load_base
from lm.training.data import read_head_data
from lm.training.heads import HeadTrainer, TrainingOptions
from lm.training.rescorer import RescorerOptions, RescorerTrainer
from lm.training.workers import Workers, start_workers


def train_both(folder: Path, base_folder: str) -> None:
    """Trains heads and a rescorer into `folder`, as many processes as the launcher's variables say."""
    base = load_base(base_folder, device="cpu")
    data = [read_head_data(base, folder / "pairs.jsonl", folder)]
    shared: dict[str, Any] = {
        "steps": 4, "vocabulary": 40, "negatives": 8, "warmup": 1, "held_out": 0.2, "evaluate_every": 2,
        "precision": "float32",
    }  # fmt: skip
    heads = TrainingOptions(h=4, inner_size=8, token_size=5, positions=200, heads_per_step=2, **shared)
    rescorer = RescorerOptions(size="neural-32m", positions=700, micro_batch=200, patience=9, **shared)
    sequential = dataclasses.replace(heads, architecture="sequential", heads_per_step=None)
    tuned = dataclasses.replace(heads, tune="lora", lora_rank=2, micro_batch=150, gradient_checkpointing=True)
    trainers = {
        "heads": HeadTrainer(base, data, heads),
        "sequential": HeadTrainer(base, data, sequential),
        "rescorer": RescorerTrainer(base, data, rescorer),
        "tuned": HeadTrainer(load_base(base_folder, device="cpu"), data, tuned),  # changes its base
    }
    for name, trainer in trainers.items():
        out = folder / f"{name}-{trainer.workers.count}"
        trainer.train(out)
        weights = {n: p.detach().clone() for n, p in trainer.parameters.items()}
        save_file(weights, out / f"rank{trainer.workers.rank}")


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both trainings, by one process (NAME-1) and by two, of which this one is the first (NAME-2)."""
    folder = tmp_path_factory.mktemp("workers")
    pairs = [{"prompt": "p" * (1 + i % 4), "response": "the cat sat on the mat, " * (1 + i % 3)} for i in range(24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    here = Path(__file__).parent
    program = f"import test_workers; test_workers.train_both(test_workers.Path({str(folder)!r}), {str(tiny_folder)!r})"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WORLD_SIZE", raising=False)
        patch.setenv("RESCORE_CACHE", str(folder / "cache"))
        train_both(folder, str(tiny_folder))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port))):
            patch.setenv(name, value)
        path = os.pathsep.join([str(here), str(here.parents[1])])
        second = subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, "RANK": "1", "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            patch.setenv("RANK", "0")
            torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=200))
            train_both(folder, str(tiny_folder))
            _, error = second.communicate(timeout=100)
            assert second.returncode == 0, error
        finally:
            second.kill()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return folder


@pytest.mark.parametrize("name", ["heads", "sequential", "rescorer", "tuned"])
def test_two_processes_give_what_one_gives(trained: Path, name: str):
    one, two = trained / f"{name}-1", trained / f"{name}-2"
    logs = [(out / "training_log.jsonl").read_text().splitlines() for out in (one, two)]
    assert len(logs[0]) == len(logs[1]) == 2  # only the first process writes
    for alone, together in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert together["step"] == alone["step"]
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    alone, first, second = load_file(one / "rank0"), load_file(two / "rank0"), load_file(two / "rank1")
    for key, value in alone.items():
        assert torch.equal(first[key], second[key])  # or they would drift apart
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-5)
    names = {path.name for path in one.iterdir()}
    assert {path.name for path in two.iterdir()} == names | {"rank1"}


LEAVES = """
import os, sys
from datetime import timedelta
import torch, torch.distributed
torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
torch.distributed.barrier()
os._exit(9)  # as a kill does
"""


@pytest.mark.parametrize("call", ["sum", "wait", "sum_gradients"])
def test_a_process_that_dies_is_told_in_one_line(monkeypatch, call):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port))):
        monkeypatch.setenv(name, value)
    other = subprocess.Popen([sys.executable, "-c", LEAVES], env={**os.environ, "RANK": "1"}, stderr=subprocess.PIPE)
    monkeypatch.setenv("RANK", "0")
    parameter = torch.nn.Parameter(torch.zeros(3))
    try:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
        workers = start_workers(torch.device("cpu"))
        workers.wait()
        assert other.wait(timeout=60) == 9
        calls = {
            "sum": lambda: workers.sum(1.0, torch.device("cpu")),
            "wait": workers.wait,
            "sum_gradients": lambda: workers.sum_gradients([parameter]),
        }
        with pytest.raises(RescoreError, match="goes on from its last checkpoint") as caught:
            calls[call]()
        assert "\n" not in str(caught.value)
    finally:
        other.kill()
        other.communicate()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class TestAlone:
    def test_nothing_is_sent(self):
        alone = Workers(0, 1)
        parameter = torch.nn.Parameter(torch.zeros(2))
        alone.sum_gradients([parameter])
        alone.wait()
        assert parameter.grad is None and alone.sum(3.5, torch.device("cpu")) == 3.5 and alone.is_first

    @pytest.mark.parametrize("count", [None, "1"])
    def test_without_a_launcher_or_as_its_only_process(self, monkeypatch, count):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if count:
            monkeypatch.setenv("WORLD_SIZE", count)
        assert start_workers(torch.device("cpu")) == Workers(0, 1)
