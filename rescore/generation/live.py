"""Prompts decoded live, from text to text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

from lattices.errors import InvalidDataError, RescoreError, first_line
from lm.base.model import BaseLM
from lm.draft_vocabulary import find_draft_vocabulary
from lm.files import SHIPPED
from lm.heads.block_heads import BlockHeads
from lm.locks import warn
from rescore.acceptance import Rule
from rescore.acceptance.options import Acceptance
from rescore.acceptance.rules import check_rule
from rescore.accounting import block_efficiency
from rescore.checks import check_fits, check_new_tokens
from rescore.costs.kept import HeadsKey, check_costs, costs_here
from rescore.costs.table import Costs
from rescore.decoding import GREEDY, Decoded, decode
from rescore.drafters import HEADS, Drafter
from rescore.drafters.base import LatticeDrafter, is_lattice_alone
from rescore.drafters.heads import Heads
from rescore.generation.growing_text import GrowingText
from rescore.options import Spec
from rescore.rescorers import JOINT, Rescorer, Target
from rescore.rescorers.joint_plan import AUTO, PLANNED_NODES
from rescore.runs.inputs import Inputs
from rescore.runs.records import Seconds
from rescore.runs.run import DEFAULT_K, NODES, NONE, ORACLE, Run, runs_of
from rescore.runs.weights import fitted_to

Messages = Sequence[Mapping[str, str]]  # a conversation: {"role": ..., "content": ...} a message
Accepted = Callable[[list[int]], bool]  # takes the tokens of a step; whether the output goes on
LOOKUP = "lookup"
FEWER = 8192  # tokens that heads draft from where nothing else is said
OF_LATTICES = ("context-ngram", "context-ngram:none")  # of what is shipped, the best that a base can have


@dataclass(frozen=True)
class Output:
    """What `generate` gives.

    text: of the output, special tokens left out; token_ids: with end-of-text, where it came, and up to the token that
        completed a stop string, where one did.
    accepted: tokens accepted by each step.
    seconds: of the whole decode, the prompt included; parts: where they went.
    verify: how drafts were verified, tree or batch; rescorer: the label of what chose them.
    acceptance: the rule by which tokens came about, or how they were drawn; lossy: it is not the base's output.
    ended: by end-of-text (`end`), a stop string (`stop`) or the limit of tokens (`length`).
    """

    text: str
    token_ids: list[int]
    accepted: list[int]
    seconds: float
    verify: str
    parts: Seconds = field(default_factory=Seconds)
    ended: Literal["end", "stop", "length"] = "length"
    rescorer: str = NONE
    acceptance: str = GREEDY.name
    lossy: bool = False

    @property
    def block_efficiency(self) -> float:
        """Tokens a step."""
        return block_efficiency([self.accepted])

    @property
    def tokens_per_second(self) -> float:
        """Of the whole decode, the prompt included."""
        return len(self.token_ids) / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        rates = {"block_efficiency": self.block_efficiency, "tokens_per_second": self.tokens_per_second}
        return asdict(self) | rates

    @property
    def _of_rule(self) -> str:
        """Whose text it is, where it is not greedy decoding's."""
        if self.lossy:
            return f" (lossy acceptance: {self.acceptance}; the text is not the base's own, and nothing scores it)"
        return "" if self.acceptance == GREEDY.name else f" (drawn: {self.acceptance})"

    def line(self) -> str:
        """Its statistics, in words."""
        parts = self.parts
        times = {"prompt": parts.prefill, "verify": parts.verify, "draft": parts.draft, "rescore": parts.rescore}
        return (
            f"{len(self.token_ids)} tokens in {self.seconds:.2f} s ({self.tokens_per_second:.1f} tokens/s), "
            f"{len(self.accepted)} steps of {self.block_efficiency:.2f} tokens by {self.rescorer}"
            f"{self._of_rule}; " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items())
        )


