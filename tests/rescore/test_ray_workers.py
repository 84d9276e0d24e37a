"""Work by the workers of a Ray cluster on this machine: the same to the last bit as here, whoever dies meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, refused, squad_records, write_lines
from evaluating import inputs_of, opened
from made_costs import costs_for
from shards import die, die_once, refuse, square
from suite_runs import Write, run, write_fixture  # noqa: F401 (a fixture)

from lattices.errors import InvalidDataError, RescoreError
from lm import executors
from lm.base.corpus import GenerationOptions, generate_corpus, read_prompts
from lm.base.model import BaseLM
from lm.executors import ExecutorOptions, RayExecutor
from lm.files import sha256_of_file
from lm.ngram.build import NgramOptions, build_ngram
from rescore.runs.evaluation import evaluate
from rescore.runs.recording import record_task
from rescore.runs.run import Run
from rescore.tracing import PART_EXAMPLES, read_trace

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster with three cores, which this process is connected to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESCORE_CACHE", str(tmp_path_factory.mktemp("workers")))
        for name, value in executors.QUIET.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # workers import what is beside this module, too
        ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level=50)
        yield
    ray.shutdown()


def workers(count: int) -> RayExecutor:
    return RayExecutor(count, {"num_cpus": 1})


def by(count: int) -> ExecutorOptions:
    return ExecutorOptions(executor="ray", workers=count)


@pytest.mark.usefixtures("cluster")
class TestMap:
    @pytest.mark.parametrize("count", [1, 3])
    def test_results_come_in_the_order_of_the_shards(self, count: int):
        assert list(workers(count).map(square, range(40))) == [n * n for n in range(40)]

    def test_no_more_shards_are_taken_than_workers_can_do(self):
        taken: list[int] = []
        found = workers(2).map(square, (taken.append(n) or n for n in range(1000)))
        assert next(found) == 0 and len(taken) <= 2 * executors.AHEAD

    def test_an_error_is_the_users_own(self):
        line = refused(lambda: list(workers(2).map(refuse, range(9))), InvalidDataError)
        assert line == "number 3 is broken; give another"

    def test_a_worker_that_dies_loses_its_shard_which_is_done_again(self, tmp_path: Path):
        assert list(workers(2).map(partial(die_once, tmp_path), range(9))) == list(range(9))
        assert (tmp_path / "died").exists()

    def test_a_shard_that_kills_every_worker_is_told(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(executors, "AGAIN", 1)
        refused(lambda: list(workers(1).map(die, [1])), "a worker died 2 times at the same shard")


@pytest.mark.usefixtures("cluster")
class TestWork:
    def test_a_suite_is_the_same_by_one_worker_by_three_and_here(self, write: Write, tmp_path: Path):
        how: dict[str, dict[str, Any]] = {"here": {}, "one": {"execution": by(1)}, "three": {"execution": by(3)}}
        documents = {name: run(write(), tmp_path / name, **each).document for name, each in how.items()}
        assert documents["one"] == documents["three"] == documents["here"]
        files = [sorted((tmp_path / name).glob("runs/*/examples.jsonl")) for name in documents]
        for here, one, three in zip(*files, strict=True):
            assert one.read_text() == three.read_text()
            assert sorted(here.read_text().splitlines()) == sorted(one.read_text().splitlines())

    def test_a_trace_goes_on_where_it_was_stopped(self, options: dict[str, Any], tmp_path: Path):
        count = 2 * PART_EXAMPLES + 5
        inputs = inputs_of(options | {"data": str(write_lines(tmp_path / "many.jsonl", squad_records(count)))})

        def stop(_: str, done: int, __: int) -> None:
            if done > PART_EXAMPLES:
                raise RescoreError("stopped")

        record_task(inputs, "heads", tmp_path / "here", k=8)
        refused(
            lambda: record_task(inputs, "heads", tmp_path / "there", k=8, execution=by(2), progress=stop), "stopped"
        )
        assert len(read_trace(tmp_path / "there").examples) == PART_EXAMPLES
        record_task(inputs, "heads", tmp_path / "there", k=8, execution=by(3))
        here, there = read_trace(tmp_path / "here"), read_trace(tmp_path / "there")
        for one, other in zip(here.examples, there.examples, strict=True):
            assert one.id == other.id and one.output_ids.tolist() == other.output_ids.tolist()
            assert one.lattice.logps.tobytes() == other.lattice.logps.tobytes()

    def test_a_corpus(self, tiny_base: BaseLM, tmp_path: Path):
        rows = [{"prompt": f"{n} " + "stone " * (n % 5)} for n in range(40)]
        prompts = read_prompts(write_lines(tmp_path / "prompts.jsonl", rows), default_chat=True)
        options = GenerationOptions(max_new_tokens=8, batch_size=4)
        generate_corpus(tiny_base, prompts, tmp_path / "here", options)
        generate_corpus(tiny_base, prompts, tmp_path / "there", options, executor=workers(3))
        for name in ("corpus.jsonl", "hidden.f16"):
            assert sha256_of_file(tmp_path / "here" / name) == sha256_of_file(tmp_path / "there" / name), name

    def test_counts_of_ngrams(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("lm.ngram.counting.LEAST_CHUNK", 1 << 11)
        text = tmp_path / "text.txt"
        text.write_text("".join(f"{n % 7} {n % 5} {n % 3} {n % 2}\n" for n in range(3000)))
        options = NgramOptions(tokenizer="words", order=3, discount_fallback=(0.5, 1.0, 1.5), threads=2)
        build_ngram([text], tmp_path / "here", options)
        build_ngram([text], tmp_path / "there", options, execution=by(3))
        assert sha256_of_file(tmp_path / "here" / "model.arpa") == sha256_of_file(tmp_path / "there" / "model.arpa")

    def test_another_cluster_than_this_process_is_connected_to(self):
        elsewhere = ExecutorOptions(executor="ray", address="127.0.0.1:1")
        with pytest.raises(RescoreError, match=r"connected to the Ray cluster at .*, not to 127.0.0.1:1"):
            elsewhere.started().__enter__()

    def test_drafts_verified_as_a_batch_after_a_tree(self, options: dict[str, Any]):
        """A worker keeps what it has loaded, not how the evaluation before verified."""
        runs, costs = [Run("none", p=4)], costs_for(options, [[20.0, 30.0]])
        for verify in ("tree", "batch"):
            how: dict[str, Any] = {"verify": verify, "costs": costs}
            here, there = (evaluate(opened(options), runs, **how, **by) for by in ({}, {"executor": workers(1)}))
            assert [e.calls for e in there.examples] == [e.calls for e in here.examples]

    def test_live_decoding_is_refused(self, write: Write, tmp_path: Path):
        path = write(("limit: 4\n", "limit: 4\nmode: live\n"))
        refused(lambda: run(path, tmp_path / "out", execution=by(1)), "live decoding measures the time")


class TestCommand:
    def test_a_cluster_of_its_own(self, model: list[object], tmp_path: Path):
        asked = ["trace", *model, "--out", tmp_path / "t", "--executor", "ray", "--workers", 1]
        ran = subprocess.run([sys.executable, "-m", "rescore", *map(str, asked)], capture_output=True, text=True)
        assert (ran.returncode, ran.stderr) == (0, ""), ran.stderr
        assert ran.stdout.endswith("6 examples, 72 positions, h = 4, K = 32\n") and ran.stdout.count("\n") == 1

    def test_what_a_cluster_says_is_one_line(self, caplog: pytest.LogCaptureFixture, capsys):
        executors._told({"lines": ["A worker died or was killed while executing a task by an unexpected ..."]})
        executors._told({"lines": ["Task _done failed. There are 1 retries remaining"]})
        assert [r.message for r in caplog.records] == ["a worker of the Ray cluster died; what it was at is done again"]
        assert capsys.readouterr().out == ""

    def test_no_cluster_at_the_address(
        self, rescore: Command, model: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(ray, "is_initialized", lambda: False)  # another test's may be up
        asked = ["--executor", "ray", "--address", "127.0.0.1:1"]
        rescore("trace", *model, "--out", tmp_path / "t", *asked).refused("no Ray cluster answers at 127.0.0.1:1")

    def test_without_ray(self, rescore: Command, model: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        asked = rescore("trace", *model, "--out", tmp_path / "t", "--executor", "ray")
        asked.refused(r"needs Ray: pip install 'rescore\[ray\]'")

    def test_mistakes(self):
        refused(lambda: ExecutorOptions(workers=2).check(), "add --executor ray")
        refused(lambda: ExecutorOptions(address="auto").check(), "add --executor ray")
        refused(lambda: ExecutorOptions(executor="ray", workers=0).check(), "--workers 0; at least one")
