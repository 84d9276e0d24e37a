"""Files that change between two looks at them: nothing is kept, shown or compared that is of something else."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_heads, save_tiny_base, squad_records, write_lines
from evaluating import Options, evaluated, opened, recorded_trace

from lattices.errors import IncompatibleError
from lm.base.catalog import load_base
from lm.files import cache_directory
from lm.text_files import TextFile
from rescore.runs import evaluation
from rescore.runs.evaluated import load_run
from rescore.runs.recording import record
from rescore.runs.tuning import tune
from rescore.studies.cost.inputs import cost_inputs
from rescore.studies.perplexity import perplexity_of_task
from rescore.suites import run as suite
from rescore.suites.plan import read_plan
from rescore.tasks import data as data_module
from rescore.tasks import load_task
from rescore.tracing import read_trace


@pytest.fixture
def options(tmp_path: Path, squad_file: Path) -> Options:
    """A tiny model and heads of their own, which the tests may overwrite."""
    base = save_tiny_base(tmp_path / "base")
    make_heads(load_base(str(base), dtype="float64", device="cpu")).save(tmp_path / "heads", dtype=torch.float32)
    return dict(
        base=str(base), heads=str(tmp_path / "heads"), data=str(squad_file), dtype="float64", device="cpu", k=8,
        max_new_tokens=8, rescorers=("none", "oracle"),
    )  # fmt: skip


def other_heads(folder: Path, base: str) -> None:
    shutil.rmtree(folder)
    make_heads(load_base(base, dtype="float64", device="cpu"), seed=1).save(folder, dtype=torch.float32)


def other_base(folder: Path, tmp_path: Path) -> None:
    """Written over in place: what is mapped into memory changes as well."""
    other = save_tiny_base(tmp_path / "other", seed=1)
    shutil.copyfile(other / "model.safetensors", folder / "model.safetensors")


@pytest.mark.parametrize("what", ["heads", "base"])
def test_what_is_replaced_before_it_is_read_is_not_kept_under_the_old_key(options: Options, tmp_path: Path, what: str):
    (task,) = opened(options)
    if what == "heads":
        other_heads(tmp_path / "heads", options["base"])
    else:
        other_base(tmp_path / "base", tmp_path)
    with pytest.raises(IncompatibleError, match="were replaced while they were read; run the command again"):
        task.trace()
    assert not list((cache_directory() / "traces").rglob("*.arrow"))


def test_data_that_are_replaced_while_they_are_read_are_refused(
    squad_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Their hash is that of what was read, not of what lies there afterwards."""
    read, data = data_module.rows, Path(shutil.copy(squad_file, tmp_path / "squad.jsonl"))

    def replaced(file: TextFile) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from read(file)
        write_lines(data, squad_records(3))

    monkeypatch.setattr(data_module, "rows", replaced)
    with pytest.raises(IncompatibleError, match="was replaced while it was read; run the command again"):
        data_module.load_examples(load_task("squad"), data=data)


