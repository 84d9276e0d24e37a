"""Lists of examples to leave out: what `rescore overlap --out` writes, and the one that comes with the package.

    schema: rescore.overlap/1
    n: 13
    tasks:
      TASK:
      - {id: ..., prompt: digest of the prompt, corpora: [name, ...]}

The digest of the prompt decides, not the id: another file of the same data set may number its examples otherwise, and
only the very prompt that was found is left out.
"""

from __future__ import annotations

import json
import os
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from lattices.errors import RescoreError
from lm.files import atomic_file
from lm.yaml_input import read_yaml

if TYPE_CHECKING:
    from rescore.studies.overlap import Overlap

SHIPPED = "shipped"  # the name of the list that comes with the package
SHIPPED_FILE = Path(__file__).with_name("contaminated.yaml")
SCHEMA = "rescore.overlap/1"
DIGEST = re.compile(r"[0-9a-f]{16}")


def read_leave_out(name: str | None) -> frozenset[str]:
    """Digests of the prompts that a list (`shipped`, or a file's path) leaves out; none without a name.

    Raises `RescoreError` if the file can't be read, `InvalidDataError` with the line of what is wrong in it.
    """
    if name is None:
        return frozenset()
    if not name.strip():
        raise RescoreError("--leave-out is empty; give shipped, or a file of rescore overlap --out")
    path = SHIPPED_FILE if name == SHIPPED else Path(name).expanduser()
    if not os.path.exists(path):
        raise RescoreError(f"no such file: {name}; give a file of rescore overlap --out, or --leave-out {SHIPPED}")
    top = read_yaml(path)
    fields = top.fields(("schema", "n", "tasks"), required=("schema",))
    if (schema := fields["schema"].text()) != SCHEMA:
        raise fields["schema"].wrong(f"{schema!r} is not {SCHEMA!r}; give a file of rescore overlap --out")
    found = set()
    for entries in fields["tasks"].fields(None).values() if "tasks" in fields else ():
        for entry in entries.items():
            prompt = entry.fields(("id", "prompt", "corpora"), required=("prompt",))["prompt"]
            if not DIGEST.fullmatch(prompt.text()):
                raise prompt.wrong("this is no digest of a prompt; give a file of rescore overlap --out")
            found.add(prompt.text())
    return frozenset(found)


def write_leave_out(overlap: Overlap, path: Path, *, about: str = "") -> None:
    """Writes the found examples as a list, without their text; `about`: a comment at its top. Raises `OutputError`."""
    quoted = json.dumps  # YAML takes JSON's strings, and one in quotes is text whatever stands in it
    lines = [f"# {line}" for paragraph in about.splitlines() for line in textwrap.wrap(paragraph, 110)]
    lines += [f"schema: {SCHEMA}", f"n: {overlap.n}"]
    tasks = [task for task in overlap.tasks if task.found]
    lines += ["tasks:"] if tasks else []
    for task in tasks:
        lines.append(f"  {quoted(task.task)}:")
        for shared in task.found:
            corpora = ", ".join(map(quoted, shared.corpora))
            lines.append(f"  - {{id: {quoted(shared.id)}, prompt: {quoted(shared.prompt)}, corpora: [{corpora}]}}")
    with atomic_file(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
