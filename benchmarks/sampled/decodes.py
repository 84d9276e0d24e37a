"""Decodes of the tiny model, and how far their outputs are from its law.

Each decode is `rescore.decoding.decode` with the real models. What these say and propose follows from what was accepted
before, so the loop itself runs once for every way that a decode can go up to a question to its rule, or to what draws
its drafts; the answers are drawn anew for every decode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from transformers import LlamaForCausalLM

from lattices.lattice import Lattice
from rescore.acceptance import Rule, Verdict
from rescore.acceptance.rules import Drawn, RandomSource
from rescore.acceptance.sampling import Sampling, try_candidates
from rescore.decoding import Decoded, decode
from rescore.generation.live import Generator
from rescore.rescorers import Context
from rescore.rescorers.unrescored import Draws
from sampled.models import LETTERS, PROMPT, Tiny, Way, costs_of


class Question(Protocol):
    """What a decode asks its rule; `place`: of the decode after the answer, from that before it."""

    def answer(self, rule: Sampling) -> Any: ...
    def place(self, before: Place, answer: Any) -> Place: ...


@dataclass(frozen=True)
class Place:
    """How far a decode is: its tokens, the chosen one included, its steps, and the drafts where these are drawn."""

    tokens: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    drafts: bytes = b""


@dataclass(frozen=True)
class First:
    """Asks for the token after the prompt."""

    logits: torch.Tensor

    def answer(self, rule: Sampling) -> int:
        return rule.first(self.logits)

    def place(self, before: Place, answer: int) -> Place:
        return Place((answer,))


@dataclass(frozen=True)
class Drawing:
    """Asks for drafts that are drawn; read: how many of their tokens the output has room for."""

    rescorer: Draws
    lattices: Lattice
    p: int
    read: int

    def answer(self, rule: Sampling) -> tuple[np.ndarray, Drawn | None]:
        context = Context((), random_source=rule.random_source)
        return self.rescorer.draft(self.lattices, [context], self.p), context.drawn

    def place(self, before: Place, answer: tuple[np.ndarray, Drawn | None]) -> Place:
        return Place(before.tokens, before.accepted, answer[0][:, :, : self.read].tobytes())


@dataclass(frozen=True)
class Judging:
    """Asks for a verdict, by the arguments of `Rule.judge`."""

    arguments: tuple[Any, ...]

    def answer(self, rule: Sampling) -> Verdict:
        return rule.judge(*self.arguments)

    def place(self, before: Place, answer: Verdict) -> Place:
        row, n, choice = answer
        added = (*self.arguments[0][row, 1:n].tolist(), *([choice] if choice >= 0 else []))
        return Place((*before.tokens, *added), (*before.accepted, n))


class UnansweredError(Exception):
    """A decode asked more than was answered."""

    def __init__(self, question: Question) -> None:
        self.question = question


class Script:
    """Answers the questions of a decode with what was answered before."""

    def __init__(self, answers: Sequence[Any]) -> None:
        self._answers = iter(answers)

    def __call__(self, question: Question) -> Any:
        if (answer := next(self._answers, None)) is None:
            raise UnansweredError(question)
        return answer


class Scripted(Rule):
    """See `rescore.acceptance.rules.Rule`."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def first(self, logits: torch.Tensor) -> int:
        chosen: int = self.script(First(logits))
        return chosen

    def judge(self, *arguments: Any) -> Verdict:  # type: ignore[override]
        verdict: Verdict = self.script(Judging(arguments))
        return verdict


class ScriptedDraws(Draws):
    """See `rescore.rescorers.base.Rescorer`."""

    def __init__(self, inner: Draws, script: Script, tokens: int) -> None:
        self.inner, self.script, self.tokens = inner, script, tokens

    def draft(self, lattices: Lattice, contexts: Sequence[Context], p: int) -> np.ndarray:
        drafts: np.ndarray
        read = self.tokens - len(contexts[0].output_ids)
        drafts, contexts[0].drawn = self.script(Drawing(self.inner, lattices, p, read))
        return drafts


