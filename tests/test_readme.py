"""The README's Python example runs, here on the tiny model; and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

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


PAGES = [README, *sorted(README.parent.glob("docs/*.md"))]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "cli.md"], ids=lambda page: page.stem)
def test_the_commands_that_are_told_exist(page: Path):
    commands = typer.main.get_command(app)
    for line in re.findall(r"^rescore (.+)$", page.read_text(), re.M):
        words = re.split(r"\s+#", line)[0].split()
        command = commands
        while hasattr(command, "commands"):
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_no_text_waits_to_be_filled_in():
    root = README.parent
    for page in [README, *root.glob("docs/**/*.md"), *root.glob("lm/weights/**/*.md")]:
        assert "@@" not in page.read_text(), page


def test_the_reference_of_commands_is_what_the_commands_say():
    import runpy

    written = runpy.run_path(str(README.parent / "docs" / "make_cli.py"))
    assert (README.parent / "docs" / "cli.md").read_text() == written["reference"](), "run python docs/make_cli.py"
