"""Small traces and records written out by hand for the tests of the analyses."""

from __future__ import annotations

import numpy as np

from lattices.lattice import Lattice
from rescore.tracing import Trace, TracedExample, TraceHeader

# Probabilities of the three entries of every slot: 0.5, 0.3, 0.1.
LOGPS = np.log(np.array([0.5, 0.3, 0.1])).astype(np.float32)


def example(name: str, output: list[int], slots: list[list[list[int]]], entropies: list[float]) -> TracedExample:
    """`slots[i][j]`: the token ids of slot j at position i, best first; `entropies`: of each head, at all positions."""
    ids = np.array(slots, dtype=np.int32)  # [t, h, k]
    t, h, k = ids.shape
    return TracedExample(
        id=name, prompt="", references=(), output=None, prompt_ids=np.array([0], np.int32),
        output_ids=np.array(output, np.int32), lattice=Lattice(ids, np.broadcast_to(LOGPS[:k], ids.shape).copy()),
        entropies=np.broadcast_to(np.float32(entropies), (t, h)).copy(), margins=np.ones(t, np.float32),
    )  # fmt: skip


def small_trace() -> Trace:
    """One example, h = 3, K = 3, output 1 2 3 4 5.

    position  target   slot 1  slot 2   slot 3    unrescored  ranks    accepted: arg-max  k = 2  k = 3
    0         1 2 3    1 ..    1 2 8    1 9 3     1 1 1       0 1 2    1                  2      3
    1         2 3 4    2 ..    3 8 9    3 4 8     2 3 3       0 0 1    2                  3      3
    2         3 4 5    3 ..    8 9 4    5 8 9     3 8 5       0 2 0    1                  1      3
    3         4 5 -    4 ..    5 8 9    5 8 9     4 5 5       0 0 -    2                  2      2
    4         5 - -    5 ..    5 8 9    8 9 7     5 5 8       0 - -    1                  1      1

    Decodes: arg-max 0 (1) 1 (2) 3 (2): 3 steps; k = 2: 0 (2) 2 (1) 3 (2): 3 steps; k = 3: 0 (3) 3 (2): 2 steps.
    """
    slots = [
        [[1, 8, 9], [1, 2, 8], [1, 9, 3]],
        [[2, 8, 9], [3, 8, 9], [3, 4, 8]],
        [[3, 8, 9], [8, 9, 4], [5, 8, 9]],
        [[4, 8, 9], [5, 8, 9], [5, 8, 9]],
        [[5, 8, 9], [5, 8, 9], [8, 9, 7]],
    ]
    return trace_of([example("a", [1, 2, 3, 4, 5], slots, [0.25, 1.0, 0.75])])


def trace_of(examples: list[TracedExample], *, h: int = 3, k: int = 3) -> Trace:
    """A trace of these examples over ten tokens."""
    return Trace(TraceHeader(h, k, 10, [], {"task": "hand"}, []), tuple(examples))
