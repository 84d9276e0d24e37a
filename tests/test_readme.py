"""The README's Python example runs, here on the tiny model; and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from cli import app

README = Path(__file__).parents[1] / "README.md"


def test_the_python_example_runs(tiny_folder, tiny_heads_folder, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    example = example.replace(
        'base="smollm2-135m"', f'base="{tiny_folder}", heads="{tiny_heads_folder}", max_prompt_tokens=200'
    )
    exec(example, {})
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["none", "oracle"]


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
    import runpy

    written = runpy.run_path(str(README.parent / "docs" / "make_cli.py"))
    assert (README.parent / "docs" / "cli.md").read_text() == written["reference"](), "run python docs/make_cli.py"