class Decodes:
    """Decodes of the prompt by one way of drafting, each from its rule's own random state."""

    def __init__(self, tiny: Tiny, way: Way, tokens: int) -> None:
        self.tiny, self.way, self.tokens = tiny, way, tokens
        self.generator: Generator | None = None
        if way.run:
            self.generator = Generator.of(
                tiny.base, tiny.heads, way.run, verify=way.verify, costs=costs_of(tiny), rule=Sampling()
            )
        self._known: dict[Place, Question | Decoded] = {}

    def whole(self, rule: Rule, script: Script | None = None) -> Decoded:
        """One from beginning to end."""
        if self.generator is None:
            return decode(self.tiny.base, None, PROMPT, max_new_tokens=self.tokens, rule=rule)
        one, rescorer = self.generator, self.generator.rescorer
        if script is not None and isinstance(rescorer, Draws):
            rescorer = ScriptedDraws(rescorer, script, self.tokens)
        return decode(
            one.base, one.heads, PROMPT, rescorer=rescorer, drafters=one.drafters, k=one.k, p=one.p,
            max_new_tokens=self.tokens, verify=one.verify, rule=rule,
        )  # fmt: skip

    def __call__(self, rule: Sampling) -> Decoded:
        """The same, from what is known of decodes that went the same way."""
        place, answers = Place(), list[Any]()
        while True:
            asked = self.asked(place, answers)
            if isinstance(asked, Decoded):
                return asked
            answers.append(asked.answer(rule))
            place = asked.place(place, answers[-1])

    def asked(self, place: Place, answers: Sequence[Any]) -> Question | Decoded:
        """What a decode asks at a place, to which these answers lead; the decode itself where it ends there."""
        if (known := self._known.get(place)) is None:
            script = Script(answers)
            try:
                known = self.whole(Scripted(script), script)
            except UnansweredError as stopped:
                known = stopped.question
            self._known[place] = known
        return known


# Rules that miss the law, in place of `try_candidates`
Tried = tuple[int | None, np.ndarray]
Slot = tuple[np.ndarray, np.ndarray] | None


class _Halved(RandomSource):
    """Accepts half as often as another."""

    def __init__(self, inner: RandomSource) -> None:
        self.inner = inner

    def accepts(self, p: float, q: float = 1.0) -> bool:
        return self.inner.accepts(p, 2 * q)


def _rejected(law: np.ndarray, candidates: Sequence[int]) -> Tried:
    """None is accepted; but the last one where nothing is left to draw from."""
    return (None, law) if law.sum() > 0 else (candidates[-1], law)


def accepts_half(law: np.ndarray, candidates: Sequence[int], source: RandomSource, drawn: Slot = None) -> Tried:
    """Accepts with p / 2."""
    accepted, law = try_candidates(law, candidates, _Halved(source), drawn)
    return _rejected(law, candidates) if accepted is None else (accepted, law)


def does_not_scale(law: np.ndarray, candidates: Sequence[int], source: RandomSource, drawn: Slot = None) -> Tried:
    """Leaves what is left as it is where a candidate is rejected."""
    law = law.copy()
    for token in candidates:
        if source.accepts(law[token]):
            return token, law
        law[token] = 0.0
    return _rejected(law, candidates)


def takes_nothing(law: np.ndarray, candidates: Sequence[int], source: RandomSource, drawn: Slot = None) -> Tried:
    """Leaves a rejected candidate its probability."""
    return next((token for token in candidates if source.accepts(law[token])), None), law


def takes_all(law: np.ndarray, candidates: Sequence[int], source: RandomSource, drawn: Slot = None) -> Tried:
    """Accepts drawn candidates with p / q, but takes rejected ones all of their probability, as given ones."""
    return _tried(law, candidates, source, drawn, takes_q=False)


def accepts_with_p(law: np.ndarray, candidates: Sequence[int], source: RandomSource, drawn: Slot = None) -> Tried:
    """Accepts drawn candidates with p, as given ones, but takes rejected ones no more than q."""
    return _tried(law, candidates, source, drawn, asks_q=False)


def keeps_siblings(law: np.ndarray, candidates: Sequence[int], source: RandomSource, drawn: Slot = None) -> Tried:
    """Goes on with the same q after a candidate that was drawn from it and rejected."""
    return _tried(law, candidates, source, drawn, removes=False)


