"""Rescorers by their spec (`rescore.specs`): what chooses drafts among what drafters propose.

`base` says what a rescorer is; a new one is a module of its own with an entry in `RESCORERS`. `joint` has its weights'
files, fit and trees by cost in the modules behind its name, `neural_state` is what neural rescorers keep of a text, and
`trees` draft whole trees of a lattice.

Others register in the group `rescore.rescorers` (docs/rescorers.md).
"""

from __future__ import annotations

from rescore.rescorers.base import Context, Rescorer, Target
from rescore.specs import Registry

__all__ = ["RESCORERS", "Context", "Rescorer", "Target", "load_rescorer"]

JOINT = "joint"
TREES = ("medusa-tree", "eagle2-tree")
WEIGHT = "alpha"  # the key that every rescorer with a weight takes
RESCORERS: Registry[Rescorer] = Registry(
    "rescorer", "--rescorer", Rescorer, "rescore.rescorers", __name__,
    {
        "none": "unrescored:Unrescored",
        "draws": "unrescored:Draws",
        "oracle": "oracle:Oracle",
        "ngram": "ngram:Ngram",
        "context-ngram": "context_ngram:ContextNgram",
        JOINT: "joint:Joint",
        "medusa-tree": "trees.rescorers:MedusaTree",
        "eagle2-tree": "trees.rescorers:Eagle2Tree",
        "learned-bigram": "learned_bigram:LearnedBigram",
        "neural": "neural:Neural",
        "ngram-neural": "ngram_neural:NgramNeural",
        **dict.fromkeys(("neural-32m", "neural-61m", "neural-94m"), "neural:Neural"),
    },
    WEIGHT,
)  # fmt: skip


def load_rescorer(spec: str) -> Rescorer:
    """The rescorer of a spec. Raises as `Registry.load`."""
    return RESCORERS.load(spec)
