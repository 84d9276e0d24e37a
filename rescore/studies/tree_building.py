"""Makes a list of choices for `medusa-tree` from traces: which tree of ranks would have been accepted longest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from lattices.errors import RescoreError
from lm.files import write_json
from rescore.rescorers.trees.choices import MOST_NODES, Choices, published
from rescore.rescorers.trees.growth import Frequencies, grow, hits
from rescore.table import NUMBER, PLAIN, Column, Table
from rescore.tasks.groups import held_out as held_out_places
from rescore.tracing import read_trace

PEER = "mc_sim_7b_63"  # what the trees are compared with


@dataclass(frozen=True)
class TreeFacts:
    """A tree, and its expected accepted length at every position of the examples that were counted, and of the others
    (None: there are none)."""

    name: str
    nodes: int
    leaves: int
    depth: int
    expected: float
    expected_elsewhere: float | None


@dataclass(frozen=True)
class BuiltTree:
    """A list that was written, by which frequencies, and the trees it can be compared with."""

    path: str
    by: str
    choices: tuple[tuple[int, ...], ...]
    trees: tuple[TreeFacts, ...]
    examples: int
    positions: int
    elsewhere: int  # positions of the other examples


def build_tree(
    trace: Annotated[Sequence[Path], "Trace folder to count on; several count together."],
    out: Annotated[Path, "File for the list, JSON as Medusa's own: --rescorer medusa-tree:FILE."],
    *,
    nodes: Annotated[int, "Nodes of the tree, the base's own token included."] = 64,
    by: Annotated[
        Literal["joint", "product"],
        "How often all of a path was right, or (Medusa's way) the product of the heads' accuracies.",
    ] = "joint",
    held_out: Annotated[
        int | None, "Examples of each trace to count on, of the last sources; at most half of them. Default: all."
    ] = None,
    depth: Annotated[int | None, "Heads besides the first that it uses. Default: all of the trace."] = None,
    ranks: Annotated[int, "Entries of a slot that it may take."] = 10,
) -> BuiltTree:
    """Writes the list to `out`. Positions are all that the traces hold.

    Raises `RescoreError` for what the traces lack and sizes that make no sense.
    """
    if not trace:
        raise RescoreError("give a trace to count on (--trace; rescore trace records one)")
    if not 2 <= nodes <= MOST_NODES or ranks < 1 or (depth is not None and depth < 1):
        raise RescoreError(f"give --nodes of 2 to {MOST_NODES:,}, and --depth and --ranks of 1 or more")
    counted: list[np.ndarray] = []
    others: list[np.ndarray] = []
    examples = 0
    for folder in trace:
        loaded = read_trace(folder)
        if loaded.header.h < 2 or loaded.header.h - 1 < (depth or 1):
            raise RescoreError(f"{folder} has {loaded.header.h - 1} heads besides the first; give a smaller --depth")
        if loaded.header.k < ranks:
            raise RescoreError(f"{folder} holds {loaded.header.k} entries of a slot; give --ranks {loaded.header.k}")
        places = set(range(len(loaded.examples)))
        if held_out is not None:
            places = set(held_out_places([example.group for example in loaded.examples], held_out))
        examples += len(places)
        for place, example in enumerate(loaded.examples):
            (counted if place in places else others).append(hits(example.lattice.token_ids, example.output_ids, ranks))
    heads = depth or min(found.shape[1] for found in counted)
    here, there = (Frequencies(_joined(found, heads), ranks) for found in (counted, others))
    grown = {
        name: grow(value, count=nodes - 1, depth=heads, ranks=ranks)
        for name, value in (("joint", here.joint), ("product", here.product))
    }
    write_json(out, grown[by])
    trees = {**{name: Choices(paths) for name, paths in grown.items()}, PEER: published()[PEER].of_depth(heads)}
    return BuiltTree(
        path=str(out), by=by, choices=grown[by], examples=examples, positions=here.positions,
        elsewhere=there.positions,
        trees=tuple(
            TreeFacts(
                name, tree.nodes, len(tree.leaves), tree.depth, here.expected(tree.paths),
                there.expected(tree.paths) if there.positions else None,
            )
            for name, tree in trees.items()
        ),
    )  # fmt: skip


def _joined(found: Sequence[np.ndarray], heads: int) -> np.ndarray:
    return np.concatenate([np.zeros((0, heads), dtype=np.int32), *(each[:, :heads] for each in found)])


def tree_table(built: BuiltTree) -> Table:
    """The tree that was written beside those that it can be compared with."""
    columns = [Column("tree"), Column("nodes", PLAIN), Column("leaves", PLAIN), Column("depth", PLAIN)]
    columns += [Column("expected", NUMBER), Column("elsewhere", NUMBER)]
    rows = [[t.name, t.nodes, t.leaves, t.depth, t.expected, t.expected_elsewhere] for t in built.trees]
    note = (
        f"expected = accepted length at every position of the {built.examples} examples that were counted "
        f"({built.positions:,} positions), elsewhere = of the others ({built.elsewhere:,}); * written to {built.path}: "
        f"--rescorer medusa-tree:{built.path}"
    )
    return Table(columns, rows, note=note, best=[([t.name for t in built.trees].index(built.by), "tree")])
