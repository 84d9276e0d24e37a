"""The acceptance rule, as a user asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from lattices.errors import RescoreError
from rescore.options import Spec

if TYPE_CHECKING:
    from rescore.acceptance.rules import Rule

GREEDY = Spec("greedy")


@dataclass(frozen=True)
class Acceptance:
    """How tokens come about: greedily, drawn, or by a lossy rule."""

    acceptance: Annotated[
        Spec,
        "What is kept of drafts. greedy: the base's own output. Lossy, with another output: typical:eps=0.09,alpha=0.3 "
        "(Medusa's), top-k:2, distance:eps=2, min-block:2 (Stern et al.).",
    ] = GREEDY
    temperature: Annotated[float, "Draw the output at this temperature, exactly as without drafts; 0: greedily."] = 0.0
    top_k: Annotated[int, "Draw among so many of the likeliest tokens; 0: all."] = 0
    top_p: Annotated[float, "Draw among the likeliest tokens that together have this share; 1: all."] = 1.0
    sampling_seed: Annotated[int, "Seed of what is drawn."] = 0

    def rule(self) -> Rule:
        """The rule. Raises `RescoreError` for one that makes no sense."""
        from rescore.acceptance.rules import load_rule
        from rescore.acceptance.sampling import Sampling

        if self.temperature != 0:
            if self.acceptance != GREEDY:
                raise RescoreError(f"--acceptance {self.acceptance} draws nothing; drop it, or --temperature")
            return Sampling(self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.sampling_seed)
        for option, given in (("top-k", self.top_k != 0), ("top-p", self.top_p != 1.0)):
            if given:
                raise RescoreError(f"--{option} is for sampling; drop it, or add --temperature")
        return load_rule(self.acceptance)
