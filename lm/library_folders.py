"""Where huggingface_hub and datasets keep what they fetch and convert, on machines where their own place won't do.

Imported before either of them: they read their settings once. Imports the standard library only.
"""

from __future__ import annotations

import os
from pathlib import Path

from lattices.paths import working_folder


def place_downloads() -> None:
    """Points both to the cache directory where `~/.cache/huggingface` is not known (no HOME: they would make a folder
    called `~` in the working folder) or can't be written to. What is there already is still read. A user's HF_HOME
    goes before."""
    if "HF_HOME" in os.environ:
        return
    usual = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "huggingface"
    known = not str(usual).startswith("~")
    if known and _may_write(usual):
        return
    own = working_folder("huggingface")
    if known and usual.is_dir():
        # Models come from there; `datasets` writes beside what it reads, so its folders move.
        os.environ.setdefault("HF_DATASETS_CACHE", str(own / "datasets"))
        os.environ.setdefault("HF_MODULES_CACHE", str(own / "modules"))
    else:
        os.environ["HF_HOME"] = str(own)


def _may_write(folder: Path) -> bool:
    """Whether the folder can be written to, or made; nothing is."""
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)