@dataclass(frozen=True)
class Generator:
    """A base LM with its drafters and rescorer, loaded and fitted once for many prompts.

    heads: None where no drafter is `heads`. label: of the run.

    For one thread at a time, as is its base LM (`lm.base.model.BaseLM`): give each thread a base and a generator of its
    own, or have them take turns with a lock.
    """

    base: BaseLM
    heads: BlockHeads | None
    rescorer: Rescorer
    drafters: tuple[Drafter, ...]
    p: int
    k: int
    verify: str
    label: str
    rule: Rule = GREEDY

    @classmethod
    def of(
        cls,
        base: BaseLM,
        heads: BlockHeads | None,
        rescorer: str | Run | Rescorer | None = None,
        *,
        verify: str = "tree",
        costs: Costs | None = None,
        inputs: Inputs | None = None,
        rule: Rule = GREEDY,
    ) -> Self:
        """Arguments as for `generate`; costs: of this base and these heads, for a rescorer that drafts by them (None:
        those measured on this machine, for which `inputs` has the models as the user named them).

        Raises `RescoreError` for what can't be decoded with, `IncompatibleError` for costs of other models.
        """
        run = runs_of([rescorer])[0] if rescorer else best_run(base, heads)
        if run.rescorer == ORACLE:
            raise RescoreError("the oracle must know the output beforehand; it can be evaluated, not generated with")
        loaded = run.load()
        drafters = run.load_drafters(loaded)
        if heads is None and any(isinstance(drafter, Heads) for drafter in drafters):
            raise RescoreError(
                f"{run.label} drafts with block heads, and there are none for {base.identity.name}; give heads, or "
                "other drafters (--drafter lookup)"
            )
        check_rule(rule, run.label, draws=loaded.random, lattices_only=is_lattice_alone(drafters))
        if costs is not None:
            check_costs(costs, "the output", base.identity, _heads_key(heads, drafters))
        elif loaded.plans:
            costs = _costs(base, heads, drafters, inputs)
        fitted, drafters = fitted_to(_target(base, costs=costs), {"": (loaded, drafters)})[""]
        if run.alpha is not None:
            if fitted.alpha is None:
                raise RescoreError(f"the rescorer {run.label} has no weight; drop alpha")
            if run.number is None:
                raise RescoreError("a weight is tuned for a task, and a prompt is of none; give alpha as a number")
            fitted = fitted.weighted(run.number)
        return cls(base, heads, fitted, drafters, run.p, run.k, verify, run.label, rule)

    def under(self, rule: Rule) -> Self:
        """The same with another rule. Raises `RescoreError` for one that can't judge its drafts."""
        check_rule(rule, self.label, draws=self.rescorer.random, lattices_only=is_lattice_alone(self.drafters))
        return replace(self, rule=rule)

    def decode(self, prompt_ids: Sequence[int], max_new_tokens: int, accepted: Accepted | None = None) -> Decoded:
        """From tokens to tokens; see `rescore.decoding.decode`. What is drawn follows from the seed and the prompt."""
        return decode(
            self.base, self.heads, prompt_ids, rescorer=self.rescorer, drafters=self.drafters, k=self.k, p=self.p,
            max_new_tokens=max_new_tokens, verify=self.verify, accepted=accepted, rule=self.rule.started(*prompt_ids),
        )  # fmt: skip

    def generate(
        self,
        prompt: str | Messages,
        *,
        max_new_tokens: int = 64,
        stop: Sequence[str] = (),
        chat: bool | None = None,
        stream: Callable[[str], object] | None = None,
    ) -> Output:
        """Arguments as for `generate`. Raises `RescoreError`."""
        check_new_tokens(max_new_tokens)
        stop = [stop] if isinstance(stop, str) else stop
        if not all(stop):
            raise RescoreError("a stop string is empty; give it some text, or leave it out")
        prompt_ids = encoded(self.base, prompt, chat)
        check_fits(self.base, len(prompt_ids), max_new_tokens, shorter="give a shorter one")
        text = GrowingText(self.base, stop, stream)
        watched = text.accepted if stop or stream is not None else None
        decoded = self.decode(prompt_ids, max_new_tokens, watched)
        if watched is None:
            text.token_ids = decoded.output_ids
        decoded.cut(len(text.token_ids))  # what came after a stop counts for nothing
        whole = text.finished()
        at_end = text.token_ids[-1] in self.base.eos_token_ids
        return Output(
            text=whole,
            token_ids=text.token_ids,
            accepted=decoded.accepted,
            seconds=decoded.seconds.prefill + decoded.seconds.total,
            verify=decoded.verify,
            parts=decoded.seconds,
            ended="stop" if text.stopped else "end" if at_end else "length",
            rescorer=self.label,
            acceptance=self.rule.name,
            lossy=self.rule.lossy,
        )


