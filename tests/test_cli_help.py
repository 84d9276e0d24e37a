"""What the command `rescore` says of itself: help, versions, progress; how it starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import (
    SETTINGS,
    Command,
)

import rescore as rescore_package
from rescore import terminal
from rescore.tasks import task_names


@pytest.mark.parametrize(("rank", "lines"), [("0", ["rescore: work: 1 of 2", "rescore: work: 2 of 2"]), ("1", [])])
def test_progress_without_a_terminal_is_a_line_a_minute(monkeypatch, capsys, rank, lines):
    monkeypatch.setenv("RANK", rank)
    with terminal.progress_bar() as progress:
        progress("work", 1, 2)  # within the first minute
        monkeypatch.setattr(terminal, "LINE_EVERY", 0.0)
        progress("work", 1, 2)
        progress("work", 2, 2)
    assert capsys.readouterr().err.splitlines() == lines


COMMANDS = [
    [], ["generate"], ["eval"], ["oracle"], ["trace"], ["generate-corpus"], ["train-heads"], ["bench"],
    ["bench", "verify-curve"],
]  # fmt: skip
READERS = ["analyse", "compare", "inspect", "cost", "report", "export-fst", "mix-ngram", "suite"]


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
    def test_every_command_has_help(self, rescore: Command, command: list[str]):
        run = rescore(*command, "--help")
        assert (run.code, run.err) == (0, "") and run.out.startswith(f"Usage: {' '.join(['rescore', *command])} ")
        assert re.search(r"--help +Show this message and exit.", run.out)

    def test_no_command_shows_help(self, rescore: Command):
        assert rescore() == rescore("--help")

    def test_a_terminal_shows_panels(self, rescore: Command, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        panels = re.findall(r"^╭─ (\S+) ─", re.sub(r"\x1b\[[0-9;]*m", "", rescore("--help").out), re.M)
        assert panels == ["Options", "Generate", "Measure", "Look", "N-grams", "Train", "Tasks", "Bench"]
        assert "ngram[:PATH]" in rescore("eval", "--help").out, "brackets are no markup"

    def test_plain_help_lists_commands_by_panel(self, rescore: Command):
        assert re.findall(r"^(\S+):\n", rescore("--help").out, re.M)[1:] == [
            "Generate", "Measure", "Look", "N-grams", "Train", "Tasks", "Bench"
        ]  # fmt: skip

    def test_the_help_of_tasks_names_them_all(self, rescore: Command):
        for command in ("eval", "oracle", "trace"):
            text = " ".join(rescore(command, "--help").out.split())
            assert all(name in text for name in task_names()), command

    def test_version(self, rescore: Command):
        run = rescore("--version")
        assert (run.code, run.err) == (0, "")
        names = [line.split()[0] for line in run.out.splitlines()]
        assert names == ["rescore", "torch", "transformers", "numpy", "numba", "datasets"]
        assert all(re.fullmatch(r"\S+ \d+\.\S+", line) for line in run.out.splitlines())

    def test_every_module_of_the_command_is_packaged_and_checked(self):
        root = Path(rescore_package.__file__).parents[1]
        settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]
        modules = {path.stem for path in root.glob("*.py")}
        assert {f"{name}.py" for name in modules} <= set(settings["hatch"]["build"]["targets"]["wheel"]["only-include"])
        assert {f"{name}.py" for name in modules} <= set(settings["mypy"]["files"])

    @pytest.mark.parametrize(
        ("commands", "heavy"),
        [
            (COMMANDS, {"torch", "transformers", "datasets", "numba", "pyarrow"}),
            ([[name] for name in READERS], {"torch", "transformers", "datasets"}),
        ],
    )
    def test_help_imports_no_heavy_library(self, commands: list[list[str]], heavy: set[str]):
        program = f"""
import contextlib, io, sys
import rescore.__main__
for command in {commands!r}:
    sys.argv = ["rescore", *command, "--help"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        rescore.__main__.main()
sys.argv = ["rescore", "--version"]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    rescore.__main__.main()
print(sorted({heavy!r} & set(sys.modules)))
"""
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert found.stdout == "[]\n"

    def test_the_command_starts_itself_anew_with_its_settings(self):
        environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        found = subprocess.run(
            [sys.executable, "-m", "rescore", "eval", "--k", "x"], capture_output=True, text=True, env=environment
        )
        assert found.returncode == 2 and re.fullmatch(r"rescore: --k x: give whole numbers.*\n", found.stderr)
