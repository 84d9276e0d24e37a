"""The cached trace: a changed model, heads or library never replays an old one, and a broken one is made again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from evaluating import Options, evaluated, inputs_of, recorded_trace

from lattices.errors import InvalidDataError, RescoreError
from lm import keys
from lm.files import cache_directory
from rescore import tracing
from rescore.runs.evaluated import load_run
from rescore.runs.models import Models


@pytest.fixture
def options(tiny_folder: Path, tiny_heads_folder: Path, squad_file: Path, tmp_path: Path) -> Options:
    """On a base and heads of its own, which can be changed."""
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    heads = shutil.copytree(tiny_heads_folder, tmp_path / "heads")
    return dict(
        base=str(base), heads=str(heads), data=str(squad_file), device="cpu", dtype="float64", k=4, max_new_tokens=8,
        limit=3, rescorers=("none", "oracle"),
    )  # fmt: skip


def edit(path: Path, change: Callable[[dict], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


CHANGES: dict[str, tuple[str, Callable[[dict], None]]] = {
    "rope": ("config.json", lambda d: d.update(rope_parameters={"rope_theta": 3.0, "rope_type": "default"})),
    "norm": ("config.json", lambda d: d.update(rms_norm_eps=1.0)),
    "end of text": ("generation_config.json", lambda d: d.update(eos_token_id=list(range(128, 257)))),
    "normaliser": ("tokenizer.json", lambda d: d.update(normalizer={"type": "Lowercase"})),
    "clean-up": ("tokenizer_config.json", lambda d: d.update(clean_up_tokenization_spaces=True)),
    "post-processor": ("tokenizer.json", lambda d: d["post_processor"].update(
        single=[{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        special_tokens={"<|end|>": {"id": "<|end|>", "ids": [256], "tokens": ["<|end|>"]}},
    )),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_model_never_replays_an_old_trace(options, what, cache_folder, monkeypatch, tmp_path):
    before = evaluated(options).document.results
    name, change = CHANGES[what]
    edit(Path(options["base"]) / name, change)
    after = evaluated(options).document
    monkeypatch.setenv("RESCORE_CACHE", str(tmp_path / "fresh"))
    fresh = evaluated(options).document
    assert after == fresh
    if what in ("rope", "norm", "end of text"):
        assert after.results != before
    assert len(list((cache_folder / "traces").iterdir())) == 2


def test_other_heads_libraries_recordings_and_devices_are_other_traces(options, monkeypatch):
    evaluated(options)
    seen = {folder.name for folder in (cache_directory() / "traces").iterdir()}

    def is_new() -> bool:
        evaluated(options)
        folders = {folder.name for folder in (cache_directory() / "traces").iterdir()}
        new = folders - seen
        seen.update(folders)
        return len(new) == 1

    assert not is_new()
    edit(Path(options["heads"]) / "config.json", lambda d: d.update(base_name="another"))
    assert is_new()
    monkeypatch.setattr(tracing, "RECORDING", 99)
    assert is_new()
    real = keys.importlib.metadata.version
    monkeypatch.setattr(keys.importlib.metadata, "version", lambda n: "5.99.0" if n == "transformers" else real(n))
    assert is_new()
    monkeypatch.setattr("lm.base.catalog.choose_device", lambda device: "cuda:1")
    (settings,) = {id(s): s for s in [Models(inputs_of(options)).trace_settings(*_task(options), 8)]}.values()
    assert settings["recorded_by"]["device"] == "cuda"


def _task(options: Options):
    from rescore.tasks import load_task
    from rescore.tasks.data import load_examples

    task = load_task("squad")
    return task, load_examples(task, data=Path(options["data"]), limit=1)


def test_the_results_say_by_what_their_trace_was_recorded(options):
    recorded = evaluated(options).document.config.traces["squad"]
    assert recorded["recorded_by"].keys() == {"device", "recording", "torch", "transformers", "tokenizers"}
    assert all(recorded["base"][name] for name in ("config_sha256", "tokenization_sha256"))


def twice(folder: Path) -> None:
    """What two processes once left: the same examples in two parts."""
    shutil.copytree(folder / "part-00000", folder / "part-00001")
    edit(folder / "trace.json", lambda d: d["parts"].append("part-00001"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


BREAKS: dict[str, Callable[[Path], None]] = {
    "header cut": lambda folder: (folder / "trace.json").write_text('{"h": 4'),
    "header empty": lambda folder: (folder / "trace.json").write_text(""),
    "header of another": lambda folder: edit(folder / "trace.json", lambda d: d.update(k=3)),
    "arrow cut": lambda folder: cut(next((folder / "part-00000").glob("*.arrow"))),
    "arrow empty": lambda folder: next((folder / "part-00000").glob("*.arrow")).write_bytes(b""),
    "part gone": lambda folder: shutil.rmtree(folder / "part-00000"),
    "twice": twice,
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_cached_trace_is_made_again(options, what, cache_folder, caplog, tmp_path):
    before = evaluated(options, out=tmp_path / "run").document
    (folder,) = (cache_folder / "traces").iterdir()
    BREAKS[what](folder)
    with pytest.raises(RescoreError, match=r"the cached trace of squad is broken .* makes it again"):
        load_run(tmp_path / "run").trace("squad")
    assert evaluated(options).document == before
    (line,) = caplog.messages
    assert line.startswith("the cached trace of squad can't be used (") and line.endswith("; it is made again")
    caplog.clear()
    assert evaluated(options).document == before and not caplog.messages


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_trace_of_the_user_s_stays_an_error(options, what, tmp_path):
    recorded_trace(dict(options, rescorers=("none",)), tmp_path / "trace")
    BREAKS[what](tmp_path / "trace")
    wanted = RescoreError if what == "header of another" else InvalidDataError
    given = dict(options, trace=str(tmp_path / "trace"), data=None, heads=None)
    with pytest.raises(wanted):
        evaluated(given)
    with pytest.raises(wanted):
        recorded_trace(dict(options, rescorers=("none",)), tmp_path / "trace")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_whole_trace_is_replayed_from_a_read_only_cache(options, cache_folder):
    before = evaluated(options).document
    folders = [cache_folder, *(path for path in cache_folder.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert evaluated(options).document == before
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_a_whole_trace_is_replayed_without_a_lock(options, monkeypatch):
    before = evaluated(options).document

    def fails(*_: object, **__: object) -> None:
        raise AssertionError("what is only read is not locked")

    monkeypatch.setattr("lm.locks.FileLock.acquire", fails)
    assert evaluated(options).document == before
