"""Drafters by their spec (`rescore.specs`): what proposes tokens, and what a rescorer then chooses among.

`base` says what a drafter is, of lattices or of text; a new one is a module of its own (`lookup`, `traced`,
`draft_model` ...) with an entry in `DRAFTERS`. `asked` asks one and checks its answer, `proposals` joins those of
several, `drafting` has a rescorer choose among them. `recorded` keeps what drafters with a model of their own propose
along a trace, `provenance` says where accepted tokens came from.

Others register in the group `rescore.drafters` (docs/drafters.md).
"""

from __future__ import annotations

from rescore.drafters.base import Drafter, LatticeDrafter, TextDrafter
from rescore.specs import Registry

__all__ = ["DRAFTERS", "HEADS", "Drafter", "LatticeDrafter", "TextDrafter", "load_drafter"]

HEADS = "heads"
DRAFTERS: Registry[Drafter] = Registry(
    "drafter", "--drafter", Drafter, "rescore.drafters", __name__,
    {
        HEADS: "heads:Heads",
        "lookup": "lookup:PromptLookup",
        "corpus-lookup": "corpus_lookup:CorpusLookup",
        "draft-model": "draft_model:DraftModel",
        "eagle": "draft_layers:Eagle",
        "hydra": "draft_layers:Hydra",
        "mtp": "draft_layers:Mtp",
        "trace": "traced:Traced",
    },
)  # fmt: skip


def load_drafter(spec: str) -> Drafter:
    """The drafter of a spec. Raises as `Registry.load_named`."""
    return DRAFTERS.load_named(spec)
