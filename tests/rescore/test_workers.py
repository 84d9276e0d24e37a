"""Work by the workers of a Ray cluster on this machine: the same to the last bit as here, whoever dies meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, refused, squad_records, write_lines
from suite_runs import Write, write_fixture  # noqa: F401 (a fixture)

from lattices.errors import InvalidDataError
from lm.executors import ExecutorOptions, RayExecutor
from lm.files import sha256_of_file
from rescore.tracing import PART_EXAMPLES, read_trace

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster with three cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESCORE_CACHE", str(tmp_path_factory.mktemp("workers")))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        started = ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="critical")
        address = started.address_info["address"]
        yield address
    ray.shutdown()


def workers(count: int) -> RayExecutor:
    return RayExecutor(count, {"num_cpus": 1})


def square(number: int) -> int:
    return number**2


def refuse(number: int) -> int:
    if number == 3:
        raise InvalidDataError("number 3 is broken; give another")
    return number


def die_once(folder: Path, number: int) -> int:
    """Takes its worker along, the first time that it is asked for 5."""
    died = folder / "died"
    if number == 5 and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("cluster")
class TestMap:
    @pytest.mark.parametrize("count", [1, 3])
    def test_results_come_in_the_order_of_the_shards(self, count: int):
        assert list(workers(count).map(square, range(40))) == [n * n for n in range(40)]

    def test_no_more_shards_are_taken_than_workers_can_do(self):
        taken: list[int] = []
        found = workers(2).map(square, (taken.append(n) or n for n in range(1000)))
        assert next(found) == 0 and len(taken) <= 8

    def test_an_error_is_the_users_own(self):
        line = refused(lambda: list(workers(2).map(refuse, range(9))), InvalidDataError)
        assert line == "number 3 is broken; give another"

    def test_a_worker_that_dies_loses_its_shard_which_is_done_again(self, tmp_path: Path):
        assert list(workers(2).map(partial(die_once, tmp_path), range(9))) == list(range(9))
        assert (tmp_path / "died").exists()

    def test_a_shard_that_kills_every_worker_is_told(self):
        refused(lambda: list(workers(1).map(die, [1])), "a worker died 4 times at the same shard")


class TestOptions:
    def test_mistakes(self):
        refused(lambda: ExecutorOptions(workers=2).check(), "add --executor ray")
        refused(lambda: ExecutorOptions(address="auto").check(), "add --executor ray")
        refused(lambda: ExecutorOptions(executor="ray", workers=0).check(), "--workers 0; at least one")

    def test_without_ray(self, rescore: Command, model: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        asked = rescore("trace", *model, "--out", tmp_path / "t", "--executor", "ray")
        asked.refused(r"needs Ray: pip install 'rescore\[ray\]'")


def run(*arguments: object, cache: Path, kill_at: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; `kill_at`: it is killed once this file is there."""
    environment = {**os.environ, "RESCORE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rescore", *map(str, arguments)]
    if kill_at is None:
        return subprocess.run(command, env=environment, capture_output=True, text=True)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not kill_at.exists():
        time.sleep(0.02)
    process.kill()
    return subprocess.CompletedProcess(command, process.wait(), *process.communicate())


def by(cluster: str, count: int) -> list[object]:
    return ["--executor", "ray", "--address", cluster, "--workers", count]


class TestCommands:
    def test_a_suite_is_the_same_by_one_worker_by_three_and_here(self, cluster: str, write: Write, tmp_path: Path):
        path, documents = write(), {}
        for name, how in {"here": [], "one": by(cluster, 1), "three": by(cluster, 3)}.items():
            ran = run("suite", path, "--out", tmp_path / name, *how, cache=tmp_path / f"cache-{name}")
            assert ran.returncode == 0, ran.stderr
            documents[name] = json.loads((tmp_path / name / "suite.json").read_text())
            assert "Traceback" not in ran.stderr and "ray" not in ran.stderr.lower()
        assert documents["one"] == documents["three"] == documents["here"]
        files = [sorted((tmp_path / name).glob("runs/*/examples.jsonl")) for name in documents]
        assert len(files[0]) == 2
        for same in zip(*files, strict=True):
            assert len({path.read_text() for path in same[1:]}) == 1

    def test_a_trace_goes_on_after_its_driver_was_killed(self, cluster: str, model: list[object], tmp_path: Path):
        count = 2 * PART_EXAMPLES + 5
        data = write_lines(tmp_path / "many.jsonl", squad_records(count))
        asked: list[Any] = ["trace", *model, "--out"]
        asked[asked.index("--data") + 1] = data
        cache = tmp_path / "cache"
        assert run(*asked, tmp_path / "here", cache=cache).returncode == 0
        first = tmp_path / "there" / "part-00000"
        run(*asked, tmp_path / "there", *by(cluster, 2), cache=cache, kill_at=first)
        ran = run(*asked, tmp_path / "there", *by(cluster, 2), cache=cache)
        assert ran.returncode == 0 and f"{count} examples" in ran.stdout, ran.stderr
        here, there = read_trace(tmp_path / "here"), read_trace(tmp_path / "there")
        for one, other in zip(here.examples, there.examples, strict=True):
            assert one.id == other.id and one.output_ids.tolist() == other.output_ids.tolist()
            assert one.lattice.logps.tobytes() == other.lattice.logps.tobytes()

    def test_a_corpus_and_a_model_of_ngrams(self, cluster: str, tiny_folder: Path, tmp_path: Path):
        prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": f"Bridge {n} " + "of stone " * (n % 5)} for n in range(40)])
        (tmp_path / "text.txt").write_text("".join(f"{n % 7} {n % 5} {n % 3} {n % 2}\n" for n in range(3000)))
        base = ["--base", tiny_folder, "--prompts", prompts, "--max-new-tokens", 8, "--batch-size", 4]
        ngram = ["build-ngram", tmp_path / "text.txt", "--tokenizer", "words", "--order", 3, "--discount-fallback"]
        for name, how in {"here": [], "there": by(cluster, 3)}.items():
            for asked in (["generate-corpus", *base], ngram):
                ran = run(*asked, "--out", tmp_path / f"{name}-{asked[0]}", *how, cache=tmp_path / "cache")
                assert ran.returncode == 0, ran.stderr
        for place in ("generate-corpus/corpus.jsonl", "generate-corpus/hidden.f16", "build-ngram/model.arpa"):
            assert sha256_of_file(tmp_path / f"here-{place}") == sha256_of_file(tmp_path / f"there-{place}"), place

    def test_no_cluster_at_the_address(self, rescore: Command, model: list[object], tmp_path: Path):
        ran = rescore("trace", *model, "--out", tmp_path / "t", *by("127.0.0.1:1", 1))
        ran.refused("no Ray cluster answers at 127.0.0.1:1")

    def test_live_decoding_is_refused(self, write: Write, tmp_path: Path, rescore: Command, cluster: str):
        path = write(("limit: 4\n", "limit: 4\nmode: live\n"))
        ran = rescore("suite", path, "--out", tmp_path / "out", *by(cluster, 1))
        ran.refused("live decoding measures the time that it takes here")
