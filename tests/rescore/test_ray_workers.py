"""Work by the workers of a Ray cluster on this machine: the same to the last bit as here, whoever dies meanwhile."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, make_heads, refused, save_tiny_base, squad_records, write_lines
from evaluating import inputs_of, opened
from made_costs import costs_for
from shards import die, die_once, refuse, square, threads, where, without_module, without_room
from suite_runs import Write, run, write_fixture  # noqa: F401 (a fixture)

from lattices.errors import IncompatibleError, InvalidDataError, RescoreError
from lm import executors
from lm.base.catalog import load_base
from lm.base.corpus import GenerationOptions, generate_corpus, read_prompts, write_own_corpus
from lm.base.model import BaseLM
from lm.executors import ExecutorOptions, RayExecutor
from lm.files import sha256_of_file
from lm.ngram.build import NgramOptions, build_ngram
from rescore.runs.evaluation import evaluate
from rescore.runs.recording import record_task
from rescore.runs.run import Run
from rescore.runs.tuning import tune
from rescore.tracing import PART_EXAMPLES, read_trace

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster with three cores, which this process is connected to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESCORE_CACHE", str(tmp_path_factory.mktemp("workers")))
        for name, value in executors.RAY_SETTINGS.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # workers import what is beside this module, too
        ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level=50)
        yield
    ray.shutdown()


def workers(count: int) -> RayExecutor:
    return RayExecutor(by(count))


def by(count: int) -> ExecutorOptions:
    return ExecutorOptions(executor="ray", workers=count)


NOWHERE = ExecutorOptions(executor="ray", address="127.0.0.1:1")


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another test's cluster may be up, which this process is connected to."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.fixture
def unstarted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster may be started or connected to."""

    def connect(_: ExecutorOptions) -> bool:
        raise AssertionError("Ray is started")

    monkeypatch.setattr(ExecutorOptions, "connect", connect)


@contextmanager
def listening(answer: bytes) -> Iterator[str]:
    """The address of what says this to everybody, and then waits."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with server.accept()[0] as there:
                there.sendall(answer)
                done.wait(10)

        done = threading.Event()
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        done.set()
        thread.join()


def same(here: Path, there: Path) -> None:
    """Two traces hold the same to the last bit."""
    one, other = read_trace(here), read_trace(there)
    for a, b in zip(one.examples, other.examples, strict=True):
        assert a.id == b.id and a.output_ids.tolist() == b.output_ids.tolist()
        assert a.lattice.logps.tobytes() == b.lattice.logps.tobytes()


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

    def test_a_worker_stands_where_the_command_does(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Paths of a task or of data begin there; and it is as urgent."""
        monkeypatch.chdir(tmp_path)
        assert list(workers(1).map(where, [0])) == [(str(tmp_path), os.nice(0))]

    def test_every_shard_is_counted_in_one_thread(self):
        assert list(workers(1).map(threads, [3, 2, 4])) == [1, 1, 1]

    def test_other_versions_on_a_worker(self, monkeypatch: pytest.MonkeyPatch):
        here = executors.versions() | {"torch": "0.1"}
        monkeypatch.setattr(executors, "versions", lambda: here)
        line = refused(lambda: list(workers(1).map(square, [1])), IncompatibleError)
        assert line.startswith("a worker of the Ray cluster has torch ") and ", here 0.1; give all" in line

    def test_what_a_worker_raises_is_raised_as_here(self):
        with pytest.raises(OSError, match="/full/file") as caught:
            list(workers(1).map(without_room, [1]))
        assert caught.value.errno == errno.ENOSPC
        refused(lambda: list(workers(1).map(without_module, [1])), "finds no module not_installed_anywhere")

    def test_a_module_that_is_here_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "only_here.py").write_text("def same(number):\n    return number\n")
        monkeypatch.syspath_prepend(tmp_path)
        function = importlib.import_module("only_here").same
        refused(lambda: list(workers(1).map(function, [1])), "finds no module only_here; install it")

    def test_what_is_given_up_after_the_end_starts_nothing(self, monkeypatch: pytest.MonkeyPatch):
        found = workers(2).map(square, range(9))
        next(found)
        with monkeypatch.context() as patch:
            patch.setattr(ray, "is_initialized", lambda: False)
            patch.setattr(ray, "cancel", lambda *_, **__: pytest.fail("Ray would be started"))
            found.close()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("cluster")
