"""Every path option of every command, given what can't be used: one line, exit code 2, nothing made elsewhere."""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Command, make_heads, no_root_rights, save_tiny_base, squad_records, write_lines

from lm.base.catalog import load_base

TINY = ["--dtype", "float64", "--device", "cpu"]
ODD_NAME = os.fsdecode(b"caf\xe9")  # no UTF-8: half of the character is missing


@dataclass(frozen=True)
class Place:
    """A command that works, and the option or the argument that names a place in it."""

    arguments: tuple[object, ...]
    option: str  # "" for the argument after the command
    is_output: bool

    def given(self, value: object) -> list[object]:
        """The command with another place."""
        if self.option:
            if self.option not in self.arguments:
                return [*self.arguments, self.option, value]
            place = self.arguments.index(self.option)
            return [*self.arguments[: place + 1], value, *self.arguments[place + 2 :]]
        return [self.arguments[0], value, *self.arguments[2:]]

    def __str__(self) -> str:
        return f"{self.arguments[0]} {self.option}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, heads, data, prompts and a text."""
    folder = tmp_path_factory.mktemp("made")
    base = save_tiny_base(folder / "base")
    os.environ["RESCORE_CACHE"] = str(folder / "cache")
    make_heads(load_base(str(base), dtype="float64", device="cpu")).save(folder / "heads")
    write_lines(folder / "squad.jsonl", squad_records(3))
    write_lines(folder / "prompts.jsonl", [{"prompt": "x" * n} for n in range(1, 5)])
    (folder / "text.txt").write_text("In 1900 the bridge was built of stone.\n" * 30)
    (folder / "suite.yaml").write_text(f"base: {base}\nheads: {folder / 'heads'}\ntasks: [squad]\nrescorers: [none]\n")
    (folder / "task.yaml").write_text(
        "source: {file: squad.jsonl}\nprompt: '{question}'\nreference: answers.text\npassage: context\n"
    )
    return folder


@pytest.fixture
def places(rescore: Command, made: Path, tmp_path: Path) -> list[Place]:
    """All of them; `tmp_path / "in"` is what an earlier command wrote."""
    model = ("--base", made / "base", *TINY)
    heads, data = ("--heads", made / "heads"), ("--data", made / "squad.jsonl", "--max-new-tokens", 6)
    within = tmp_path / "in"
    trace = ("trace", *model, *heads, *data, "--out", within / "trace")
    run = ("eval", *model, *heads, *data, "--out", within / "run")
    tune = ("tune", *model, *heads, *data, "--p", 1, "--alphas", 1)
    ngram = ("build-ngram", made / "text.txt", "--tokenizer", made / "base", "--order", 2, "--discount-fallback")
    for arguments in (trace, run, (*ngram, "--out", within / "ngram")):
        assert rescore(*arguments).code == 0
    out = ("--out", tmp_path / "out")
    train = (*model[:2], "--corpus", made / "text.txt", "--steps", 1, "--device", "cpu")
    table: dict[tuple[object, ...], str] = {
        ("eval", *model, *heads, *data, *out): "--base --heads --data --out",
        ("eval", "--trace", within / "trace", "--rescorer", "oracle"): "--trace",
        ("oracle", *model, *heads, *data): "--base --heads --data",
        (*tune, "--rescorer", "context-ngram"): "--base --heads --data",
        ("tune", "--trace", within / "trace", "--rescorer", "context-ngram"): "--trace",
        ("trace", *model, *heads, *data, *out): "--base --heads --data --out",
        ("suite", made / "suite.yaml", "--data", made, *out): " --out",
        ("report", within / "run", "--out", tmp_path / "out.html"): " --out",
        ("analyse", "--trace", within / "trace"): "--trace",
        ("analyse", "--results", within / "run"): "--results",
        ("compare", within / "run", within / "run"): "",
        ("inspect", within / "run"): "",
        (*ngram, *out): " --tokenizer --out",
        ("score-ngram", made / "text.txt", "--ngram", within / "ngram"): " --ngram --tokenizer",
        ("mix-ngram", within / "ngram", within / "ngram", "--weights", "1,1", *out): " --out",
        ("mix-ngram", within / "ngram", within / "ngram", "--trace", within / "trace", *out): "--trace",
        ("export-fst", "--ngram", within / "ngram", "--trace", within / "trace", *out): "--ngram --trace --out",
        ("generate-corpus", *model, "--prompts", made / "prompts.jsonl", *out): "--prompts --base --out",
        ("train-heads", *train, *out): "--corpus --base --out",
        ("train-heads", *train, "--held-out-corpus", made / "prompts.jsonl", *out): "--held-out-corpus",
        ("train-heads", *train, "--initial", made / "heads", *out): "--initial",
        ("train-rescorer", "neural-32m", *train, *out): "--corpus --out",
        ("train-bigram", *train, *heads, *out): "--corpus --heads --out",
        ("tasks", made / "task.yaml"): "",
        ("perplexity", "--task", made / "task.yaml", "--data", made / "squad.jsonl", *model): "--task --data --base",
        ("cost", "--base", made / "base", "--heads", made / "heads"): "--base --heads",
        ("cost", "--config", made / "base" / "config.json"): "--config",
        ("cost", "--results", within / "run"): "--results",
        ("bench", "block-length", "--trace", within / "trace", *model, *heads): "--trace --heads",
    }  # fmt: skip
    return [
        Place(arguments, option, option == "--out") for arguments, options in table.items()
        for option in (options.split(" ") if options.startswith((" ", "-")) else [""])
    ]  # fmt: skip


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder, which stays empty."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert os.listdir(folder) == []


