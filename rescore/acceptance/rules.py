"""What an acceptance rule is: drafts and what the base LM says after each of their tokens in, a verdict out.

`Greedy` is the rule of every number unless another is named.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from lattices.errors import RescoreError
from rescore.specs import Registry

if TYPE_CHECKING:
    import torch

SAMPLE = "add --temperature (in transformers: do_sample=True)"  # what to do about drafts that are drawn

# Behind the label of a run that is not greedy: of what kind, and its rule.
MARK = re.compile(r" \[(lossy|sampled): ([^\[\]]*)\]$")


def marked(label: str, acceptance: str, *, lossy: bool, sampled: bool) -> str:
    """The label of a run with the rule that its output came about by, where that is not greedy acceptance."""
    kind = "lossy" if lossy else "sampled" if sampled else ""
    return f"{label} [{kind}: {acceptance}]" if kind else label


def unmarked(label: str) -> str:
    """The same without the rule."""
    return MARK.sub("", label)


def mark_of(label: str) -> str:
    """The rule that a label ends with, as ` [lossy: top-k:2]`; empty for greedy acceptance."""
    found = MARK.search(label)
    return found[0] if found else ""


def kind_of(label: str) -> str:
    """Of what kind the rule is that a label ends with: `lossy` or `sampled`; `greedy` where there is none."""
    found = MARK.search(label)
    return found[1] if found else "greedy"


def is_lossy(label: str) -> bool:
    """Whether a label says that the outputs are not the base's."""
    return kind_of(label) == "lossy"


class Likeliest(Protocol):
    """What the base says after every draft token, as far as its likeliest tokens tell.

    choices int `[p, l]`: the likeliest one. best: ids `[p, l, k]` of the k likeliest, equal ones by lowest id; -1 where
    that is not known.
    """

    @property
    def choices(self) -> np.ndarray: ...
    def best(self, k: int) -> np.ndarray: ...


class Said(Likeliest, Protocol):
    """What a verify call gave.

    logits `[b, m, vocab]` after every token read; rows, columns int `[p, l]`: where in them each draft token stands.
    """

    @property
    def logits(self) -> torch.Tensor: ...
    @property
    def rows(self) -> np.ndarray: ...
    @property
    def columns(self) -> np.ndarray: ...


class Drawn(NamedTuple):
    """The distributions that the tokens of a step's drafts were drawn from, slot by slot.

    token_ids int `[l, k]`, probs float64 `[l, k]`, each row summing to 1 (the first slot is not drawn). The children of
    a node were drawn from its slot's without replacement, in the order of the drafts.
    """

    token_ids: np.ndarray
    probs: np.ndarray


class Verdict(NamedTuple):
    """row: of the winning draft; n: its tokens that are accepted, 1 <= n; choice: the token that comes after them."""

    row: int
    n: int
    choice: int


class RandomSource:
    """Answers the two questions that sampled decoding asks, whether a token is accepted and which one is drawn, by
    numbers that follow from `seed`: nothing else there is random."""

    def __init__(self, *seed: int) -> None:
        self._numbers = np.random.default_rng(seed)

    def accepts(self, p: float, q: float = 1.0) -> bool:
        """True with probability min(1, p / q); q is above 0."""
        # Below, never equal: a random number may be 0, and what has no probability must not come.
        return bool(self._numbers.random() * q < p)

    def draw(self, probs: np.ndarray) -> int:
        """A place in probs `[n]` with the probability that stands there; of any positive sum."""
        sums = np.cumsum(probs)
        place = int(np.searchsorted(sums, self._numbers.random() * sums[-1], side="right"))
        return place if place < len(probs) else int(np.flatnonzero(probs)[-1])  # where the product was rounded up