class TestWork:
    def test_a_suite_is_the_same_by_one_worker_by_three_and_here(self, write: Write, tmp_path: Path):
        how: dict[str, dict[str, Any]] = {"here": {}, "one": {"execution": by(1)}, "three": {"execution": by(3)}}
        documents = {name: run(write(), tmp_path / name, **each).document for name, each in how.items()}
        assert documents["one"] == documents["three"] == documents["here"]
        files = [sorted((tmp_path / name).glob("runs/*/examples.jsonl")) for name in documents]
        for here, one, three in zip(*files, strict=True):
            assert one.read_text() == three.read_text() == here.read_text()

    def test_a_weight_is_tuned_for_a_base_without_heads(self, options: dict[str, Any]):
        (recording,) = opened(options | {"heads": None}, heads_needed=False)
        how: dict[str, Any] = {"drafters": ("lookup",), "alphas": (0.5,), "held_out": 2}
        here, there = (tune(recording, ["context-ngram:none"], **how, **by) for by in ({}, {"executor": workers(2)}))
        assert here == there and len(here[0].block_efficiency) == 2

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
        same(tmp_path / "here", tmp_path / "there")

    def test_a_driver_that_was_killed_goes_on(self, model: list[object], options: dict[str, Any], tmp_path: Path):
        data = write_lines(tmp_path / "many.jsonl", squad_records(3 * PART_EXAMPLES))
        there, address = tmp_path / "there", ray.get_runtime_context().gcs_address
        asked = ["trace", *model[:4], "--data", data, *model[6:-1], 4, "--k", 8, "--out", there]
        asked += ["--executor", "ray", "--address", address, "--workers", 1]
        for part, (how, code) in enumerate({signal.SIGKILL: -9, signal.SIGTERM: 130}.items()):
            command = [sys.executable, "-m", "rescore", *map(str, asked)]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as driver:
                while driver.poll() is None and not (there / f"part-0000{part}").exists():
                    time.sleep(0.01)
                driver.send_signal(how)
                said = driver.stderr.read() if driver.stderr else ""
            assert driver.returncode == code and len(list(there.glob("part-*"))) < 3
            assert all(line.startswith("rescore: ") for line in said.splitlines()), said
        inputs = inputs_of(options | {"data": str(data), "max_new_tokens": 4})
        for out, how in (("here", {}), ("there", {"execution": by(1)})):
            record_task(inputs, "heads", tmp_path / out, k=8, **how)
        same(tmp_path / "here", there)

    def test_a_worker_that_has_loaded_a_model_which_is_replaced(self, options: dict[str, Any], tmp_path: Path):
        base, heads = tmp_path / "base", tmp_path / "heads"
        for seed in (1, 2):
            shutil.rmtree(base, ignore_errors=True)
            make_heads(load_base(str(save_tiny_base(base, seed=seed)), device="cpu")).save(heads)
            inputs = inputs_of(options | {"base": str(base), "heads": str(heads)})
            record_task(inputs, "heads", tmp_path / f"here-{seed}", k=8)
            record_task(inputs, "heads", tmp_path / f"there-{seed}", k=8, execution=by(1))
            same(tmp_path / f"here-{seed}", tmp_path / f"there-{seed}")

    def test_a_worker_works_on_the_kind_of_device_that_there_is_here(self, options: dict[str, Any]):
        (recording,) = opened(options | {"device": "auto"})
        assert recording.models.inputs_of_worker.device == recording.models.device.partition(":")[0] != "auto"

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
        with pytest.raises(RescoreError, match=r"connected to the Ray cluster at .*, not to 127.0.0.1:1"):
            RayExecutor(NOWHERE).begin()

    def test_drafts_verified_as_a_batch_after_a_tree(self, options: dict[str, Any]):
        """A worker keeps what it has loaded, not how the evaluation before verified."""
        runs, costs = [Run("none", p=4)], costs_for(options, [[20.0, 30.0]])
        for verify in ("tree", "batch"):
            how: dict[str, Any] = {"verify": verify, "costs": costs}
            here, there = (evaluate(opened(options), runs, **how, **by) for by in ({}, {"executor": workers(1)}))
            assert [e.calls for e in there.examples] == [e.calls for e in here.examples]

    def test_a_port_of_a_cluster(self):
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        executors._knock(host, int(port))