def test_a_place_that_can_not_be_used(
    rescore: Command,
    places: list[Place],
    tmp_path: Path,
    working_folder: Path,
):
    """Not there, not named, not ours: whichever command, whichever option."""
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "x").mkdir()
    values: dict[str, tuple[object, str]] = {
        "empty": ("", "is empty; give it a value"),
        "nobody": ("~no-such-user/x", "no-such-user"),
        "long": ("x" * 300, "name too long|no such f|unknown model|must end with .html"),
        "locked": (locked / "x", "Permission denied|must end with .html"),
    }
    for what, (value, message) in values.items():
        locked.chmod(0)
        for place in places:
            try:
                with no_root_rights():
                    rescore(*place.given(value)).refused(f"(?i){message}")
            except AssertionError as error:
                raise AssertionError(f"{what}, {place}: {error}") from error
            assert not (tmp_path / "out").exists()
        locked.chmod(0o700)
        assert os.listdir(locked / "x") == []


def test_a_name_that_is_no_utf8(
    rescore: Command,
    places: list[Place],
    tmp_path: Path,
    working_folder: Path,
):
    """It is shown escaped. Arrow and safetensors can't write there, which is told before the work."""
    for number, place in enumerate(places):
        run = rescore(*place.given(tmp_path / str(number) / ODD_NAME))
        if run.code == 0:
            assert place.is_output and place.arguments[0] not in ("trace", "train-heads", "train-rescorer"), place
            assert "caf" not in run.out or "caf\\udce9" in run.out, place
        else:
            assert (run.code, run.out) == (2, ""), (place, run)
            assert run.err.count("\n") == 1, (place, run)
            assert "caf\\udce9" in run.err or ".html" in run.err, (place, run)
            assert not (tmp_path / str(number)).exists(), place


def test_data_whose_name_is_no_utf8(
    rescore: Command,
    made: Path,
    tmp_path: Path,
    working_folder: Path,
):
    """The name is in the results, which can be read again, compared and made a page of."""
    data = tmp_path / f"{ODD_NAME}.jsonl"
    shutil.copy(made / "squad.jsonl", data)
    options = ["--base", made / "base", "--heads", made / "heads", *TINY, "--max-new-tokens", 6]
    run = ["eval", *options, "--data", data, "--out", tmp_path / ODD_NAME]
    assert rescore(*run).code == rescore(*run[:-1], made / "run").code == 0
    again = rescore(*run, "--json")
    assert again.code == 0 and again.document["config"]["inputs"]["squad"]["data"] == str(data)
    for command in (
        ["compare", tmp_path / ODD_NAME, made / "run"], ["inspect", tmp_path / ODD_NAME],
        ["analyse", "--results", tmp_path / ODD_NAME], ["report", tmp_path / ODD_NAME, "--out", tmp_path / "page.html"],
        ["build-ngram", data, "--field", "context", "--tokenizer", "words", "--order", 2, "--discount-fallback"],
    ):  # fmt: skip
        found = rescore(*command)
        assert found.code == 0, found
    assert (tmp_path / f"{ODD_NAME}-2gram" / "manifest.json").is_file()


def test_a_home_that_is_named(
    rescore: Command,
    made: Path,
    tmp_path: Path,
    working_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(made / "squad.jsonl", tmp_path)
    options = ["--base", made / "base", "--heads", made / "heads", *TINY, "--max-new-tokens", 6]
    assert rescore("trace", *options, "--data", "~/squad.jsonl", "--out", "~/trace").code == 0
    assert (tmp_path / "trace" / "trace.json").is_file()
    assert rescore("eval", "--trace", "~/trace", "--out", "~/run").code == 0
    assert (tmp_path / "run" / "results.json").is_file()
    assert rescore("analyse", "--trace", "~/trace").code == 0


def test_a_user_without_a_home(
    rescore: Command,
    made: Path,
    working_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """No HOME, no entry in the list of users, no cache folder named: that is told, with what to do."""

    def unknown(*_: object) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "RESCORE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    options = ["--base", made / "base", "--heads", made / "heads", "--data", made / "squad.jsonl", *TINY]
    rescore("eval", *options).refused("this user has no home folder; set RESCORE_CACHE to a folder")
    rescore("trace", *options, "--out", "~/trace").refused("--out ~/trace: no home folder is known for ~")
    assert rescore("tasks").code == 0
    monkeypatch.setenv("RESCORE_CACHE", str(made / "elsewhere"))
    assert rescore("eval", *options, "--max-new-tokens", 4).code == 0
