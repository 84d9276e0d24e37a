"""What the numbers of a run were made with: versions of the software, and the git revision."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "numpy", "numba", "datasets")


def environment() -> dict[str, Any]:
    """Versions of this project and its key libraries, and the git revision where there is one."""
    return {"versions": versions(), "git_revision": _git_revision()}


def versions() -> dict[str, str]:
    """Installed versions by distribution name."""
    installed = {}
    for name in ("rescore", *LIBRARIES):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def _git_revision() -> str | None:
    """The commit, with `-dirty` where tracked files are changed; None outside a checkout."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
