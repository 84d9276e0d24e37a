"""Trees of ranks, `medusa_choices` in [C] (Medusa, Cai et al. 2024): which entries of the heads' slots are drafted.

A choice is a path of ranks from 0: `(0, 2)` is the likeliest token of head 2 and then the third of head 3 (head 1, the
base's own token, is the root, which no choice names). A file is a JSON list of such paths, as Medusa's own lists are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from lattices.errors import InvalidDataError, UnknownNameError, unreadable
from lattices.joined.lookup import NONE
from lattices.paths import user_path

PUBLISHED = Path(__file__).parent / "published.json"
MOST_NODES = 1 << 16
DEEPEST, WIDEST = 64, 1 << 20
Path_ = tuple[int, ...]


@dataclass(frozen=True)
class Choices:
    """A tree of ranks: its nodes but for the root, each the path to it, as they were given (of grown lists in the order
    of their growth). Every path's parent is among them."""

    paths: tuple[Path_, ...]

    @property
    def nodes(self) -> int:
        """Nodes, the root included."""
        return 1 + len(self.paths)

    @property
    def depth(self) -> int:
        """Tokens of the longest path, the root not counted."""
        return max(map(len, self.paths), default=0)

    @property
    def ranks(self) -> int:
        """Entries of a slot that it takes, at most: its highest rank and one."""
        return 1 + max((rank for path in self.paths for rank in path), default=0)

    @cached_property
    def leaves(self) -> tuple[Path_, ...]:
        """The paths that no other goes on from, by their ranks: that of the likeliest tokens first. Without any path
        the root is the leaf."""
        parents = {path[:-1] for path in self.paths}
        return tuple(sorted(path for path in self.paths if path not in parents)) or ((),)

    def of_depth(self, depth: int) -> Choices:
        """What is left of it for so many heads besides the first: longer paths are dropped."""
        return self if depth >= self.depth else Choices(tuple(path for path in self.paths if len(path) <= depth))

    @cached_property
    def layout(self) -> Layout:
        """The tree as arrays."""
        in_order = [(), *sorted(self.paths, key=lambda path: (len(path), path))]
        number = {path: place for place, path in enumerate(in_order)}
        leaves, depth = self.leaves, self.depth
        return Layout(
            parents=np.array([number[path[:-1]] if path else NONE for path in in_order], dtype=np.int32),
            depths=np.array([len(path) for path in in_order], dtype=np.int32),
            ranks=np.array([path[-1] if path else 0 for path in in_order], dtype=np.int32),
            leaves=np.array([number[path] for path in leaves], dtype=np.int32),
            paths=np.array([[*path, *[NONE] * (depth - len(path))] for path in leaves], dtype=np.int32).reshape(
                len(leaves), depth
            ),
        )


@dataclass(frozen=True, eq=False)
class Layout:
    """m nodes, the root first, then by depth and ranks (Medusa's own order), so that parents stand before children.

    parents, depths int32 `[m]` (`NONE` and 0 of the root); ranks int32 `[m]` of the last token (0 of the root).
    leaves int32 `[l]`: the nodes that are leaves, in the order of `Choices.leaves`; paths int32 `[l, depth]`: the ranks
    on the way to each, `NONE` after its end.
    """

    parents: np.ndarray
    depths: np.ndarray
    ranks: np.ndarray
    leaves: np.ndarray
    paths: np.ndarray


@cache
def published() -> dict[str, Choices]:
    """The lists that Medusa publishes, by name (`published.json` says where they are from)."""
    document = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return {
        name: checked([[int(rank) for rank in word] for word in words.split()], name)
        for name, words in document["choices"].items()
    }


def load_choices(given: str) -> Choices:
    """A published list by its name, or the file of one.

    Raises `RescoreError` for a name that is none and no file, and `InvalidDataError` as `checked`.
    """
    if given in published():
        return published()[given]
    path = user_path(given, "medusa-tree:")
    if not path.exists() and "/" not in given and not path.suffix:
        raise UnknownNameError("list of choices", given, published(), "or give a file: a JSON list of paths")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise InvalidDataError(f"{path} is no JSON; give a list of paths of ranks, like [[0], [1], [0, 0]]") from error
    return checked(document, str(path))


def checked(document: object, where: str) -> Choices:
    """The tree that a list of paths describes, in any order; `where` names it in errors.

    Raises `InvalidDataError` for anything else than paths of ranks, a path that is there twice, one whose parent is
    missing, and for none or too many of them.
    """
    if not isinstance(document, list) or not all(isinstance(path, list) and path for path in document):
        raise InvalidDataError(f"{where}: give a list of paths of ranks, like [[0], [1], [0, 0]]")
    if not 1 <= len(document) < MOST_NODES:
        raise InvalidDataError(f"{where} has {len(document):,} choices; a tree has 1 to {MOST_NODES - 1:,}")
    seen: dict[Path_, None] = {}
    for path in document:
        if any(type(rank) is not int or not 0 <= rank < WIDEST for rank in path) or len(path) > DEEPEST:
            raise InvalidDataError(
                f"{where}: {json.dumps(path)[:80]} is no choice; a path has up to {DEEPEST} ranks, whole numbers from 0"
            )
        if tuple(path) in seen:
            raise InvalidDataError(f"{where}: the choice {path} is there twice; keep one")
        seen[tuple(path)] = None
    for path in seen:
        if len(path) > 1 and path[:-1] not in seen:
            raise InvalidDataError(f"{where}: the choice {list(path)} lacks its parent {list(path[:-1])}; add it")
    return Choices(tuple(seen))
