"""Evaluations that are stopped go on where they were; a changed one does not."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import squad_records, write_lines
from evaluating import evaluated
from evaluation_runs import Make, Peek, make_fixture, peek_fixture, run, without_times  # noqa: F401 (fixtures)

from lattices.errors import IncompatibleError
from lm.records import plain
from rescore import rescorers, tracing
from rescore.runs import evaluation
from rescore.tasks import data as data_module


def stop_after(count: int, how: Callable[[], Any]) -> Callable[..., Any]:
    """A progress callback that stops the run when so many examples are done."""

    def progress(what: str, done: int, total: int) -> None:
        if not what.startswith("trace") and done == count:
            how()

    return progress


def ctrl_c() -> None:
    raise KeyboardInterrupt


def examples_of(folder: Path) -> list[tuple[str, int, str]]:
    records = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    return [(record["rescorer"], record["p"], record["id"]) for record in records]


class TestInterruption:
    @pytest.mark.parametrize("how", [ctrl_c, lambda: signal.raise_signal(signal.SIGINT)], ids=["exception", "signal"])
    @pytest.mark.parametrize("mode", ["replay", "live"])
    def test_finished_examples_are_kept_and_the_same_command_goes_on(
        self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, how: Callable[[], Any]
    ):
        monkeypatch.setattr(evaluation, "SHARD_EXAMPLES", 2)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            cut = evaluated(make(mode=mode), out=tmp_path, progress=stop_after(2, how))
        finally:
            signal.signal(signal.SIGINT, before)
        assert cut.interrupted and [r.n for r in cut.document.results] == [2, 2, 2]
        assert without_times(cut.document.results) == run(make(limit=2))
        assert {name for *_, name in examples_of(tmp_path)} == {"q0", "q1"}
        assert not (tmp_path / "results.json").exists()

        kept = (tmp_path / "examples.jsonl").read_bytes()
        with (tmp_path / "examples.jsonl").open("ab") as stream:
            stream.write(b'{"task": "squad", "resc')  # killed while it wrote
        whole = evaluated(make(mode=mode), out=tmp_path)
        assert not whole.interrupted and without_times(whole.document.results) == run(make())
        assert (tmp_path / "examples.jsonl").read_bytes().startswith(kept)
        assert len(examples_of(tmp_path)) == len(set(examples_of(tmp_path))) == 18
        saved = json.loads((tmp_path / "results.json").read_text())["results"]
        assert saved == plain(whole.document.results)

    def test_ctrl_c_inside_a_rescorer(self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(evaluation, "SHARD_EXAMPLES", 2)
        calls: list[int] = []

        class Slow(Peek):
            def draft(self, lattices, contexts, p):
                calls.append(1)
                if len(calls) == 8:  # in the second pair of examples
                    ctrl_c()
                return super().draft(lattices, contexts, p)

        monkeypatch.setitem(rescorers.RESCORERS.built_in, "slow", Slow)
        options = make(rescorers=("none", "slow"))
        cut = evaluated(options, out=tmp_path)
        assert cut.interrupted
        assert [(r.rescorer, r.n) for r in cut.document.results] == [("none", 4), ("slow", 2)]
        assert evaluated(options, out=tmp_path).document.results == run(options)

    @pytest.mark.parametrize("mode", ["replay", "live"])
    def test_ctrl_c_while_the_trace_is_recorded(self, make: Make, tmp_path: Path, monkeypatch, mode: str):
        monkeypatch.setattr(tracing, "PART_EXAMPLES", 2)

        def progress(what: str, done: int, total: int) -> None:
            if done == 5:
                ctrl_c()

        cut = evaluated(make(mode=mode), out=tmp_path, progress=progress)
        assert cut.interrupted
        expected = run(make(limit=4)) if mode == "replay" else []  # what is recorded is replayed, not decoded
        assert cut.document.results == expected
        seen: list[int] = []
        whole = evaluated(make(mode=mode), out=tmp_path, progress=lambda what, done, _: seen.append((what, done)))
        assert [n for what, n in seen if what == "trace squad"] == [5, 6], "four examples were recorded already"
        assert without_times(whole.document.results) == run(make())

    def test_ctrl_c_before_anything_is_finished(self, make: Make, tmp_path: Path):
        cut = evaluated(make(), out=tmp_path, progress=lambda *_: ctrl_c())
        assert cut.interrupted and cut.document.results == []
        assert run(make(), out=tmp_path) == run(make())

    def test_the_second_task_goes_on_where_it_stopped(self, make: Make, tmp_path: Path):
        data = write_lines(tmp_path / "both.jsonl", [r | {"answer": "42"} for r in squad_records(3)])
        options = make(tasks=("gsm8k", "squad"), data=str(data))

        def progress(what: str, done: int, total: int) -> None:
            if what == "trace squad":
                ctrl_c()

        cut = evaluated(options, out=tmp_path / "run", progress=progress)
        assert {r.task for r in cut.document.results} == {"gsm8k"}
        assert run(options, out=tmp_path / "run") == run(options)

    def test_a_finished_run_is_not_done_again(self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        live = run(make(mode="live"), out=tmp_path)
        monkeypatch.setattr(evaluation, "decode", lambda *_, **__: pytest.fail("decoded again"))
        assert run(make(mode="live"), out=tmp_path) == live

    def test_a_changed_configuration_does_not_go_on(self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        data = write_lines(tmp_path / "squad.jsonl", squad_records(2))
        run(make(data=str(data)), out=tmp_path / "run")
        before = sorted((f.name, f.read_bytes()) for f in (tmp_path / "run").iterdir())
        for changes, difference in (
            ({"k": 4}, r"\(runs.squad: none \(p = 1, k = 8\), .* -> none \(p = 1, k = 4\), "),
            ({"p": (1, 16)}, r"\(runs.squad: .* -> none \(p = 1, k = 8\), none \(p = 16, k = 8\), "),
            (
                {"rescorers": ("none",), "limit": 1},
                r"inputs.squad.limit: None -> 1; runs.squad: .* -> none \(p = 1, k = 8\)",
            ),
            ({"max_new_tokens": 9}, r"inputs.squad.max_new_tokens: 14 -> 9; traces.squad.max_new_tokens: 14 -> 9"),
        ):
            with pytest.raises(IncompatibleError, match=difference):
                run(make(data=str(data), **changes), out=tmp_path / "run")
        write_lines(data, squad_records(3))  # the same name, other examples
        with pytest.raises(IncompatibleError, match=r"data.squad.sha256: .* -> .*; use another --out"):
            run(make(data=str(data)), out=tmp_path / "run")
        assert sorted((f.name, f.read_bytes()) for f in (tmp_path / "run").iterdir()) == before

    def test_the_reason_for_the_sample_may_change(self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        first = evaluated(make(data=None, limit=1, max_prompt_tokens=200), out=tmp_path)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(data_module, "_hub_trouble", lambda hub: "the hub can't be reached")
        second = evaluated(make(data=None, limit=1, max_prompt_tokens=200), out=tmp_path)
        assert first.notices != second.notices and "can't be reached" in second.notices[0]
        assert first.document.results == second.document.results