@pytest.mark.usefixtures("unconnected", "unstarted")
class TestBeforeAnything:
    """What needs no cluster starts none, and what can't be done is told before models are loaded."""

    def test_a_suite_that_is_finished(self, write: Write, tmp_path: Path):
        path, out = write(), tmp_path / "out"
        whole = run(path, out).document
        (out / "suite.json").unlink()
        assert run(path, out, execution=by(2)).document == whole

    def test_live_decoding_is_refused(self, write: Write, tmp_path: Path):
        path = write(("limit: 4\n", "limit: 4\nmode: live\n"))
        refused(lambda: run(path, tmp_path / "out", execution=NOWHERE), "live decoding measures the time")
        assert not (tmp_path / "out").exists()

    def test_one_of_several_gpus(self, write: Write, options: dict[str, Any], tmp_path: Path):
        path, out = write(("device: cpu", "device: cuda:1")), tmp_path / "out"
        inputs = inputs_of(options | {"device": "cuda:1"})
        asked: dict[str, Any] = {"device": "cuda:1", "options": GenerationOptions(), "execution": NOWHERE}
        for call in (
            lambda: run(path, out, execution=NOWHERE),
            lambda: record_task(inputs, "heads", out, k=8, execution=NOWHERE),
            lambda: write_own_corpus(tmp_path / "none.jsonl", out, **asked),
        ):
            refused(call, "--device cuda:1 is one GPU of this machine", "give --device cuda")
        assert not out.exists()

    def test_no_cluster_at_the_address(self, write: Write, options: dict[str, Any], tmp_path: Path):
        text, out = tmp_path / "text.txt", tmp_path / "out"
        text.write_text("a b c\n")
        corpus: dict[str, Any] = {"base": "no-such-base", "options": GenerationOptions(), "execution": NOWHERE}
        inputs = inputs_of(options | {"base": "no-such-base"})
        for call in (
            lambda: run(write(), out, execution=NOWHERE),
            lambda: record_task(inputs, "heads", out, k=8, execution=NOWHERE),
            lambda: write_own_corpus(tmp_path / "none.jsonl", out, **corpus),
            lambda: build_ngram([text], out, NgramOptions(tokenizer="no-such-base"), execution=NOWHERE),
        ):
            refused(call, "no Ray cluster answers at 127.0.0.1:1")
        assert not out.exists()

    @pytest.mark.parametrize("scheme", ["", "ray://"])
    @pytest.mark.parametrize(
        ("answer", "why"), [(b"HTTP/1.0 400 Bad request\r\n", "what listens there is no cluster"), (b"", "timed out")]
    )
    def test_something_else_at_the_address(self, answer: bytes, why: str, scheme: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(executors, "CONNECT_SECONDS", 0.2)
        with listening(answer) as there:
            address = scheme + there
            refused(ExecutorOptions(executor="ray", address=address).check, f"answers at {address} ({why})")

    def test_lmplz_counts_by_itself(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("shutil.which", lambda _: "/bin/true")
        options = NgramOptions(tokenizer="words", estimator="lmplz")
        refused(lambda: build_ngram(["text.txt"], tmp_path / "out", options, execution=by(2)), "drop --executor")


class TestCommand:
    def test_a_cluster_of_its_own(self, model: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # of another cluster, which nobody asked for
        asked = ["trace", *model, "--out", tmp_path / "t", "--executor", "ray", "--workers", 1]
        ran = subprocess.run([sys.executable, "-m", "rescore", *map(str, asked)], capture_output=True, text=True)
        assert ran.returncode == 0 and all(line.startswith("rescore: ") for line in ran.stderr.splitlines()), ran.stderr
        assert ran.stdout.endswith("6 examples, 72 positions, h = 4, K = 32\n") and ran.stdout.count("\n") == 1

    def test_what_a_cluster_says_is_one_line(self, caplog: pytest.LogCaptureFixture, capsys):
        executors._told({"lines": ["A worker died or was killed while executing a task by an unexpected ..."]})
        executors._told({"lines": ["Task _done failed. There are 1 retries remaining"]})
        executors._told({"lines": ["The node was over its memory threshold. Ray killed this worker ..."]})
        assert [r.message for r in caplog.records] == [
            "a worker of the Ray cluster died; what it was at is done again",
            "a worker of the Ray cluster was ended for want of memory; what it was at is done again",
        ]
        assert capsys.readouterr().out == ""

    @pytest.mark.usefixtures("unconnected")
    def test_no_cluster_at_the_address(self, rescore: Command, model: list[object], tmp_path: Path):
        asked = ["--executor", "ray", "--address", "127.0.0.1:1"]
        rescore("trace", *model, "--out", tmp_path / "t", *asked).refused("no Ray cluster answers at 127.0.0.1:1")

    @pytest.mark.usefixtures("unconnected")
    def test_a_cluster_that_does_not_let_us_in(self, monkeypatch: pytest.MonkeyPatch, capfd):
        def init(**_: Any) -> None:
            os.write(2, b"gcs_client.cc:210: Failed to get cluster ID\n")  # as Ray's library does
            raise ConnectionError("Failed to connect to Ray cluster")

        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setattr(executors, "_knock", lambda *_: None)
        refused(RayExecutor(NOWHERE).begin, "at 127.0.0.1:1 (Failed to connect", "set RAY_AUTH_MODE=token")
        os.write(2, b"after\n")
        assert capfd.readouterr().err == "after\n"

    def test_without_ray(self, rescore: Command, model: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        asked = rescore("trace", *model, "--out", tmp_path / "t", "--executor", "ray")
        asked.refused(r"needs Ray: pip install 'rescore\[ray\]'")

    def test_mistakes(self):
        refused(lambda: ExecutorOptions(workers=2).check(), "add --executor ray")
        refused(lambda: ExecutorOptions(address="auto").check(), "add --executor ray")
        refused(lambda: ExecutorOptions(executor="ray", workers=0).check(), "--workers 0; at least one")