def test_live_decoding_of_weights_that_were_replaced_is_not_kept(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    evaluated(options)  # the trace is there: live decoding records nothing that would be checked
    decode = evaluation.decode

    def replaced(*arguments: Any, **more: Any) -> Any:
        other_base(tmp_path / "base", tmp_path)
        return decode(*arguments, **more)

    monkeypatch.setattr(evaluation, "decode", replaced)
    with pytest.raises(IncompatibleError, match="were replaced while they were read; run the command again"):
        evaluated(dict(options, mode="live"), out=tmp_path / "out")
    assert (tmp_path / "out" / "examples.jsonl").read_text() == ""


def test_a_base_that_was_loaded_before_its_files_were_replaced_records_nothing(options: Options, tmp_path: Path):
    base = load_base(options["base"], dtype="float64", device="cpu")
    other_base(tmp_path / "base", tmp_path)
    with pytest.raises(IncompatibleError, match="were replaced while they were read; run the command again"):
        record(base, options["heads"], data=options["data"], max_new_tokens=8)
    assert not list((cache_directory() / "traces").rglob("*.arrow"))


def test_the_perplexity_of_weights_that_were_replaced_is_not_told(options: Options, tmp_path: Path):
    (tmp_path / "passages.jsonl").write_text('{"text": "one two three"}\n')
    measured = partial(
        perplexity_of_task, "lambada", base=options["base"], data=str(tmp_path / "passages.jsonl"), dtype="float64",
        device="cpu",
    )  # fmt: skip
    assert measured().tokens > 1
    with pytest.raises(IncompatibleError, match="were replaced while they were read; run the command again"):
        measured(progress=lambda *_: other_base(tmp_path / "base", tmp_path))


def test_a_task_whose_code_makes_other_prompts_does_not_replay_the_old_ones(
    options: Options, caplog: pytest.LogCaptureFixture
):
    (task,) = opened(options)
    before = task.trace()
    assert task.data is not None
    changed = tuple(dataclasses.replace(e, prompt=f"{e.prompt} Now!") for e in task.data.examples)
    now = dataclasses.replace(task, data=dataclasses.replace(task.data, examples=changed))
    assert now.recorded() is None
    after = now.trace()
    assert [e.prompt for e in after.examples] == [f"{e.prompt} Now!" for e in before.examples]
    assert "holds another prompt or other references of the example 'q0'" in caplog.text


def test_a_trace_of_the_users_own_with_other_prompts_is_refused(options: Options, tmp_path: Path):
    recorded_trace(options, tmp_path / "trace")
    (task,) = opened(options, k=8, out=tmp_path / "trace")
    assert task.data is not None
    changed = tuple(dataclasses.replace(e, references=("other",)) for e in task.data.examples)
    now = dataclasses.replace(task, data=dataclasses.replace(task.data, examples=changed))
    with pytest.raises(IncompatibleError, match="holds another prompt or other references"):
        now.trace()


def test_a_run_of_a_given_trace_does_not_read_another_one_in_its_place(options: Options, tmp_path: Path):
    recorded_trace(options, tmp_path / "trace")
    given = dict(trace=str(tmp_path / "trace"), k=8, rescorers=("none", "oracle"))
    evaluated(given, out=tmp_path / "run")
    assert load_run(tmp_path / "run").trace("squad") is not None
    other_heads(tmp_path / "heads", options["base"])
    shutil.rmtree(tmp_path / "trace")
    recorded_trace(options, tmp_path / "trace")
    assert [e.id for e in read_trace(tmp_path / "trace").examples] == [f"q{i}" for i in range(6)]
    with pytest.raises(IncompatibleError, match=r"is not the trace that .* was replayed from"):
        load_run(tmp_path / "run").trace("squad")


def test_the_cost_of_a_run_is_not_that_of_another_model_under_the_same_name(options: Options, tmp_path: Path):
    evaluated(options, out=tmp_path / "run")
    found: Any = cost_inputs(load_run(tmp_path / "run"))
    assert found.base.parameters > 0
    other_base(tmp_path / "base", tmp_path)
    for base in (None, options["base"]):
        with pytest.raises(IncompatibleError, match=r"is not the base LM that .* was decoded with"):
            cost_inputs(load_run(tmp_path / "run"), base=base)


def test_a_trace_of_another_version_of_a_task_file_is_not_taken_for_this_one(options: Options, tmp_path: Path):
    (tmp_path / "q.jsonl").write_text('{"q": "one", "a": "x"}\n{"q": "two", "a": "y"}\n')
    file = tmp_path / "mine.yaml"
    body = "name: mine\nsource:\n  file: q.jsonl\nprompt: 'Q {q}'\nreference: a\nmetric: exact_match\n"
    file.write_text(body)
    mine = dict(options, tasks=(str(file),), data=None)
    recorded_trace(mine, tmp_path / "trace")
    given = dict(tasks=(str(file),), trace=str(tmp_path / "trace"), k=8)
    evaluated(given)
    file.write_text(body.replace("Q {q}", "Ask {q}"))
    with pytest.raises(IncompatibleError, match="was recorded for another version of"):
        evaluated(given)


def test_a_suite_keeps_no_sweep_of_another_base_under_the_old_key(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    body = "".join(f"{name}: {options[name]}\n" for name in ("base", "heads", "device", "dtype", "k"))
    body += f"max_new_tokens: 8\ntasks: [{{name: squad, data: {options['data']}, limit: 2}}]\n"
    body += "rescorers: [{name: 'context-ngram:none', tune: {limit: 2, alphas: [1]}}]\n"
    (tmp_path / "table.yaml").write_text(body)

    def replaced(*arguments: Any, **more: Any) -> Any:
        tuned = tune(*arguments, **more)
        other_base(tmp_path / "base", tmp_path)
        return tuned

    monkeypatch.setattr(suite, "tune", replaced)
    with pytest.raises(IncompatibleError, match="were replaced while they were read"):
        suite.run_suite(read_plan(tmp_path / "table.yaml"), tmp_path / "out")
    assert (tmp_path / "out" / "tuned.jsonl").read_text() == ""
