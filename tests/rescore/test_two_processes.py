"""Two real processes at once, on one cold cache and on one `--out`, and one that is killed in the middle."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from evaluating import Options, evaluated, recorded_trace, swept

from lattices.errors import RescoreError
from lm import records
from rescore import rescorers, tracing
from rescore.rescorers.unrescored import Unrescored
from rescore.runs.evaluated import Evaluation, load_run
from rescore.runs.log import ExampleLog
from rescore.runs.records import ExampleRecord
from rescore.tracing import read_trace

# Processes of their own, which need not each load the libraries.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["rescore.runs.evaluation", "rescore.runs.tuning", "lm.base.catalog", "datasets", "lm.heads.block_heads"]
)


class HalfWeight(Unrescored):
    """A rescorer with a weight that does nothing."""

    alpha, identity = 0.5, "weighted"


def work(name: str, folder: Path, options: Options, environment: dict[str, str], asked: dict[str, Any]) -> None:
    """One process: begins when all are ready. `kill`: at the n-th example of the trace, or of the results."""
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}.{ending}", os.O_CREAT | os.O_WRONLY), number)
    os.environ.update(environment)
    tracing.PART_EXAMPLES = 1
    rescorers.RESCORERS.built_in["weighted"] = HalfWeight
    out, kill, slow, add = asked.get("out"), asked.get("kill"), asked.get("slow", 0.0), ExampleLog.add

    def progress(what: str, done: int, total: int) -> None:
        time.sleep(slow)
        if kill and not out and what.startswith("trace") and done == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def add_slowly(self: ExampleLog, record: ExampleRecord) -> None:
        add(self, record)
        time.sleep(slow)
        if kill and out and len(self._records) == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    ExampleLog.add = add_slowly  # type: ignore[method-assign]
    (folder / name).touch()
    while not (folder / "go").exists():
        time.sleep(0.002)
    try:
        found: Any
        if asked["do"] == "eval":
            found = plain(evaluated(options, out=out, progress=progress))
        elif asked["do"] == "tune":
            options = dict(options, rescorers=("weighted",))
            found = [t.alpha for t in swept(options, alphas=(0.5,), ks=(4,), ps=(1,), keep=False, progress=progress)]
        else:
            found = [e.id for e in recorded_trace(options, out, progress=progress).examples]
        print(json.dumps(found), flush=True)
    except RescoreError as error:
        print("refused:", error, flush=True)


def plain(evaluation: Evaluation) -> Any:
    """Results as they are read back."""
    return records.plain(evaluation.document.results)


@pytest.fixture
def options(tiny_folder: Path, tiny_heads_folder: Path, squad_file: Path) -> Options:
    return dict(
        base=str(tiny_folder), heads=str(tiny_heads_folder), data=str(squad_file), device="cpu", dtype="float64", k=4,
        max_new_tokens=16, rescorers=("none", "oracle"),
    )  # fmt: skip


@dataclasses.dataclass
class Ended:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


def together(folder: Path, options: Options, *asked: dict[str, Any]) -> list[Ended]:
    """Runs the processes side by side; what they left."""
    folder.mkdir()
    environment = {name: os.environ[name] for name in ("RESCORE_CACHE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")}
    running = [
        PROCESSES.Process(target=work, args=(str(number), folder, options, environment, one))
        for number, one in enumerate(asked)
    ]
    for process in running:
        process.start()
    try:
        while not all((folder / str(number)).exists() for number in range(len(asked))):
            assert all(process.is_alive() for process in running)
            time.sleep(0.005)
        (folder / "go").touch()
        for process in running:
            process.join(60)
    finally:
        for process in running:
            process.kill()
    texts = [[(folder / f"{number}.{ending}").read_text() for ending in ("out", "err")] for number in range(len(asked))]
    return [Ended(process.exitcode, *said) for process, said in zip(running, texts, strict=True)]


@pytest.fixture
def expected(options: Options, tmp_path: Path) -> Any:
    """What an evaluation alone gives, in a cache of its own, recorded in the same parts."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RESCORE_CACHE", str(tmp_path / "alone"))
        patched.setattr(tracing, "PART_EXAMPLES", 1)
        return plain(evaluated(options))


WAITS = "another rescore process is making the trace of squad; waiting for it\n"