class Rule(ABC):
    """Decides what of the drafts is kept, and the token after it.

    name: its spec. lossy: its output is not the base's. random: it draws, by its `random_source`, see `started`.
    """

    name: str = ""
    lossy: bool = False
    random: bool = False
    random_source: RandomSource | None = None

    def marked(self, label: str) -> str:
        """The label of a run whose output comes about by this rule: wherever its numbers go, that goes with them."""
        return marked(label, self.name, lossy=self.lossy, sampled=self.random)

    def started(self, *key: object) -> Rule:
        """The rule for one output; a random one draws by its seed and this key from the beginning."""
        return self

    def first(self, logits: torch.Tensor) -> int:
        """The token after the prompt, of logits `[vocab]`."""
        return int(logits.argmax())

    @abstractmethod
    def judge(
        self,
        drafts: np.ndarray,
        said: Said,
        remaining: int,
        eos_token_ids: Collection[int],
        drawn: Drawn | None = None,
    ) -> Verdict:
        """The verdict on drafts int `[p, l]` that begin with the same token, which is accepted already; -1 stands after
        the end of a shorter one.

        remaining: tokens that the output may still grow by, at least as many as the drafts have. Nothing follows
        end-of-text. drawn: None where nothing was drawn.
        """


class Greedy(Rule):
    """The greedy rule, for live decoding and for replay: the output is greedy decoding's.

    The first token of a draft is the base LM's own choice from the call before, so it is always accepted ([B] section
    4). A later token is accepted while it equals what the base chooses after the tokens before it.
    """

    name = "greedy"

    def judge(
        self,
        drafts: np.ndarray,
        said: Said,
        remaining: int,
        eos_token_ids: Collection[int],
        drawn: Drawn | None = None,
    ) -> Verdict:
        rows, lengths = accept(drafts[None], said.choices[None], np.array([remaining]), eos_token_ids)
        row, n = int(rows[0]), int(lengths[0])
        return Verdict(row, n, int(said.choices[row, n - 1]))


def accept(
    drafts: np.ndarray, choices: np.ndarray, remaining: np.ndarray, eos_token_ids: Iterable[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The winning draft and its accepted length n, 1 <= n <= h, for each of b blocks.

    drafts int `[b, p, h]`, -1 after the end of a shorter one; choices int `[b, p, h]`: the base's greedy token after
    draft token j and all before it (anything where the tokens before are wrong); remaining int `[b]`: tokens that the
    output may still grow by. Nothing follows end-of-text. Returns `[b]` and `[b]`; of equal lengths the first wins.
    """
    ended = np.isin(drafts[..., :-1], list(eos_token_ids))
    match = (drafts[..., 1:] == choices[..., :-1]) & (drafts[..., 1:] >= 0) & ~ended
    lengths = 1 + np.cumprod(match, axis=-1).sum(axis=-1)  # [b, p]
    lengths = np.minimum(lengths, remaining[:, None])
    rows = lengths.argmax(axis=-1)
    return rows, np.take_along_axis(lengths, rows[:, None], axis=-1)[:, 0]


def first_difference(output_ids: Iterable[int], reference_ids: Iterable[int]) -> int | None:
    """Position of the first token that differs (or is missing on one side); None if both are the same."""
    pairs = enumerate(zip_longest(output_ids, reference_ids))
    return next((place for place, (a, b) in pairs if a != b), None)


RULES: Registry[Rule] = Registry(
    "acceptance rule", "--acceptance", Rule, "rescore.acceptance", __name__.rpartition(".")[0],
    {
        "greedy": Greedy,
        "typical": "lossy:Typical",
        "top-k": "lossy:TopK",
        "distance": "lossy:Distance",
        "min-block": "lossy:MinBlock",
    },
)  # fmt: skip


def check_rule(rule: Rule, label: str, *, draws: bool, lattices_only: bool) -> None:
    """Raises `RescoreError` for a run that a rule can't judge.

    draws: its rescorer draws its drafts; lattices_only: of the slots of one drafter.
    """
    if draws and not rule.random:
        raise RescoreError(f"{label} draws its drafts, which is for sampled output only; {SAMPLE}")
    if draws and not lattices_only:
        raise RescoreError(
            f"{label} draws from the slots of one drafter; give one that has slots (--drafter heads), or several to a "
            "rescorer that does not draw (--rescorer joint)"
        )


def load_rule(spec: str) -> Rule:
    """The rule of a spec. Raises as `Registry.load_named`."""
    return RULES.load_named(spec)
