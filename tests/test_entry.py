"""The installed command runs this project's code wherever it is started, whatever lies in the working folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rescore

ROOT = Path(rescore.__file__).parents[1]
SHADOWS = ("cli.py", "lm/__init__.py", "lm/files.py", "lattices/__init__.py")


@pytest.fixture
def shadowed(tmp_path: Path) -> Path:
    """A working folder with files of the user's own under the names of ours."""
    for name in SHADOWS:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise SystemExit('the user's own {name} was run')\n".replace("'s", ""))
    return tmp_path


# What the script of the installed command does, and `python -m`, which puts the working folder first on the path.
@pytest.mark.parametrize("start", [["-c", "from rescore.__main__ import main; main()"], ["-m", "rescore"]], ids=str)
@pytest.mark.parametrize("on_the_path", [False, True])
def test_files_of_the_users_own_are_not_taken_for_ours(shadowed: Path, start: list[str], on_the_path: bool):
    path = [str(shadowed)] * on_the_path + [str(ROOT)]
    run = subprocess.run(
        [sys.executable, *start, "tasks", "squad"],
        capture_output=True, text=True, cwd=shadowed, env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    assert "question: " in run.stdout


def test_a_ctrl_c_after_the_end_changes_nothing():
    program = (
        "import atexit, os, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"  # what is registered first is called last
        "from rescore.__main__ import main; main()"
    )
    run = subprocess.run([sys.executable, "-c", program, "tasks"], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stderr) == (0, "") and "squad" in run.stdout


def test_a_module_of_another_project_that_is_loaded_already_is_told(shadowed: Path):
    (shadowed / "lm" / "__init__.py").write_text("")
    program = "import sys; sys.path.insert(0, '.'); import lm; import rescore"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=shadowed,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 1
    assert "rescore needs its own lm, but" in run.stderr.splitlines()[-1]


def test_torchrun_starts_the_installed_command(shadowed: Path):
    """`torchrun --no-python rescore`: each process runs the command, from any folder."""
    command = shadowed / "rescore"
    command.write_text(f"#!{sys.executable}\nfrom rescore.__main__ import main\nmain()\n")
    command.chmod(0o755)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", str(command)]
    run = subprocess.run(
        [*launcher, "train-heads", "--corpus", "missing.jsonl", "--out", "heads"],
        capture_output=True, text=True, cwd=shadowed, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "missing.jsonl" in run.stderr and "user" not in run.stderr