def test_an_eval_and_a_tune_on_one_cold_cache(options, expected, tmp_path: Path, cache_folder: Path):
    one, other = together(
        tmp_path / "race", options, {"do": "eval", "slow": 0.05}, {"do": "tune", "slow": 0.05},
    )  # fmt: skip
    assert one.document == expected and len(other.document) == 1
    assert (one.err + other.err).count(WAITS) <= 1, "none where the other came when all was recorded"
    (folder,) = (cache_folder / "traces").iterdir()
    assert sorted(e.id for e in read_trace(folder).examples) == [f"q{i}" for i in range(6)], "each is there once"
    assert plain(evaluated(options)) == expected


def test_two_evals_and_one_that_is_killed_on_one_cold_cache(options, expected, tmp_path: Path, cache_folder: Path):
    killed, one, other = together(
        tmp_path / "race", options, {"do": "eval", "slow": 0.05, "kill": 3}, {"do": "eval", "slow": 0.05},
        {"do": "eval", "slow": 0.05},
    )  # fmt: skip
    # Where it came last it had nothing to record, and was not killed.
    assert killed.code == -signal.SIGKILL or killed.document == expected
    assert one.document == expected and other.document == expected
    (folder,) = (cache_folder / "traces").iterdir()
    assert sorted(e.id for e in read_trace(folder).examples) == [f"q{i}" for i in range(6)]


def test_a_healthy_run_after_a_killed_one(options, expected, tmp_path: Path, cache_folder: Path, caplog):
    (killed,) = together(tmp_path / "race", options, {"do": "eval", "kill": 4})
    assert killed.code == -signal.SIGKILL
    (folder,) = (cache_folder / "traces").iterdir()
    assert len(read_trace(folder).examples) == 3, "what was finished is kept"
    assert plain(evaluated(options)) == expected and not caplog.messages
    assert not list((cache_folder / "locks").iterdir())


@pytest.mark.parametrize("do", ["eval", "trace"])
def test_two_on_one_out(options, expected, tmp_path: Path, do: str):
    out = tmp_path / "out"
    evaluated(options)  # a warm cache: the folder is what they meet at
    ended = together(tmp_path / "race", options, *[{"do": do, "out": out, "slow": 0.1}] * 2)
    refused, whole = sorted(ended, key=lambda run: not run.out.startswith("refused"))
    line = f"refused: another rescore process is writing to {out}; wait for it, or use another --out\n"
    assert refused.out == line and whole.code == 0
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    if do == "trace":
        assert [e.id for e in read_trace(out).examples] == whole.document == [f"q{i}" for i in range(6)]
        return
    assert whole.document == expected
    lines = (out / "examples.jsonl").read_text().splitlines()
    assert len(lines) == len({(r["rescorer"], r["id"]) for r in map(json.loads, lines)}) == 12


def test_one_out_after_a_killed_run(options, expected, tmp_path: Path):
    out = tmp_path / "out"
    evaluated(options)
    (killed,) = together(tmp_path / "race", options, {"do": "eval", "out": out, "kill": 5})
    assert killed.code == -signal.SIGKILL and not (out / "results.json").exists()
    assert plain(evaluated(options, out=out)) == expected
    assert records.plain(load_run(out).results) == expected
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "examples.jsonl", "results.json"]


class TestLinesThatAreThereTwice:
    """What two processes once left in one folder."""

    @pytest.fixture
    def run(self, options: Options, tmp_path: Path) -> Path:
        evaluated(options, out=tmp_path / "run")
        path = tmp_path / "run" / "examples.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines for _ in range(2)) + lines[0])
        return tmp_path / "run"

    def test_each_counts_once_for_readers(self, options, run: Path, tmp_path: Path):
        evaluated(options, out=tmp_path / "clean")
        found, clean = load_run(run), load_run(tmp_path / "clean")
        assert found.examples == clean.examples

    def test_and_for_a_run_that_goes_on(self, options, expected, run: Path):
        with ExampleLog(run, json.loads((run / "config.json").read_text())) as log:
            assert len(log.records(("squad", "none", 1, options.get("k", 16)), [f"q{i}" for i in range(6)])) == 6
        assert plain(evaluated(options, out=run)) == expected

    def test_a_line_that_is_missing_is_not_made_up_by_another(self, options, run: Path):
        path = run / "examples.jsonl"
        path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if '"q3"' not in line))
        with pytest.raises(Exception, match="has 5 of the 6 examples"):
            load_run(run)