def _tried(
    law: np.ndarray, candidates: Sequence[int], source: RandomSource, drawn: Slot, *,
    asks_q: bool = True, takes_q: bool = True, removes: bool = True,
) -> Tried:  # fmt: skip
    """The right rule for drawn candidates, but for what is left out."""
    assert drawn is not None
    law, q = law.copy(), np.zeros(len(law))
    q[drawn[0]] = drawn[1]
    for token in candidates:
        if source.accepts(law[token], q[token] if asks_q else 1.0):
            return token, law
        if takes_q:
            law = np.maximum(law - q, 0.0)
        else:
            law[token] = 0.0
        law /= law.sum() or 1.0
        if removes:
            q[token] = 0.0
            q /= q.sum() or 1.0
    return _rejected(law, candidates)


WRONG_RULES: dict[Callable[..., Tried], str] = {  # by the way of drafting that they are tried with
    accepts_half: "heads, tree of 4",
    does_not_scale: "heads, tree of 4",
    takes_nothing: "heads, tree of 4",
    takes_all: "draws, tree of 2",
    accepts_with_p: "draws, tree of 2",
    keeps_siblings: "draws, tree of 2",
}


class Remembered(Sampling):
    """See `rescore.acceptance.sampling.Sampling`: laws are computed once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._laws: dict[bytes, np.ndarray] = {}

    def law(self, logits: torch.Tensor) -> np.ndarray:
        key = logits.numpy().tobytes()
        if (law := self._laws.get(key)) is None:
            law = self._laws[key] = super().law(logits)
        return law


Output = tuple[int, ...]


def law_of(tiny: Tiny, rule: Sampling, tokens: int) -> dict[Output, float]:
    """The probability of every output, token by token without a cache."""
    law: dict[Output, float] = {}
    open_: list[tuple[Output, float]] = [((), 1.0)]
    while open_:
        output, share = open_.pop()
        if len(output) == tokens or (output and output[-1] in tiny.base.eos_token_ids):
            law[output] = share
            continue
        logits, _ = tiny.base.forward(torch.tensor([[*PROMPT, *output]]), last=1)
        open_ += [((*output, token), share * p) for token, p in enumerate(rule.law(logits[0, 0]).tolist()) if p > 0]
    return law


def distance(counts: Counter[Output], law: dict[Output, float]) -> float:
    """Total variation distance of frequencies from a law."""
    total = counts.total()
    return sum(abs(counts[key] / total - law.get(key, 0.0)) for key in {*counts, *law}) / 2


def apart(counts: Counter[Output], others: Counter[Output]) -> float:
    """Total variation distance of two samples."""
    total = others.total()
    return distance(counts, {output: times / total for output, times in others.items()})


def direct_sample(tiny: Tiny, tokens: int, draws: int, *, seed: int, **how: Any) -> Counter[Output]:
    """Outputs that transformers' `generate` samples."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(tiny.at("base"), dtype=torch.float64).eval()
    end, found = len(LETTERS), Counter[Output]()
    while (left := draws - found.total()) > 0:
        rows = torch.tensor([PROMPT]).expand(min(left, 5_000), -1)
        out = model.generate(
            rows, attention_mask=torch.ones_like(rows), do_sample=True, max_new_tokens=tokens, pad_token_id=end, **how
        )
        for row in out[:, len(PROMPT) :].tolist():
            found[tuple(row[: row.index(end) + 1] if end in row else row)] += 1
    return found


@dataclass
class Counted:
    """Outputs, and the steps that they took."""

    outputs: Counter[Output] = field(default_factory=Counter)
    steps: int = 0
    whole: int = 0  # decodes that were decoded whole besides
    differing: int = 0  # of these those that came out otherwise

    @property
    def block_efficiency(self) -> float:
        return sum(len(output) * count for output, count in self.outputs.items()) / self.steps


def count(decodes: Decodes, rule: Sampling, draws: int, whole: int = 0) -> Counted:
    """So many decodes."""
    counted = Counted()
    for draw in range(draws):
        decoded = decodes(rule.started(decodes.way.label, draw))
        counted.outputs[tuple(decoded.output_ids)] += 1
        counted.steps += len(decoded.accepted)
        if draw < whole:
            again = decodes.whole(rule.started(decodes.way.label, draw))
            counted.whole += 1
            counted.differing += (again.output_ids, again.accepted) != (decoded.output_ids, decoded.accepted)
    return counted
