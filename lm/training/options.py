"""How heads, rescorers and learned bigrams are trained: the options of each, and what they are trained on.

The help on the fields is that of the command line (`lm.options`). Imports nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

from lattices.errors import RescoreError, UnknownNameError
from lm.options import Base, Device, Precision, TopK

FROZEN, LORA, FULL = "none", "lora", "full"
Architecture = Literal["feed_forward", "shared", "medusa", "sequential"]
Tune = Literal["none", "lora", "full"]
Stored = Literal["float16", "int8"]
Init = Literal["base", "scratch"]
INNER_SIZE = 560  # of the architectures with a hidden layer
LORA_RANK = 16
BASE_LEARNING_RATES = {LORA: 5e-4, FULL: 3e-5}

Vocabulary = Annotated[int | None, "Most frequent tokens in the loss; 0: all."]
Steps = Annotated[int, "Training steps, at most."]
LearningRate = Annotated[float, "Peak learning rate (AdamW, cosine)."]
EvaluateEvery = Annotated[int, "Steps between checkpoints, each measured on held-out text."]
MicroBatch = Annotated[int, "Tokens that a base or rescorer which learns reads at a time; fewer need less memory."]


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """What is trained on, with the base LM that reads it."""

    corpus: Annotated[Sequence[Path], "Folder of generate-corpus, .jsonl or .csv of pairs, or text."]
    base: Base = "smollm2-135m"
    max_tokens: Annotated[int | None, "Tokens taken of each text corpus, at most."] = None
    cache_gb: Annotated[float, "Limit of a text corpus's cached states, in 10^9 bytes."] = 20.0
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a training goes on and how fast; the options of every training begin with it.

    `LEAST`: the smallest value of each option that has one. None stands for no limit.
    """

    steps: Steps
    learning_rate: LearningRate  # the highest: after `warmup` steps, before the cosine
    warmup: int = 50
    weight_decay: float = 0.01
    held_out: float = 0.03  # share of the segments that is measured on
    evaluate_every: int  # steps
    seed: Annotated[int, "Seed of everything random."] = 0

    LEAST: ClassVar[dict[str, int]] = {}

    def check(self) -> None:
        """Raises `RescoreError` for the first option that is out of its range."""
        schedule = {"steps": 1, "warmup": 0, "evaluate_every": 1, "seed": 0, "weight_decay": 0}
        for name, least in {**self.LEAST, **schedule}.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise RescoreError(f"{name} = {value}; it must be at least {least}")
        if not 0 < self.held_out < 1:
            raise RescoreError(f"held_out = {self.held_out}; it is a share, above 0 and below 1")
        for name in ("learning_rate", "base_learning_rate"):
            rate = getattr(self, name, None)
            if rate is not None and not 0 < rate <= 1:
                raise RescoreError(f"{name} = {rate}; it must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class TextOptions(Schedule):
    """Options of the loss and of how it is computed."""

    vocabulary: Vocabulary  # the most frequent target tokens
    negatives: int  # other tokens, drawn per step
    soft: Annotated[float, "Share of the base's own distribution in the target, 0 to 1."] = 0.5
    precision: Precision = "auto"  # of the vocabulary products and of forwards that learn

    LEAST: ClassVar = {"positions": 1, "micro_batch": 1, "vocabulary": 1, "negatives": 0}

    def check(self) -> None:
        super().check()
        if not 0 <= self.soft <= 1:
            raise RescoreError(f"soft = {self.soft}; it is a share, from 0 to 1")
        _check("precision", self.precision, get_args(get_args(Precision)[0]))


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(TextOptions):
    """How heads are trained."""

    # The heads (`lm.heads.nets`).
    h: Annotated[int, "Block length: h - 1 heads are trained."] = 9
    architecture: Annotated[Architecture, "Of the heads; shared: one hidden layer for all; sequential: Hydra-like."] = (
        "feed_forward"
    )
    inner_size: Annotated[int | None, f"Width of the hidden layer; {INNER_SIZE} by default, not for medusa."] = None
    token_size: Annotated[int, "Width in which heads see drafted tokens; 0: not at all."] = 128
    blocks: Annotated[int, "Residual blocks of a medusa head."] = 1
    stored: Annotated[Stored, "How the heads are stored; int8 is half the size."] = "float16"
    # A step.
    steps: Steps = 2000
    positions: Annotated[int, "Positions per step, of whole segments."] = 2048
    micro_batch: MicroBatch = 4096
    # Drawn with odds 1/i for head i. None: all ([A]); 1: each as likely ([B])
    heads_per_step: Annotated[int | None, "Heads in a step's loss, drawn anew each time; 0: all."] = 4
    head_weights: Annotated[
        tuple[float, ...] | None, "Weights of heads 2 to h in the loss, like 1,0.8,0.6; equal by default."
    ] = None
    vocabulary: Vocabulary = 8192
    negatives: int = 1024
    learning_rate: LearningRate = 1e-3
    warmup: int = 100
    evaluate_every: EvaluateEvery = 200
    # The base.
    tune: Annotated[Tune, "Whether the base is frozen, or fine-tuned with the heads."] = "none"
    lora_rank: Annotated[int | None, f"Rank of the base's changes (tune lora); {LORA_RANK} by default."] = None
    tuned_layers: Annotated[int | None, "Only so many of a tuned base's last layers: cheaper steps. Default: all."] = (
        None
    )
    base_learning_rate: Annotated[
        float | None, "Peak learning rate of a tuned base; default 5e-4 for lora, 3e-5 for full."
    ] = None
    gradient_checkpointing: Annotated[bool, "Less memory for a tuned base, more time."] = False

    LEAST: ClassVar = TextOptions.LEAST | {
        "h": 2, "inner_size": 1, "token_size": 0, "blocks": 1, "heads_per_step": 1, "lora_rank": 1, "tuned_layers": 1
    }  # fmt: skip

    def check(self) -> None:
        super().check()
        _check("block head architecture", self.architecture, get_args(Architecture))
        if self.architecture == "sequential" and self.token_size == 0:
            raise RescoreError("token_size = 0; sequential heads see drafted tokens and need a width for them")
        if self.architecture == "medusa" and self.inner_size is not None:
            raise RescoreError("medusa heads are as wide as the states; inner_size is not for them, blocks is")
        if self.architecture != "medusa" and self.blocks != 1:
            raise RescoreError(f"blocks = {self.blocks}; only medusa heads have residual blocks")
        if self.head_weights is not None:
            if len(self.head_weights) != self.h - 1:
                raise RescoreError(
                    f"head_weights has {len(self.head_weights)} weights; heads 2 to {self.h} need one each"
                )
            if not all(0 <= weight < math.inf for weight in self.head_weights) or not any(self.head_weights):
                raise RescoreError(f"head_weights = {self.head_weights}; weights are 0 or more, one of them above 0")
        _check("way to tune the base", self.tune, get_args(Tune))
        for name in ("gradient_checkpointing", "base_learning_rate", "tuned_layers"):
            if self.tune == FROZEN and getattr(self, name):
                raise RescoreError(f"{name} is for a tuned base (tune: lora or full)")
        if self.tune != LORA and self.lora_rank is not None:
            raise RescoreError(f"lora_rank = {self.lora_rank} is for a base tuned by LoRA (tune: lora)")
        _check("precision of stored heads", self.stored, get_args(Stored))


@dataclass(frozen=True, kw_only=True)
class RescorerOptions(TextOptions):
    """How a rescorer is trained."""

    size: Annotated[str, "neural-32m, neural-61m or neural-94m."] = "neural-61m"
    init: Annotated[Init, "base: layers of the base, of which the last ones are trained; scratch: none."] = "base"
    layers: Annotated[
        tuple[int, ...] | None,
        "The base's layers, from 0, like 0,1,28,29 (init base). Default: its first ones.",
    ] = None
    tuned_layers: Annotated[int, "Last layers that are trained in full, at most all (init base)."] = 3
    lora_rank: Annotated[int, "Rank of the changes of the layers below these (init base); 0: they stay."] = 0
    lattice: Annotated[
        float, "Share of the loss that is over the choice among a head's best 16 tokens, by both scores, 0 to 1."
    ] = 0.0
    steps: Steps = 1000
    positions: Annotated[int, "Tokens per step, prompts and padding included."] = 4096
    micro_batch: MicroBatch = 4096
    vocabulary: Vocabulary = 16384
    negatives: int = 2048
    learning_rate: LearningRate = 5e-4
    evaluate_every: EvaluateEvery = 100
    # The best weights are the result.
    patience: Annotated[int, "Checkpoints without a better held-out loss before it stops."] = 5

    LEAST: ClassVar = TextOptions.LEAST | {"tuned_layers": 0, "lora_rank": 0, "patience": 1}

    def check(self) -> None:
        from lm.neural.model import are_layers, named_size

        named_size(self.size)
        _check("init", self.init, get_args(Init))
        super().check()
        if not 0 <= self.lattice <= 1:
            raise RescoreError(f"lattice = {self.lattice}; it is a share, from 0 to 1")
        for name in ("lora_rank", "layers"):
            if self.init != "base" and (value := getattr(self, name)):
                raise RescoreError(f"{name} = {value} is for one that begins as the base's layers (init: base)")
        count = named_size(self.size).base_layers
        if self.lora_rank and self.tuned_layers >= count:
            raise RescoreError(
                f"lora_rank = {self.lora_rank} is for layers below those that are trained in full, and "
                f"{self.size} has {count} in all; lower tuned_layers"
            )
        if self.layers is not None and (len(self.layers) != count or not are_layers(self.layers)):
            raise RescoreError(
                f"layers = {','.join(map(str, self.layers))}; {self.size} takes {count} layers, each once, in "
                "rising order"
            )

    def chosen_layers(self) -> tuple[int, ...]:
        """The base's layers that it begins with, from 0."""
        from lm.neural.model import named_size

        return self.layers or tuple(range(named_size(self.size).base_layers))


@dataclass(frozen=True, kw_only=True)
class BigramOptions(Schedule):
    """How a bigram is trained."""

    rank: Annotated[int, "Rank of the pair scores."] = 128
    k: TopK = 16
    rows: Annotated[int, "Lattices taken of each corpus."] = 30000
    batch: Annotated[int, "Lattices per step."] = 512
    steps: Steps = 1500
    learning_rate: LearningRate = 2e-3
    weight_decay: float = 0.05
    held_out: float = 0.05
    evaluate_every: int = 250

    LEAST: ClassVar = {"rank": 1, "k": 2, "rows": 2, "batch": 1}


def _check(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UnknownNameError(what, value, known)
