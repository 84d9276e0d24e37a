"""Writes the lists of docs/models.md by trying a tiny model of every family: `python docs/make_models.py`.

A test compares the page with what this would write, so it can't fall behind.
"""

from __future__ import annotations

import sys
from pathlib import Path

PAGE = Path(__file__).parent / "models.md"
BEGIN, END = "<!-- made by docs/make_models.py -->\n", "<!-- end -->\n"
TESTS = Path(__file__).parents[1] / "tests"


def version() -> str:
    """The minor version of the installed transformers."""
    import transformers

    return ".".join(transformers.__version__.split(".")[:2])


def lists() -> str:
    """What is between the page's two marks."""
    sys.path[:0] = [str(TESTS), str(TESTS / "lm")]
    from tiny_models import families, tried
    from transformers.utils import logging

    logging.set_verbosity_error()  # of sizes that are odd on purpose

    groups: dict[str, list[str]] = {"tree": [], "batch": [], "alone": [], "frozen": []}
    refused: dict[str, list[str]] = {}
    not_built: dict[str, list[str]] = {}
    for name in families():
        found = tried(name)
        if found.base is not None:
            groups["tree" if found.base.supports_tree else "batch"].append(name)
            groups["alone"] += [] if found.base.supports_padding else [name]
            groups["frozen"] += [] if found.base.body_gives_states else [name]
        elif found.refused:
            why = found.refused.replace(f"{name} ({name})", "").replace(f" {name} ", " it ").removeprefix(name)
            refused.setdefault(why.strip(), []).append(name)
        else:
            not_built.setdefault(found.not_built, []).append(name)
    return (
        f"Tried with transformers {version()}, by `model_type` of a model's `config.json`.\n\n"
        f"### Verified as a tree or as a batch\n\n{_names(groups['tree'])}\n\n"
        f"### Verified as a batch only\n\n{_names(groups['batch'])}\n\n"
        f"### Prompts of one length in a batch\n\n{_names(groups['alone'])}\n\n"
        f"### No fine-tuning with the heads\n\n{_names(groups['frozen'])}\n\n"
        f"### Refused\n\n{_table(refused)}\n"
        f"### Not tried\n\n{_table(not_built)}"
    )


def page() -> str:
    """The whole page, its lists made again."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + "\n" + lists() + "\n" + END + rest.partition(END)[2]


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _table(reasons: dict[str, list[str]]) -> str:
    rows = [f"| {reason.replace('|', '/')} | {_names(names)} |\n" for reason, names in sorted(reasons.items())]
    return "| Why | Families |\n|---|---|\n" + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
