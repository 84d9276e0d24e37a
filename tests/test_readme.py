"""The README's Python examples run, here on the tiny model; and its commands exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

import rescore
from cli import app

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.usefixtures("converted")
def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """As it stands, with fewer and shorter examples."""
    example, in_transformers = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert "limit=8)" in example
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example.replace("limit=8)", "limit=2, max_new_tokens=12)"), names)
    run, again, out = names["run"], names["again"], names["out"]
    assert [r.rescorer for r in run] == ["none", "context-ngram", "ngram", "LastEntries"]
    assert [(r.p, r.alpha) for r in run] == [(1, None), (1, 1.0), (16, 0.5), (1, None)]
    assert run["LastEntries"].block_efficiency <= run["none"].block_efficiency <= run["ngram"].block_efficiency
    assert again.results == run.results and again.examples == run.examples
    assert list(run.to_pandas()["block_efficiency"]) == [r.block_efficiency for r in run]
    assert sum(out.accepted) == len(out.token_ids) and out.text and out.seconds > 0
    assert f"{run['context-ngram'].block_efficiency}" in capsys.readouterr().out
    exec(in_transformers.replace("max_new_tokens=24", "max_new_tokens=8"), names)
    ids, model = names["ids"], names["model"]
    assert ids.tolist() == model.generate(**names["inputs"], max_new_tokens=8, do_sample=False).tolist()
    assert sum(names["blocks"].decoded.accepted) == 8 and "What is a lattice?" in capsys.readouterr().out


def test_public_names():
    for name in rescore.__all__:
        assert getattr(rescore, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = rescore.nonsense


ROOT = README.parent
PAGES = [README, *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("lm/weights/**/*.md"))]
SOURCES = [
    *sorted(ROOT.glob("cli*.py")),
    *(p for floor in ("lattices", "lm", "rescore") for p in ROOT.glob(f"{floor}/**/*.py")),
]
PROGRAM = re.compile(r"(?:^|\s)(?:python |torchrun .*)?((?:docs|benchmarks)/\S+\.py)(.*)")


def told_commands(text: str) -> list[str]:
    """What a page tells the reader to type: lines of its code blocks, and what stands between backticks."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [re.split(r"\s+#", line)[0].strip() for line in [*lines, *re.findall(r"`([^`\n]+)`", text)]]


def check_command(words: list[str]) -> None:
    """Asserts that the command line has this command with these options; not what their values are."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, words[0]
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help", "--debug"}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "cli.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_that_are_told_exist(page: Path):
    for line in told_commands(page.read_text()):
        if match := re.match(r"(?:torchrun .*--no-python )?rescore ([^|>]*)", line):
            words = match[1].replace("COMMAND --help", "--help").split()
            if words[:1] not in ([], ["..."]):
                check_command(words)
        elif match := PROGRAM.search(line):
            source = (ROOT / match[1]).read_text()  # there is such a program
            for option in re.findall(r"--[a-z-]+", match[2]):
                assert f'"{option}"' in source, line
        elif match := re.match(r"make ([a-z-]+)", line):
            assert f"\n{match[1]}:" in (ROOT / "Makefile").read_text(), line


def test_the_commands_that_messages_and_help_texts_tell_exist():
    told = [
        (path, words)
        for path in SOURCES
        for words in re.findall(r"\brescore ((?:bench )?[a-z-]+(?: --[a-z-]+)+)", path.read_text())
    ]
    assert len(told) > 10
    for path, words in told:
        try:
            check_command(words.split())
        except AssertionError as error:
            raise AssertionError(f"{path}: rescore {words}") from error


def all_commands() -> list[list[str]]:
    """Every command of the command line, by its words."""
    found, waiting = [], [([], typer.main.get_command(app))]
    while waiting:
        words, command = waiting.pop()
        found.append(words)
        waiting += [([*words, name], inner) for name, inner in getattr(command, "commands", {}).items()]
    return sorted(found)


@pytest.mark.parametrize("words", all_commands(), ids=" ".join)
def test_every_command_has_a_help_that_describes_each_option(words: list[str]):
    run = CliRunner().invoke(app, [*words, "--help"], prog_name="rescore")
    assert run.exit_code == 0 and run.output.startswith("Usage: rescore")
    command = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    for parameter in command.params:
        assert getattr(parameter, "help", None), parameter.name


def test_no_text_waits_to_be_filled_in():
    root = README.parent
    for page in [README, *root.glob("docs/**/*.md"), *root.glob("lm/weights/**/*.md")]:
        assert "@@" not in page.read_text(), page


def test_the_reference_of_commands_is_what_the_commands_say():

    written = runpy.run_path(str(README.parent / "docs" / "make_cli.py"))
    assert (README.parent / "docs" / "cli.md").read_text() == written["reference"](), "run python docs/make_cli.py"


def test_the_diagram_of_joint_is_of_the_shipped_weights():
    import runpy

    made = runpy.run_path(str(README.parent / "docs" / "make_joint.py"))
    fit = made["shipped"]()
    assert made["PICTURE"].read_text() == made["diagram"](fit), "run python docs/make_joint.py"
    assert made["diagram"](fit).count("<circle") == sum(count > 0 for count in fit.counts)
    assert f"{fit.calibration_error:.4f}" in made["PICTURE"].read_text()


def test_tables_of_figures_are_those_of_the_runs():
    written = runpy.run_path(str(ROOT / "docs" / "make_tables.py"))
    for path in written["PAGES"]:
        assert path.read_text() == written["page"](path.read_text()), f"{path.name}: run python docs/make_tables.py"
    assert sum(len(written["BLOCK"].findall(path.read_text())) for path in written["PAGES"]) == len(written["TABLES"])
    for name, said in written["claims"]().items():
        assert not written["missing"](name, said), f"{name}: run python docs/make_tables.py"


def test_the_pictures_of_the_findings_are_of_the_runs():
    made = runpy.run_path(str(ROOT / "docs" / "make_findings.py"))
    for name, picture in made["PICTURES"].items():
        assert (ROOT / "docs" / f"found-{name}.svg").read_text() == picture(), "run python docs/make_findings.py"


def test_the_tests_that_hold_a_promise_exist():
    root = README.parent
    named = set(re.findall(r"`(test_\w+)`", (root / "docs" / "reliability.md").read_text()))
    there = {
        name
        for path in (root / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)\(", path.read_text())
    }
    assert len(named) > 20 and named <= there
