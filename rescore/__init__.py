"""The pipeline: tasks, decoding and traces, rescorers, verification, accounting, results."""

import importlib
import sys
from pathlib import Path


def import_neighbours(*names: str) -> None:
    """Imports top-level packages of this project from the folder that `rescore` itself lies in.

    `lm` and `cli` are names that a user's own files have too, in the working folder or on PYTHONPATH: those come
    earlier on the path, and would be taken in silence. Raises `ImportError` if one of another project is loaded.
    """
    root = Path(__file__).resolve().parents[1]
    sys.path.insert(0, str(root))
    try:
        for name in names:
            module = importlib.import_module(name)
            if Path(module.__file__ or "").resolve().parent not in (root, root / name):
                raise ImportError(f"rescore needs its own {name}, but {module.__file__} is loaded under that name")
    finally:
        sys.path.remove(str(root))


import_neighbours("lattices", "lm")