def generate(
    base: BaseLM,
    heads: BlockHeads | None,
    prompt: str | Messages,
    *,
    rescorer: str | Run | Rescorer | None = None,
    max_new_tokens: int = 64,
    verify: str = "tree",
    chat: bool | None = None,
    stop: Sequence[str] = (),
    stream: Callable[[str], object] | None = None,
    acceptance: str = GREEDY.name,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Output:
    """Decodes a prompt in blocks; the text is greedy decoding's own, whatever drafts it, or with a temperature has the
    law of sampling. For many prompts make a `Generator` once. One thread at a time may use a base LM (`Generator`).

    heads: None where no drafter is `heads`.
    prompt: text, or the messages of a conversation, `{"role": ..., "content": ...}` each.
    rescorer: its spec, an object, or a `Run` with drafters, p, k and weight; the spec of a drafter: its own drafts.
        None: the best that the base has (`best_run`).
    chat: whether a text goes through the base's chat template (None: where it has one).
    stop: the text is cut before the first of these; no more is decoded than it takes to see it.
    stream: takes pieces of the text as they are settled, never half a character or what may begin a stop string;
        together they are the text.
    temperature: above 0: the output is drawn, with top_k and top_p as transformers has them, by the seed.
    acceptance: the spec of a lossy rule (`rescore.acceptance.lossy`), whose output is not the base's.
    Raises `RescoreError` for what can't be decoded.
    """
    rule = Acceptance(Spec(acceptance), temperature, top_k, top_p, seed).rule()
    generator = Generator.of(base, heads, rescorer, verify=verify, rule=rule)
    return generator.generate(prompt, max_new_tokens=max_new_tokens, stop=stop, chat=chat, stream=stream)


def best_run(
    base: BaseLM,
    heads: BlockHeads | None,
    *,
    drafters: Sequence[str | Drafter] = (),
    nodes: int | Literal["auto"] | None = None,
    k: int = DEFAULT_K,
    p: int | None = None,
    inputs: Inputs | None = None,
) -> Run:
    """The run that generates where no rescorer is named: `joint` where weights for these drafters are shipped with the
    base's name (by its costs where they are measured here and no p is given), else `context-ngram` where there are
    lattices (with the shipped n-gram model if it is of this tokenizer), else the drafters' own drafts.

    drafters: none: heads if there are some, which draft from `FEWER` tokens where it is known which come most often
    (cheaper, and hardly less is accepted), and lookup. nodes: of trees, which are `joint`'s (`runs_of`). k, p: as for
    `Run`; None: one draft, or of a tree all that it has. inputs: as for `costs_here`. Raises as `Run` and its
    `load_drafters`.
    """
    own = Run(
        NONE, drafters=tuple(drafters or _own_drafters(base, heads)), label="drafts", k=k, p=1 if p is None else p
    )
    objects = own.load_drafters(own.load())
    if nodes is not None:
        return runs_of([JOINT], drafters=own.drafters, nodes=nodes, ks=[k], ps=[] if p is None else [p])[0]
    lattices = any(isinstance(drafter, LatticeDrafter) for drafter in objects)
    shipped = (SHIPPED / base.identity.name / JOINT).is_dir()
    specs = [(f"{JOINT}:{NODES}={AUTO}", PLANNED_NODES)] if shipped and own.p == 1 else []
    specs += [(spec, own.p) for spec in ((JOINT,) if shipped else ()) + (OF_LATTICES if lattices else ())]
    for spec, drafts in specs:
        run = Run(spec, drafters=own.drafters, k=k, p=drafts)
        try:
            loaded = run.load()
            costs = _costs(base, heads, objects, inputs) if loaded.plans else None
            loaded.fit(_target(base, costs=costs, sources=tuple(drafter.source for drafter in objects)))
        except InvalidDataError as error:
            warn(f"{spec} is left out: {first_line(error)}")
            continue
        except RescoreError:  # of another tokenizer, fitted for other drafters, or without costs
            continue
        return run
    return Run(NONE, drafters=own.drafters, label="+".join(drafter.name for drafter in objects), k=k, p=own.p)


def _own_drafters(base: BaseLM, heads: BlockHeads | None) -> tuple[str, ...]:
    if heads is None:
        return (LOOKUP,)
    try:
        find_draft_vocabulary("", tokenizer_sha256=base.identity.tokenizer_sha256, base=base.identity.name)
    except RescoreError:
        return (HEADS, LOOKUP)
    return (f"{HEADS}:vocabulary={FEWER}" if heads.projection is None and base.vocab_size > FEWER else HEADS, LOOKUP)


def _target(base: BaseLM, **more: Any) -> Target:
    target = Target.of(base.identity, base.vocab_size, base.eos_token_ids, device=str(base.device), shared=base)
    return replace(target, **more)


def _costs(base: BaseLM, heads: BlockHeads | None, drafters: Sequence[Drafter], inputs: Inputs | None = None) -> Costs:
    """Those measured on this machine, with the heads if they are among the drafters."""
    key = _heads_key(heads, drafters)
    return costs_here(base.identity, key, str(base.device), compiles=base.compiles, inputs=inputs)


def _heads_key(heads: BlockHeads | None, drafters: Sequence[Drafter]) -> HeadsKey | None:
    asked = heads is not None and any(isinstance(drafter, Heads) for drafter in drafters)
    return (heads.sha256, heads.h) if heads and asked else None


def encoded(base: BaseLM, prompt: str | Messages, chat: bool | None = None) -> list[int]:
    """Token ids of a prompt; arguments as for `generate`. Raises `RescoreError`."""
    if isinstance(prompt, str):
        return base.encode_prompt(prompt, chat=base.is_chat if chat is None else chat)
    if chat is False:
        raise RescoreError("messages go through the chat template; give the prompt as text to go without")
    check_messages(prompt)
    return base.encode_messages(prompt)


def check_messages(messages: Any, where: str = "messages") -> None:
    """Raises `RescoreError` for what is no conversation; `where` names it."""
    fine = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not fine or not messages or not all(map(_is_message, messages)):
        raise RescoreError(f'{where}: give a list of {{"role": ..., "content": ...}}, both of them text')


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(name), str) for name in ("role", "content"))
