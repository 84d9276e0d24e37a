"""The command `rescore` where something is wrong: one line for each mistake, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from conftest import (
    Command,
    Run,
    byte_tokenizer,
    files_of_at_most,
    make_heads,
    once,
    save_tiny_base,
    squad_records,
    write_lines,
)

from rescore import traced_rows, tracing
from rescore.runs import evaluation


def refusals(tiny: Path, heads: Path, data: Path, folder: Path) -> Iterator[tuple[str, list[object], str]]:
    """(what is wrong, arguments, what the one line says)."""
    model = ["--base", tiny, "--heads", heads, "--dtype", "float64", "--max-new-tokens", 8]
    given = [*model, "--data", data]
    yield "no such model", ["eval", "--base", "smollm2-135n"], r"unknown model .*did you mean smollm2-135m or"
    yield "no such model folder", ["eval", "--base", folder / "none"], "none"
    yield "no such task", ["eval", *given, "--task", "squat"], r"unknown task 'squat'; did you mean squad or qa\?"
    yield (
        "no such rescorer",
        ["eval", *given, "--rescorer", "orcale"],
        r"unknown rescorer 'orcale'; did you mean oracle",
    )
    yield "text for none", ["eval", *given, "--rescorer", "none:foo"], "the rescorer none takes no text"
    yield "no such mode", ["eval", *given, "--mode", "life"], r"unknown --mode 'life'; did you mean live\?"
    yield "no such verify", ["eval", *given, "--verify", "three"], r"unknown --verify 'three'; did you mean tree\?"
    yield "no such dtype", ["eval", *given, "--dtype", "float31"], r"unknown --dtype 'float31'; did you mean float32"
    yield "no such device", ["eval", *given, "--device", "foo"], r"unknown device 'foo'; known: auto, cpu, cuda\n"
    yield "no data file", ["eval", *model, "--data", folder / "none.jsonl"], "no such file: .*none.jsonl"
    yield "a folder without the task", ["eval", *model, "--data", folder], "no such file: .*squad.jsonl"
    yield "no such option", ["eval", "--retcorer", "none"], r"No such option.*--retcorer.*--rescorer"
    yield "no number", ["eval", "--k", "many"], "--k many: give whole numbers"
    yield "no such command", ["evaluate"], "No such command 'evaluate'"
    yield "no output folder", ["trace"], "Missing option '--out'"
    yield "no command of bench", ["bench"], "Missing command; --help lists them"
    yield "a word too many", ["eval", "squad"], r"unexpected extra argument.*squad"
    yield "p below 1", ["eval", *given, "--p", 0], r"p = 0; at least one draft must be verified \(--p 1\)"
    yield "one p below 1", ["eval", *given, "--p", "1,0"], "p = 0; at least one draft"
    yield "no list of p", ["eval", *given, "--p", "1;16"], "--p 1;16: give whole numbers with commas"
    yield "k below 1", ["eval", *given, "--k", 0], "k = 0"
    yield "k above the vocabulary", ["eval", *given, "--k", 258], "k = 258 is outside 1 to the vocabulary's 257"
    yield "k of a trace above it", ["trace", *given, "--k", 258, "--out", folder / "t"], "k = 258 is outside"
    yield "h above the heads'", ["eval", *given, "--h", 9], "h = 9, but these heads propose blocks of 4"
    yield "limit below 1", ["eval", *given, "--limit", 0], "--limit 0; at least one example"
    none_and_oracle = ["--rescorer", "none,oracle"]
    yield "a weight of none", ["eval", *given, "--alpha", 2], "no weight is used by --rescorer none; drop --alpha"
    yield "weights of both", ["eval", *given, *none_and_oracle, "--alpha", "tuned"], "none or oracle; drop --alpha"
    yield "its own weight", ["eval", *given, "--rescorer", "none:alpha=2,ngram"], "no weight is used by .*none:alpha=2;"
    yield "verified in a replay", ["eval", *given, "--verify", "batch"], "--verify batch is how live decoding verifies"
    yield "no heads there", ["eval", *given, "--heads", folder], "no block heads in "
    yield "no trace there", ["eval", "--trace", folder / "none"], "no trace in .*none: can't read trace.json"
    yield "out is a file", ["eval", *given, "--out", data], "can't write .*squad.jsonl: it is a file, and a folder"
    yield "out below a file", ["trace", *given, "--out", data / "x"], "can't write .*squad.jsonl/x: Not a directory"
    yield "trace to a file", ["trace", *given, "--out", data], "can't write .*squad.jsonl: it is a file, and a folder"
    lines = {
        "empty": ("", "empty.jsonl is empty; task squad needs the fields context, question, answers"),
        "blank": ("\n \n", "is empty"),
        "no JSON": (json.dumps(squad_records(1)[0]) + "\n{oops}\n", "line 2 is not valid JSON"),
        "no object": ("[1, 2]\n", "row 1 is not a JSON object"),
        "no field": ('\n{"question": "q", "answers": ["a"]}\n', "line 2: no field 'context'"),
        "no text": (
            '{"question": 3, "context": "c", "answers": ["a"]}\n',
            "line 1: the field 'question' holds a number",
        ),
        "long": (
            json.dumps(squad_records(1)[0] | {"context": "x" * 600}),
            r"a prompt of \d+ tokens and 8 new ones do n",
        ),
    }
    for what, (text, message) in lines.items():
        path = folder / f"{what}.jsonl"
        path.write_text(text)
        yield f"data: {what}", ["eval", *model, "--data", path], message


def test_every_mistake_is_one_line(rescore, tiny_folder, tiny_heads_folder, squad_file, tmp_path):
    for what, arguments, message in refusals(tiny_folder, tiny_heads_folder, squad_file, tmp_path):
        try:
            rescore(*once(*arguments)).refused(message)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from error
    assert not (tmp_path / "t").exists()


class TestMistakes:
    def test_heads_of_another_base(self, rescore: Command, model: list[object], tiny_base, tmp_path: Path):
        wide = save_tiny_base(tmp_path / "wide", hidden_size=48)
        rescore(*once("eval", *model, "--base", wide)).refused(
            "hidden_size is 32, the base's is 48; give other --heads"
        )
        folder = tmp_path / "heads"
        make_heads(tiny_base).save(folder, dtype=torch.float32)
        config = json.loads((folder / "config.json").read_text())
        for field, value in (("vocab_size", 300), ("tokenizer_sha256", "0" * 64)):
            (folder / "config.json").write_text(json.dumps(config | {field: value}))
            rescore(*once("eval", *model, "--heads", folder)).refused(
                f"{field} is {value}, the base's is .*; give other --heads"
            )

    def test_a_model_that_is_broken(self, rescore: Command, model: list[object], tmp_path: Path):
        folder = save_tiny_base(tmp_path / "broken")
        (folder / "model.safetensors").write_bytes(b"not weights")
        rescore(*once("eval", *model, "--base", folder)).refused("can't load the model .*broken: ")
        (folder / "config.json").unlink()
        rescore(*once("eval", *model, "--base", folder)).refused(
            "has no config.json; a model folder is what save_pretrained"
        )
        byte_tokenizer().save_pretrained(tmp_path / "no-weights")
        rescore(*once("eval", *model, "--base", tmp_path / "no-weights")).refused("no-weights has no config.json")

    def test_a_trace_that_is_broken(self, rescore: Command, model: list[object], tmp_path: Path):
        rescore("trace", *model, "--out", tmp_path)
        header = json.loads((tmp_path / "trace.json").read_text())
        for changed, message in (
            ({"schema": "rescore.trace/0"}, "schema 'rescore.trace/0'; this version reads 'rescore.trace/1'"),
            ({"parts": ["part-00007"]}, "can't read the trace part .*part-00007"),
            ({"k": 31}, r"'q0' has \d+ values in 'token_ids'; .* need"),
            ({"vocab_size": 40}, "outside the vocabulary"),
        ):
            (tmp_path / "trace.json").write_text(json.dumps(header | changed))
            rescore("eval", "--trace", tmp_path).refused(message)

    def test_a_full_disk(self, rescore: Command, model: list[object], tmp_path: Path):
        command = ["eval", *model, "--rescorer", "none", "--rescorer", "oracle", "--out"]
        whole = rescore(*command, tmp_path / "whole", "--json")
        lines = (tmp_path / "whole" / "examples.jsonl").read_text().splitlines(keepends=True)
        room = sum(map(len, lines[:9]))
        assert room > (tmp_path / "whole" / "config.json").stat().st_size
        with files_of_at_most(room + 5):
            rescore(*command, tmp_path / "run").refused("can't write .*examples.jsonl: .*; what was written before is")
        assert (tmp_path / "run" / "examples.jsonl").read_text() == "".join(lines[:9]) + lines[9][:5]
        assert not (tmp_path / "run" / "results.json").exists()
        assert rescore(*command, tmp_path / "run", "--json").document["results"] == whole.document["results"]
        assert (tmp_path / "run" / "examples.jsonl").read_text() == "".join(lines)

    def test_debug_shows_where(self, rescore: Command, model: list[object]):
        for arguments in (["--debug", "eval", "--task", "squat"], ["eval", "--task", "squat", "--debug"]):
            run = rescore(*arguments)
            assert (run.code, run.out) == (2, "")
            assert run.err.startswith("Traceback") and "UnknownNameError" in run.err
            assert run.err.endswith("did you mean squad or qa? (a task of your own is a YAML file, like ./mine.yaml)\n")

    def test_an_unforeseen_error_is_one_line_too(self, rescore: Command, model: list[object], monkeypatch):
        def fail(*_: object, **__: object) -> None:
            raise ZeroDivisionError("one\nby zero")

        monkeypatch.setattr(evaluation, "replay", fail)
        rescore("eval", *model).refused(r"ZeroDivisionError: one by zero \(--debug shows where\)", code=1)
        run = rescore("eval", *model, "--debug")
        assert run.code == 1 and run.err.startswith("Traceback")


class TestInterruption:
    def test_what_is_finished_is_shown_and_kept(
        self, rescore: Command, model: list[object], tmp_path: Path, monkeypatch
    ):
        monkeypatch.setattr(evaluation, "SHARD_EXAMPLES", 2)
        true_replay, calls = evaluation.replay_steps, []

        def interrupted_replay(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:  # once for each pair of examples
                signal.raise_signal(signal.SIGINT)
            return true_replay(*arguments, **options)

        monkeypatch.setattr(evaluation, "replay_steps", interrupted_replay)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            run = rescore("eval", *model, "--out", tmp_path / "run")
            calls.clear()
            alone = rescore("eval", *model)
        finally:
            signal.signal(signal.SIGINT, before)
        assert run.code == alone.code == 130
        assert run.err == (
            f"rescore: interrupted; the finished examples are shown and kept in {tmp_path / 'run'}: "
            "the same command goes on\n"
        )
        assert alone.err == "rescore: interrupted; the finished examples are shown (--out DIR would keep them)\n"
        assert "\nsquad: 4 examples of 4 groups, " in run.out and run.out == alone.out
        whole = rescore("eval", *model, "--out", tmp_path / "run", "--json")
        assert whole.code == 0
        assert whole.document["results"] == rescore("eval", *model, "--json").document["results"]

    def test_a_recording_goes_on(self, rescore: Command, model: list[object], tmp_path: Path, monkeypatch):
        monkeypatch.setattr(tracing, "PART_EXAMPLES", 4)
        row, calls = traced_rows.row_of_states, []

        def interrupted_row(*arguments: Any, **more: Any) -> Any:
            calls.append(1)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return row(*arguments, **more)

        monkeypatch.setattr(traced_rows, "row_of_states", interrupted_row)
        run = rescore("trace", *model, "--out", tmp_path)
        assert run == Run(130, "", "rescore: interrupted; what is finished is kept, the same command goes on\n")
        assert rescore("trace", *model, "--out", tmp_path).out.endswith("6 examples, 72 positions, h = 4, K = 32\n")
        assert len(calls) == 8, "the last two of the six are recorded by the second run"

    def test_a_real_ctrl_c_of_the_real_command(self, rescore: Command, model: list[object], tmp_path: Path):
        data = write_lines(tmp_path / "squad.jsonl", squad_records(30))
        options = [*once(*model, "--data", data), "--rescorer", "none", "--k", 4]
        live = ["eval", *options, "--mode", "live", "--out", tmp_path / "run"]
        process = subprocess.Popen(
            [sys.executable, "-m", "rescore", *map(str, live)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # even where the tests run without it
        )
        log = tmp_path / "run" / "examples.jsonl"
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 2):
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert err.count("\n") == 1 and "interrupted; the finished examples are shown and kept in" in err
        finished = len(log.read_text().splitlines())
        assert 2 <= finished < 30 and f"\nsquad: {finished} examples of {finished} groups, " in out
        whole = rescore(*live, "--json").document["results"]
        replayed = rescore("eval", *options, "--json").document["results"]
        assert [
            {**r, "identical": None, "divergence": None, "latency": None, "autoregressive_quality": None} for r in whole
        ] == replayed
        assert whole[0]["identical"] == {"n": 30, "identical": 30}
