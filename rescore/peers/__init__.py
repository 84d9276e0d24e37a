"""Peers: other libraries' own decoders, which live evaluation measures beside ours, in turns on the same prompts.

A peer has the model as its library loads it, and its library's settings; nothing of this project's (weights laid out
for few rows, attention, cache, drafters). Peers go by their spec (`rescore.specs`); others register in the group
`rescore.peers`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rescore.specs import Registry

if TYPE_CHECKING:
    from lm.base.model import BaseLM
    from rescore.decoding import Decoded

Decoder = Callable[[Sequence[int], int], "Decoded"]  # tokens of a prompt, and the most an output may have


class Peer(ABC):
    """A decoder of another library, greedy like ours.

    name: its spec, which results call it by.
    identity: library and version.
    longest: tokens that one of its steps may accept, the one that the step before had chosen included.
    """

    name: str = ""
    identity: str = ""
    longest: int = 1

    @abstractmethod
    def load(self, base: BaseLM, shared: dict[object, Any]) -> Decoder:
        """What decodes with the model of `base`, the prompt's time apart (`Seconds.prefill`); several peers find in
        `shared` what one of them has loaded. Raises `RescoreError` where it can't be had."""


PEERS: Registry[Peer] = Registry(
    "peer", "--peer", Peer, "rescore.peers", __name__, {"transformers": "transformers_generate:TransformersGenerate"}
)


def load_peer(spec: str) -> Peer:
    """The peer of a spec. Raises as `Registry.load_named`."""
    return PEERS.load_named(spec)
